// One vector of float32 lanes in the widest register of the instruction set that the source is compiled for.
//
// Each CPU source is compiled once per instruction set with FUSEWRIGHT_ISA naming its namespace, so no two
// instruction sets share a symbol: an inline function with one name in two of them could be merged by the linker
// into the AVX-512 copy, which then runs on a machine that has none. For the same reason these files include no
// standard C++ template. Arithmetic is GCC/Clang vector extensions; intrinsics appear only in conversions.
#pragma once

#ifndef FUSEWRIGHT_ISA
#error "compile with -DFUSEWRIGHT_ISA=<namespace>"
#endif

#define FUSEWRIGHT_STRING(name) #name
#define FUSEWRIGHT_EXPANDED_STRING(name) FUSEWRIGHT_STRING(name)
#define FUSEWRIGHT_ISA_NAME FUSEWRIGHT_EXPANDED_STRING(FUSEWRIGHT_ISA)

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "fusewright/row_view.h"

// For the few operations of an inner loop: left to itself GCC calls them once their users are many.
#define FUSEWRIGHT_ALWAYS_INLINE inline __attribute__((always_inline))

namespace fusewright::FUSEWRIGHT_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

constexpr int lanes = vector_bytes / 4;

typedef float Float __attribute__((vector_size(vector_bytes)));
typedef int32_t Int __attribute__((vector_size(vector_bytes)));
typedef uint32_t UInt __attribute__((vector_size(vector_bytes)));
typedef uint16_t Short __attribute__((vector_size(vector_bytes / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

inline Float broadcast(float value) { return value - Float{}; }

// mask ? a : b; a mask lane is all ones or all zeros, as vector comparisons give.
inline Float select(Int mask, Float a, Float b) {
  return bit_cast<Float>((mask & bit_cast<Int>(a)) | (~mask & bit_cast<Int>(b)));
}

// The second operand where the first is NaN or not greater: the hardware's maximum, in one instruction, which GCC 12
// does not make of the comparison.
inline Float maximum(Float a, Float b) {
#if defined(__AVX512F__)
  return bit_cast<Float>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<Float>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// ---- conversion to and from float32 ----

inline Float to_float(Float vector) { return vector; }

inline Float bfloat16_to_float(Short bits) { return bit_cast<Float>(__builtin_convertvector(bits, UInt) << 16); }

inline Float float16_to_float(Short bits) {
#if defined(__AVX512F__)
  return bit_cast<Float>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return bit_cast<Float>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#else
  // Shift exponent and mantissa into place and rescale by 2^112, which also normalises subnormals; Inf and NaN
  // come out at 2^16 and above and get their exponent back.
  const UInt word = __builtin_convertvector(bits, UInt);
  const Float scaled = bit_cast<Float>((word & 0x7fff) << 13) * 0x1p112f;
  const UInt special = bit_cast<UInt>(scaled >= 65536.0f) & 0x7f800000u;
  return bit_cast<Float>(bit_cast<UInt>(scaled) | special | ((word & 0x8000) << 16));
#endif
}

// Round to nearest even. With AVX512-BF16 the hardware's conversion takes float32 subnormals as zero.
inline Short float_to_bfloat16(Float value) {
#if defined(__AVX512BF16__)
  return bit_cast<Short>(_mm512_cvtneps_pbh(bit_cast<__m512>(value)));
#else
  const UInt word = bit_cast<UInt>(value);
  const UInt rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  const UInt quiet_nan = (word >> 16) | 0x40;
  const UInt is_nan = bit_cast<UInt>(value != value);
  return __builtin_convertvector((rounded & ~is_nan) | (quiet_nan & is_nan), Short);
#endif
}

inline Short float_to_float16(Float value) {
#if defined(__AVX512F__)
  return bit_cast<Short>(_mm512_cvtps_ph(bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bit_cast<Short>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  const UInt word = bit_cast<UInt>(value);
  const UInt sign = (word >> 16) & 0x8000;
  const UInt magnitude = word & 0x7fffffff;
  // Normal result: rebias the exponent by -112 and round the 13 dropped bits to nearest even.
  const UInt normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal result: adding 0.5 aligns the last kept bit with the last bit of the sum, which rounds it.
  const UInt subnormal = bit_cast<UInt>(bit_cast<Float>(magnitude) + 0.5f) - 0x3f000000;
  const UInt is_subnormal = bit_cast<UInt>(magnitude < (113u << 23));
  const UInt is_overflow = bit_cast<UInt>(magnitude >= 0x477ff000);
  const UInt is_nan = bit_cast<UInt>(magnitude > 0x7f800000);
  UInt result = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  result = (result & ~is_overflow) | (is_overflow & 0x7c00);
  result = (result & ~is_nan) | (is_nan & (0x7e00 | ((magnitude >> 13) & 0x3ff)));
  return __builtin_convertvector(result | sign, Short);
#endif
}

// ---- loads and stores at any alignment ----

inline Float load(const float* source) {
  Float vector;
  memcpy(&vector, source, sizeof(vector));
  return vector;
}
inline Float load(const BFloat16* source) {
  Short bits;
  memcpy(&bits, source, sizeof(bits));
  return bfloat16_to_float(bits);
}
inline Float load(const Float16* source) {
  Short bits;
  memcpy(&bits, source, sizeof(bits));
  return float16_to_float(bits);
}

inline void store(float* target, Float value) { memcpy(target, &value, sizeof(value)); }
inline void store(BFloat16* target, Float value) {
  const Short bits = float_to_bfloat16(value);
  memcpy(target, &bits, sizeof(bits));
}
inline void store(Float16* target, Float value) {
  const Short bits = float_to_float16(value);
  memcpy(target, &bits, sizeof(bits));
}

// The first `count` lanes; the others are zero. `count` < lanes.
template <class T>
inline Float load_partial(const T* source, int64_t count) {
  T buffer[lanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = source[i];
  return load(buffer);
}

template <class T>
inline void store_partial(T* target, Float value, int64_t count) {
  T buffer[lanes];
  store(buffer, value);
  for (int64_t i = 0; i < count; ++i) target[i] = buffer[i];
}

// ---- two vectors at a time ----
//
// Two bfloat16 share a 32-bit word, so a vector of words splits into its even and its odd elements by one shift and
// one mask, far cheaper than widening in order. Element-wise arithmetic does not care about the order; what meets the
// elements there (weights, sums over rows) is kept in the same order, the pair order: element 2i of a block at i,
// element 2i + 1 at lanes + i. For the other types pair order is the natural order.

constexpr int pair_lanes = 2 * lanes;

struct Pair {
  Float first, second;
};

template <class T>
constexpr bool has_pair_order = false;
template <>
constexpr bool has_pair_order<BFloat16> = true;

template <class T>
inline Pair load_pair(const T* source) {
  if constexpr (has_pair_order<T>) {
    UInt words;
    memcpy(&words, source, sizeof(words));
    return {bit_cast<Float>(words << 16), bit_cast<Float>(words & 0xffff0000u)};
  } else {
    return {load(source), load(source + lanes)};
  }
}

template <class T>
inline void store_pair(T* target, Pair value) {
  if constexpr (has_pair_order<T>) {
#if defined(__AVX512BF16__)
    // Even elements in the low half, odd ones in the high half; then they are interleaved.
    const __m512bh halves = _mm512_cvtne2ps_pbh(bit_cast<__m512>(value.second), bit_cast<__m512>(value.first));
    typedef uint16_t Shorts __attribute__((vector_size(vector_bytes)));
    Shorts order;
    for (int i = 0; i < lanes; ++i) {
      order[2 * i] = i;
      order[2 * i + 1] = lanes + i;
    }
    const __m512i interleaved = _mm512_permutexvar_epi16(bit_cast<__m512i>(order), bit_cast<__m512i>(halves));
    memcpy(target, &interleaved, sizeof(interleaved));
#else
    const auto rounded = [](Float vector) {
      const UInt word = bit_cast<UInt>(vector);
      const UInt is_nan = bit_cast<UInt>(vector != vector);
      return ((word + 0x7fff + ((word >> 16) & 1)) & ~is_nan) | ((word | 0x400000) & is_nan);
    };
    const UInt words = (rounded(value.first) >> 16) | (rounded(value.second) & 0xffff0000u);
    memcpy(target, &words, sizeof(words));
#endif
  } else {
    store(target, value.first);
    store(target + lanes, value.second);
  }
}

// The first `count` < pair_lanes elements; the others are zero.
template <class T>
inline Pair load_pair_partial(const T* source, int64_t count) {
  T buffer[pair_lanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = source[i];
  return load_pair(buffer);
}

template <class T>
inline void store_pair_partial(T* target, Pair value, int64_t count) {
  T buffer[pair_lanes];
  store_pair(buffer, value);
  for (int64_t i = 0; i < count; ++i) target[i] = buffer[i];
}

// Where column i of a row lies in pair order.
inline int64_t pair_position(int64_t column) {
  const int64_t within = column % pair_lanes;
  return column - within + (within % 2) * lanes + within / 2;
}

inline int64_t whole_pairs(int64_t columns) { return (columns + pair_lanes - 1) / pair_lanes * pair_lanes; }

// All ones in the first `count` lanes.
inline Int first_lanes(int64_t count) {
  Int index;
  for (int i = 0; i < lanes; ++i) index[i] = i;
  return index < static_cast<int32_t>(count);
}

// The vector with its lanes moved down by 8, 4, 2 or 1, the first ones coming back at the end.
template <int Step>
inline Float rotate(Float v) {
#if defined(__AVX512F__)
  if constexpr (Step == 8) {
    return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  } else if constexpr (Step == 4) {
    return __builtin_shufflevector(v, v, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3);
  } else if constexpr (Step == 2) {
    return __builtin_shufflevector(v, v, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1);
  } else {
    return __builtin_shufflevector(v, v, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0);
  }
#elif defined(__AVX2__)
  if constexpr (Step == 4) {
    return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  } else if constexpr (Step == 2) {
    return __builtin_shufflevector(v, v, 2, 3, 4, 5, 6, 7, 0, 1);
  } else {
    return __builtin_shufflevector(v, v, 1, 2, 3, 4, 5, 6, 7, 0);
  }
#else
  if constexpr (Step == 2) {
    return __builtin_shufflevector(v, v, 2, 3, 0, 1);
  } else {
    return __builtin_shufflevector(v, v, 1, 2, 3, 0);
  }
#endif
}

// Sum over lanes in pairs, the same order for every caller.
template <int Step = lanes / 2>
inline float sum_lanes(Float vector) {
  if constexpr (Step == 0) {
    return vector[0];
  } else {
    return sum_lanes<Step / 2>(vector + rotate<Step>(vector));
  }
}

inline float maximum_lanes(Float vector) {
  float result = vector[0];
  for (int i = 1; i < lanes; ++i) result = vector[i] > result ? vector[i] : result;
  return result;
}

}  // namespace fusewright::FUSEWRIGHT_ISA
