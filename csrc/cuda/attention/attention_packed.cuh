// Packed sequences: which of them a block works on, and its rows as if they were a tensor of their own.
//
// Tiles of `Tile` rows begin where a sequence does. Sequence s takes the numbers of tiles from offset s / Tile + s on:
// enough for all of its tiles, whatever the lengths, so that a grid needs to know their sum only. Rows behind the last
// offset are one more sequence, in which nothing sees anything.
#pragma once

#include "attention_rows.cuh"

namespace fusewright::cuda {

// A sequence, and a tile of it, which it may not have.
struct AttentionPackedTile {
  int sequence, tile;
};

class AttentionPackedSequences {
 public:
  AttentionPackedSequences() = default;
  explicit AttentionPackedSequences(const AttentionParams& params)
      : packing_(params.packing),
        count_(static_cast<int>(params.packing.count)),
        queries_(static_cast<int>(params.queries)),
        keys_(static_cast<int>(params.keys)) {}

  // Numbers of tiles of all sequences, of a tensor of so many rows.
  int64_t tiles(int64_t rows, int64_t tile) const { return rows / tile + count_ + 1; }

  // Where a sequence begins.
  __device__ __forceinline__ int query_begin(int sequence) const {
    return sequence > count_ ? queries_ : offset_at(packing_.query_offsets, packing_.wide_query_offsets, sequence);
  }
  __device__ __forceinline__ int key_begin(int sequence) const {
    return sequence > count_ ? keys_ : offset_at(packing_.key_offsets, packing_.wide_key_offsets, sequence);
  }

  template <int Tile>
  __device__ __forceinline__ int first_query_tile(int sequence) const {
    return query_begin(sequence) / Tile + sequence;
  }

  // The tile of queries, or of keys, with a number in the grid.
  template <int Tile>
  __device__ __forceinline__ AttentionPackedTile query_tile(int number) const {
    return find<Tile>(number, [&](int sequence) { return query_begin(sequence); });
  }
  template <int Tile>
  __device__ __forceinline__ AttentionPackedTile key_tile(int number) const {
    return find<Tile>(number, [&](int sequence) { return key_begin(sequence); });
  }

  // The rows of one sequence, of those of all.
  template <class T>
  __device__ __forceinline__ void narrow(AttentionRows& rows, int sequence) const {
    const int first_query = query_begin(sequence), first_key = key_begin(sequence);
    rows.queries = query_begin(sequence + 1) - first_query;
    rows.keys = key_begin(sequence + 1) - first_key;
    move<T>(rows.query, first_query);
    move<T>(rows.output, first_query);
    move<T>(rows.key, first_key);
    move<T>(rows.value, first_key);
    rows.maximum += first_query;
    rows.total += first_query;
    const int shift = packing_.bottom_right ? rows.keys - rows.queries : 0;
    rows.before += shift;
    rows.behind += shift;
    const bool behind_the_last = sequence == count_;
    if (behind_the_last) rows.behind = rows.before;
  }

  template <class T>
  static __device__ __forceinline__ void move(HeadsView& view, int rows) {
    if (view.data != nullptr) view.data = static_cast<T*>(view.data) + rows * view.row_stride;
  }

 private:
  static __device__ __forceinline__ int offset_at(const void* offsets, bool wide, int i) {
    return wide ? static_cast<int>(static_cast<const int64_t*>(offsets)[i]) : static_cast<const int*>(offsets)[i];
  }
  template <int Tile, class Begin>
  __device__ __forceinline__ AttentionPackedTile find(int number, Begin begin) const {
    int sequence = 0;
    for (int end = count_ + 1; end - sequence > 1;) {
      const int middle = sequence + (end - sequence) / 2;
      if (begin(middle) / Tile + middle <= number) {
        sequence = middle;
      } else {
        end = middle;
      }
    }
    return {sequence, number - (begin(sequence) / Tile + sequence)};
  }

  AttentionPacking packing_;
  int count_ = 0, queries_ = 0, keys_ = 0;
};

}  // namespace fusewright::cuda
