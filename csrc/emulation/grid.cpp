#include "grid.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <numeric>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fusewright::emulation {
namespace {

constexpr size_t guard_bytes = 4096;

unsigned count(const dim3& size) { return size.x * size.y * size.z; }

uint3 index_in(const dim3& size, unsigned number) {
  return {number % size.x, number / size.x % size.y, number / size.x / size.y};
}

std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

}  // namespace

Grid grid;

bool Grid::run(const LaunchShape& launched, int together, const std::string& kernel, void (*run)(const void*),
               const void* arguments, size_t arguments_bytes, uint64_t seed) {
  LaunchShape shape = launched;
  if (shape.cooperative) shape.cluster = shape.grid;
  kernel_ = kernel;
  run_ = run;
  arguments_ = arguments;
  arguments_bytes_ = arguments_bytes;
  random_ = Random(seed);
  report_.clear();
  failed_ = false;
  checker_.begin_launch();
  blockDim = shape.block;
  gridDim = shape.grid;

  // Clusters tile the grid; the launch has checked that they do.
  const dim3 clusters(shape.grid.x / shape.cluster.x, shape.grid.y / shape.cluster.y, shape.grid.z / shape.cluster.z);
  std::vector<unsigned> order(count(clusters));
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_.below(static_cast<uint32_t>(i))]);
  for (size_t next = 0; next < order.size(); next += together) {
    std::vector<uint3> firsts;
    for (size_t i = next; i < std::min(next + together, order.size()); ++i) {
      const uint3 first = index_in(clusters, order[i]);
      firsts.push_back({first.x * shape.cluster.x, first.y * shape.cluster.y, first.z * shape.cluster.z});
    }
    try {
      start_clusters(shape, firsts);
      run_clusters();
    } catch (const Failure&) {
    }
    current_ = nullptr;
    if (failed_) return false;
  }
  return true;
}

void Grid::start_clusters(const LaunchShape& shape, const std::vector<uint3>& first_blocks) {
  blocks_of_cluster_ = static_cast<int>(count(shape.cluster));
  const int blocks = blocks_of_cluster_ * static_cast<int>(first_blocks.size());
  const int threads_of_block = static_cast<int>(count(shape.block));
  const int warps_of_block = (threads_of_block + warp_size - 1) / warp_size;
  checker_.begin_run();
  live_threads_ = blocks * threads_of_block;
  agents_ = live_threads_ + async_slots + blocks * warps_of_block;
  one_warp_ahead_ = random_.below(2) == 0;
  landing_ = static_cast<Landing>(random_.below(3));
  asynchronous_.start_clusters(live_threads_, blocks * warps_of_block);
  waiting_.clear();
  clusters_.assign(first_blocks.size(), Cluster());
  for (Cluster& cluster : clusters_) cluster.live_threads = blocks_of_cluster_ * threads_of_block;
  turns_.clear();
  published_.clear();
  while (static_cast<int>(blocks_.size()) < blocks) blocks_.push_back(std::make_unique<Block>());
  threads_.resize(live_threads_);
  warps_.resize(blocks * warps_of_block);
  warpgroups_.assign((warps_.size() + 3) / 4, Warpgroup());
  if (stacks_count_ < threads_.size()) {
    if (stacks_ != nullptr) munmap(stacks_, stacks_count_ * stack_bytes);
    stacks_count_ = threads_.size();
    void* pages = mmap(nullptr, stacks_count_ * stack_bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    stacks_ = static_cast<unsigned char*>(pages);
    for (size_t i = 0; i < stacks_count_; ++i) mprotect(stacks_ + i * stack_bytes, guard_bytes, PROT_NONE);
  }

  const Knowledge origin = no_knowledge();
  for (int b = 0; b < blocks; ++b) {
    Block& block = *blocks_[b];
    block.cluster = b / blocks_of_cluster_;
    block.rank = b % blocks_of_cluster_;
    const uint3 first_block = first_blocks[block.cluster], offset = index_in(shape.cluster, block.rank);
    block.index = {first_block.x + offset.x, first_block.y + offset.y, first_block.z + offset.z};
    block.threads = threads_of_block;
    block.live_threads = threads_of_block;
    block.shared.start_block(shape.dynamic_shared_bytes);
    block.barriers.fill(NamedBarrier());
    for (int w = 0; w < warps_of_block; ++w) {
      Warp& warp = warps_[b * warps_of_block + w];
      warp = Warp();
      warp.block = &block;
      warp.first = &threads_[b * threads_of_block + w * warp_size];
      warp.lanes = std::min(warp_size, threads_of_block - w * warp_size);
      warp.runnable = warp.lanes == warp_size ? 0xFFFFFFFFu : (1u << warp.lanes) - 1;
      warp.exited = ~warp.runnable;
      warp.priority = static_cast<uint32_t>(random_.next());
      warp.elected = static_cast<int>(random_.below(warp.lanes));
    }
    for (int t = 0; t < threads_of_block; ++t) {
      const int number = b * threads_of_block + t;
      Thread& thread = threads_[number];
      thread.clock.start(number, origin);
      thread.index = index_in(shape.block, t);
      thread.block = &block;
      thread.number_in_block = t;
      thread.warp = b * warps_of_block + t / warp_size;
      thread.lane = t % warp_size;
      thread.exited = false;
      thread.wait = Wait();
      thread.bulk_groups.clear();
      thread.open_bulk_group.reset();
      thread.copy_groups.clear();
      thread.open_copy_group.reset();
      thread.wgmma = WgmmaThread();
      thread.arrived_in.fill(0);
      thread.stack = reinterpret_cast<uintptr_t>(stacks_ + number * stack_bytes);
      thread.fiber.start(stacks_ + number * stack_bytes, stack_bytes, thread_main);
    }
  }
}

void Grid::run_clusters() {
  while (live_threads_ > 0) {
    Thread* thread = choose();
    if (land_before(thread)) {
      asynchronous_.land(random_.below(static_cast<uint32_t>(asynchronous_.pending())));
      continue;
    }
    if (thread == nullptr) fail("deadlock\n" + describe_deadlock(), nullptr);
    resume(*thread);
    if (failed_) throw Failure();
  }
  const std::string unfinished = asynchronous_.finish();
  if (!unfinished.empty()) fail(unfinished, nullptr);
}

bool Grid::land_before(const Thread* thread) {
  if (asynchronous_.pending() == 0) return false;
  if (thread == nullptr || landing_ == Landing::early) return true;
  return landing_ == Landing::any && random_.below(8) == 0;
}

// A warp, then a lane of it. Where one warp is ahead it goes on as long as it can, and the order changes now and then.
Thread* Grid::choose() {
  Warp* chosen = nullptr;
  uint32_t seen = 0;
  for (Warp& warp : warps_) {
    if (warp.runnable == 0) continue;
    ++seen;
    if (one_warp_ahead_ ? chosen == nullptr || warp.priority > chosen->priority : random_.below(seen) == 0) {
      chosen = &warp;
    }
  }
  if (chosen == nullptr) return nullptr;
  if (one_warp_ahead_ && random_.below(64) == 0) chosen->priority = static_cast<uint32_t>(random_.next());
  const int start = static_cast<int>(random_.below(warp_size));
  const uint32_t rotated = chosen->runnable >> start | (start == 0 ? 0 : chosen->runnable << (warp_size - start));
  return chosen->first + (start + __builtin_ctz(rotated)) % warp_size;
}

void Grid::resume(Thread& thread) {
  current_ = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  scheduler_.switch_to(thread.fiber);
  current_ = nullptr;
}

void Grid::thread_main() {
  grid.run_(grid.arguments_);
  grid.exit_thread();
}

void Grid::exit_thread() {
  Thread& thread = *current_;
  Warp& warp = warp_of(thread);
  const bool all_read = std::all_of(thread.bulk_groups.begin(), thread.bulk_groups.end(),
                                    [](const auto& group) { return group->known_to_have_read; });
  if (!all_read || thread.open_bulk_group != nullptr) {
    fail("exits without waiting for its bulk copies out of shared memory", nullptr);
  }
  if (thread.wgmma.waited < thread.wgmma.issued) fail("exits without waiting for its wgmma", nullptr);
  thread.exited = true;
  warp.runnable &= ~(1u << thread.lane);
  warp.exited |= 1u << thread.lane;
  --live_threads_;
  --thread.block->live_threads;
  Cluster& cluster = clusters_[thread.block->cluster];
  --cluster.live_threads;
  check_no_collective_waits_for(thread);
  complete_barriers_without(*thread.block);
  if (cluster.arrived > 0 && cluster.arrived >= cluster.live_threads) complete_cluster_barrier(cluster);
  thread.fiber.switch_to(scheduler_);
}

void Grid::park(const Wait& wait) {
  Thread& thread = *current_;
  thread.wait = wait;
  warp_of(thread).runnable &= ~(1u << thread.lane);
  thread.fiber.switch_to(scheduler_);
  thread.wait = Wait();
}

void Grid::wait_until(const std::function<bool()>& ready, const Wait& wait) {
  while (!ready()) {
    waiting_.push_back({current_, &ready});
    park(wait);
  }
}

void Grid::wake_waiting() {
  std::erase_if(waiting_, [&](const Waiting& waiting) {
    if (!(*waiting.ready)()) return false;
    make_runnable(*waiting.thread);
    return true;
  });
}

void Grid::make_runnable(Thread& thread) { warp_of(thread).runnable |= 1u << thread.lane; }

void Grid::maybe_yield() {
  if (random_.below(4) == 0) current_->fiber.switch_to(scheduler_);
}

std::string Grid::name_of(const Thread& thread) const {
  return "thread " + text(thread.index) + " of block " + text(thread.block->index);
}

std::string Grid::name_of_agent(int agent) const {
  return agent < static_cast<int>(threads_.size()) ? name_of(threads_[agent]) : asynchronous_.name_of_agent(agent);
}

void Grid::fail(const std::string& what, const void* pc) {
  failed_ = true;
  report_ = kernel_ + ": ";
  if (current_ != nullptr) report_ += name_of(*current_) + ": ";
  report_ += what + describe_code(pc);
  if (current_ == nullptr) throw Failure();
  for (;;) current_->fiber.switch_to(scheduler_);
}

std::string Grid::describe_deadlock() const {
  std::string report;
  for (const Warp& warp : warps_) {
    for (int lane = 0; lane < warp.lanes;) {
      const Thread& thread = warp.first[lane];
      int last = lane;
      const std::string waits = thread.exited ? "" : describe(thread.wait, thread);
      while (last + 1 < warp.lanes && warp.first[last + 1].exited == thread.exited &&
             (thread.exited || describe(warp.first[last + 1].wait, warp.first[last + 1]) == waits)) {
        ++last;
      }
      if (!thread.exited) {
        report += "  block " + text(thread.block->index) + " warp " +
                  std::to_string(thread.number_in_block / warp_size) + " lanes " + std::to_string(lane) + "-" +
                  std::to_string(last) + ": " + waits + "\n";
      }
      lane = last + 1;
    }
  }
  return report;
}

}  // namespace fusewright::emulation
