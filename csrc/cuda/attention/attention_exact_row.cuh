// The end of an output row: division by its total, and the rare row that has to be computed anew.
#pragma once

#include "attention_rows.cuh"
#include "attention_softmax.cuh"
#include "fusewright/cuda/vector.cuh"

namespace fusewright::cuda {

// sums[4 j + 2 r + c] of row r, from its visible keys alone: in a product of tiles, a hidden value that is NaN or
// infinite meets a weight of 0 and makes NaN of it. Four lanes share the row.
template <class T, int D, int r>
__device__ __forceinline__ void sum_exactly(const AttentionRows& rows, const AttentionRow& row, int lane,
                                            float scaled_reference, float (&sums)[D / 2]) {
  constexpr float smallest_weight = 0x1p-126f;  // a visible value takes part, however small its weight
  const unsigned quad = 0xFu << lane / 4 * 4;
  const int column = 2 * (lane % 4);
  const auto element = [&](const HeadsView& view, int head, int i_row) {
    return static_cast<const T*>(view.data) + view.offset(row.batch, head, i_row) + column;
  };
  const int key_head = row.head / rows.group;
  const T* query = element(rows.query, row.head, row.query);
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    sums[4 * j + 2 * r] = 0.0f;
    sums[4 * j + 2 * r + 1] = 0.0f;
  }
  const int end = rows.end_key(row.query);
#pragma unroll 1
  for (int i_key = rows.first_key(row.query); i_key < end; ++i_key) {
    const T* key = element(rows.key, key_head, i_key);
    float logit = 0.0f;
#pragma unroll 1
    for (int j = 0; j < D / 8; ++j) {
      logit += load_float(query + 8 * j) * load_float(key + 8 * j) +
               load_float(query + 8 * j + 1) * load_float(key + 8 * j + 1);
    }
    logit += __shfl_xor_sync(quad, logit, 1);
    logit += __shfl_xor_sync(quad, logit, 2);
    const float exponential = exp2_flushed(logit * rows.scale_log2 - scaled_reference);
    const float weight = exponential < smallest_weight ? smallest_weight : exponential;
    const T* value = element(rows.value, key_head, i_key);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      sums[4 * j + 2 * r] += weight * load_float(value + 8 * j);
      sums[4 * j + 2 * r + 1] += weight * load_float(value + 8 * j + 1);
    }
  }
}

// Output and statistics of the thread's row r.
template <class T, int D, int r>
__device__ __forceinline__ void write_row(const AttentionRows& rows, const AttentionRow& row, int lane,
                                          const OnlineSoftmax& softmax, float (&sums)[D / 2]) {
  if (row.query >= rows.queries) return;
  const float total = softmax.total(r);
  if (lane % 4 == 0) rows.write_statistics(row, softmax.reference(r), total);
  float any = 0.0f;
#pragma unroll
  for (int j = 0; j < D / 8; ++j) any += sums[4 * j + 2 * r] * 0.0f + sums[4 * j + 2 * r + 1] * 0.0f;
  const unsigned quad = 0xFu << lane / 4 * 4;
  any += __shfl_xor_sync(quad, any, 1);
  any += __shfl_xor_sync(quad, any, 2);
  // 0 times what is not finite is NaN.
  if (any != any) sum_exactly<T, D, r>(rows, row, lane, softmax.scaled_reference(r), sums);
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  T* output = static_cast<T*>(rows.output.data) + rows.output.offset(row.batch, row.head, row.query) + 2 * (lane % 4);
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    Packed<T, 2> pair;
    const float values[2] = {sums[4 * j + 2 * r] * inverse, sums[4 * j + 2 * r + 1] * inverse};
    pair.pack(values);
    pair.store(output + 8 * j);
  }
}

}  // namespace fusewright::cuda
