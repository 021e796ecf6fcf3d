// Asynchronous copies of adjacent bytes, 16 dividing them and both addresses, and what their threads wait for. Needs
// sm_90. What threads wrote to shared memory is seen by a copy out of it after fence_async_proxy() and a barrier.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "fusewright/cuda/mbarrier.cuh"

namespace fusewright::cuda {

#if defined(__CUDACC__)

// `barrier` counts the bytes.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// global[i] += shared[i], each addition atomic.
__device__ __forceinline__ void bulk_reduce_add(float* global, const float* shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

// The copies out of shared memory that this thread has issued since become a group.
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most `Pending` groups, the newest, still read shared memory.
template <int Pending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// The same until their writes are done as well, and known to this thread.
template <int Pending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}

#else

using emulation::bulk_commit;
using emulation::bulk_load;
using emulation::bulk_reduce_add;

template <int Pending>
void bulk_wait_read() {
  emulation::bulk_wait_read(Pending);
}
template <int Pending>
void bulk_wait() {
  emulation::bulk_wait(Pending);
}

#endif

}  // namespace fusewright::cuda
