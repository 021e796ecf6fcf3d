// Additive scores: score[i][j] = sum_d weight[d] tanh(query[i][d] + key[j][d]), and their gradients.
// Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and translate", 2015.
//
// With a = exp(2 query) and b = exp(2 key), taken once per row, tanh(query + key) = 1 - 2 r, r = 1 / (1 + a b): a
// reciprocal for each pair and element in place of an exponential and a division. Lanes run along D.
#pragma once

#include "fusewright/cpu/attention/blocks.h"
#include "fusewright/cpu/attention/logits.h"
#include "fusewright/cpu/rows.h"

namespace fusewright::FUSEWRIGHT_ISA {

// Up to here a b neither overflows nor underflows; beyond, the tanh is taken of each sum.
constexpr float largest_tanh_term = 20.0f;

// Rows of queries or keys as float32 in whole vectors, and, if none of them is too large, as exp(2 x). Behind the last
// column zeros, or ones.
struct TanhTerms {
  float* plain;
  float* exponentials;
  bool moderate;

  static int64_t floats(int64_t width) { return 2 * query_block * whole_vectors(width); }

  static TanhTerms in(float* memory, int64_t width) {
    return {memory, memory + query_block * whole_vectors(width), true};
  }

  template <class T>
  void read(const Rows<T>& rows) {
    const int64_t stride = whole_vectors(rows.width);
    Float largest{};
    Int moderate_lanes = largest == largest;
    for (int64_t r = 0; r < rows.count; ++r) {
      for (int64_t c = 0; c < rows.width; c += lanes) {
        const int64_t left = rows.width - c;
        const Float x = left >= lanes ? load(rows.row(r) + c) : load_partial(rows.row(r) + c, left);
        store(plain + r * stride + c, x);
        moderate_lanes &= absolute(x) <= largest_tanh_term;  // false for NaN
        const Float clipped = select(absolute(x) <= largest_tanh_term, x, Float{});
        store(exponentials + r * stride + c, exp2_clamped<true>(clipped * (2.0f * log2_e)));
      }
    }
    moderate = sum_lanes(select(moderate_lanes, Float{}, broadcast(1.0f))) == 0.0f;
  }
};

// 1 / x for 1 <= x < 2^126.
FUSEWRIGHT_ALWAYS_INLINE Float reciprocal(Float x) {
#if defined(__AVX512F__)
  const Float guess = bit_cast<Float>(_mm512_rcp14_ps(bit_cast<__m512>(x)));
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// r = (1 - tanh(query + key)) / 2 of one vector, and r (1 - r), a quarter of the derivative of the tanh.
struct TanhParts {
  Float half_complement, quarter_slope;
};

template <bool Moderate>
FUSEWRIGHT_ALWAYS_INLINE TanhParts tanh_parts(const TanhTerms& queries, const TanhTerms& keys, int64_t query,
                                              int64_t key) {
  if constexpr (Moderate) {
    const Float both = load(queries.exponentials + query) * load(keys.exponentials + key);
    const Float r = reciprocal(both + 1.0f);
    // 1 - r would cancel where r is near 1.
    return {r, (both * r) * r};
  } else {
    const Float t = tanh_lanes(load(queries.plain + query) + load(keys.plain + key));
    return {0.5f - 0.5f * t, 0.25f - (0.25f * t) * t};
  }
}

template <bool Moderate>
inline void tanh_scores(const TanhTerms& queries, int64_t query_count, const TanhTerms& keys, int64_t key_count,
                        const float* weight, int64_t width, float* scores) {
  constexpr int64_t at_once = 4;
  const int64_t stride = whole_vectors(width);
  Float weight_sum{};
  for (int64_t c = 0; c < stride; c += lanes) weight_sum += load(weight + c);
  const float all = sum_lanes(weight_sum);
  for (int64_t q = 0; q < query_count; ++q) {
    for (int64_t first = 0; first < key_count; first += at_once) {
      const int64_t count = key_count - first < at_once ? key_count - first : at_once;
      Float sums[at_once] = {};
      for (int64_t c = 0; c < stride; c += lanes) {
        const Float w = load(weight + c);
        for (int64_t k = 0; k < count; ++k) {
          sums[k] += w * tanh_parts<Moderate>(queries, keys, q * stride + c, (first + k) * stride + c).half_complement;
        }
      }
      for (int64_t k = 0; k < count; ++k) scores[(first + k) * query_block + q] = all - 2.0f * sum_lanes(sums[k]);
    }
  }
}

// Scores of a block, keys by lanes of queries; zero in the lanes behind the last query.
inline void tanh_scores(const TanhTerms& queries, int64_t query_count, const TanhTerms& keys, int64_t key_count,
                        const float* weight, int64_t width, float* scores) {
  if (query_count < query_block) memset(scores, 0, key_count * query_block * sizeof(float));
  if (queries.moderate && keys.moderate) {
    tanh_scores<true>(queries, query_count, keys, key_count, weight, width, scores);
  } else {
    tanh_scores<false>(queries, query_count, keys, key_count, weight, width, scores);
  }
}

// Sums of gradients over pairs, in rows of whole vectors. The derivative of tanh is 4 r (1 - r).
struct TanhGradients {
  float* queries;  // without its factor 4 weight[d]
  float* keys;
  float* weight;
};

// ds at (key, query), in rows of query_block. A pair of zero leaves no trace, not even that of a NaN.
template <bool Moderate, class Stored>
inline void add_tanh_gradients(const TanhTerms& queries, int64_t query_count, const TanhTerms& keys, int64_t key_count,
                               const Stored* ds, const float* weight, int64_t width, const TanhGradients& sums) {
  const int64_t stride = whole_vectors(width);
  for (int64_t k = 0; k < key_count; ++k) {
    float of_key[query_block];
    for (int64_t q = 0; q < query_count; ++q) of_key[q] = element(ds + k * query_block + q);
    for (int64_t c = 0; c < stride; c += lanes) {
      Float key_sum{}, weight_sum{};
      for (int64_t q = 0; q < query_count; ++q) {
        if (of_key[q] == 0.0f) continue;
        const TanhParts parts = tanh_parts<Moderate>(queries, keys, q * stride + c, k * stride + c);
        const Float g = broadcast(of_key[q]), slope = g * parts.quarter_slope;
        key_sum += slope;
        weight_sum += g * (1.0f - 2.0f * parts.half_complement);
        float* const query_sum = sums.queries + q * stride + c;
        store(query_sum, load(query_sum) + slope);
      }
      float* const key_row = sums.keys + k * stride + c;
      store(key_row, load(key_row) + key_sum * (4.0f * load(weight + c)));
      store(sums.weight + c, load(sums.weight + c) + weight_sum);
    }
  }
}

template <class Stored>
inline void add_tanh_gradients(const TanhTerms& queries, int64_t query_count, const TanhTerms& keys, int64_t key_count,
                               const Stored* ds, const float* weight, int64_t width, const TanhGradients& sums) {
  if (queries.moderate && keys.moderate) {
    add_tanh_gradients<true>(queries, query_count, keys, key_count, ds, weight, width, sums);
  } else {
    add_tanh_gradients<false>(queries, query_count, keys, key_count, ds, weight, width, sums);
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
