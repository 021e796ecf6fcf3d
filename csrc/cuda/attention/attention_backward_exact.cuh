// Rows of gradients from the pairs that take part in them alone, see attention_exact_row.cuh.
#pragma once

#include "attention_backward_rows.cuh"
#include "attention_exact_row.cuh"

namespace fusewright::cuda {

// The weight of a pair and the gradient of its logit.
struct AttentionPair {
  float weight, slope;
};

template <class T, int D>
__device__ __forceinline__ AttentionPair pair_of(const AttentionBackwardKernelParams& params, int batch, int head,
                                                 int i_query, int i_key, int lane) {
  constexpr int queries = attention_backward_queries(D);
  const AttentionRows& rows = params.rows;
  const AttentionRow query = {batch, head, i_query}, key = {batch, head / rows.group, i_key};
  const auto& numbers = params.numbers<queries>(params.tile_index(batch, head, i_query / queries));
  const float logit = product_of_rows(row_of_lane<const T>(rows.query, query, lane),
                                      row_of_lane<const T>(rows.key, key, lane), lane, rows.width);
  const float grad_weight = product_of_rows(row_of_lane<const T>(params.grad_output, query, lane),
                                            row_of_lane<const T>(rows.value, key, lane), lane, rows.value_width);
  const float weight = visible_weight(logit * rows.scale_log2 - numbers.reference[i_query % queries]) *
                       numbers.inverse[i_query % queries];
  return {weight, weight * (grad_weight - numbers.delta[i_query % queries])};
}

// Row r of the sums of a key and its value.
template <class T, int D, int r>
__device__ __forceinline__ void sum_queries_exactly(const AttentionBackwardKernelParams& params,
                                                    const AttentionRow& key, int lane, float (&key_sums)[D / 2],
                                                    float (&value_sums)[D / 2]) {
  const AttentionRows& rows = params.rows;
  const int end = rows.end_query(key.index);
  clear_row<r>(key_sums);
  clear_row<r>(value_sums);
#pragma unroll 1
  for (int head = key.head * rows.group; head < (key.head + 1) * rows.group; ++head) {
#pragma unroll 1
    for (int i_query = rows.first_query(key.index); i_query < end; ++i_query) {
      const AttentionPair pair = pair_of<T, D>(params, key.batch, head, i_query, key.index, lane);
      const AttentionRow query = {key.batch, head, i_query};
      add_row<T, r>(key_sums, pair.slope, row_of_lane<const T>(rows.query, query, lane), rows.width);
      add_row<T, r>(value_sums, pair.weight, row_of_lane<const T>(params.grad_output, query, lane), rows.value_width);
    }
  }
}

// Row r of the sums of a query.
template <class T, int D, int r>
__device__ __forceinline__ void sum_keys_exactly(const AttentionBackwardKernelParams& params, const AttentionRow& query,
                                                 int lane, float (&sums)[D / 2]) {
  const AttentionRows& rows = params.rows;
  const int end = rows.end_key(query.index);
  clear_row<r>(sums);
#pragma unroll 1
  for (int i_key = rows.first_key(query.index); i_key < end; ++i_key) {
    const AttentionPair pair = pair_of<T, D>(params, query.batch, query.head, query.index, i_key, lane);
    const AttentionRow key = {query.batch, query.head / rows.group, i_key};
    add_row<T, r>(sums, pair.slope, row_of_lane<const T>(rows.key, key, lane), rows.width);
  }
}

}  // namespace fusewright::cuda
