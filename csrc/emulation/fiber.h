// Cooperative threads of execution: each thread of a CUDA block is one.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fusewright::emulation {

class Fiber {
 public:
  // `entry` runs on `stack` at the first switch here, and must never return.
  void start(void* stack, size_t bytes, void (*entry)());

  // Saves the calling execution in *this and goes on with `next`, until somebody switches back here.
  void switch_to(Fiber& next);

 private:
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace fusewright::emulation
