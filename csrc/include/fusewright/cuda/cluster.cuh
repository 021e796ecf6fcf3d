// Blocks of one cluster, which run at the same time and reach each other's shared memory. Needs sm_90.
//
// A block must not end while another may still reach its shared memory: the last of them is a cluster_sync().
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "fusewright/cuda/mbarrier.cuh"

namespace fusewright::cuda {

#if defined(__CUDACC__)

// The number of this block in its cluster.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier of all threads of the cluster; what they wrote before is seen by all after it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What lies at `own` in this block's shared memory, in that of block `rank`.
template <class T>
__device__ __forceinline__ T* shared_of_rank(T* own, int rank) {
  T* other;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(own), "r"(rank));
  return other;
}

// Arrives at the barrier that `own` is in block `rank`.
__device__ __forceinline__ void mbarrier_arrive_at_rank(uint64_t* own, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(own)),
      "r"(rank)
      : "memory");
}

#else

using emulation::cluster_rank;
using emulation::cluster_sync;

template <class T>
T* shared_of_rank(T* own, int rank) {
  return static_cast<T*>(emulation::shared_of_rank(own, rank));
}

inline void mbarrier_arrive_at_rank(uint64_t* own, int rank) { emulation::mbarrier_arrive(shared_of_rank(own, rank)); }

#endif

}  // namespace fusewright::cuda
