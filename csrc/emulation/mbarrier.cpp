// Memory barriers with a count of arrivals and a count of bytes.

#include <algorithm>

#include "emulation/asynchronous.h"
#include "grid.h"

namespace fusewright::emulation {
namespace {

Mbarrier& find(const uint64_t* address, const void* pc) {
  auto& barriers = grid.asynchronous().mbarriers();
  const auto found = barriers.find(address);
  if (found == barriers.end()) grid.fail("there is no mbarrier at " + grid.describe_shared(address), pc);
  Mbarrier& barrier = found->second;
  if (grid.current().clock.knows(barrier.initialiser) < barrier.initialised) {
    grid.fail("no barrier lies between the initialisation and this use of " + describe_mbarrier(address), pc);
  }
  return barrier;
}

void arrive(uint64_t* address, int bytes, const void* pc) {
  Thread& thread = grid.current();
  Mbarrier& barrier = find(address, pc);
  const int agent = thread.clock.agent();
  if (std::find(barrier.arrivals.begin(), barrier.arrivals.end(), agent) != barrier.arrivals.end()) {
    grid.fail("second arrival in one phase at " + describe_mbarrier(address), pc);
  }
  if (barrier.pending == 0) grid.fail("more arrivals than expected at " + describe_mbarrier(address), pc);
  barrier.arrivals.push_back(agent);
  if (barrier.arriving.empty()) barrier.arriving = grid.no_knowledge();
  thread.clock.add_to(barrier.arriving);
  thread.clock.advance();
  barrier.bytes += bytes;
  --barrier.pending;
  complete_phase_if_over(barrier);
  grid.maybe_yield();
}

}  // namespace

void mbarrier_init(uint64_t* address, int count) {
  const void* pc = __builtin_return_address(0);
  Thread& thread = grid.current();
  // A write like any other to whoever accesses these bytes without ordering.
  grid.check_access(address, sizeof(*address), Access::write, pc);
  if (reinterpret_cast<uintptr_t>(address) % sizeof(*address) != 0 || count < 1) {
    grid.fail("an mbarrier takes 8 aligned bytes and a count of at least 1, not " + std::to_string(count), pc);
  }
  Mbarrier barrier;
  barrier.expected = count;
  barrier.pending = count;
  barrier.initialiser = thread.clock.agent();
  barrier.initialised = thread.clock.now();
  grid.asynchronous().mbarriers()[address] = std::move(barrier);
}

void mbarrier_fence_init() {
  const int agent = grid.current().clock.agent();
  for (auto& [address, barrier] : grid.asynchronous().mbarriers()) barrier.fenced |= barrier.initialiser == agent;
}

void mbarrier_arrive(uint64_t* barrier) { arrive(barrier, 0, __builtin_return_address(0)); }
void mbarrier_arrive_expect_bytes(uint64_t* barrier, int bytes) { arrive(barrier, bytes, __builtin_return_address(0)); }

void mbarrier_wait(uint64_t* address, int parity) {
  const void* pc = __builtin_return_address(0);
  Mbarrier& barrier = find(address, pc);
  grid.wait_until([&] { return static_cast<int>(barrier.phase & 1) != parity; },
                  {Wait::Kind::mbarrier, 0, 0, address, parity, pc});
  grid.current().clock.acquire(barrier.completed);
}

void complete_phase_if_over(Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.completed = std::move(barrier.arriving);
  barrier.arriving = Knowledge();
  barrier.arrivals.clear();
  barrier.pending = barrier.expected;
  ++barrier.phase;
  grid.wake_waiting();
}

void check_usable_by_copies(const uint64_t* address, const void* pc) {
  if (!find(address, pc).fenced) {
    grid.fail("fence.mbarrier_init is missing before an asynchronous copy uses " + describe_mbarrier(address), pc);
  }
}

void land_at(const uint64_t* address, const AsyncOperation& operation, int bytes) {
  Mbarrier& barrier = grid.asynchronous().mbarriers().at(address);
  if (barrier.arriving.empty()) barrier.arriving = grid.no_knowledge();
  barrier.arriving.join(operation.released());
  barrier.bytes -= bytes;
  complete_phase_if_over(barrier);
}

std::string describe_mbarrier(const uint64_t* address) {
  const Mbarrier& barrier = grid.asynchronous().mbarriers().at(address);
  return "the mbarrier at " + grid.describe_shared(address) + ", phase " + std::to_string(barrier.phase) + ", " +
         std::to_string(barrier.expected - barrier.pending) + " of " + std::to_string(barrier.expected) +
         " have arrived, " + std::to_string(barrier.bytes) + " bytes are outstanding";
}

}  // namespace fusewright::emulation
