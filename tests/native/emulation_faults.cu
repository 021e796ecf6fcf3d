// Kernels with one fault each, and the same without it: the emulator must report the fault under every schedule and
// nothing else ever. Each entry takes whether the fault is in, and one buffer of 256 int32 (some: of fewer).

#include "fusewright/cuda/bulk_copy.cuh"
#include "fusewright/cuda/cluster.cuh"
#include "fusewright/cuda/launch.cuh"
#include "fusewright/cuda/mma.cuh"
#include "fusewright/cuda/named_barrier.cuh"
#include "fusewright/cuda/reduce.cuh"
#include "fusewright/cuda/shared.cuh"

namespace {

using namespace fusewright::cuda;

constexpr int threads = 128;

struct Values {
  int values[threads];
};

// Each thread reads what its neighbour in the next warp wrote.
__global__ void missing_barrier_kernel(bool fault, int* output) {
  auto& values = block_shared<Values>().values;
  values[threadIdx.x] = threadIdx.x;
  if (!fault) __syncthreads();
  output[threadIdx.x] = values[(threadIdx.x + 32) % threads];
}

// The second write may overtake the reads of the first.
__global__ void missing_second_barrier_kernel(bool fault, int* output) {
  auto& values = block_shared<Values>().values;
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const int first = values[(threadIdx.x + 32) % threads];
  if (!fault) __syncthreads();
  values[threadIdx.x] = 2 * threadIdx.x;
  __syncthreads();
  output[threadIdx.x] = first + values[(threadIdx.x + 32) % threads];
}

// A shuffle synchronises lanes but orders none of their accesses to memory.
__global__ void shuffle_for_syncwarp_kernel(bool fault, int* output) {
  auto& values = block_shared<Values>().values;
  values[threadIdx.x] = threadIdx.x;
  if (fault) {
    __shfl_sync(0xFFFFFFFFu, 0, 0);
  } else {
    __syncwarp();
  }
  output[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void unwritten_shared_kernel(bool fault, int* output) {
  auto& values = block_shared<Values>().values;
  if (!fault || threadIdx.x != 77) values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  output[threadIdx.x] = values[threads - 1 - threadIdx.x];
}

__global__ void shared_out_of_range_kernel(bool fault, int* output) {
  auto& values = block_shared<Values>().values;
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  output[threadIdx.x] = values[threadIdx.x + (fault && threadIdx.x == threads - 1 ? 1 : 0)];
}

__global__ void global_out_of_range_kernel(bool fault, int* output) {
  output[threadIdx.x + (fault ? threads + 1 : 0)] = threadIdx.x;
}

// Blocks of one launch are unordered.
__global__ void blocks_race_kernel(bool fault, int* output) {
  output[threadIdx.x + (fault ? 0 : blockIdx.x * threads)] = blockIdx.x;
}

__global__ void barrier_some_miss_kernel(bool fault, int* output) {
  auto& values = block_shared<Values>().values;
  values[threadIdx.x] = threadIdx.x;
  if (!fault || threadIdx.x < 96) named_barrier_sync(1, threads);
  output[threadIdx.x] = values[threadIdx.x];
}

// A warp arrives twice, in place of another.
__global__ void second_arrival_kernel(bool fault, int* output) {
  const int warp = threadIdx.x / warp_size;
  if (warp == 0) named_barrier_arrive(2, threads);
  if (fault && warp == 0) named_barrier_arrive(2, threads);
  if (warp != 0) named_barrier_sync(2, threads);
  output[threadIdx.x] = warp;
}

__global__ void barrier_counts_differ_kernel(bool fault, int* output) {
  named_barrier_sync(3, fault && threadIdx.x < 32 ? 64 : threads);
  output[threadIdx.x] = threadIdx.x;
}

// Lanes that left are named in a mask.
__global__ void lanes_missing_kernel(bool fault, int* output) {
  if (threadIdx.x % warp_size >= 16) return;
  output[threadIdx.x] = __shfl_xor_sync(fault ? 0xFFFFFFFFu : 0x0000FFFFu, threadIdx.x, 1);
}

// A copy out of shared memory sees what threads wrote by a fence only.
__global__ void missing_proxy_fence_kernel(bool fault, int* output) {
  auto& values = *dynamic_shared<Values>();
  values.values[threadIdx.x] = __float_as_uint(static_cast<float>(threadIdx.x));
  if (!fault) fence_async_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_reduce_add(reinterpret_cast<float*>(output), reinterpret_cast<const float*>(values.values), sizeof(values));
    bulk_commit();
    bulk_wait_read<0>();
  }
}

// Shared memory is written again while a copy may still read it.
__global__ void overwritten_in_flight_kernel(bool fault, int* output) {
  auto& values = *dynamic_shared<Values>();
  values.values[threadIdx.x] = 0;
  fence_async_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_reduce_add(reinterpret_cast<float*>(output), reinterpret_cast<const float*>(values.values), sizeof(values));
    bulk_commit();
    if (!fault) bulk_wait_read<0>();
    values.values[0] = 1;
    bulk_wait_read<0>();
  }
}

struct Loaded {
  Values values;
  uint64_t full;
};

// The barrier is told of fewer bytes than the copy has, or the copy is not waited for.
__global__ void bytes_differ_kernel(bool fault, int* output) {
  Loaded& loaded = *dynamic_shared<Loaded>();
  if (threadIdx.x == 0) {
    mbarrier_init(&loaded.full, 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect_bytes(&loaded.full, sizeof(Values) - (fault ? 16 : 0));
    bulk_load(&loaded.values, output, sizeof(Values), &loaded.full);
  }
  __syncthreads();
  mbarrier_wait(&loaded.full, 0);
  output[threadIdx.x] = loaded.values.values[threadIdx.x] + 1;
}

// cp.async: others see it after their own thread has waited, and a barrier.
__global__ void copy_not_waited_for_kernel(bool fault, int* output) {
  auto& values = *dynamic_shared<Values>();
  if (threadIdx.x < threads / 4) copy_async(values.values + 4 * threadIdx.x, output + 4 * threadIdx.x, true);
  copy_async_commit();
  if (!fault) copy_async_wait<0>();
  __syncthreads();
  output[threadIdx.x] = values.values[threads - 1 - threadIdx.x];
}

// Two blocks of a cluster; each reads what the other wrote.
__global__ void missing_cluster_barrier_kernel(bool fault, int* output) {
  auto& values = *dynamic_shared<Values>();
  values.values[threadIdx.x] = cluster_rank();
  if (!fault) cluster_sync();
  const int other = shared_of_rank(values.values, 1 - cluster_rank())[threadIdx.x];
  cluster_sync();
  output[cluster_rank() * threads + threadIdx.x] = other;
}

// A block ends while the other may still read its shared memory.
__global__ void block_ends_early_kernel(bool fault, int* output) {
  auto& values = *dynamic_shared<Values>();
  values.values[threadIdx.x] = cluster_rank();
  cluster_sync();
  int other = 0;
  if (cluster_rank() == 0) {
    for (int i = 0; i < threads; ++i) {
      other += shared_of_rank(values.values, 1)[i];
      atomicAdd(output, 1);
    }
  }
  if (!fault) cluster_sync();
  if (cluster_rank() == 0) output[threads + threadIdx.x] = other;
}

template <class Kernel>
int run_cluster(Kernel kernel, int fault, int* output) {
  return launch_clusters(kernel, dim3(2), dim3(threads), dim3(2), sizeof(Values), nullptr, fault != 0, output);
}

template <class Kernel>
int run(Kernel kernel, int fault, int* output, unsigned blocks = 1) {
  return launch(kernel, dim3(blocks), dim3(threads), sizeof(Loaded), nullptr, fault != 0, output);
}

}  // namespace

extern "C" {
int missing_barrier(int fault, int* output) { return run(missing_barrier_kernel, fault, output); }
int missing_second_barrier(int fault, int* output) { return run(missing_second_barrier_kernel, fault, output); }
int shuffle_for_syncwarp(int fault, int* output) { return run(shuffle_for_syncwarp_kernel, fault, output); }
int unwritten_shared(int fault, int* output) { return run(unwritten_shared_kernel, fault, output); }
int shared_out_of_range(int fault, int* output) { return run(shared_out_of_range_kernel, fault, output); }
int global_out_of_range(int fault, int* output) { return run(global_out_of_range_kernel, fault, output); }
int blocks_race(int fault, int* output) { return run(blocks_race_kernel, fault, output, 2); }
int barrier_some_miss(int fault, int* output) { return run(barrier_some_miss_kernel, fault, output); }
int second_arrival(int fault, int* output) { return run(second_arrival_kernel, fault, output); }
int barrier_counts_differ(int fault, int* output) { return run(barrier_counts_differ_kernel, fault, output); }
int lanes_missing(int fault, int* output) { return run(lanes_missing_kernel, fault, output); }
int missing_proxy_fence(int fault, int* output) { return run(missing_proxy_fence_kernel, fault, output); }
int overwritten_in_flight(int fault, int* output) { return run(overwritten_in_flight_kernel, fault, output); }
int bytes_differ(int fault, int* output) { return run(bytes_differ_kernel, fault, output); }
int copy_not_waited_for(int fault, int* output) { return run(copy_not_waited_for_kernel, fault, output); }
int missing_cluster_barrier(int fault, int* output) {
  return run_cluster(missing_cluster_barrier_kernel, fault, output);
}
int block_ends_early(int fault, int* output) { return run_cluster(block_ends_early_kernel, fault, output); }
}
