#include "asynchronous.h"

#include <utility>

#include "grid.h"
#include "include/emulation/asynchronous.h"

namespace fusewright::emulation {

void Asynchronous::start_cluster(int threads) {
  threads_ = threads;
  times_.fill(0);
  pending_.clear();
  mbarriers_.clear();
}

void Asynchronous::stamp(AsyncOperation& operation) {
  const int slot = next_slot_;
  next_slot_ = (next_slot_ + 1) % async_slots;
  operation.agent = threads_ + slot;
  operation.time = ++times_[slot];
  names_[slot] = operation.name;
}

AsyncOperation Asynchronous::issue(const std::string& name) {
  Thread& thread = grid.current();
  AsyncOperation operation;
  operation.name = name;
  operation.block = thread.block;
  operation.knowledge = thread.clock.release();
  stamp(operation);
  return operation;
}

void Asynchronous::land(size_t index) {
  const AsyncOperation operation = std::move(pending_[index]);
  pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(index));
  operation.run(operation);
  grid.wake_waiting();
}

std::string Asynchronous::unfinished() const {
  if (!pending_.empty()) return "the block ends while " + pending_.front().name + " is in flight";
  for (const auto& [address, barrier] : mbarriers_) {
    if (barrier.bytes != 0) return "the block ends with bytes outstanding: " + describe_mbarrier(address);
  }
  return "";
}

void fence_async_proxy() { grid.current().clock.fence_async_proxy(); }

void bulk_commit() {
  Thread& thread = grid.current();
  if (thread.open_bulk_group == nullptr) thread.open_bulk_group = std::make_shared<BulkGroup>();
  thread.bulk_groups.push_back(std::move(thread.open_bulk_group));
}

void bulk_wait_read(int pending) {
  Thread& thread = grid.current();
  const void* pc = __builtin_return_address(0);
  while (static_cast<int>(thread.bulk_groups.size()) > pending) {
    const std::shared_ptr<BulkGroup> group = thread.bulk_groups.front();
    grid.wait_until([&] { return group->in_flight == 0; }, {Wait::Kind::bulk_group, 0, 0, nullptr, 0, pc});
    thread.clock.acquire(group->landed);
    thread.bulk_groups.erase(thread.bulk_groups.begin());
  }
}

void set_max_registers(int count) {
  if (count < 24 || count > 256 || count % 8 != 0) {
    grid.fail("setmaxnreg of " + std::to_string(count) + ", expected a multiple of 8 from 24 to 256",
              __builtin_return_address(0));
  }
}

bool elect_lane() {
  Thread& thread = grid.current();
  ballot(0xFFFFFFFFu, true);
  return thread.lane == grid.warp_of(thread).elected;
}

}  // namespace fusewright::emulation
