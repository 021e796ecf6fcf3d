// Parameters of the LSH attention kernels. Schemas and meaning: fusewright_kernels/library/lsh_attention.py.
// Letters: B batch, H heads, T length, D and DV head dimensions, R rounds, C chunk length.
#pragma once

#include <cstdint>

#include "fusewright/attention.h"

namespace fusewright {

// Hashing of the vectors of one head.
struct LshHashParams {
  int64_t width, rounds;
  DataType dtype;
  HeadsView vectors;
  // One digit of the bucket: `rotations` (R, D, padded columns) float32, zero behind the last column.
  const float* rotations;
  int64_t columns;      // NB_f / 2
  int64_t place_value;  // of the digit
  bool first_digit;     // else the digit is added to what is there
};

// One digit of the buckets of all vectors, on a GPU.
struct LshDigitParams {
  int64_t batch, heads, length, width, rounds;
  DataType dtype;
  HeadsView vectors;
  const float* rotations;  // (H, D, R, columns)
  int64_t rotation_head_stride, rotation_row_stride, rotation_round_stride, rotation_column_stride;
  int64_t columns;                    // NB_f / 2
  int64_t place_value;                // of the digit
  bool first_digit;                   // else the digit is added to what is there
  const bool* key_padding = nullptr;  // (B, T), given with the last digit: into the bucket behind the last
  int64_t* buckets;                   // (B, H, R, T)
};

struct LshSortParams {
  const int64_t* buckets;  // (rows, T), each in [0, n_buckets)
  int64_t rows, length, n_buckets;
  int32_t* order;  // (rows, T)
};

struct LshAttentionParams {
  int64_t batch, heads, length, width, value_width;
  int64_t rounds, chunk_length, chunks_before, chunks_after;
  DataType dtype;
  HeadsView query_key, value;
  const int32_t* order;               // (B, H, R, T)
  const int64_t* buckets = nullptr;   // (B, H, R, T), or nullptr where all of a window meet
  const int32_t* chunk_of = nullptr;  // (B, H, R, T): chunk of each position, given where each key counts once
  const bool* key_padding = nullptr;  // (B, T)
  bool causal;
  float scale;
  uint64_t seed = 0;
  uint64_t keep_threshold = 0;  // of philox words; 0 without dropout
  float keep_scale = 1;         // 1 / (1 - p), 0 for p = 1

  float* inverse_norm;  // (B, H, T): 1 / |x|, 0 without a direction
  // (B, H, T): a reference r of the row's logits, and sum exp(logit - r); 0 for a row that sees itself alone.
  float* reference;
  float* total;

  int64_t chunks_per_round() const { return (length + chunk_length - 1) / chunk_length; }
  int64_t ring() const { return rounds * chunks_per_round(); }
  int64_t window() const { return chunks_before + 1 + chunks_after; }
  int64_t row(int64_t b, int64_t h) const { return (b * heads + h) * length; }
  int64_t row(int64_t b, int64_t h, int64_t round) const { return ((b * heads + h) * rounds + round) * length; }
};

struct LshForwardParams : LshAttentionParams {
  HeadsView output;
};

struct LshBackwardParams : LshAttentionParams {
  HeadsView output, grad_output, grad_query_key, grad_value;
  const float* grad_lse = nullptr;  // (B, H, T) or nullptr
};

// Float32 sums of one head, rows of padded width; the first round overwrites them, the later ones add.
struct LshSums {
  float* query_key;  // (T, padded D), backward only
  float* value;      // (T, padded DV)
};

// Chunks [first, last) of one round of one head, counted within the round.
struct LshTask {
  int64_t batch, head, round, first, last;
  LshSums sums;
  // Backward: what the task adds to keys of chunks outside of it, (before + after) chunks of padded C rows of keys and
  // then as many of values. Other tasks may own those rows, so they are added behind a barrier, in order.
  float* edge_keys = nullptr;
  float* edge_values = nullptr;
};

// Chunks of one task. Fixed, so that the number of threads does not decide in which order sums are added.
constexpr int64_t lsh_chunks_per_task = 16;

}  // namespace fusewright
