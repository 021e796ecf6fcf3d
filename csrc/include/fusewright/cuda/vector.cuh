// Vectors of 2 to 32 bytes in global or shared memory as float32 in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "fusewright/row_view.h"

namespace fusewright::cuda {

// Elements of T that one 16-byte access moves.
template <class T>
constexpr int full_vector = 16 / static_cast<int>(sizeof(T));

// `Width` adjacent elements of T as they lie in memory. A row is first fetched into these, all loads before the first
// conversion, so that the loads of a thread are in flight together.
template <class T, int Width>
struct Packed {
  static constexpr int bytes = Width * static_cast<int>(sizeof(T));
  static_assert(bytes == 2 || bytes == 4 || bytes == 8 || bytes % 16 == 0);
  uint32_t words[(bytes + 3) / 4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (uint32_t& word : words) word = 0;
  }

  __device__ __forceinline__ void load(const T* source) {
    if constexpr (bytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < bytes / 16; ++i) {
        const uint4 part = reinterpret_cast<const uint4*>(source)[i];
        words[4 * i] = part.x;
        words[4 * i + 1] = part.y;
        words[4 * i + 2] = part.z;
        words[4 * i + 3] = part.w;
      }
    } else if constexpr (bytes == 8) {
      const uint2 part = *reinterpret_cast<const uint2*>(source);
      words[0] = part.x;
      words[1] = part.y;
    } else if constexpr (bytes == 4) {
      words[0] = *reinterpret_cast<const uint32_t*>(source);
    } else {
      words[0] = *reinterpret_cast<const uint16_t*>(source);
    }
  }

  __device__ __forceinline__ void store(T* target) const {
    if constexpr (bytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < bytes / 16; ++i) {
        reinterpret_cast<uint4*>(target)[i] =
            make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
      }
    } else if constexpr (bytes == 8) {
      *reinterpret_cast<uint2*>(target) = make_uint2(words[0], words[1]);
    } else if constexpr (bytes == 4) {
      *reinterpret_cast<uint32_t*>(target) = words[0];
    } else {
      *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(words[0]);
    }
  }

  __device__ __forceinline__ void unpack(float* values) const {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        values[i] = __uint_as_float(words[i]);
      } else {
        const uint32_t bits = i % 2 == 0 ? words[i / 2] & 0xFFFFu : words[i / 2] >> 16;
        if constexpr (std::is_same_v<T, __nv_bfloat16>) {
          values[i] = __uint_as_float(bits << 16);
        } else {
          values[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
        }
      }
    }
  }

  // Rounds to nearest even.
  __device__ __forceinline__ void pack(const float* values) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < Width; ++i) words[i] = __float_as_uint(values[i]);
    } else if constexpr (Width == 1) {
      words[0] = bits_of(values[0]);
    } else {
#pragma unroll
      for (int i = 0; i < Width / 2; ++i) words[i] = bits_of(values[2 * i]) | bits_of(values[2 * i + 1]) << 16;
    }
  }

 private:
  static __device__ __forceinline__ uint32_t bits_of(float value) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __bfloat16_as_ushort(__float2bfloat16_rn(value));
    } else {
      return __half_as_ushort(__float2half_rn(value));
    }
  }
};

// `value` as it comes back after being stored as T.
template <class T>
__device__ __forceinline__ float round_to(float value) {
  Packed<T, 1> packed;
  packed.pack(&value);
  packed.unpack(&value);
  return value;
}

template <class T>
__device__ __forceinline__ float load_float(const T* source) {
  Packed<T, 1> packed;
  packed.load(source);
  float value;
  packed.unpack(&value);
  return value;
}

template <class T>
__device__ __forceinline__ void store_float(T* target, float value) {
  Packed<T, 1> packed;
  packed.pack(&value);
  packed.store(target);
}

// Calls body(T{}) or body(float{}): activations and residual streams have the kernel's type T or are float32.
// The branch is uniform, and stands outside the loops over vectors so that it does not part their loads.
template <class T, class Body>
__device__ __forceinline__ void with_stream_type(DataType dtype, Body body) {
  if constexpr (std::is_same_v<T, float>) {
    body(float{});
  } else if (dtype == DataType::float32) {
    body(float{});
  } else {
    body(T{});
  }
}

// Calls body with the element type of a parameter, which need not be related to that of the activations.
template <class Body>
__device__ __forceinline__ void with_parameter_type(DataType dtype, Body body) {
  switch (dtype) {
    case DataType::float32:
      return body(float{});
    case DataType::bfloat16:
      return body(__nv_bfloat16{});
    case DataType::float16:
      return body(__half{});
  }
}

}  // namespace fusewright::cuda
