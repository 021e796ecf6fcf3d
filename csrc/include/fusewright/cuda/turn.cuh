// Turns that blocks take at a piece of global memory, in an order of their own: a word counts those that are over.
// A block may wait only for turns of blocks that are sure to run beside it or to have run: see take_ticket().
#pragma once

#include <cuda_runtime.h>

#if !defined(__CUDACC__)
#include "emulation/execution.h"
#endif

namespace fusewright::cuda {

// The number of blocks that asked before: by one thread, for the block's place in the work. Whoever has an earlier
// ticket has started, so it may be waited for; that blocks start in the order of their index is nowhere promised.
__device__ __forceinline__ int take_ticket(int* tickets) { return atomicAdd(tickets, 1); }

#if defined(__CUDACC__)

// Until `turn` turns are over. What was done in them, bulk copies that were waited for included, is done.
__device__ __forceinline__ void wait_for_turn(const int* turns, int turn) {
  int over;
  do {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(over) : "l"(turns) : "memory");
  } while (over != turn);
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

__device__ __forceinline__ void end_turn(int* turns) {
  asm volatile("fence.proxy.async.global;" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turns) : "memory");
}

#else

using emulation::end_turn;
using emulation::wait_for_turn;

#endif

}  // namespace fusewright::cuda
