// Parameters of the exact attention kernels. Schemas and meaning: fusewright_kernels/library/attention.py.
// Letters: B batch, H query heads, HK key/value heads, T query length, S key length, D and DV head dimensions.
#pragma once

#include <cstdint>

#include "fusewright/row_view.h"

namespace fusewright {

// (B, heads, length, width) with unit stride along the width; strides in elements.
struct HeadsView {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;

  FUSEWRIGHT_HOST_DEVICE int64_t offset(int64_t batch, int64_t head, int64_t row) const {
    return batch * batch_stride + head * head_stride + row * row_stride;
  }
};

enum class MaskKind { none, boolean, additive };

// (B, H, T, S), a stride of 0 where it is broadcast.
struct MaskView {
  MaskKind kind = MaskKind::none;
  DataType dtype = DataType::float32;  // of an additive mask
  const void* data = nullptr;
  int64_t stride[4] = {};
};

// Where the sequences of packed tensors begin, on the device: those of queries and of keys each `count` + 1 offsets,
// int64 or int32. Rows behind the last offset belong to none.
struct AttentionPacking {
  const void* query_offsets = nullptr;  // nullptr: nothing is packed
  const void* key_offsets = nullptr;
  bool wide_query_offsets = false, wide_key_offsets = false;
  bool bottom_right = false;
  int64_t count = 0;
};

struct AttentionParams {
  int64_t batch, heads, key_heads, queries, keys, width, value_width;
  DataType dtype;
  HeadsView query, key, value;

  MaskView mask;
  const bool* block_mask = nullptr;  // (1 or H, ceil(T / block_size), block_columns)
  int64_t block_size = 0, block_columns = 0, block_head_stride = 0;
  const float* alibi_slopes = nullptr;  // (1 or B, H)
  int64_t alibi_batch_stride = 0;
  const float* sinks = nullptr;  // (H,)
  // (H, padded D), zero behind D: scores are sum_d weight[d] tanh(query[d] + key[d]) instead of products.
  const float* score_weight = nullptr;

  AttentionPacking packing;    // of CUDA kernels; those of the CPU have their tasks
  bool split_float32 = false;  // multiply float32 as three bfloat16 where there are tiles
  float scale, softcap;
  int64_t window_left, window_right;  // -1 is no limit
  uint64_t seed = 0;
  uint64_t keep_threshold = 0;  // of philox words; 0 without dropout
  float keep_scale = 1;         // 1 / (1 - p), 0 for p = 1

  // (B, H, T): a reference r of the row's logits, and sum exp(logit - r).
  float* maximum;
  float* total;
};

struct AttentionForwardParams : AttentionParams {
  HeadsView output;
};

// Keys and values may lie in pages: then their batch counts pages and their rows the tokens of a page, and key j of a
// sequence is row j % page_size of page block_table[batch][j / page_size].
struct AttentionDecodeParams : AttentionForwardParams {
  const int64_t* block_table = nullptr;
  int64_t block_table_stride = 0;
  int64_t page_size = 0;  // 0 without pages
};

struct AttentionBackwardParams : AttentionParams {
  HeadsView output, grad_output;
  const float* grad_lse = nullptr;             // (B, H, T) or nullptr
  HeadsView grad_query, grad_key, grad_value;  // data is nullptr for a gradient nobody wants
  float* grad_sink_rows = nullptr;             // (B, H, T): each row's part of the gradient of its head's sink
  float* grad_score_weight = nullptr;          // (H, D)
};

// One sequence of one batch entry: rows [query_begin, query_begin + query_count) of the query tensor, likewise keys.
// Key j of the sequence lies j - i - shift behind the key that query i is aligned with.
struct AttentionSequence {
  int64_t batch;
  int64_t query_begin, query_count;
  int64_t key_begin, key_count;
  int64_t shift;
};

// Queries that one call takes: `count` of them from `first` within their sequence, of one query head.
struct AttentionForwardTask {
  int64_t sequence;
  int64_t head;
  int64_t first, count;
};

// Keys [first_key, last_key) of one key head for every query that meets it: row r is query r % T of the group's head
// r / T. What it leaves of each row: see attention_decode.cpp.
struct AttentionDecodeTask {
  int64_t sequence;
  int64_t key_head;
  int64_t first_key, last_key;
  float* references;
  float* totals;
  float* sums;  // rows of padded DV
};

// Blocks of queries that one backward call takes: blocks `first`, `first + step`, ... of every query head that meets
// `key_head`. Gradients of keys and values are sums over such calls.
struct AttentionBackwardTask {
  int64_t sequence;
  int64_t key_head;
  int64_t first, step;
  float* key_sums;               // (key_count, padded D), overwritten
  float* value_sums;             // (key_count, padded DV), overwritten
  float* weight_sums = nullptr;  // (H / HK, padded D), overwritten; of the score weight, if that is wanted
};

// A part of an additive mask's gradient: at most one block of queries and keys, or all of them along a dimension that
// the mask is broadcast along. Sums run over `batches` and `heads`.
struct AttentionMaskTask {
  int64_t batch, batches, head, heads;
  int64_t query, queries, key, keys;
  bool one_query, one_key;  // the mask is broadcast along them
  int64_t shift;
  void* target;  // the gradient's element for (query, key)
  int64_t target_stride;
};

// Queries that share one pass over the keys. Fixed, so that neither instruction set nor number of threads decides how a
// row is computed.
constexpr int64_t attention_query_block = 64;
constexpr int64_t attention_key_block = 64;

// Keys of one decoding task.
constexpr int64_t attention_decode_keys = 512;

// Up to this many queries a sequence is served by the decoding kernel.
constexpr int64_t attention_decode_queries = 4;

// Queries of one forward task at most: its blocks share what is done to a block of keys and values before the products.
constexpr int64_t attention_queries_per_task = 4 * attention_query_block;

}  // namespace fusewright
