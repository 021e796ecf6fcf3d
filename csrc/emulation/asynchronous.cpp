#include "asynchronous.h"

#include <cstring>
#include <utility>

#include "emulation/asynchronous.h"
#include "grid.h"

namespace fusewright::emulation {
namespace {

void check_bulk(const void* shared, const void* global, int bytes, const void* pc) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes <= 0 ||
      bytes % 16 != 0) {
    grid.fail("a bulk copy of " + std::to_string(bytes) + " bytes: 16 must divide them and both addresses", pc);
  }
}

}  // namespace

void Asynchronous::start_clusters(int threads, int warps) {
  threads_ = threads;
  product_times_.assign(warps, 0);
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

void Asynchronous::stamp_product(AsyncOperation& operation, int warp) {
  operation.agent = threads_ + async_slots + warp;
  operation.time = ++product_times_[warp];
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

std::string Asynchronous::finish() {
  while (!pending_.empty() && pending_.front().may_outlive_block) land(0);
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
  const void* pc = __builtin_return_address(0);
  Thread& thread = grid.current();
  for (size_t i = 0; i + pending < thread.bulk_groups.size(); ++i) {
    const std::shared_ptr<BulkGroup> group = thread.bulk_groups[i];
    if (group->known_to_have_read) continue;
    grid.wait_until([&] { return group->reading == 0; }, {Wait::Kind::bulk_group, 0, 0, nullptr, 0, pc});
    thread.clock.acquire(group->read);
    group->known_to_have_read = true;
  }
}

void bulk_wait(int pending) { wait_for_groups(grid.current().bulk_groups, pending, __builtin_return_address(0)); }

void wait_for_groups(std::vector<std::shared_ptr<BulkGroup>>& groups, int pending, const void* pc) {
  while (static_cast<int>(groups.size()) > pending) {
    const std::shared_ptr<BulkGroup> group = groups.front();
    grid.wait_until([&] { return group->in_flight == 0; }, {Wait::Kind::bulk_group, 0, 0, nullptr, 0, pc});
    grid.current().clock.acquire(group->landed);
    groups.erase(groups.begin());
  }
}

void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier) {
  const void* pc = __builtin_return_address(0);
  check_bulk(shared, global, bytes, pc);
  check_usable_by_copies(barrier, pc);
  AsyncOperation operation = grid.asynchronous().issue("a bulk load to " + grid.describe_shared(shared));
  operation.run = [=](const AsyncOperation& self) {
    grid.check_async_access(self, global, bytes, Access::read, pc);
    grid.check_async_access(self, shared, bytes, Access::write, pc);
    std::memcpy(shared, global, bytes);
    land_at(barrier, self, bytes);
  };
  grid.asynchronous().add(std::move(operation));
  grid.maybe_yield();
}

void bulk_reduce_add(float* global, const float* shared, int bytes) {
  const void* pc = __builtin_return_address(0);
  check_bulk(shared, global, bytes, pc);
  const std::shared_ptr<BulkGroup> group = open_bulk_group(grid.current());
  AsyncOperation operation = grid.asynchronous().issue("a bulk addition from " + grid.describe_shared(shared));
  operation.run = [=](const AsyncOperation& self) {
    grid.check_async_access(self, shared, bytes, Access::read, pc);
    AsyncOperation addition = self;
    addition.may_outlive_block = true;
    addition.knowledge = self.released();
    grid.asynchronous().stamp(addition);
    addition.run = [=,
                    values = std::vector<float>(shared, shared + bytes / sizeof(float))](const AsyncOperation& self) {
      grid.check_async_access(self, global, bytes, Access::atomic, pc);
      for (size_t i = 0; i < values.size(); ++i) global[i] += values[i];
      group->land(self);
    };
    grid.asynchronous().add(std::move(addition));
    group->finish_reading(self);
  };
  grid.asynchronous().add(std::move(operation));
  grid.maybe_yield();
}

std::shared_ptr<BulkGroup> open_bulk_group(Thread& thread) {
  if (thread.open_bulk_group == nullptr) thread.open_bulk_group = std::make_shared<BulkGroup>();
  ++thread.open_bulk_group->in_flight;
  ++thread.open_bulk_group->reading;
  return thread.open_bulk_group;
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
