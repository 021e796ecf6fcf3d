// The shared memory of one block: the dynamic part at the start, static variables behind it.
#pragma once

#include <string>
#include <vector>

#include "memory.h"

namespace fusewright::emulation {

// 227 KiB is the most that a block may use on Hopper; ranges between variables that belong to none need room too.
constexpr size_t shared_memory_limit = 227 * 1024;
constexpr size_t shared_memory_room = 256 * 1024;

class SharedMemory {
 public:
  SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory();

  // Forgets the variables of the block before. Contents are never read before they are written, as that is an error.
  void start_block(size_t dynamic_bytes);

  unsigned char* dynamic() const { return data_; }
  // nullptr: more than a block may have.
  void* static_variable(const void* key, size_t bytes, size_t alignment, const char* name);

  bool contains(uintptr_t address) const { return region_.contains(address); }
  Region& region() { return region_; }
  // Whether [address, address + bytes) lies within one variable.
  bool is_valid(uintptr_t address, size_t bytes) const;
  // "byte 12 of 'sums' (128 bytes)", or where between variables an address lies.
  std::string describe(uintptr_t address) const;

 private:
  struct Variable {
    const void* key;
    size_t offset;
    size_t bytes;
    std::string name;
  };

  unsigned char* data_;
  Region region_;
  std::vector<Variable> variables_;
  size_t used_ = 0;  // bytes of variables, as the hardware counts them
  size_t end_ = 0;
};

}  // namespace fusewright::emulation
