// Products of a warpgroup, 128 threads, on Hopper's tensor cores. Needs sm_90a.
//
// Thread t holds of a (64, N) accumulator: row 16 (t / 32) + (t % 32) / 4 + 8 r, column 8 j + 2 (t % 4) + c at index
// 4 j + 2 r + c, for r and c of 0 and 1. The operand of 16 columns in registers is four pairs of it, j = 0 and 1.
//
// Products run while the threads go on. From their issue to the wait for their group, the accumulators, the operand in
// registers and the operands in shared memory must be left alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "fusewright/cuda/mbarrier.cuh"
#include "fusewright/cuda/slab.cuh"

namespace fusewright::cuda {

constexpr int warpgroup_size = 128;

// The 18 address bits that a descriptor has, without the lowest four.
__device__ __forceinline__ uint64_t descriptor_address(const void* shared) {
#if defined(__CUDACC__)
  return (shared_address(shared) & 0x3FFFF) >> 4;
#else
  return (reinterpret_cast<uintptr_t>(shared) & 0x3FFFF) >> 4;
#endif
}

// Operand (rows, 16) in shared memory whose 16 columns are adjacent: `tile` is the address of its first element.
__device__ __forceinline__ uint64_t wgmma_rows(const void* tile) {
  constexpr uint64_t swizzle_128 = uint64_t{1} << 62;
  constexpr uint64_t group_of_rows = swizzle_rows * slab_row_bytes / 16;
  return swizzle_128 | group_of_rows << 32 | uint64_t{1} << 16 | descriptor_address(tile);
}

// Operand (16, columns) whose columns are adjacent, in slabs `slab_bytes` apart.
__device__ __forceinline__ uint64_t wgmma_columns(const void* tile, int slab_bytes) {
  constexpr uint64_t swizzle_128 = uint64_t{1} << 62;
  constexpr uint64_t group_of_rows = swizzle_rows * slab_row_bytes / 16;
  return swizzle_128 | group_of_rows << 32 | static_cast<uint64_t>(slab_bytes / 16) << 16 | descriptor_address(tile);
}

#if defined(__CUDACC__)

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `Pending` groups are unfinished. The accumulators are named so that no use of them moves before it.
template <int Pending, int Count>
__device__ __forceinline__ void wgmma_wait(float (&accumulators)[Count]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(accumulators[i])::"memory");
}

#define FUSEWRIGHT_D4(I) "+f"(d[I]), "+f"(d[I + 1]), "+f"(d[I + 2]), "+f"(d[I + 3])
#define FUSEWRIGHT_D16(I) FUSEWRIGHT_D4(I), FUSEWRIGHT_D4(I + 4), FUSEWRIGHT_D4(I + 8), FUSEWRIGHT_D4(I + 12)

// COLUMNS_B: "1" where the columns of b are adjacent.
#define FUSEWRIGHT_WGMMA_SHARED_64(TYPE, COLUMNS_B)                                       \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred accumulate;\n"                                                          \
      "setp.ne.b32 accumulate, %34, 0;\n"                                                 \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                         \
      " {"                                                                                \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "            \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
      "%32, %33, accumulate, 1, 1, 0, " COLUMNS_B                                         \
      ";\n"                                                                               \
      "}\n"                                                                               \
      : FUSEWRIGHT_D16(0), FUSEWRIGHT_D16(16)                                             \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

#define FUSEWRIGHT_WGMMA_SHARED_128(TYPE, COLUMNS_B)                                      \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred accumulate;\n"                                                          \
      "setp.ne.b32 accumulate, %66, 0;\n"                                                 \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                        \
      " {"                                                                                \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "            \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "%64, %65, accumulate, 1, 1, 0, " COLUMNS_B                                         \
      ";\n"                                                                               \
      "}\n"                                                                               \
      : FUSEWRIGHT_D16(0), FUSEWRIGHT_D16(16), FUSEWRIGHT_D16(32), FUSEWRIGHT_D16(48)     \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

#define FUSEWRIGHT_WGMMA_REGISTERS_64(TYPE)                                               \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred accumulate;\n"                                                          \
      "setp.ne.b32 accumulate, %37, 0;\n"                                                 \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                         \
      " {"                                                                                \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "            \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
      "{%32, %33, %34, %35}, %36, accumulate, 1, 1, 1;\n"                                 \
      "}\n"                                                                               \
      : FUSEWRIGHT_D16(0), FUSEWRIGHT_D16(16)                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))

#define FUSEWRIGHT_WGMMA_REGISTERS_128(TYPE)                                              \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred accumulate;\n"                                                          \
      "setp.ne.b32 accumulate, %69, 0;\n"                                                 \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                        \
      " {"                                                                                \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "            \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "{%64, %65, %66, %67}, %68, accumulate, 1, 1, 1;\n"                                 \
      "}\n"                                                                               \
      : FUSEWRIGHT_D16(0), FUSEWRIGHT_D16(16), FUSEWRIGHT_D16(32), FUSEWRIGHT_D16(48)     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))

// d (64, N) = a b^T, or += : both operands (rows, 16) in shared memory.
template <class T, int Half>
__device__ __forceinline__ void wgmma_rows_rows(float (&d)[Half], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(Half == 32 || Half == 64, "N is 64 or 128");
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (Half == 32) {
      FUSEWRIGHT_WGMMA_SHARED_64("bf16", "0");
    } else {
      FUSEWRIGHT_WGMMA_SHARED_128("bf16", "0");
    }
  } else {
    if constexpr (Half == 32) {
      FUSEWRIGHT_WGMMA_SHARED_64("f16", "0");
    } else {
      FUSEWRIGHT_WGMMA_SHARED_128("f16", "0");
    }
  }
}

// d (64, 64) = a b, or += : a (64, 16) and b (16, 64) in shared memory, b with adjacent columns.
template <class T>
__device__ __forceinline__ void wgmma_rows_columns(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    FUSEWRIGHT_WGMMA_SHARED_64("bf16", "1");
  } else {
    FUSEWRIGHT_WGMMA_SHARED_64("f16", "1");
  }
}

// d (64, N) = a b, or += : a (64, 16) in registers, b (16, N) in shared memory with adjacent columns.
template <class T, int Half>
__device__ __forceinline__ void wgmma_registers_columns(float (&d)[Half], const uint32_t* a, uint64_t b,
                                                        bool accumulate) {
  static_assert(Half == 32 || Half == 64, "N is 64 or 128");
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (Half == 32) {
      FUSEWRIGHT_WGMMA_REGISTERS_64("bf16");
    } else {
      FUSEWRIGHT_WGMMA_REGISTERS_128("bf16");
    }
  } else {
    if constexpr (Half == 32) {
      FUSEWRIGHT_WGMMA_REGISTERS_64("f16");
    } else {
      FUSEWRIGHT_WGMMA_REGISTERS_128("f16");
    }
  }
}

#undef FUSEWRIGHT_WGMMA_SHARED_64
#undef FUSEWRIGHT_WGMMA_SHARED_128
#undef FUSEWRIGHT_WGMMA_REGISTERS_64
#undef FUSEWRIGHT_WGMMA_REGISTERS_128
#undef FUSEWRIGHT_D16
#undef FUSEWRIGHT_D4

// The registers of each thread of a warpgroup: what one gives up another can take.
template <int Registers>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// True in one lane of the warp.
__device__ __forceinline__ bool elect_lane() {
  int elected;
  asm volatile(
      "{\n"
      ".reg .pred chosen;\n"
      "elect.sync _|chosen, 0xFFFFFFFF;\n"
      "selp.s32 %0, 1, 0, chosen;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

#else

using emulation::elect_lane;
using emulation::wgmma_commit;
using emulation::wgmma_fence;

template <int Pending, int Count>
void wgmma_wait(float (&)[Count]) {
  emulation::wgmma_wait(Pending);
}

template <class T>
constexpr emulation::Matrix16 matrix_type =
    std::is_same_v<T, __nv_bfloat16> ? emulation::Matrix16::bfloat16 : emulation::Matrix16::float16;

template <class T, int Half>
void wgmma_rows_rows(float (&d)[Half], uint64_t a, uint64_t b, bool accumulate) {
  emulation::wgmma(matrix_type<T>, 2 * Half, d, nullptr, a, b, accumulate, false);
}

template <class T>
void wgmma_rows_columns(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  emulation::wgmma(matrix_type<T>, 64, d, nullptr, a, b, accumulate, true);
}

template <class T, int Half>
void wgmma_registers_columns(float (&d)[Half], const uint32_t* a, uint64_t b, bool accumulate) {
  emulation::wgmma(matrix_type<T>, 2 * Half, d, a, 0, b, accumulate, true);
}

template <int Registers>
void release_registers() {
  emulation::set_max_registers(Registers);
}
template <int Registers>
void take_registers() {
  emulation::set_max_registers(Registers);
}

#endif

}  // namespace fusewright::cuda
