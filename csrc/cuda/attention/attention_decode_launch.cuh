// The two launches of attention over a cache: parts, then rows.
#pragma once

#include "attention_decode_join.cuh"
#include "attention_decode_part.cuh"

namespace fusewright::cuda {

template <class T, int D>
cudaError_t attention_decode(const AttentionDecodeKernelParams& params, int64_t batch, void* stream) {
  const int64_t key_heads = params.heads / params.group, rows = int64_t{params.heads} * params.queries;
  const int64_t row_tiles = ceil_div(params.group * params.queries, attention_decode_rows);
  const dim3 parts(static_cast<unsigned>(params.parts), static_cast<unsigned>(key_heads * row_tiles),
                   static_cast<unsigned>(batch));
  const cudaError_t error =
      launch(attention_decode_part_kernel<T, D>, parts, dim3(attention_decode_warps * warp_size), 0, stream, params);
  if (error != cudaSuccess) return error;
  const dim3 joined(static_cast<unsigned>(ceil_div(rows, attention_join_warps)), static_cast<unsigned>(batch));
  return launch(attention_decode_join_kernel<T>, joined, dim3(attention_join_warps * warp_size), 0, stream, params);
}

}  // namespace fusewright::cuda
