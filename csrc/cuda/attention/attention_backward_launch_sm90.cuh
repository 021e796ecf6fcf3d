// The three launches of Hopper's backward: rows, products, the queries' gradient.
#pragma once

#include "attention_backward_query.cuh"
#include "attention_backward_rows.cuh"
#include "attention_backward_sm90.cuh"

namespace fusewright::cuda {

template <class T, int D, bool Packed>
cudaError_t launch_backward(const AttentionBackwardParams& params, int64_t shift, bool ordered, void* workspace,
                            void* stream) {
  constexpr int queries = attention_backward_queries(D);
  AttentionBackwardSm90Params sm90 = {};
  sm90.ordered = ordered;
  AttentionBackwardKernelParams& kernel_params = sm90.kernel;
  kernel_params.rows = AttentionRows(params, params.output, shift);
  kernel_params.grad_output = params.grad_output;
  kernel_params.grad_query = params.grad_query;
  kernel_params.grad_key = params.grad_key;
  kernel_params.grad_value = params.grad_value;
  kernel_params.grad_lse = params.grad_lse;
  kernel_params.workspace = AttentionBackwardWorkspace(params, workspace);
  if (Packed) kernel_params.sequences = AttentionPackedSequences(params);
  cudaError_t error =
      encode_heads(sm90.query_map, params.query, params, params.width, params.queries, params.heads, queries);
  if (error == cudaSuccess) {
    error =
        encode_heads(sm90.key_map, params.key, params, params.width, params.keys, params.key_heads, attention_key_tile);
  }
  if (error == cudaSuccess) {
    error = encode_heads(sm90.value_map, params.value, params, params.value_width, params.keys, params.key_heads,
                         attention_key_tile);
  }
  if (error == cudaSuccess) {
    error = encode_heads(sm90.grad_output_map, params.grad_output, params, params.value_width, params.queries,
                         params.heads, queries);
  }
  const auto heads = static_cast<unsigned>(params.heads), batch = static_cast<unsigned>(params.batch);
  const auto query_tiles = static_cast<unsigned>(kernel_params.workspace.query_tiles);
  if (error == cudaSuccess) {
    error = launch(attention_backward_rows_sm90_kernel<T, D, Packed>, dim3(query_tiles, heads, batch),
                   dim3(attention_backward_rows_threads), 0, stream, kernel_params);
  }
  if (error == cudaSuccess) {
    const int64_t key_tiles = Packed ? kernel_params.sequences.tiles(params.keys, attention_key_tile)
                                     : ceil_div(params.keys, attention_key_tile);
    const dim3 grid(static_cast<unsigned>(key_tiles), static_cast<unsigned>(params.key_heads), batch);
    error = launch(attention_backward_sm90_kernel<T, D, Packed>, grid, dim3(attention_threads),
                   sizeof(AttentionBackwardShared<D>), stream, sm90);
  }
  if (error == cudaSuccess && params.grad_query.data != nullptr) {
    error = launch(attention_backward_query_sm90_kernel<T, D, Packed>, dim3(query_tiles * (queries / 64), heads, batch),
                   dim3(attention_backward_query_threads), 0, stream, kernel_params);
  }
  return error;
}

template <class T, int D>
cudaError_t attention_backward_sm90(const AttentionBackwardParams& params, int64_t shift, bool ordered, void* workspace,
                                    void* stream) {
  return params.packing.query_offsets == nullptr
             ? launch_backward<T, D, false>(params, shift, ordered, workspace, stream)
             : launch_backward<T, D, true>(params, shift, ordered, workspace, stream);
}

}  // namespace fusewright::cuda
