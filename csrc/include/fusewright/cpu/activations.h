// Sigmoid and hyperbolic tangent in float32 lanes.
//
// Both from exp of an argument that is not positive, so nothing overflows, and from exp(x) - 1 for the tangent, so
// that nothing cancels near 0. NaN gives NaN.
#pragma once

#include "fusewright/cpu/exp.h"

namespace fusewright::FUSEWRIGHT_ISA {

// Precise: to about a unit in the last place of float32; else enough for results of two bytes.
template <bool Precise>
inline ExpParts exp_parts_of(Float x) {
  if constexpr (Precise) {
    return exp_parts(x);
  } else {
    return exp_parts_for_two_bytes(x);
  }
}

// 1 / x for x in [1, 2].
inline Float reciprocal(Float x) {
#if defined(__AVX512F__)
  // Fourteen bits and one step of Newton's method; a division takes three times as long.
  const Float guess = bit_cast<Float>(_mm512_rcp14_ps(bit_cast<__m512>(x)));
  return guess + guess * (1.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

inline Float magnitude(Float x) { return bit_cast<Float>(bit_cast<Int>(x) & 0x7fffffff); }

// 1 / (1 + exp(-x)), and its derivative, in which nothing cancels.
struct SigmoidSlope {
  Float value;
  Float slope;
};

template <bool Precise>
inline SigmoidSlope sigmoid_slope(Float x) {
  const ExpParts parts = exp_parts_of<Precise>(-magnitude(x));
  const Float e = exp_scale(parts.less_one + 1.0f, parts.power);
  const Float of_magnitude = reciprocal(1.0f + e);
  const Float of_opposite = e * of_magnitude;
  return {select(x < 0.0f, of_opposite, of_magnitude), of_opposite * of_magnitude};
}

template <bool Precise>
inline Float sigmoid(Float x) {
  return sigmoid_slope<Precise>(x).value;
}

template <bool Precise>
inline Float tanh(Float x) {
  const ExpParts parts = exp_parts_of<Precise>(-2.0f * magnitude(x));
  const Float scale = exp_scale(broadcast(1.0f), parts.power);
  const Float less_one = parts.less_one * scale + (scale - 1.0f);
  const Float of_magnitude = -less_one * reciprocal(2.0f + less_one);
  const Int sign = bit_cast<Int>(x) & static_cast<int32_t>(0x80000000);
  return bit_cast<Float>(bit_cast<Int>(of_magnitude) | sign);
}

}  // namespace fusewright::FUSEWRIGHT_ISA
