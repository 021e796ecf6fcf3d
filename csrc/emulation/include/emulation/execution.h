// What the kernels' side of the emulator knows of a running thread, and how a launch reaches it.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3() = default;
  constexpr dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs at the moment.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace fusewright::emulation {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  dim3 cluster;
  size_t dynamic_shared_bytes = 0;
  bool cooperative = false;  // all blocks run at the same time
};

// Runs kernel `address` over the whole grid: each thread calls run(arguments). Returns a cudaError_t.
int launch(const void* address, const LaunchShape& shape, void (*run)(const void* arguments), const void* arguments,
           size_t arguments_bytes);

// The block's static shared variable that `key` stands for; each block has its own.
void* static_shared(const void* key, size_t bytes, size_t alignment, const char* name);
void* dynamic_shared();

// What a thread other than the caller may update at the same time. Returns what was there before.
float atomic_add(float* address, float value);
int atomic_add(int* address, int value);

// Waits until the word in global memory is `turn`; what others did before end_turn() is known then.
void wait_for_turn(const int* turns, int turn);
void end_turn(int* turns);
// A word of global memory that one thread at a time advances for those of other blocks. What the publisher knew is
// known to whoever has waited for its epoch or a later one.
void publish_epoch(uint32_t* word, uint32_t epoch);
void wait_for_epoch(const uint32_t* word, uint32_t epoch);

// __syncthreads, and bar.sync or bar.arrive of a numbered barrier with a number of threads.
void block_barrier();
void named_barrier_sync(int barrier, int threads);
void named_barrier_arrive(int barrier, int threads);

int cluster_rank();
void cluster_sync();
void* shared_of_rank(const void* own, int rank);

}  // namespace fusewright::emulation
