// Few queries over a part of the keys of a cache. Bound by reading keys and values once: a block of four warps has one
// part of one key head, for 16 rows, the queries of all heads that share the keys.
//
// Tensor cores multiply (16 rows, keys) although few rows may be there; their operands come straight from memory, 16
// bytes a load. That works because the order of a product's inner dimension is free, and so is the meaning of the
// output's columns: lane l reads for the logits columns 32 c + 8 (l % 4) + {0..7} of key l / 4, and for the sums
// columns 64 c + 8 (l / 4) + {0..7} of keys 2 (l % 4) + {0, 1, 8, 9}.
// Dao et al., "Flash-Decoding for long-context inference", 2023.
#pragma once

#include "attention_decode.cuh"
#include "attention_softmax.cuh"
#include "fusewright/cuda/mma.cuh"
#include "fusewright/cuda/reduce.cuh"
#include "fusewright/cuda/shared.cuh"
#include "fusewright/cuda/vector.cuh"

namespace fusewright::cuda {

constexpr int attention_decode_rows = 16;
constexpr int attention_decode_warps = 4;
constexpr int attention_decode_keys_at_once = 16;  // of a warp

// 8 columns of a row from `column` on; 0 where it has none.
template <class T>
__device__ __forceinline__ Packed<T, 8> columns_of(const T* row, int column, int width) {
  Packed<T, 8> columns;
  columns.clear();
  if (column < width) columns.load(row + column);
  return columns;
}

// What one warp knows of its rows l / 4 and l / 4 + 8.
template <class T, int D>
class DecodeRows {
 public:
  static constexpr int key_chunks = D / 32, value_chunks = D / 64;

  __device__ __forceinline__ DecodeRows(const AttentionDecodeKernelParams& params, int batch, int key_head,
                                        int first_row, int length)
      : params_(params), batch_(batch), key_head_(key_head), lane_(threadIdx.x % warp_size) {
    for (int r = 0; r < 2; ++r) {
      // Behind the last row comes the last again, and sees no key.
      const int count = params.group * params.queries, row = min(first_row + lane_ / 4 + 8 * r, count - 1);
      const int head = key_head * params.group + row / params.queries, i_query = row % params.queries;
      position_[r] = first_row + lane_ / 4 + 8 * r < count ? params.position(length, i_query) : -1;
      slope_[r] = params.slope(batch, head);
      const T* query = static_cast<const T*>(params.query.data) + params.query.offset(batch, head, i_query);
#pragma unroll
      for (int c = 0; c < key_chunks; ++c) {
        query_[r][c] = columns_of(query, 32 * c + 8 * (lane_ % 4), params.width);
      }
    }
  }

  // Keys [first, first + 16) of those before `end`; behind them comes the last again, and is hidden.
  __device__ __forceinline__ void add_keys(int first, int end) {
    float logits[2][4] = {};
    Packed<T, 8> values[4][value_chunks];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first + 2 * (lane_ % 4) + i % 2 + 8 * (i / 2);
      const T* row = params_.row<T>(params_.value, batch_, key_head_, min(key, end - 1));
#pragma unroll
      for (int c = 0; c < value_chunks; ++c) {
        values[i][c] = columns_of(row, 64 * c + 8 * (lane_ / 4), params_.value_width);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int key = first + 8 * j + lane_ / 4;
      const T* row = params_.row<T>(params_.key, batch_, key_head_, min(key, end - 1));
#pragma unroll
      for (int c = 0; c < key_chunks; ++c) {
        const Packed<T, 8> part = columns_of(row, 32 * c + 8 * (lane_ % 4), params_.width);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t a[4] = {query_[0][c].words[2 * half], query_[1][c].words[2 * half],
                                 query_[0][c].words[2 * half + 1], query_[1][c].words[2 * half + 1]};
          const uint32_t b[2] = {part.words[2 * half], part.words[2 * half + 1]};
          mma<T>(logits[j], a, b);
        }
      }
    }
    uint32_t weights[4];
    weigh(logits, first, end, weights);
#pragma unroll
    for (int c = 0; c < value_chunks; ++c) {
#pragma unroll
      for (int column = 0; column < 8; ++column) {
        const auto pair = [&](int i) {
          const uint32_t low = values[i][c].words[column / 2], high = values[i + 1][c].words[column / 2];
          return column % 2 == 0 ? (low & 0xFFFFu) | high << 16 : low >> 16 | (high & 0xFFFF0000u);
        };
        const uint32_t b[2] = {pair(0), pair(2)};
        mma<T>(sums_[c][column], weights, b);
      }
    }
  }

  // The warps' results together, as the part's.
  __device__ __forceinline__ void write(int first_row, int part) {
    struct Results {
      float reference[attention_decode_warps][attention_decode_rows],
          total[attention_decode_warps][attention_decode_rows];
      float sums[attention_decode_warps][attention_decode_rows][D];
    };
    auto& results = block_shared<Results>();
    const int warp = threadIdx.x / warp_size;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = total_[r] + __shfl_xor_sync(0xFFFFFFFFu, total_[r], 1);
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
      const int row = lane_ / 4 + 8 * r;
      if (lane_ % 4 == 0) {
        results.reference[warp][row] = reference_[r];
        results.total[warp][row] = total;
      }
#pragma unroll
      for (int c = 0; c < value_chunks; ++c) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          results.sums[warp][row][64 * c + 16 * (lane_ % 4) + i] = sums_[c][i % 8][2 * r + i / 8];
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < attention_decode_rows * D; i += attention_decode_warps * warp_size) {
      const int row = i / D, column = i % D;
      if (first_row + row >= params_.group * params_.queries) break;
      float reference = -INFINITY, total = 0.0f, sum = 0.0f;
      for (int w = 0; w < attention_decode_warps; ++w) reference = fmaxf(reference, results.reference[w][row]);
      for (int w = 0; w < attention_decode_warps; ++w) {
        const float own = results.reference[w][row];
        const float factor = own == -INFINITY ? 0.0f : exp2_flushed(own - reference);
        // Without any key of its own a warp's sums are 0.
        total += results.total[w][row] * factor;
        sum += results.sums[w][row][column] * factor;
      }
      const int head = key_head_ * params_.group + (first_row + row) / params_.queries;
      const int i_query = (first_row + row) % params_.queries;
      const int64_t place =
          ((static_cast<int64_t>(batch_) * params_.heads + head) * params_.queries + i_query) * params_.parts + part;
      if (column < params_.value_width) params_.part_sums[place * params_.value_width + column] = sum;
      if (column == 0) {
        params_.part_references[place] = reference;
        params_.part_totals[place] = total;
      }
    }
  }

 private:
  __device__ __forceinline__ void weigh(float (&logits)[2][4], int first, int end, uint32_t (&weights)[4]) {
    float factors[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int begin = params_.first_key(position_[r]);
      float larger = reference_[r];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first + 8 * (i / 2) + 2 * (lane_ % 4) + i % 2;
        float& logit = logits[i / 2][2 * r + i % 2];
        const bool visible = key >= begin && key <= position_[r] && key < end;
        logit = visible ? params_.logit(logit, slope_[r], position_[r] - key) : -INFINITY;
        larger = fmaxf(larger, logit);
      }
      larger = fmaxf(larger, __shfl_xor_sync(0xFFFFFFFFu, larger, 1));
      larger = fmaxf(larger, __shfl_xor_sync(0xFFFFFFFFu, larger, 2));
      // Where no key was seen there is nothing to subtract, and -inf - (-inf) would be NaN.
      const float subtracted = larger == -INFINITY ? 0.0f : larger;
      factors[r] = exp2_flushed(reference_[r] - subtracted);
      reference_[r] = larger;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float* pair = logits[j] + 2 * r;
        pair[0] = exp2_flushed(pair[0] - subtracted);
        pair[1] = exp2_flushed(pair[1] - subtracted);
        sum += pair[0] + pair[1];
        weights[r + 2 * j] = packed_pair<T>(pair[0], pair[1]);
      }
      total_[r] = total_[r] * factors[r] + sum;
    }
#pragma unroll
    for (int c = 0; c < value_chunks; ++c) {
#pragma unroll
      for (int column = 0; column < 8; ++column) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[c][column][i] *= factors[i / 2];
      }
    }
  }

  const AttentionDecodeKernelParams& params_;
  int batch_, key_head_, lane_;
  int position_[2];
  float slope_[2];
  Packed<T, 8> query_[2][key_chunks];
  float reference_[2] = {-INFINITY, -INFINITY};  // in the exponent's unit
  float total_[2] = {};                          // of the lane's keys
  float sums_[value_chunks][8][4] = {};          // column 64 c + 8 (2 (l % 4) + i % 2) +
                                                 // column of row l / 4 + 8 (i / 2)
};

template <class T, int D>
__global__ void __launch_bounds__(attention_decode_warps* warp_size)
    attention_decode_part_kernel(const __grid_constant__ AttentionDecodeKernelParams params) {
  const int row_tiles = (params.group * params.queries + attention_decode_rows - 1) / attention_decode_rows;
  const int key_head = blockIdx.y / row_tiles, first_row = blockIdx.y % row_tiles * attention_decode_rows;
  const int batch = blockIdx.z, length = static_cast<int>(params.lengths[batch]);
  const int part = params.first_part(length) + static_cast<int>(blockIdx.x);
  const int end = min(length, (part + 1) * attention_part_keys);
  if (part * attention_part_keys >= end) return;
  DecodeRows<T, D> rows(params, batch, key_head, first_row, length);
  constexpr int step = attention_decode_warps * attention_decode_keys_at_once;
  for (int first =
           part * attention_part_keys + static_cast<int>(threadIdx.x) / warp_size * attention_decode_keys_at_once;
       first < end; first += step) {
    rows.add_keys(first, end);
  }
  rows.write(first_row, blockIdx.x);
}

}  // namespace fusewright::cuda
