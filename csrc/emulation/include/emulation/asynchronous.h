// Asynchronous copies and products, and the memory barriers that tell of their end.
#pragma once

#include <cstdint>

struct CUtensorMap_st;

namespace fusewright::emulation {

void mbarrier_init(uint64_t* barrier, int count);
void mbarrier_fence_init();
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_arrive_expect_bytes(uint64_t* barrier, int bytes);
void mbarrier_wait(uint64_t* barrier, int parity);

void fence_async_proxy();

// Tiles of a tensor map; coordinates are in elements, the fastest dimension first.
void tensor_load(void* shared, const CUtensorMap_st* map, uint64_t* barrier, const int* coordinates);
// To the same place in each block of the cluster that `ranks` has a bit for; each one's barrier counts the bytes.
void tensor_load_multicast(void* shared, const CUtensorMap_st* map, uint64_t* barrier, const int* coordinates,
                           unsigned ranks);
void tensor_store(const CUtensorMap_st* map, const void* shared, const int* coordinates);
// Adjacent bytes, and the addition of float32 to global memory.
void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier);
void bulk_reduce_add(float* global, const float* shared, int bytes);
// The bulk copies that this thread has issued since, as one group; and waits until at most `pending` of its groups
// still read shared memory, or are unfinished.
void bulk_commit();
void bulk_wait_read(int pending);
void bulk_wait(int pending);

enum class Matrix16 { bfloat16, float16 };

// d (64, N) += or = a (64, 16) b (16, N) of the calling thread's warpgroup. `a` is in registers, or else in shared
// memory as descriptor_a says. Transposed: the rows of a, or columns of b, are adjacent in memory.
void wgmma(Matrix16 type, int n, float* d, const uint32_t* a, uint64_t descriptor_a, uint64_t descriptor_b,
           bool accumulate, bool transposed_b);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

void set_max_registers(int count);
bool elect_lane();

}  // namespace fusewright::emulation
