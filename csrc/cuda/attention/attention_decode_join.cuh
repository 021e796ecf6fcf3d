// The parts of a row joined in order, with the sink; and the rare row that has to be computed anew, pair by pair: a
// value that one query of a call sees and another does not may be NaN or infinite, and 0 times that is NaN.
#pragma once

#include "attention_decode.cuh"
#include "attention_exact_row.cuh"
#include "fusewright/cuda/reduce.cuh"
#include "fusewright/cuda/vector.cuh"

namespace fusewright::cuda {

constexpr int attention_join_warps = 4;

// A lane's columns, 4 * lane and on.
struct JoinedColumns {
  float sums[4] = {};

  __device__ __forceinline__ void add(const float* row, float factor) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += row[i] * factor;
  }
  __device__ __forceinline__ bool finite_in_warp() const {
    const float any = sums[0] * 0.0f + sums[1] * 0.0f + sums[2] * 0.0f + sums[3] * 0.0f;
    return __all_sync(0xFFFFFFFFu, any == any) != 0;
  }
};

template <class T>
__device__ __forceinline__ void load_columns(float (&columns)[4], const T* row, int width) {
  const int first = 4 * (static_cast<int>(threadIdx.x) % warp_size);
  Packed<T, 4> packed;
  packed.clear();
  if (first < width) packed.load(row + first);
  packed.unpack(columns);
}

template <class T>
__device__ __forceinline__ JoinedColumns sum_row_exactly(const AttentionDecodeKernelParams& params,
                                                         const AttentionRow& row, int length, float reference) {
  const int key_head = row.head / params.group, position = params.position(length, row.index);
  const float slope = params.slope(row.batch, row.head);
  JoinedColumns columns;
  float query[4], key[4], value[4];
  load_columns(query, static_cast<const T*>(params.query.data) + params.query.offset(row.batch, row.head, row.index),
               params.width);
#pragma unroll 1
  for (int i_key = params.first_key(position); i_key <= position; ++i_key) {
    load_columns(key, params.row<T>(params.key, row.batch, key_head, i_key), params.width);
    load_columns(value, params.row<T>(params.value, row.batch, key_head, i_key), params.value_width);
    float product = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) product += query[i] * key[i];
    product = reduce_lanes<warp_size>(product, Sum());
    columns.add(value, visible_weight(params.logit(product, slope, position - i_key) - reference));
  }
  return columns;
}

// A row a warp.
template <class T>
__global__ void __launch_bounds__(attention_join_warps* warp_size)
    attention_decode_join_kernel(const __grid_constant__ AttentionDecodeKernelParams params) {
  constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;
  const int rows = params.heads * params.queries;
  const int i_row = blockIdx.x * attention_join_warps + threadIdx.x / warp_size;
  if (i_row >= rows) return;
  const AttentionRow row = {static_cast<int>(blockIdx.y), i_row / params.queries, i_row % params.queries};
  const int lane = threadIdx.x % warp_size, column = 4 * lane;
  const int length = static_cast<int>(params.lengths[row.batch]);
  const int parts = max(0, (length + attention_part_keys - 1) / attention_part_keys - params.first_part(length));
  const int64_t place = static_cast<int64_t>(row.batch) * rows + i_row;
  const float* references = params.part_references + place * params.parts;
  const float* totals = params.part_totals + place * params.parts;
  const float* sums = params.part_sums + place * params.parts * params.value_width;

  const float sink = params.sinks == nullptr ? -INFINITY : params.sinks[row.head] * log2_e;
  float reference = sink;
  for (int part = lane; part < parts; part += warp_size) reference = fmaxf(reference, references[part]);
  reference = reduce_lanes<warp_size>(reference, Maximum());
  float total = sink == -INFINITY ? 0.0f : exp2_flushed(sink - reference);
  JoinedColumns columns;
  for (int part = 0; part < parts; ++part) {
    if (references[part] == -INFINITY) continue;
    const float factor = exp2_flushed(references[part] - reference);
    total += totals[part] * factor;
    if (column < params.value_width) columns.add(sums + part * params.value_width + column, factor);
  }
  if (!columns.finite_in_warp()) columns = sum_row_exactly<T>(params, row, length, reference);
  if (column < params.value_width) {
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = columns.sums[i] * inverse;
    Packed<T, 4> packed;
    packed.pack(values);
    packed.store(static_cast<T*>(params.output.data) + params.output.offset(row.batch, row.head, row.index) + column);
  }
  if (lane == 0) {
    params.maximum[place] = reference * ln_2;
    params.total[place] = total;
  }
}

}  // namespace fusewright::cuda
