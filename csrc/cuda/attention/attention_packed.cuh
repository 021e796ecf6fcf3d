// Packed sequences: which of them a block works on, and its rows as if they were a tensor of their own.
//
// Tiles of `Tile` rows begin where a sequence does. Sequence s takes the numbers of tiles from offset s / Tile + s on:
// enough for all of its tiles, whatever the lengths, so that a grid needs to know their sum only. Rows behind the last
// offset are one more sequence, without keys.
#pragma once

#include "attention_rows.cuh"

namespace fusewright::cuda {

struct AttentionPackedSequence {
  AttentionRows rows;
  int query_begin, key_begin;
  int tile;  // of the sequence; one that it may not have
};

class AttentionPackedSequences {
 public:
  AttentionPackedSequences() = default;
  explicit AttentionPackedSequences(const AttentionParams& params)
      : packing_(params.packing),
        count_(static_cast<int>(params.packing.count)),
        queries_(static_cast<int>(params.queries)) {}

  template <int Tile>
  int64_t tiles() const {
    return int64_t{queries_} / Tile + count_ + 1;
  }

  // For a tile of queries, by its number in the grid.
  template <class T, int Tile>
  __device__ __forceinline__ void find(const AttentionRows& all, int number, AttentionPackedSequence& found) const {
    int sequence = 0;
    for (int end = count_ + 1; end - sequence > 1;) {
      const int middle = sequence + (end - sequence) / 2;
      if (first_tile<Tile>(middle) <= number) {
        sequence = middle;
      } else {
        end = middle;
      }
    }
    const bool has_keys = sequence < count_;
    const int query_begin = query_offset(sequence), key_begin = has_keys ? key_offset(sequence) : 0;
    AttentionRows& rows = found.rows;
    rows = all;
    rows.queries = query_offset(sequence + 1) - query_begin;
    rows.keys = has_keys ? key_offset(sequence + 1) - key_begin : 0;
    move<T>(rows.query, query_begin);
    move<T>(rows.output, query_begin);
    move<T>(rows.key, key_begin);
    move<T>(rows.value, key_begin);
    rows.maximum += query_begin;
    rows.total += query_begin;
    const int shift = packing_.bottom_right ? rows.keys - rows.queries : 0;
    rows.before += shift;
    rows.behind += shift;
    found.query_begin = query_begin;
    found.key_begin = key_begin;
    found.tile = number - first_tile<Tile>(sequence);
  }

 private:
  static __device__ __forceinline__ int offset_at(const void* offsets, bool wide, int i) {
    return wide ? static_cast<int>(static_cast<const int64_t*>(offsets)[i]) : static_cast<const int*>(offsets)[i];
  }
  __device__ __forceinline__ int query_offset(int i) const {
    return i > count_ ? queries_ : offset_at(packing_.query_offsets, packing_.wide_query_offsets, i);
  }
  __device__ __forceinline__ int key_offset(int i) const {
    return offset_at(packing_.key_offsets, packing_.wide_key_offsets, i);
  }
  template <int Tile>
  __device__ __forceinline__ int first_tile(int sequence) const {
    return query_offset(sequence) / Tile + sequence;
  }
  template <class T>
  static __device__ __forceinline__ void move(HeadsView& view, int rows) {
    view.data = static_cast<T*>(view.data) + rows * view.row_stride;
  }

  AttentionPacking packing_;
  int count_ = 0, queries_ = 0;
};

}  // namespace fusewright::cuda
