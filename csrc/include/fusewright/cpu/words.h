// Elements of tensors as the words that products take: conversion, padding, interleaving and transposition.
#pragma once

#include "fusewright/cpu/product.h"

namespace fusewright::FUSEWRIGHT_ISA {

// How elements of T are multiplied: bfloat16 in pairs where the processor can, else everything as float32.
template <class T>
struct Multiplied {
  using Word = FloatWord;
};
#if defined(__AVX512BF16__)
template <>
struct Multiplied<BFloat16> {
  using Word = PairWord;
};
#endif

// The elements that such words hold.
template <class Word>
struct StoredAs {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct StoredAs<PairWord> {
  using type = BFloat16;
};
#endif

// The element type of left operands of T.
template <class T>
using Stored = typename StoredAs<typename Multiplied<T>::Word>::type;

template <class T>
constexpr bool in_pairs = Multiplied<T>::Word::elements == 2;

template <class T>
constexpr bool is_float = false;
template <>
constexpr bool is_float<float> = true;

// Whether results of T are as precise as float32, and so what they are made of has to be.
template <class T>
constexpr bool as_precise_as_float = is_float<T>;

// Words of one segment of a sum, and how many segments it has: more than one where elements are split (split.h).
template <class T>
constexpr int segments = 1;
inline int64_t segment_words(int64_t elements) { return whole_tiles((elements + 1) / 2); }

template <class T>
inline int64_t words(int64_t elements) {
  if constexpr (segments<T> > 1) return segments<T> * segment_words(elements);
  return in_pairs<T> ? (elements + 1) / 2 : elements;
}

// Whether products of T run in tiles, which take whole tiles of both operands.
template <class T>
constexpr bool in_tiles = in_pairs<T> && has_tiles;

// Words and rows with the padding that products of T need.
template <class T>
inline int64_t padded_words(int64_t elements) {
  return in_tiles<T> ? whole_tiles(words<T>(elements)) : words<T>(elements);
}
template <class T>
inline int64_t padded_rows(int64_t rows) {
  return in_tiles<T> ? whole_tiles(rows) : rows;
}

inline int64_t whole_vectors(int64_t elements) { return (elements + lanes - 1) / lanes * lanes; }

// A block of rows of a tensor.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int64_t count;
  int64_t width;

  const T* row(int64_t index) const { return data + index * stride; }
};

inline float element(const float* source) { return *source; }
inline float element(const BFloat16* source) {
  const uint32_t word = static_cast<uint32_t>(source->bits) << 16;
  return bit_cast<float>(word);
}
inline float element(const Float16* source) { return load_partial(source, 1)[0]; }

inline void to_floats(float* target, const float* source, int64_t count) {
  // A tensor without elements has no address, which memcpy may not be given even for nothing.
  if (count > 0) memcpy(target, source, count * sizeof(float));
}
template <class T>
inline void to_floats(float* target, const T* source, int64_t count) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(target + i, load(source + i));
  if (i < count) store_partial(target + i, load_partial(source + i, count - i), count - i);
}

// Two rows of 16-bit elements as words: element i of `first` below that of `second`, which may be absent.
template <class T>
inline void interleave_rows(uint32_t* target, const T* first, const T* second, int64_t width) {
  if (second == nullptr) {
    for (int64_t i = 0; i < width; ++i) target[i] = first[i].bits;
  } else {
    for (int64_t i = 0; i < width; ++i) target[i] = first[i].bits | static_cast<uint32_t>(second[i].bits) << 16;
  }
}

// A vector of words along the width of a row, in the form that products take.
template <class T>
inline Float load_words(const T* row) {
  if constexpr (in_pairs<T>) {
    Float words;
    memcpy(&words, row, sizeof(words));
    return words;
  } else {
    return load(row);
  }
}

template <class T>
inline Float load_last_words(const T* row, int64_t count) {
  if constexpr (in_pairs<T>) {
    T buffer[2 * lanes] = {};
    memcpy(buffer, row, count * sizeof(T));
    return load_words(buffer);
  } else {
    return load_partial(row, count);
  }
}

template <class T>
constexpr int64_t elements_per_vector = in_pairs<T> ? 2 * lanes : lanes;

// The off-diagonal quarters of the blocks of 2 * Half rows and columns change places, down to blocks of one word. All
// is unrolled, so that rows stay in registers and the orders are constants.
template <int Half = lanes / 2>
FUSEWRIGHT_ALWAYS_INLINE void transpose(Float* rows) {
  if constexpr (Half >= 1) {
    Int upper, lower;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      upper[i] = (i & Half) == 0 ? i : lanes + i - Half;
      lower[i] = (i & Half) == 0 ? i + Half : lanes + i;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if ((i & Half) == 0) {
        const Float a = rows[i], b = rows[i + Half];
        rows[i] = __builtin_shuffle(a, b, upper);
        rows[i + Half] = __builtin_shuffle(a, b, lower);
      }
    }
    transpose<Half / 2>(rows);
  }
}

// Rows of words become columns: row i of the result is column i, up to 16 of either.
inline void transpose_words(const uint32_t* source, int64_t source_stride, uint32_t* target, int64_t target_stride) {
  Float rows[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) memcpy(&rows[i], source + i * source_stride, sizeof(Float));
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) memcpy(target + i * target_stride, &rows[i], sizeof(Float));
}

}  // namespace fusewright::FUSEWRIGHT_ISA
