// float16 as bits, with the conversions that the kernels use.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half value) {
  const unsigned sign = static_cast<unsigned>(value.bits & 0x8000) << 16;
  const unsigned magnitude = value.bits & 0x7FFF;
  if (magnitude >= 0x7C00) return __uint_as_float(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // A multiplication by 2^112 moves the exponent, and makes subnormal numbers normal.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
}

// To nearest, ties to even; every NaN becomes the one that the hardware gives.
inline __half __float2half_rn(float value) {
  if (value != value) return {0x7FFF};
  const unsigned sign = __float_as_uint(value) >> 16 & 0x8000;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  // Below the smallest normal number the spacing is 2^-24: adding 0.5 rounds to it.
  if (magnitude < 0x1p-14f) return {static_cast<uint16_t>(sign | (__float_as_uint(magnitude + 0.5f) - 0x3F000000))};
  const unsigned bits = __float_as_uint(magnitude) - 0x38000000;
  return {static_cast<uint16_t>(sign | (bits + 0xFFF + (bits >> 13 & 1)) >> 13)};
}
