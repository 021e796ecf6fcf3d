// GELU and its slope in float32 lanes.
#pragma once

#include "fusewright/cpu/activations.h"

namespace fusewright::FUSEWRIGHT_ISA {

// P(Z < z) for a normal Z, and its derivative.
struct NormalProbability {
  Float below;
  Float density;
};

// The tail is exp(-z^2 / 2) times a function that falls smoothly, like 1 / z: a polynomial in u = 1 / (1 + 0.35 |z|)
// with the smallest largest relative error on |z| < 15, 3e-8. Nothing cancels for negative z.
template <bool Precise>
inline NormalProbability normal_probability(Float z) {
  constexpr float most = 15.0f;  // exp(-most^2 / 2) rounds to 0
  constexpr float inverse_root_two_pi = 0x1.988454p-2f;
  const Float size = -maximum(broadcast(-most), -magnitude(z));
  const Float argument = size * size * -0.5f;
  const Float e = Precise ? exp_nonpositive(argument) : exp_nonpositive_for_two_bytes(argument);
  const Float u = reciprocal(size * 0.35f + 1.0f);
  Float q = broadcast(-0x1.ddd45cp-6f);
  q = q * u + 0x1.270a88p-3f;
  q = q * u - 0x1.060c56p-2f;
  q = q * u + 0x1.467268p-3f;
  q = q * u - 0x1.7d35aep-6f;
  q = q * u + 0x1.b070a2p-4f;
  q = q * u + 0x1.eac350p-4f;
  q = q * u + 0x1.1e7138p-3f;
  q = q * u + 0x1.1df1c0p-3f;
  const Float tail = q * u * e;
  return {select(z < 0.0f, tail, 1.0f - tail), e * inverse_root_two_pi};
}

// Hendrycks and Gimpel's approximation, z * sigmoid(2 c (z + a z^3)).
struct TanhGelu {
  static constexpr float scale = 0x1.988454p+0f;  // 2 sqrt(2 / pi)
  static constexpr float cube = 0x1.6e4e26p-5f;   // 0.044715
};

template <bool Tanh, bool Precise>
inline Float gelu(Float z) {
  if constexpr (Tanh) {
    return z * sigmoid<Precise>(z * (z * z * TanhGelu::cube + 1.0f) * TanhGelu::scale);
  } else {
    return z * normal_probability<Precise>(z).below;
  }
}

template <bool Tanh, bool Precise>
inline Float gelu_slope(Float z) {
  if constexpr (Tanh) {
    const Float square = z * z;
    const SigmoidSlope s = sigmoid_slope<Precise>(z * (square * TanhGelu::cube + 1.0f) * TanhGelu::scale);
    const Float inner = (square * (3.0f * TanhGelu::cube) + 1.0f) * TanhGelu::scale;
    return s.value + z * s.slope * inner;
  } else {
    const NormalProbability p = normal_probability<Precise>(z);
    return p.below + z * p.density;
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
