// What runs beside the threads: each operation lands at a moment drawn from the seed.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "clock.h"
#include "memory.h"

namespace fusewright::emulation {

struct Block;
struct Thread;

struct AsyncOperation {
  std::string name;
  Block* block = nullptr;
  int agent = 0;
  Time time = 0;
  bool async_proxy = true;
  bool may_outlive_block = false;  // it reads no shared memory any more
  Knowledge knowledge;             // of those that issued it
  std::function<void(const AsyncOperation&)> run;

  Observer observer() const { return {agent, time, async_proxy, false, &knowledge}; }
  // What whoever waits for its end acquires.
  Knowledge released() const {
    Knowledge result = knowledge.copy();
    result.times()[agent] = time;
    result.async_times()[agent] = time;
    return result;
  }
};

struct Mbarrier {
  int expected = 0;  // arrivals of a phase
  int pending = 0;
  int64_t bytes = 0;  // expected and not yet landed
  uint32_t phase = 0;
  Knowledge arriving;   // of those that arrived in this phase
  Knowledge completed;  // of the last phase
  int initialiser = 0;
  Time initialised = 0;
  bool fenced = false;        // fence.mbarrier_init by the thread that initialised it
  std::vector<int> arrivals;  // agents, in this phase
};

// Copies of one thread that it waits for together.
struct BulkGroup {
  int in_flight = 0;
  int reading = 0;  // shared memory
  bool known_to_have_read = false;
  Knowledge read, landed;

  void finish_reading(const AsyncOperation& operation) {
    --reading;
    add(operation, read);
  }
  void land(const AsyncOperation& operation) {
    --in_flight;
    add(operation, landed);
  }

 private:
  static void add(const AsyncOperation& operation, Knowledge& known) {
    if (known.empty()) {
      known = operation.released();
    } else {
      known.join(operation.released());
    }
  }
};

// Slots for asynchronous copies among the agents; behind them come the warps' products. An operation that lands while
// others of its slot are still known about would be mistaken for them, so there are many.
constexpr int async_slots = 128;

class Asynchronous {
 public:
  void start_clusters(int threads, int warps);

  // An operation of the current thread, with what it knows now.
  AsyncOperation issue(const std::string& name);
  void stamp(AsyncOperation& operation);
  // The stamps of the part of a product that is a warp's. They end in order, so one agent stands for all.
  void stamp_product(AsyncOperation& operation, int warp);
  void add(AsyncOperation operation) { pending_.push_back(std::move(operation)); }

  size_t pending() const { return pending_.size(); }
  void land(size_t index);

  std::string name_of_agent(int agent) const {
    return agent < threads_ + async_slots ? names_[agent - threads_] : "a wgmma";
  }
  std::map<const uint64_t*, Mbarrier>& mbarriers() { return mbarriers_; }
  // What the threads have left behind, empty if nothing. Writes to global memory may still land.
  std::string finish();

 private:
  int threads_ = 0;
  int next_slot_ = 0;
  std::array<Time, async_slots> times_ = {};
  std::vector<Time> product_times_;  // of each warp
  std::array<std::string, async_slots> names_;
  std::vector<AsyncOperation> pending_;
  std::map<const uint64_t*, Mbarrier> mbarriers_;
};

// The group of copies that the thread issues now, with one more in flight.
std::shared_ptr<BulkGroup> open_bulk_group(Thread& thread);
// The current thread waits until at most `pending` of its groups, the newest, have not landed.
void wait_for_groups(std::vector<std::shared_ptr<BulkGroup>>& groups, int pending, const void* pc);
// The phase is over if all have arrived and all bytes have landed.
void complete_phase_if_over(Mbarrier& barrier);
// Fails unless the mbarrier is there and visible to copies; takes the bytes of a copy that has landed off it.
void check_usable_by_copies(const uint64_t* barrier, const void* pc);
void land_at(const uint64_t* barrier, const AsyncOperation& operation, int bytes);
// "mbarrier at byte 8 of ..., phase 3, ...".
std::string describe_mbarrier(const uint64_t* barrier);

}  // namespace fusewright::emulation
