#include "shared_memory.h"

#include <cxxabi.h>

#include <cstdlib>

namespace fusewright::emulation {
namespace {

// Bytes that belong to no variable, so that an access behind one is not taken for one to the next.
constexpr size_t gap = 128;

size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

std::string demangled(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  const std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

}  // namespace

SharedMemory::SharedMemory()
    // Swizzles and descriptors of matrices know the 18 low bits of an address.
    : data_(static_cast<unsigned char*>(std::aligned_alloc(shared_memory_room, shared_memory_room))),
      region_("shared memory", data_, shared_memory_room, Region::Content::unwritten, true, true) {}

SharedMemory::~SharedMemory() { std::free(data_); }

void SharedMemory::start_block(size_t dynamic_bytes) {
  variables_.clear();
  used_ = dynamic_bytes;
  end_ = dynamic_bytes + gap;
  if (dynamic_bytes > 0) variables_.push_back({nullptr, 0, dynamic_bytes, "dynamic shared memory"});
}

void* SharedMemory::static_variable(const void* key, size_t bytes, size_t alignment, const char* name) {
  for (const Variable& variable : variables_) {
    if (variable.key == key) return data_ + variable.offset;
  }
  used_ = round_up(used_, alignment) + bytes;
  if (used_ > shared_memory_limit) return nullptr;
  const size_t offset = round_up(end_, alignment);
  variables_.push_back({key, offset, bytes, demangled(name)});
  end_ = offset + bytes + gap;
  return data_ + offset;
}

bool SharedMemory::is_valid(uintptr_t address, size_t bytes) const {
  const size_t offset = address - region_.begin();
  for (const Variable& variable : variables_) {
    if (offset >= variable.offset && offset + bytes <= variable.offset + variable.bytes) return true;
  }
  return false;
}

std::string SharedMemory::describe(uintptr_t address) const {
  const size_t offset = address - region_.begin();
  const Variable* before = nullptr;
  for (const Variable& variable : variables_) {
    if (variable.offset <= offset && (before == nullptr || variable.offset > before->offset)) before = &variable;
  }
  if (before == nullptr) return "shared memory of which the block has none";
  const std::string variable = "shared '" + before->name + "' (" + std::to_string(before->bytes) + " bytes)";
  return "byte " + std::to_string(offset - before->offset) + " of " + variable;
}

}  // namespace fusewright::emulation
