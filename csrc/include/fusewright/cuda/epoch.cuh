// Words in global memory by which blocks that run at the same time tell each other how far they are, instead of a
// barrier of the whole grid: who needs one block's result waits for that block alone.
//
// An epoch only grows, and one thread at a time advances a word, so a word never needs to be reset within a launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fusewright::cuda {

#if defined(__CUDACC__)

// What this thread wrote, and what its block wrote before a barrier, is seen by whoever waits for this epoch.
__device__ __forceinline__ void publish_epoch(uint32_t* word, uint32_t epoch) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(epoch) : "memory");
}

__device__ __forceinline__ void wait_for_epoch(const uint32_t* word, uint32_t epoch) {
  uint32_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(word) : "memory");
  } while (seen < epoch);
}

#else

using emulation::publish_epoch;
using emulation::wait_for_epoch;

#endif

}  // namespace fusewright::cuda
