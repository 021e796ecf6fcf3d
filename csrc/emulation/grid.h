// The threads that run together: the blocks of one or several clusters or of a cooperative launch, and the scheduler
// that chooses whose turn it is.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "asynchronous.h"
#include "clock.h"
#include "emulation/execution.h"
#include "fiber.h"
#include "memory.h"
#include "random.h"
#include "shared_memory.h"
#include "warp_collective.h"
#include "wgmma.h"

namespace fusewright::emulation {

constexpr int warp_size = 32;
constexpr int named_barriers = 16;
constexpr size_t stack_bytes = 128 * 1024;

// What a parked thread waits for, for the report of a deadlock.
struct Wait {
  enum class Kind {
    nothing,
    block_barrier,
    named_barrier,
    cluster_barrier,
    turn,
    warp_collective,
    mbarrier,
    bulk_group,
    wgmma,
    epoch
  } kind = Kind::nothing;
  int barrier = 0;    // its number
  unsigned mask = 0;  // of lanes
  const uint64_t* mbarrier = nullptr;
  int parity = 0;
  const void* pc = nullptr;
  const uint32_t* word = nullptr;
  uint32_t epoch = 0;
};

struct Block;

struct Thread {
  Fiber fiber;
  Clock clock;  // its agent is the thread's number in the run
  uint3 index;
  Block* block = nullptr;
  int number_in_block = 0;
  int warp = 0;  // in the run
  int lane = 0;
  bool exited = false;
  uintptr_t stack = 0;
  uint64_t received = 0;  // what a warp collective gave it
  Wait wait;
  std::vector<std::shared_ptr<BulkGroup>> bulk_groups;  // committed, the oldest first
  std::shared_ptr<BulkGroup> open_bulk_group;
  std::vector<std::shared_ptr<BulkGroup>> copy_groups;  // of cp.async
  std::shared_ptr<BulkGroup> open_copy_group;
  WgmmaThread wgmma;
  std::array<uint32_t, named_barriers> arrived_in;  // the generation of each barrier, see NamedBarrier
};

struct NamedBarrier {
  uint32_t generation = 1;
  int expected = 0;  // 0: all threads of the block that have not exited
  int arrived = 0;
  Knowledge knowledge;    // of those that arrived
  Knowledge last_joined;  // to join it once only: threads that left a barrier together share theirs
  std::vector<Thread*> waiting;
};

struct Block {
  uint3 index;
  int threads = 0;
  int live_threads = 0;
  int rank = 0;  // in the cluster
  int cluster = 0;
  SharedMemory shared;
  std::array<NamedBarrier, named_barriers> barriers;
};

struct Cluster {
  int live_threads = 0;
  // Of their barrier.
  int arrived = 0;
  Knowledge knowledge;
  std::vector<Thread*> waiting;
};

struct Warp {
  Block* block = nullptr;
  Thread* first = nullptr;
  int lanes = 0;
  uint32_t runnable = 0;
  uint32_t exited = 0;
  uint32_t priority = 0;
  int elected = 0;  // the lane that elect.sync chooses
  std::vector<WarpCollective> collectives;
};

// Ends the run with a report. In a thread of a kernel it goes to the scheduler for good, elsewhere it throws.
struct Failure {};

class Grid {
 public:
  // One launch, `together` clusters of blocks after the others in an order drawn from the seed; a cooperative launch is
  // run as one cluster. False: see report().
  bool run(const LaunchShape& shape, int together, const std::string& kernel, void (*run)(const void*),
           const void* arguments, size_t arguments_bytes, uint64_t seed);
  const std::string& report() const { return report_; }

  bool in_kernel() const { return current_ != nullptr; }
  Thread& current() { return *current_; }
  Warp& warp(int number) { return warps_[number]; }
  Warpgroup& warpgroup(int number) { return warpgroups_[number]; }
  std::vector<std::unique_ptr<Block>>& blocks() { return blocks_; }
  int running_blocks() const { return static_cast<int>(clusters_.size()) * blocks_of_cluster_; }
  int blocks_of_cluster() const { return blocks_of_cluster_; }
  // Of the current thread's cluster.
  Cluster& cluster() { return clusters_[current_->block->cluster]; }
  Block& block_of_cluster(int rank) { return *blocks_[current_->block->cluster * blocks_of_cluster_ + rank]; }
  Knowledge& turn_knowledge(const int* turns) { return turns_[turns]; }
  Asynchronous& asynchronous() { return asynchronous_; }
  // What the publishers of words knew, see publish_epoch.
  std::map<const uint32_t*, Knowledge>& published() { return published_; }
  Warp& warp_of(const Thread& thread) { return warps_[thread.warp]; }

  // The current thread waits until make_runnable; others go on.
  void park(const Wait& wait);
  void make_runnable(Thread& thread);
  // The current thread waits until `ready`, which is asked again after each asynchronous event.
  void wait_until(const std::function<bool()>& ready, const Wait& wait);
  void wake_waiting();
  // Lets others go first, now and then: before what others can see.
  void maybe_yield();
  [[noreturn]] void fail(const std::string& what, const void* pc);

  Knowledge no_knowledge() const { return Knowledge(agents_); }

  // An access by the current thread.
  void check_access(const void* address, size_t bytes, Access access, const void* pc);
  void check_async_access(const AsyncOperation& operation, const void* address, size_t bytes, Access access,
                          const void* pc);
  std::string describe_shared(const void* address) const;
  GlobalMemory& global_memory() { return global_memory_; }
  AccessChecker& checker() { return checker_; }

 private:
  void start_clusters(const LaunchShape& shape, const std::vector<uint3>& first_blocks);
  void run_clusters();
  Thread* choose();
  bool land_before(const Thread* thread);
  void resume(Thread& thread);
  static void thread_main();
  void exit_thread();
  std::string name_of(const Thread& thread) const;
  std::string name_of_agent(int agent) const;
  std::string describe_deadlock() const;
  bool is_constant(uintptr_t address, size_t bytes);

  Fiber scheduler_;
  Thread* current_ = nullptr;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Warpgroup> warpgroups_;
  struct Waiting {
    Thread* thread;
    const std::function<bool()>* ready;
  };
  std::vector<Waiting> waiting_;
  Asynchronous asynchronous_;
  std::map<const uint32_t*, Knowledge> published_;
  int blocks_of_cluster_ = 0;
  std::vector<Cluster> clusters_;  // those running; theirs are the first of blocks_, which is never made shorter
  std::map<const int*, Knowledge> turns_;
  int live_threads_ = 0;
  int agents_ = 0;
  enum class Landing { early, late, any } landing_ = Landing::any;
  bool one_warp_ahead_ = false;  // the schedule prefers warps by priority, and so lets others lag behind

  std::string kernel_;
  void (*run_)(const void*) = nullptr;
  const void* arguments_ = nullptr;
  size_t arguments_bytes_ = 0;
  Random random_{0};
  std::string report_;
  bool failed_ = false;

  unsigned char* stacks_ = nullptr;
  size_t stacks_count_ = 0;
  GlobalMemory global_memory_;
  AccessChecker checker_;
  struct Range {
    uintptr_t begin, end;
  };
  std::vector<Range> constants_;  // segments of loaded libraries that were read
};

extern Grid grid;

// Threads leave the barrier that the departure of another completes.
void complete_barriers_without(Block& block);
void complete_cluster_barrier(Cluster& cluster);
// The running block whose shared memory an address lies in, or nullptr.
Block* block_of(uintptr_t address);
void check_no_collective_waits_for(Thread& thread);
std::string describe(const Wait& wait, const Thread& thread);
std::string describe_epoch(const Wait& wait);
std::string describe_collective(unsigned mask, const Warp& warp);
// " [library+0x123]", for addr2line.
std::string describe_code(const void* pc);

}  // namespace fusewright::emulation
