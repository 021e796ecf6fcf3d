// Products of a warp on tensor cores since sm_80, and the loads that feed them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#if !defined(__CUDACC__)
#include "emulation/matrix.h"
#endif

namespace fusewright::cuda {

#if defined(__CUDACC__)

// Four matrices of 8 x 8 16-bit elements from shared memory. Lane l gives the address of row l % 8 of matrix l / 8,
// aligned to 16 bytes; of each matrix it receives the elements from 2 (l % 4) on of row l / 4, or if Transposed of
// column l / 4.
template <bool Transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
}

// The opposite, of what the lanes hold. Needs sm_90.
template <bool Transposed>
__device__ __forceinline__ void store_matrices(const uint32_t (&registers)[4], void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Transposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(registers[0]),
                 "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
                 : "memory");
  }
}

// d (16, 8) += a (16, 16) b (16, 8). Lane l holds d's row l / 4 + 8 r, column 2 (l % 4) + c at index 2 r + c; a's rows
// alike, columns 2 (l % 4) + {0, 1} + 8 k at index r + 2 k; b's rows 2 (l % 4) + {0, 1} + 8 k, column l / 4 at index k.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// 16 bytes from global to shared memory, zeros unless `inside`. Its own thread knows of the end by copy_async_wait,
// others by a barrier after that.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(inside ? 16 : 0)
      : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `Pending` of the groups, the newest, are unfinished.
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

#else

using emulation::copy_async;
using emulation::copy_async_commit;

template <bool Transposed>
void load_matrices(uint32_t (&registers)[4], const void* row) {
  emulation::load_matrices(registers, row, Transposed);
}

template <bool Transposed>
void store_matrices(const uint32_t (&registers)[4], void* row) {
  emulation::store_matrices(registers, row, Transposed);
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr bool is_bfloat16 = std::is_same_v<T, __nv_bfloat16>;
  emulation::mma(is_bfloat16 ? emulation::Matrix16::bfloat16 : emulation::Matrix16::float16, d, a, b);
}

template <int Pending>
void copy_async_wait() {
  emulation::copy_async_wait(Pending);
}

#endif

}  // namespace fusewright::cuda
