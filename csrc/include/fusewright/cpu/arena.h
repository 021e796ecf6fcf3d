// Scratch memory of one task.
#pragma once

#include "fusewright/cpu/vector.h"

namespace fusewright::FUSEWRIGHT_ISA {

// Hands out pieces of one allocation, each aligned to 64 bytes; without one it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  void* bytes(int64_t count) {
    char* begin = base_ + used_;
    used_ += (count + 63) / 64 * 64;
    return begin;
  }
  float* floats(int64_t count) { return static_cast<float*>(bytes(count * static_cast<int64_t>(sizeof(float)))); }
  int64_t used() const { return used_; }
  bool counts_only() const { return base_ == nullptr; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace fusewright::FUSEWRIGHT_ISA
