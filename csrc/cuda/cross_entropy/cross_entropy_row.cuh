// What a row of logits is and what it wants of its classes, as forward and backward read them.
#pragma once

#include "fusewright/cross_entropy.h"
#include "fusewright/cuda/element_tile.cuh"

namespace fusewright::cuda {

// exp(x) of an x that is not positive. The product's rounding counts for |x| units, of a term that shrinks like exp(x).
__device__ __forceinline__ float exponential(float x) { return exp2f(x * 1.4426950408889634f); }

// The logits of inputs; none beyond the row is used.
template <int Elements>
__device__ __forceinline__ void cap_logits(float softcap, float (&values)[Elements]) {
  if (softcap == 0.0f) return;
  const float inverse = 1.0f / softcap;
#pragma unroll
  for (int i = 0; i < Elements; ++i) values[i] = softcap * tanhf(values[i] * inverse);
}

__device__ __forceinline__ float softcap_slope(float softcap, float logit) {
  const float capped = logit / softcap;
  return 1.0f - capped * capped;
}

// The class of a row. Rows of probabilities have none and count always.
struct RowTarget {
  int64_t column;
  bool by_class;
  bool ignored;
  bool outside;

  __device__ __forceinline__ RowTarget(const CrossEntropyParams& params, int64_t row)
      : column(params.target == nullptr ? -1 : params.target[row]),
        by_class(params.target != nullptr),
        ignored(by_class && column == params.ignore_index),
        outside(by_class && !ignored && (column < 0 || column >= params.columns)) {}
};

// The share of the target class beside that of all classes.
__device__ __forceinline__ double share_of_target(const CrossEntropyParams& params, int64_t column) {
  const double keep = 1.0 - params.label_smoothing;
  return params.weight == nullptr ? keep : keep * params.weight[column];
}

// What a row wants of all classes, smoothed and weighted: of probabilities everything, of a class what smoothing
// spreads.
template <class Tile, int Elements>
__device__ __forceinline__ void load_spread(const CrossEntropyParams& params, const Tile& tile, int64_t row,
                                            float (&wanted)[Elements]) {
  // Of every thread, so not in double.
  const float smoothing = static_cast<float>(params.label_smoothing);
  const float keep = 1.0f - smoothing, uniform = smoothing / static_cast<float>(params.columns);
#pragma unroll
  for (float& value : wanted) value = 0.0f;
  if (params.probabilities.data != nullptr) {
    with_parameter_type(params.probabilities.dtype,
                        [&](auto type) { tile.template load<decltype(type)>(params.probabilities, row, wanted); });
  }
#pragma unroll
  for (float& value : wanted) value = value * keep + uniform;
  if (params.weight == nullptr) return;
  float weight[Elements];
  tile.load_contiguous(params.weight, 0, weight);
#pragma unroll
  for (int i = 0; i < Elements; ++i) wanted[i] *= weight[i];
}

inline bool spreads(const CrossEntropyParams& params) {
  return params.target == nullptr || params.label_smoothing > 0.0;
}

// Calls body(T{}, Columns{}, std::bool_constant<spread>{}) for a call's types and accesses.
template <class Body>
cudaError_t with_cross_entropy_types(const CrossEntropyParams& params, std::initializer_list<const RowView*> operands,
                                     Body body) {
  return with_element_type(params.input.dtype, [&](auto element) {
    using T = decltype(element);
    return with_columns<T>(operands, params.columns, [&](auto columns) {
      if (spreads(params)) return body(element, columns, std::true_type{});
      return body(element, columns, std::false_type{});
    });
  });
}

// The class weights as an operand, for the question which accesses it allows.
inline RowView weight_row(const CrossEntropyParams& params) {
  RowView view;
  view.data = const_cast<float*>(params.weight);
  return view;
}

}  // namespace fusewright::cuda
