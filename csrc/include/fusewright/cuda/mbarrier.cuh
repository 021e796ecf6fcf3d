// Barriers in shared memory that count arrivals, and bytes of asynchronous copies. A barrier has phases: it is at phase
// 0 first, and goes on to the next when the expected arrivals and bytes are complete. Needs sm_90.
//
// Each thread arrives at most once in a phase. Waiting for a parity returns once the phase of that parity is over: a
// fresh barrier lets a wait for parity 1 pass.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if !defined(__CUDACC__)
#include "emulation/asynchronous.h"
#endif

namespace fusewright::cuda {

#if defined(__CUDACC__)

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// By the thread that initialised barriers, before a copy uses one; other threads need a barrier of the block too.
__device__ __forceinline__ void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Also has the phase wait for `bytes` more of copies.
__device__ __forceinline__ void mbarrier_arrive_expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 over, [%0], %1;\n"
      "@over bra.uni done;\n"
      "bra.uni again;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Makes what this thread knows to be written in shared memory visible to copies and wgmma that follow.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#else

using emulation::fence_async_proxy;
using emulation::mbarrier_arrive;
using emulation::mbarrier_arrive_expect_bytes;
using emulation::mbarrier_fence_init;
using emulation::mbarrier_init;
using emulation::mbarrier_wait;

#endif

}  // namespace fusewright::cuda
