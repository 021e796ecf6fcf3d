// Kernels of SwiGLU and their launch: output = gate * sigmoid(gate) * up.
#pragma once

#include "fusewright/activation.h"
#include "fusewright/cuda/activations.cuh"
#include "fusewright/cuda/element_tile.cuh"

namespace fusewright::cuda {

template <class T, class Columns>
__global__ void __launch_bounds__(element_tile_threads)
    swiglu_forward_kernel(const __grid_constant__ SwigluForwardParams params) {
  constexpr int elements = element_tile_elements<Columns>;
  const auto tile = make_element_tile<Columns, elements>(params.columns);
  if (tile.row >= params.rows) return;
  float gate[elements], up[elements];
  tile.template load<T>(params.gate, tile.row, gate);
  tile.template load<T>(params.up, tile.row, up);
#pragma unroll
  for (int i = 0; i < elements; ++i) gate[i] = gate[i] * sigmoid_slope(gate[i]).value * up[i];
  tile.template store<T>(params.output, tile.row, gate);
}

// grad_gate = grad * up * (s + gate * s'), grad_up = grad * gate * s, s = sigmoid(gate)
template <class T, class Columns>
__global__ void __launch_bounds__(element_tile_threads)
    swiglu_backward_kernel(const __grid_constant__ SwigluBackwardParams params) {
  constexpr int elements = element_tile_elements<Columns>;
  const auto tile = make_element_tile<Columns, elements>(params.columns);
  if (tile.row >= params.rows) return;
  float grad[elements], gate[elements], up[elements];
  tile.template load<T>(params.grad_output, tile.row, grad);
  tile.template load<T>(params.gate, tile.row, gate);
  tile.template load<T>(params.up, tile.row, up);
#pragma unroll
  for (int i = 0; i < elements; ++i) {
    const SigmoidSlope s = sigmoid_slope(gate[i]);
    up[i] = grad[i] * up[i] * (s.value + gate[i] * s.slope);
    grad[i] = grad[i] * gate[i] * s.value;
  }
  tile.template store<T>(params.grad_gate, tile.row, up);
  tile.template store<T>(params.grad_up, tile.row, grad);
}

}  // namespace fusewright::cuda
