// exp(x) for x <= 0 in float32 lanes, about half a unit in the last place off.
#pragma once

#include "fusewright/cpu/vector.h"

namespace fusewright::FUSEWRIGHT_ISA {

// exp(x) = 2^n * exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2, exp(r) by its Taylor series to r^7: the first
// term left out is 6e-9. n * ln 2 is subtracted in two parts so that r is exact. -Inf gives 0 and NaN gives NaN.
inline Float exp_nonpositive(Float x) {
  constexpr float log2_e = 0x1.715476p+0f;
  constexpr float ln2_high = 0x1.62e4p-1f;  // 15 bits, so that n * ln2_high is exact
  constexpr float ln2_low = 0x1.7f7d1cp-20f;
  constexpr float round_to_integer = 0x1.8p23f;
  constexpr float smallest = -104.0f;  // exp of this rounds to 0 even as a subnormal

  x = select(x < smallest, broadcast(smallest), x);
  const Float shifted = x * log2_e + round_to_integer;
  const Float n = shifted - round_to_integer;
  const Float r = (x - n * ln2_high) - n * ln2_low;
  Float p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r;
#if defined(__AVX512F__)
  return bit_cast<Float>(_mm512_scalef_ps(bit_cast<__m512>(p + 1.0f), bit_cast<__m512>(n)));
#else
  // 2^n in two factors: n reaches -150, below the exponent of a normal number.
  const Int exponent = bit_cast<Int>(shifted) - bit_cast<Int>(broadcast(round_to_integer));
  const Int half = exponent >> 1;
  const Float scale = bit_cast<Float>((half + 127) << 23);
  const Float other_scale = bit_cast<Float>((exponent - half + 127) << 23);
  return ((p + 1.0f) * scale) * other_scale;
#endif
}

}  // namespace fusewright::FUSEWRIGHT_ISA
