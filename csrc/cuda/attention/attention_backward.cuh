// The launches of the backward that attention.cu chooses from, and the workspace that its kernels share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "attention_forward.cuh"
#include "attention_packed.cuh"
#include "fusewright/attention.h"
#include "fusewright/cuda/launch.cuh"

namespace fusewright::cuda {

// Queries of one step. Sums of two gradients, logits and their gradients fill the registers: the wider rows are, the
// fewer queries.
FUSEWRIGHT_HOST_DEVICE constexpr int attention_backward_queries(int columns) { return columns == 64 ? 128 : 64; }

// Of a tile of queries, one behind the other as a bulk copy takes them; rows behind the last are 0.
template <int Queries>
struct AttentionRowNumbers {
  float reference[Queries];  // of the logits, in the exponent's unit
  float inverse[Queries];    // of the total
  float delta[Queries];      // output times its gradient, less the log-sum-exp's
};

// Sums of 64 queries by 64 columns of grad_query, thread by thread as accumulators lie; a row of D columns has D / 64.
constexpr int64_t attention_query_sums = 64 * 64;

struct AttentionBackwardWorkspace {
  int query_tiles;     // of a head
  float* row_numbers;  // (B, H, query_tiles) AttentionRowNumbers
  float* query_sums;   // (B, H, T in whole tiles, D): of each 64 rows D / 64 times attention_query_sums
  int* turns;          // (B, H, query_tiles, 2): those at each warpgroup's part of a tile's sums
  int* tickets;

  AttentionBackwardWorkspace() = default;
  AttentionBackwardWorkspace(const AttentionParams& params, void* memory) {
    const int64_t tile = attention_backward_queries(attention_kernel_width(params));
    const bool packed = params.packing.query_offsets != nullptr;
    query_tiles = static_cast<int>(packed ? AttentionPackedSequences(params).tiles(params.queries, tile)
                                          : ceil_div(params.queries, tile));
    row_numbers = static_cast<float*>(memory);
    query_sums = row_numbers + 3 * rows(params);
    turns = reinterpret_cast<int*>(query_sums + rows(params) * attention_kernel_width(params));
    tickets = turns + 2 * params.batch * params.heads * query_tiles;
  }

  static int64_t bytes(const AttentionParams& params) {
    const AttentionBackwardWorkspace of_sizes(params, nullptr);
    const int64_t words = of_sizes.rows(params) * (3 + attention_kernel_width(params)) +
                          2 * params.batch * params.heads * of_sizes.query_tiles + 1;
    return words * 4;
  }

 private:
  int64_t rows(const AttentionParams& params) const {
    return params.batch * params.heads * query_tiles * attention_backward_queries(attention_kernel_width(params));
  }
};

// `ordered`: sums of grad_query are added in one order, so that they repeat bit for bit.
template <class T, int D>
cudaError_t attention_backward_sm90(const AttentionBackwardParams& params, int64_t shift, bool ordered, void* workspace,
                                    void* stream);

extern template cudaError_t attention_backward_sm90<__nv_bfloat16, 64>(const AttentionBackwardParams&, int64_t, bool,
                                                                       void*, void*);
extern template cudaError_t attention_backward_sm90<__nv_bfloat16, 128>(const AttentionBackwardParams&, int64_t, bool,
                                                                        void*, void*);
extern template cudaError_t attention_backward_sm90<__half, 64>(const AttentionBackwardParams&, int64_t, bool, void*,
                                                                void*);
extern template cudaError_t attention_backward_sm90<__half, 128>(const AttentionBackwardParams&, int64_t, bool, void*,
                                                                 void*);

}  // namespace fusewright::cuda
