// Rows of sums as four lanes share them: how they are stored, and what the rare row takes that has to be computed anew,
// pair by pair. In a product of tiles, a hidden element that is NaN or infinite meets a weight of 0 and makes NaN of
// it.
//
// Of a row, a lane has columns 8 j + 2 (lane % 4) + c; of the rows r of 0 and 1 of a thread at index 4 j + 2 r + c.
// Those from `width` on, a multiple of 8, are not there.
#pragma once

#include "attention_rows.cuh"
#include "attention_softmax.cuh"
#include "fusewright/cuda/vector.cuh"

namespace fusewright::cuda {

__device__ __forceinline__ unsigned quad_of(int lane) { return 0xFu << lane / 4 * 4; }

// The lane's first element of a row.
template <class T>
__device__ __forceinline__ T* row_of_lane(const HeadsView& view, const AttentionRow& row, int lane) {
  return static_cast<T*>(view.data) + view.offset(row.batch, row.head, row.index) + 2 * (lane % 4);
}

// Whether all of row r of the thread's four lanes is finite.
template <int r, int Count>
__device__ __forceinline__ bool is_finite_row(const float (&sums)[Count], int lane) {
  float any = 0.0f;
#pragma unroll
  for (int j = 0; j < Count / 4; ++j) any += sums[4 * j + 2 * r] * 0.0f + sums[4 * j + 2 * r + 1] * 0.0f;
  any += __shfl_xor_sync(quad_of(lane), any, 1);
  any += __shfl_xor_sync(quad_of(lane), any, 2);
  // 0 times what is not finite is NaN.
  return any == any;
}

template <class T, int r, int Count>
__device__ __forceinline__ void store_row(const HeadsView& view, const AttentionRow& row, int lane,
                                          const float (&sums)[Count], float factor, int width) {
  T* target = row_of_lane<T>(view, row, lane);
#pragma unroll
  for (int j = 0; j < Count / 4; ++j) {
    if (8 * j >= width) break;
    Packed<T, 2> pair;
    const float values[2] = {sums[4 * j + 2 * r] * factor, sums[4 * j + 2 * r + 1] * factor};
    pair.pack(values);
    pair.store(target + 8 * j);
  }
}

template <int r, int Count>
__device__ __forceinline__ void clear_row(float (&sums)[Count]) {
#pragma unroll
  for (int j = 0; j < Count / 4; ++j) sums[4 * j + 2 * r] = sums[4 * j + 2 * r + 1] = 0.0f;
}

// sums += factor * row
template <class T, int r, int Count>
__device__ __forceinline__ void add_row(float (&sums)[Count], float factor, const T* row, int width) {
#pragma unroll
  for (int j = 0; j < Count / 4; ++j) {
    if (8 * j >= width) break;
    sums[4 * j + 2 * r] += factor * load_float(row + 8 * j);
    sums[4 * j + 2 * r + 1] += factor * load_float(row + 8 * j + 1);
  }
}

// The sum over all columns of a * b.
template <class T>
__device__ __forceinline__ float product_of_rows(const T* a, const T* b, int lane, int width) {
  float sum = 0.0f;
#pragma unroll 1
  for (int j = 0; j < width / 8; ++j) {
    sum += load_float(a + 8 * j) * load_float(b + 8 * j) + load_float(a + 8 * j + 1) * load_float(b + 8 * j + 1);
  }
  sum += __shfl_xor_sync(quad_of(lane), sum, 1);
  return sum + __shfl_xor_sync(quad_of(lane), sum, 2);
}

// 2^x of a pair that takes part: its value does, however small the weight.
__device__ __forceinline__ float visible_weight(float x) {
  constexpr float smallest = 0x1p-126f;
  const float weight = exp2_flushed(x);
  return weight < smallest ? smallest : weight;
}

// Row r of the output before its division by the total, from its visible keys alone.
template <class T, int D, int r>
__device__ __forceinline__ void sum_values_exactly(const AttentionRows& rows, const AttentionRow& row, int lane,
                                                   float scaled_reference, float (&sums)[D / 2]) {
  const int key_head = row.head / rows.group, end = rows.end_key(row.index);
  const T* query = row_of_lane<const T>(rows.query, row, lane);
  clear_row<r>(sums);
#pragma unroll 1
  for (int i_key = rows.first_key(row.index); i_key < end; ++i_key) {
    const AttentionRow key_row = {row.batch, key_head, i_key};
    const float logit = product_of_rows(query, row_of_lane<const T>(rows.key, key_row, lane), lane, rows.width);
    const float weight = visible_weight(logit * rows.scale_log2 - scaled_reference);
    add_row<T, r>(sums, weight, row_of_lane<const T>(rows.value, key_row, lane), rows.value_width);
  }
}

// Output and statistics of the thread's row r.
template <class T, int D, int r, class Softmax>
__device__ __forceinline__ void write_row(const AttentionRows& rows, const AttentionRow& row, int lane,
                                          const Softmax& softmax, float (&sums)[D / 2]) {
  if (row.index >= rows.queries) return;
  const float total = softmax.total(r);
  if (lane % 4 == 0) rows.write_statistics(row, softmax.reference(r), total);
  if (!is_finite_row<r>(sums, lane)) {
    sum_values_exactly<T, D, r>(rows, row, lane, softmax.scaled_reference(r), sums);
  }
  store_row<T, r>(rows.output, row, lane, sums, total == 0.0f ? 0.0f : 1.0f / total, rows.value_width);
}

}  // namespace fusewright::cuda
