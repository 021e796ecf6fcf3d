// 2^x in float32 lanes for the softmax of attention.
#pragma once

#include "fusewright/cpu/vector.h"

namespace fusewright::FUSEWRIGHT_ISA {

// 2^f for |f| <= 1/2, coefficients fitted to the smallest maximal relative error with p(0) = 1: degree 4 is 2.8e-6 off,
// far below the rounding of a bfloat16 or float16, degree 6 is 1.6e-8 off.
template <bool Precise>
inline Float exp2_of_fraction(Float f) {
  if constexpr (Precise) {
    Float p = broadcast(0x1.41fbbcp-13f);
    p = p * f + 0x1.5f3e54p-10f;
    p = p * f + 0x1.3b2d4cp-7f;
    p = p * f + 0x1.c6aee8p-5f;
    p = p * f + 0x1.ebfbdcp-3f;
    p = p * f + 0x1.62e430p-1f;
    return p * f + 1.0f;
  } else {
    Float p = broadcast(0x1.3a02ccp-7f);
    p = p * f + 0x1.c9fc46p-5f;
    p = p * f + 0x1.ec0378p-3f;
    p = p * f + 0x1.62e12cp-1f;
    return p * f + 1.0f;
  }
}

// 2^x for x <= 126. Below -126 it stays 2^-126: a weight that takes part is never zero, which tells it from a masked
// one, and 2^-126 adds nothing to a sum that is at least 2^-8. NaN gives NaN.
template <bool Precise>
inline Float exp2_clamped(Float x) {
  x = maximum(broadcast(-126.0f), x);
#if defined(__AVX512F__)
  const __m512 whole = _mm512_roundscale_ps(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
  const Float fraction = x - bit_cast<Float>(whole);
  return bit_cast<Float>(_mm512_scalef_ps(bit_cast<__m512>(exp2_of_fraction<Precise>(fraction)), whole));
#else
  constexpr float round_to_integer = 0x1.8p23f;
  const Float shifted = x + round_to_integer;
  const Float fraction = x - (shifted - round_to_integer);
  const Int exponent = bit_cast<Int>(shifted) << 23;
  return bit_cast<Float>(bit_cast<Int>(exp2_of_fraction<Precise>(fraction)) + exponent);
#endif
}

}  // namespace fusewright::FUSEWRIGHT_ISA
