// Sigmoid and GELU in float32, with slopes in which nothing cancels.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace fusewright::cuda {

// 1 / (1 + exp(-x)) and its derivative.
struct SigmoidSlope {
  float value;
  float slope;
};

__device__ __forceinline__ SigmoidSlope sigmoid_slope(float x) {
  const float e = expf(-fabsf(x));
  const float of_magnitude = 1.0f / (1.0f + e);
  const float of_opposite = e * of_magnitude;
  return {x < 0.0f ? of_opposite : of_magnitude, of_opposite * of_magnitude};
}

// The factor of z in GELU and its derivative: of z * factor(z) the slope is factor + z * derivative.
struct GeluFactor {
  float value;
  float slope;
};

// P(Z < z) of a normal Z, or z's sigmoid in Hendrycks and Gimpel's approximation, z * sigmoid(2 c (z + a z^3)).
template <bool Tanh>
__device__ __forceinline__ GeluFactor gelu_factor(float z) {
  if constexpr (Tanh) {
    constexpr float scale = 1.5957691216057308f;  // 2 sqrt(2 / pi)
    constexpr float cube = 0.044715f;
    const float square = z * z;
    const SigmoidSlope s = sigmoid_slope(z * (square * cube + 1.0f) * scale);
    return {s.value, s.slope * (square * (3.0f * cube) + 1.0f) * scale};
  } else {
    constexpr float inverse_root_two = 0.7071067811865476f;
    constexpr float inverse_root_two_pi = 0.3989422804014327f;
    return {0.5f * erfcf(-z * inverse_root_two), expf(-0.5f * z * z) * inverse_root_two_pi};
  }
}

}  // namespace fusewright::cuda
