// exp(x) for x <= 0 in float32 lanes.
//
// exp(x) = 2^n * exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2; exp(r) = 1 + r + r^2 q(r), q being the
// polynomial with the smallest largest relative error of the whole. -Inf gives 0 and NaN gives NaN.
#pragma once

#include "fusewright/cpu/vector.h"

namespace fusewright::FUSEWRIGHT_ISA {

// n, and n in the last bits of a float, where integer arithmetic can take it.
struct ExpPower {
  Float n;
  Float shifted;
};

constexpr float exp_round_to_integer = 0x1.8p23f;

// exp of -104 rounds to 0 even as a subnormal.
inline Float exp_argument(Float x) { return maximum(broadcast(-104.0f), x); }

inline ExpPower exp_power(Float x) {
  constexpr float log2_e = 0x1.715476p+0f;
  const Float shifted = x * log2_e + exp_round_to_integer;
  return {shifted - exp_round_to_integer, shifted};
}

// value * 2^n
inline Float exp_scale(Float value, ExpPower power) {
#if defined(__AVX512F__)
  return bit_cast<Float>(_mm512_scalef_ps(bit_cast<__m512>(value), bit_cast<__m512>(power.n)));
#else
  // In two factors: n reaches -150, below the exponent of a normal number.
  const Int exponent = bit_cast<Int>(power.shifted) - bit_cast<Int>(broadcast(exp_round_to_integer));
  const Int half = exponent >> 1;
  const Float scale = bit_cast<Float>((half + 127) << 23);
  const Float other_scale = bit_cast<Float>((exponent - half + 127) << 23);
  return (value * scale) * other_scale;
#endif
}

// exp(x) = (1 + less_one) * 2^power
struct ExpParts {
  Float less_one;
  ExpPower power;
};

// For x <= 0; the polynomial is good to 3e-9.
inline ExpParts exp_parts(Float x) {
  constexpr float ln2_high = 0x1.62e4p-1f;  // 15 bits, so that n * ln2_high is exact and with it r
  constexpr float ln2_low = 0x1.7f7d1cp-20f;
  x = exp_argument(x);
  const ExpPower power = exp_power(x);
  const Float r = (x - power.n * ln2_high) - power.n * ln2_low;
  Float q = broadcast(0x1.6a2434p-10f);
  q = q * r + 0x1.1239e2p-7f;
  q = q * r + 0x1.5558f2p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  return {q * (r * r) + r, power};
}

// For results of two bytes, which keep 11 bits at most: 5e-6 off, and as much again at x = -100.
inline ExpParts exp_parts_for_two_bytes(Float x) {
  constexpr float ln2 = 0x1.62e43p-1f;
  x = exp_argument(x);
  const ExpPower power = exp_power(x);
  const Float r = x - power.n * ln2;
  Float q = broadcast(0x1.52258ep-5f);
  q = q * r + 0x1.571cc2p-3f;
  q = q * r + 0x1.0006b6p-1f;
  return {q * (r * r) + r, power};
}

// About half a unit in the last place off.
inline Float exp_nonpositive(Float x) {
  const ExpParts parts = exp_parts(x);
  return exp_scale(parts.less_one + 1.0f, parts.power);
}

inline Float exp_nonpositive_for_two_bytes(Float x) {
  const ExpParts parts = exp_parts_for_two_bytes(x);
  return exp_scale(parts.less_one + 1.0f, parts.power);
}

}  // namespace fusewright::FUSEWRIGHT_ISA
