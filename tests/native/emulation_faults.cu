// Kernels with one fault each, and the same without it: the emulator must report the fault under every schedule and
// nothing else ever. Each entry takes whether the fault is in, and one buffer of 256 int32 (some: of fewer).

#include "fusewright/cuda/launch.cuh"
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

template <class Kernel>
int run(Kernel kernel, int fault, int* output, unsigned blocks = 1) {
  return launch(kernel, dim3(blocks), dim3(threads), 0, nullptr, fault != 0, output);
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
}
