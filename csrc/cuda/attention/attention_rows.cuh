// What the attention kernels know of their rows: which keys a query sees, and where results go.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "fusewright/attention.h"

namespace fusewright::cuda {

struct AttentionRow {
  int batch, head, index;
};

struct AttentionRows {
  HeadsView query, key, value, output;
  float *maximum, *total;  // (B, H, length)
  int heads, group, queries, keys, width, value_width, length;
  // Query i sees keys [i + before, i + behind), of those there are.
  int before, behind;
  float scale, scale_log2;

  AttentionRows() = default;

  AttentionRows(const AttentionParams& params, const HeadsView& output, int64_t shift)
      : query(params.query),
        key(params.key),
        value(params.value),
        output(output),
        maximum(params.maximum),
        total(params.total),
        heads(static_cast<int>(params.heads)),
        group(static_cast<int>(params.heads / params.key_heads)),
        queries(static_cast<int>(params.queries)),
        keys(static_cast<int>(params.keys)),
        width(static_cast<int>(params.width)),
        value_width(static_cast<int>(params.value_width)),
        length(static_cast<int>(params.queries)),
        scale(params.scale),
        scale_log2(static_cast<float>(params.scale * 1.4426950408889634)) {
    // Beyond any sum of two lengths a limit is none.
    constexpr int64_t unlimited = int64_t{1} << 30;
    const auto clamped = [&](int64_t limit) { return static_cast<int>(std::clamp(limit, -unlimited, unlimited)); };
    before = params.window_left < 0 ? clamped(-unlimited) : clamped(shift - params.window_left);
    behind = params.window_right < 0 ? clamped(unlimited) : clamped(shift + params.window_right + 1);
  }

  __device__ __forceinline__ int first_key(int i_query) const { return max(0, i_query + before); }
  __device__ __forceinline__ int end_key(int i_query) const { return min(keys, i_query + behind); }

  // The queries that see a key.
  __device__ __forceinline__ int first_query(int i_key) const { return max(0, i_key - behind + 1); }
  __device__ __forceinline__ int end_query(int i_key) const {
    return i_key < keys ? min(queries, i_key - before + 1) : 0;
  }

  // Whether a tile of `tile_queries` queries by `tile_keys` keys has pairs that do not take part.
  __device__ __forceinline__ bool cuts(int i_first_query, int tile_queries, int i_first_key, int tile_keys) const {
    return i_first_key + tile_keys > end_key(i_first_query) ||
           i_first_key < first_key(i_first_query + tile_queries - 1);
  }

  // Of a row in (B, H, length).
  __device__ __forceinline__ int64_t place(const AttentionRow& row) const {
    return (static_cast<int64_t>(row.batch) * heads + row.head) * length + row.index;
  }

  __device__ __forceinline__ void write_statistics(const AttentionRow& row, float reference, float sum) const {
    maximum[place(row)] = reference;
    total[place(row)] = sum;
  }
};

}  // namespace fusewright::cuda
