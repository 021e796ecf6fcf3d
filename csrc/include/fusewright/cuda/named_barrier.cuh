// Numbered barriers of a block, 1 to 15, for some of its threads: whole warps, `threads` in all with those that wait
// and those that only arrive. What the latter wrote before is seen by the former after it.
#pragma once

#include <cuda_runtime.h>

namespace fusewright::cuda {

#if defined(__CUDACC__)

__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

#else

using emulation::named_barrier_arrive;
using emulation::named_barrier_sync;

#endif

}  // namespace fusewright::cuda
