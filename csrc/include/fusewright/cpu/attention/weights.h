// Weights of one block (keys by queries, or gradients of their scores) as operands of the products that follow.
#pragma once

#include "fusewright/cpu/arena.h"
#include "fusewright/cpu/attention/split_blocks.h"

namespace fusewright::FUSEWRIGHT_ISA {

// As left operand of products over the queries: rows of keys, words along the queries.
template <class T>
class WeightRows {
 public:
  using Word = typename Multiplied<T>::Word;
  using Stored = typename StoredAs<Word>::type;

  explicit WeightRows(Arena& arena)
      : data_(static_cast<Stored*>(arena.bytes(key_block * row_elements() * static_cast<int64_t>(sizeof(Stored))))) {}

  // To be called before the block's weights are stored.
  void begin(const Block& block) { segment_ = 2 * segment_words(block.queries); }

  // Weights of key k and the lanes from v.
  void store(int64_t k, int64_t v, Float weights) const {
#if FUSEWRIGHT_HAS_TILES
    if constexpr (segments<T> > 1) {
      const auto bits = split<T::parts>(weights);
      for (int s = 0; s < segments<T>; ++s) {
        store_part(data_ + k * row_elements() + s * segment_ + v, bits.part[left_part<T>(s)]);
      }
      return;
    }
#endif
    FUSEWRIGHT_ISA::store(data_ + k * row_elements() + v, weights);
  }

  float at(int64_t k, int64_t r) const {
    const Stored* const weight = data_ + k * row_elements() + r;
#if FUSEWRIGHT_HAS_TILES
    if constexpr (segments<T> > 1) {
      float sum = 0.0f;
      // Each part once: where the right factor's is the first.
      for (int s = 0; s < segments<T>; ++s) {
        if (right_part<T>(s) == 0) sum += element(weight + s * segment_);
      }
      return sum;
    }
#endif
    return element(weight);
  }

  LeftOperand operand() const { return {data_, row_elements() * static_cast<int64_t>(sizeof(Stored)), 4}; }

  // Keys by query_block queries; of types that are not split.
  const Stored* data() const { return data_; }

 private:
  static int64_t row_elements() { return words<T>(query_block) * Word::elements; }

  Stored* data_;
  int64_t segment_ = 0;  // elements of a row from one segment to the next
};

// As right operand of products over the keys: words along the keys by lanes of queries.
template <class T>
class WeightLanes {
 public:
  static int64_t floats() { return words<T>(key_block) * query_block; }

  explicit WeightLanes(float* data) : data_(data) {}

  // Forms weight(k) for every key of the block in order and stores them, in the lanes from v.
  template <class Weight>
  void store(const Block& block, int64_t v, Weight weight) const {
    if constexpr (in_pairs<T>) {
      const int64_t segment = segment_words(block.keys);
      for (int64_t k = 0; k < block.keys; k += 2) {
        const Float first = weight(k);
        store_pair(k / 2, v, segment, first, k + 1 < block.keys ? weight(k + 1) : Float{});
      }
      const int64_t used = (block.keys + 1) / 2, stored = segments<T> > 1 ? segment : padded_words<T>(block.keys);
      for (int s = 0; s < segments<T>; ++s) {
        for (int64_t w = used; w < stored; ++w) FUSEWRIGHT_ISA::store(word(s * segment + w, v), Float{});
      }
    } else {
      for (int64_t k = 0; k < block.keys; ++k) FUSEWRIGHT_ISA::store(word(k, v), weight(k));
    }
  }

  float at([[maybe_unused]] const Block& block, int64_t k, int64_t r) const {
#if FUSEWRIGHT_HAS_TILES
    if constexpr (segments<T> > 1) {
      float sum = 0.0f;
      for (int s = 0; s < segments<T>; ++s) {
        if (left_part<T>(s) == 0) sum += element(half(s * segment_words(block.keys) + k / 2, r, k));
      }
      return sum;
    }
#endif
    if constexpr (in_pairs<T>) return element(half(k / 2, r, k));
    return *word(k, r);
  }

  Lanes operand() const { return {data_, query_block}; }

 private:
  float* word(int64_t w, int64_t lane) const { return data_ + w * query_block + lane; }
  const BFloat16* half(int64_t w, int64_t lane, int64_t k) const {
    return reinterpret_cast<const BFloat16*>(word(w, lane)) + k % 2;
  }

  void store_pair(int64_t w, int64_t v, [[maybe_unused]] int64_t segment, Float first, Float second) const {
#if FUSEWRIGHT_HAS_TILES
    if constexpr (segments<T> > 1) {
      const auto low = split<T::parts>(first), high = split<T::parts>(second);
      for (int s = 0; s < segments<T>; ++s) {
        const int p = right_part<T>(s);
        FUSEWRIGHT_ISA::store(word(s * segment + w, v), part_words(low.part[p], high.part[p]));
      }
      return;
    }
#endif
    FUSEWRIGHT_ISA::store_pair(reinterpret_cast<BFloat16*>(word(w, v)), Pair{first, second});
  }

  float* data_;
};

}  // namespace fusewright::FUSEWRIGHT_ISA
