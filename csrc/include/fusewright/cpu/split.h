// Elements that products in tiles take as sums of bfloat16: float16 exactly as two, float32 exactly as three.
//
// Tiles multiply bfloat16 alone, sixteen times as fast as vectors multiply float32. With a = a0 + a1 (+ a2), each part
// a bfloat16 of about 2^-8 of the one before, a b is the sum of the products of parts whose orders add up to less than
// the number of parts: three products for float16, six for float32. What is left out is below 2^-18 and 2^-25 of a b.
// Such a product is one product of bfloat16 over a longer sum, in segments: parts 1 0 0 of one factor meet 0 1 0 of the
// other. Henry, Tang, Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations", 2019.
#pragma once

#include "fusewright/cpu/words.h"

namespace fusewright::FUSEWRIGHT_ISA {

// An element in memory as it is, to be multiplied in parts.
template <class T, int Parts>
struct Split {
  static constexpr int parts = Parts;
  T value;
};

template <class T>
struct StoredElement {
  using type = T;
};
template <class T, int Parts>
struct StoredElement<Split<T, Parts>> {
  using type = T;
};

// The same rows, to be multiplied whole.
template <class T>
inline Rows<typename StoredElement<T>::type> as_stored(const Rows<T>& rows) {
  using Stored = typename StoredElement<T>::type;
  static_assert(sizeof(T) == sizeof(Stored));
  return {reinterpret_cast<const Stored*>(rows.data), rows.stride, rows.count, rows.width};
}

#if FUSEWRIGHT_HAS_TILES

// Pairs of parts. Their smallest products would be lost one by one in a large sum that they start from.
struct PartWord : PairWord {
  static constexpr bool added_last = true;
};
template <class T, int Parts>
struct Multiplied<Split<T, Parts>> {
  using Word = PartWord;
};
template <>
struct StoredAs<PartWord> {
  using type = BFloat16;
};
template <class T, int Parts>
constexpr int segments<Split<T, Parts>> = Parts * (Parts + 1) / 2;
template <class T, int Parts>
constexpr bool as_precise_as_float<Split<T, Parts>> = is_float<T>;

// Which part a segment of the left and of the right factor holds. The smallest products come first: the sum is then
// rounded at its full size by the last segment alone.
template <class T>
constexpr int left_part(int segment) {
  constexpr int of_three[] = {2, 1, 0, 1, 0, 0};
  return of_three[6 - segments<T> + segment];
}
template <class T>
constexpr int right_part(int segment) {
  constexpr int of_three[] = {0, 1, 2, 0, 1, 0};
  return of_three[6 - segments<T> + segment];
}

template <class T, int Parts>
inline Float load(const Split<T, Parts>* source) {
  return load(&source->value);
}
template <class T, int Parts>
inline void store(Split<T, Parts>* target, Float value) {
  store(&target->value, value);
}
template <class T, int Parts>
inline float element(const Split<T, Parts>* source) {
  return element(&source->value);
}

// Parts as float32 whose lower half is zero. Rounded to nearest and not cut off: what the products leave out then has
// either sign, and is a fourth and an eighth as large.
template <int Parts>
struct PartBits {
  UInt part[Parts];
};
template <int Parts>
FUSEWRIGHT_ALWAYS_INLINE PartBits<Parts> split(Float x) {
  PartBits<Parts> bits;
#pragma GCC unroll 3
  for (int p = 0; p < Parts; ++p) {
    const Float part = bfloat16_to_float(float_to_bfloat16(x));
    bits.part[p] = bit_cast<UInt>(part);
    x -= part;
  }
  return bits;
}

inline void store_part(BFloat16* target, UInt part) {
  const Short bits = __builtin_convertvector(part >> 16, Short);
  memcpy(target, &bits, sizeof(bits));
}

// Two parts as words, `first` in the lower half.
inline Float part_words(UInt first, UInt second) { return bit_cast<Float>(first >> 16 | second); }

#endif

}  // namespace fusewright::FUSEWRIGHT_ISA
