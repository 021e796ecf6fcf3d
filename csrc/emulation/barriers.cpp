// Barriers of a block, __syncthreads and the numbered ones; of a cluster; turns of blocks.

#include <utility>

#include "grid.h"

namespace fusewright::emulation {
namespace {

void complete(NamedBarrier& barrier) {
  for (Thread* thread : barrier.waiting) {
    thread->clock.become(barrier.knowledge);
    grid.make_runnable(*thread);
  }
  barrier.waiting.clear();
  barrier.knowledge = Knowledge();
  barrier.last_joined = Knowledge();
  barrier.arrived = 0;
  ++barrier.generation;
}

void complete_if_all_arrived(Block& block, NamedBarrier& barrier) {
  const int expected = barrier.expected == 0 ? block.live_threads : barrier.expected;
  if (barrier.arrived > 0 && barrier.arrived >= expected) complete(barrier);
}

void arrive(int number, int expected, bool wait, const void* pc) {
  Thread& thread = grid.current();
  Block& block = *thread.block;
  const std::string name = "barrier " + std::to_string(number);
  if (number < 0 || number >= named_barriers) grid.fail(name + " does not exist, there are 16", pc);
  if (expected % warp_size != 0 || expected < 0 || expected > (block.threads + warp_size - 1) / warp_size * warp_size) {
    grid.fail(name + " for " + std::to_string(expected) + " threads, expected a multiple of 32 that the block has", pc);
  }
  NamedBarrier& barrier = block.barriers[number];
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.knowledge = grid.no_knowledge();
  } else if (barrier.expected != expected) {
    grid.fail(name + " for " + std::to_string(expected) + " threads, others have arrived at it for " +
                  std::to_string(barrier.expected),
              pc);
  }
  if (thread.arrived_in[number] == barrier.generation) grid.fail("second arrival at " + name, pc);
  thread.arrived_in[number] = barrier.generation;
  if (thread.clock.others() == barrier.last_joined) {
    thread.clock.add_own_to(barrier.knowledge);
  } else {
    thread.clock.add_to(barrier.knowledge);
    barrier.last_joined = thread.clock.others();
  }
  thread.clock.advance();
  ++barrier.arrived;
  if (wait) barrier.waiting.push_back(&thread);
  const uint32_t generation = barrier.generation;
  complete_if_all_arrived(block, barrier);
  if (!wait) {
    grid.maybe_yield();
  } else if (barrier.generation == generation) {
    grid.park({expected == 0 ? Wait::Kind::block_barrier : Wait::Kind::named_barrier, number, 0, nullptr, 0, pc});
  }
}

}  // namespace

int cluster_rank() { return grid.current().block->rank; }

void cluster_sync() {
  const void* pc = __builtin_return_address(0);
  Thread& thread = grid.current();
  Cluster& cluster = grid.cluster();
  if (cluster.arrived == 0) cluster.knowledge = grid.no_knowledge();
  thread.clock.add_to(cluster.knowledge);
  thread.clock.advance();
  cluster.waiting.push_back(&thread);
  // Threads that have exited count as arrived, as those of a block do.
  if (++cluster.arrived < cluster.live_threads) {
    grid.park({Wait::Kind::cluster_barrier, 0, 0, nullptr, 0, pc});
    return;
  }
  complete_cluster_barrier(cluster);
}

void complete_cluster_barrier(Cluster& cluster) {
  cluster.arrived = 0;
  for (Thread* other : std::exchange(cluster.waiting, {})) {
    other->clock.become(cluster.knowledge);
    grid.make_runnable(*other);
  }
}

void wait_for_turn(const int* turns, int turn) {
  const void* pc = __builtin_return_address(0);
  grid.check_access(turns, sizeof(*turns), Access::atomic, pc);
  grid.wait_until([=] { return *turns == turn; }, {Wait::Kind::turn, turn, 0, nullptr, 0, pc});
  grid.current().clock.acquire(grid.turn_knowledge(turns));
}

void end_turn(int* turns) {
  const void* pc = __builtin_return_address(0);
  grid.check_access(turns, sizeof(*turns), Access::atomic, pc);
  Knowledge& known = grid.turn_knowledge(turns);
  Knowledge released = grid.current().clock.release();
  released.join(known);
  known = std::move(released);
  ++*turns;
  grid.wake_waiting();
  grid.maybe_yield();
}

Block* block_of(uintptr_t address) {
  for (int i = 0; i < grid.running_blocks(); ++i) {
    Block& block = *grid.blocks()[i];
    if (block.shared.contains(address)) return &block;
  }
  return nullptr;
}

void* shared_of_rank(const void* own, int rank) {
  const void* pc = __builtin_return_address(0);
  const SharedMemory& shared = grid.current().block->shared;
  const uintptr_t address = reinterpret_cast<uintptr_t>(own);
  if (!shared.contains(address)) grid.fail("mapa of an address that is not the block's shared memory", pc);
  if (rank < 0 || rank >= grid.blocks_of_cluster()) {
    grid.fail("block " + std::to_string(rank) + " of a cluster of " + std::to_string(grid.blocks_of_cluster()), pc);
  }
  unsigned char* other = grid.block_of_cluster(rank).shared.dynamic();
  return other + (address - reinterpret_cast<uintptr_t>(shared.dynamic()));
}

void block_barrier() { arrive(0, 0, true, __builtin_return_address(0)); }
void named_barrier_sync(int barrier, int threads) { arrive(barrier, threads, true, __builtin_return_address(0)); }
void named_barrier_arrive(int barrier, int threads) { arrive(barrier, threads, false, __builtin_return_address(0)); }

void complete_barriers_without(Block& block) {
  for (NamedBarrier& barrier : block.barriers) {
    if (barrier.expected == 0) complete_if_all_arrived(block, barrier);
  }
}

std::string describe(const Wait& wait, const Thread& thread) {
  const auto arrivals = [&] {
    const NamedBarrier& barrier = thread.block->barriers[wait.barrier];
    const int expected = barrier.expected == 0 ? thread.block->live_threads : barrier.expected;
    return ", " + std::to_string(barrier.arrived) + " of " + std::to_string(expected) + " threads have arrived";
  };
  switch (wait.kind) {
    case Wait::Kind::block_barrier:
      return "__syncthreads" + arrivals() + describe_code(wait.pc);
    case Wait::Kind::named_barrier:
      return "barrier " + std::to_string(wait.barrier) + arrivals() + describe_code(wait.pc);
    case Wait::Kind::warp_collective:
      return describe_collective(wait.mask, grid.warp_of(thread)) + describe_code(wait.pc);
    case Wait::Kind::cluster_barrier:
      return "the cluster's barrier" + describe_code(wait.pc);
    case Wait::Kind::turn:
      return "turn " + std::to_string(wait.barrier) + describe_code(wait.pc);
    case Wait::Kind::mbarrier:
      return "parity " + std::to_string(wait.parity) + " of " + describe_mbarrier(wait.mbarrier) +
             describe_code(wait.pc);
    case Wait::Kind::bulk_group:
      return "its bulk copies" + describe_code(wait.pc);
    case Wait::Kind::wgmma:
      return "its wgmma, which the other warps of the warpgroup have not all issued" + describe_code(wait.pc);
    case Wait::Kind::epoch:
      return describe_epoch(wait) + describe_code(wait.pc);
    case Wait::Kind::nothing:
      break;
  }
  return "runnable";
}

}  // namespace fusewright::emulation
