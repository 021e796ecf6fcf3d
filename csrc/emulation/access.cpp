// Where an access of a kernel's thread goes: its own stack, shared memory, registered buffers, constants.

#include <link.h>

#include "grid.h"

namespace fusewright::emulation {
namespace {

const char* verb(Access access) {
  return access == Access::read ? "reads " : access == Access::write ? "writes " : "atomically updates ";
}

}  // namespace

void Grid::check_access(const void* pointer, size_t bytes, Access access, const void* pc) {
  Thread& thread = *current_;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (address - thread.stack < stack_bytes) return;
  const auto explain = [&](const std::string& where, const std::string& why) {
    fail(verb(access) + std::to_string(bytes) + " bytes at " + where + ": " + why, pc);
  };
  const Observer observer = {thread.clock.agent(), thread.clock.now(), false, true, &thread.clock.others()};
  const auto check = [&](Region& region, const auto& where) {
    const std::string wrong = checker_.check(region, address - region.begin(), bytes, access, observer,
                                             [&](int agent) { return name_of_agent(agent); });
    if (!wrong.empty()) explain(where(), wrong);
  };

  if (Block* block = block_of(address)) {
    SharedMemory& shared = block->shared;
    if (block->cluster != thread.block->cluster) explain("shared memory of another cluster", "out of range");
    if (block->live_threads == 0) explain("shared memory of another block", "that block has ended");
    if (!shared.is_valid(address, bytes)) explain(shared.describe(address), "out of range");
    check(shared.region(), [&] { return shared.describe(address); });
    return;
  }
  if (Region* buffer = global_memory_.find(address)) {
    const size_t offset = address - buffer->begin();
    const auto where = [&] {
      return "byte " + std::to_string(offset) + " of buffer '" + buffer->name() + "' (" +
             std::to_string(buffer->bytes()) + " bytes)";
    };
    if (offset + bytes > buffer->bytes()) explain(where(), "out of range");
    if (access != Access::read && !buffer->writable()) explain(where(), "the buffer is read-only");
    check(*buffer, where);
    return;
  }
  if (access == Access::read) {
    const uintptr_t arguments = reinterpret_cast<uintptr_t>(arguments_);
    if (address - arguments < arguments_bytes_ || is_constant(address, bytes)) return;
  }
  for (const Thread& other : threads_) {
    if (address - other.stack < stack_bytes) explain("local memory of " + name_of(other), "out of range");
  }
  explain("an address that is no kernel's", "out of range, " + global_memory_.describe(address));
}

void Grid::check_async_access(const AsyncOperation& operation, const void* pointer, size_t bytes, Access access,
                              const void* pc) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const auto explain = [&](const std::string& where, const std::string& why) {
    fail(operation.name + " " + verb(access) + std::to_string(bytes) + " bytes at " + where + ": " + why, pc);
  };
  const auto check = [&](Region& region, const auto& where) {
    const std::string wrong = checker_.check(region, address - region.begin(), bytes, access, operation.observer(),
                                             [&](int agent) { return name_of_agent(agent); });
    if (!wrong.empty()) explain(where(), wrong);
  };
  if (Block* block = block_of(address)) {
    SharedMemory& shared = block->shared;
    if (!shared.is_valid(address, bytes)) explain(shared.describe(address), "out of range");
    check(shared.region(), [&] { return shared.describe(address); });
    return;
  }
  Region* buffer = global_memory_.find(address);
  if (buffer == nullptr || address - buffer->begin() + bytes > buffer->bytes()) {
    explain("an address that is no kernel's", "out of range, " + global_memory_.describe(address));
  }
  const auto where = [&] {
    return "byte " + std::to_string(address - buffer->begin()) + " of buffer '" + buffer->name() + "'";
  };
  if (access != Access::read && !buffer->writable()) explain(where(), "the buffer is read-only");
  check(*buffer, where);
}

std::string Grid::describe_shared(const void* pointer) const {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  for (const auto& block : blocks_) {
    if (block->shared.contains(address)) return block->shared.describe(address);
  }
  return "an address that is not shared memory";
}

namespace {

template <class T>
T add(T* address, T value, const void* pc) {
  grid.check_access(address, sizeof(T), Access::atomic, pc);
  const T before = *address;
  *address = before + value;
  grid.maybe_yield();
  return before;
}

}  // namespace

float atomic_add(float* address, float value) { return add(address, value, __builtin_return_address(0)); }
int atomic_add(int* address, int value) { return add(address, value, __builtin_return_address(0)); }

// Tables of constants, and the built-in variables, lie in the libraries' own segments.
bool Grid::is_constant(uintptr_t address, size_t bytes) {
  for (const Range& range : constants_) {
    if (address >= range.begin && address + bytes <= range.end) return true;
  }
  struct Search {
    uintptr_t address;
    Range found;
  } search = {address, {0, 0}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        Search& search = *static_cast<Search*>(data);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          if (header.p_type == PT_LOAD && search.address - begin < header.p_memsz) {
            search.found = {begin, begin + header.p_memsz};
          }
        }
        return 0;
      },
      &search);
  if (search.found.end == 0) return false;
  constants_.push_back(search.found);
  return address + bytes <= search.found.end;
}

}  // namespace fusewright::emulation
