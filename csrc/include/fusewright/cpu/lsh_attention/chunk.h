// One chunk of sorted positions as the keys of LSH attention, gathered once for all chunks that meet it.
#pragma once

#include "fusewright/cpu/arena.h"
#include "fusewright/cpu/attention/blocks.h"
#include "fusewright/lsh_attention.h"

namespace fusewright::FUSEWRIGHT_ISA {

// Which forms of the keys and values the products of a pass take.
enum class Pass { forward, backward };

template <class T, Pass pass>
class Chunk {
 public:
  Chunk() = default;
  Chunk(const LshAttentionParams& params, Arena& arena) {
    const int64_t blocks = (params.chunk_length + key_block - 1) / key_block;
    const auto take = [&](int64_t count, int64_t size) { return arena.bytes(count * size); };
    positions_ = static_cast<int32_t*>(take(blocks * key_block, sizeof(int32_t)));
    buckets_ = params.buckets == nullptr ? nullptr : static_cast<int32_t*>(take(blocks * key_block, sizeof(int32_t)));
    factors_ = static_cast<float*>(take(blocks * key_block, sizeof(float)));
    met_ = static_cast<bool*>(take(blocks * key_block, sizeof(bool)));
    keys_ = static_cast<T*>(take(blocks * key_block * params.width, sizeof(T)));
    values_ = static_cast<T*>(take(blocks * key_block * params.value_width, sizeof(T)));
    operands_ = static_cast<Operands*>(take(blocks, sizeof(Operands)));
    key_rows_ = static_cast<char*>(take(blocks, scratch_bytes(params.width)));
    value_scratch_ = static_cast<char*>(take(blocks, scratch_bytes(params.value_width)));
    key_columns_ = pass == Pass::backward ? static_cast<char*>(take(blocks, scratch_bytes(params.width))) : nullptr;
  }

  // Reads chunk `number` of the ring for one head.
  void gather(const LshAttentionParams& params, int64_t batch, int64_t head, int64_t number) {
    round_ = number / params.chunks_per_round();
    const int64_t first = number % params.chunks_per_round() * params.chunk_length;
    count_ = params.length - first < params.chunk_length ? params.length - first : params.chunk_length;
    width_ = params.width;
    value_width_ = params.value_width;
    const int64_t row = params.row(batch, head), round_row = params.row(batch, head, round_);
    const int32_t* order = params.order + round_row + first;
    memcpy(positions_, order, count_ * sizeof(int32_t));
    const T* keys = static_cast<const T*>(params.query_key.data) + params.query_key.offset(batch, head, 0);
    const T* values = static_cast<const T*>(params.value.data) + params.value.offset(batch, head, 0);
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t position = positions_[i];
      // The rows of a chunk lie anywhere: those behind are asked for while this one is copied.
      constexpr int64_t ahead = 8;
      if (i + ahead < count_) {
        __builtin_prefetch(keys + order[i + ahead] * params.query_key.row_stride);
        __builtin_prefetch(values + order[i + ahead] * params.value.row_stride);
      }
      memcpy(keys_ + i * width_, keys + position * params.query_key.row_stride, width_ * sizeof(T));
      memcpy(values_ + i * value_width_, values + position * params.value.row_stride, value_width_ * sizeof(T));
      factors_[i] = params.scale * params.inverse_norm[row + position];
      met_[i] = params.key_padding == nullptr || !params.key_padding[batch * params.length + position];
      if (buckets_ != nullptr) buckets_[i] = static_cast<int32_t>(params.buckets[round_row + position]);
    }
    for (int64_t b = 0; b < blocks(); ++b) prepare(operands_[b], b);
  }

  int64_t round() const { return round_; }
  int64_t count() const { return count_; }
  int64_t blocks() const { return (count_ + key_block - 1) / key_block; }
  int64_t count_of(int64_t block) const {
    const int64_t rest = count_ - block * key_block;
    return rest < key_block ? rest : key_block;
  }

  const int32_t* positions(int64_t block) const { return positions_ + block * key_block; }
  const int32_t* buckets(int64_t block) const { return buckets_ + block * key_block; }
  // scale / |x| of each key, by which its products become logits.
  const float* factors(int64_t block) const { return factors_ + block * key_block; }
  // Whether anybody meets the key: padding is met by nobody.
  const bool* met(int64_t block) const { return met_ + block * key_block; }

  Rows<T> keys(int64_t block) const { return {keys_ + block * key_block * width_, width_, count_of(block), width_}; }
  Rows<T> values(int64_t block) const {
    return {values_ + block * key_block * value_width_, value_width_, count_of(block), value_width_};
  }
  bool keys_finite(int64_t block) const { return operands_[block].keys_finite; }
  bool values_finite(int64_t block) const { return operands_[block].values_finite; }
  LeftOperand key_rows(int64_t block) const { return operands_[block].key_rows; }
  // For the backward: the product that gives gradients of queries.
  LeftOperand key_columns(int64_t block) const { return operands_[block].key_columns; }
  // Columns for the forward's sums of values, rows for the backward's gradients of weights.
  LeftOperand values_operand(int64_t block) const { return operands_[block].values; }

 private:
  struct Operands {
    LeftOperand key_rows, values, key_columns;
    bool keys_finite, values_finite;
  };

  static int64_t scratch_bytes(int64_t width) { return (left_scratch_bytes<T>(width) + 63) / 64 * 64; }

  void prepare(Operands& operands, int64_t block) const {
    const Rows<T> block_keys = keys(block), block_values = values(block);
    operands.keys_finite = all_finite(block_keys);
    operands.values_finite = all_finite(block_values);
    operands.key_rows = left_rows(block_keys, key_rows_ + block * scratch_bytes(width_));
    char* const value_scratch = value_scratch_ + block * scratch_bytes(value_width_);
    if constexpr (pass == Pass::forward) {
      operands.values = left_columns(block_values, value_scratch);
    } else {
      operands.values = left_rows(block_values, value_scratch);
      operands.key_columns = left_columns(block_keys, key_columns_ + block * scratch_bytes(width_));
    }
  }

  int64_t round_ = 0, count_ = 0, width_ = 0, value_width_ = 0;
  int32_t *positions_ = nullptr, *buckets_ = nullptr;
  float* factors_ = nullptr;
  bool* met_ = nullptr;
  T *keys_ = nullptr, *values_ = nullptr;
  Operands* operands_ = nullptr;                                                  // of each block
  char *key_rows_ = nullptr, *value_scratch_ = nullptr, *key_columns_ = nullptr;  // where operands are not in place
};

}  // namespace fusewright::FUSEWRIGHT_ISA
