// Hashing by random rotations, and the sort by bucket.
//
// The bucket of x is the number of the largest among x R and -x R. Rotated vectors live in cache only: a block of them
// at a time, for a part of the columns at a time. Andoni et al., "Practical and optimal LSH for angular distance",
// 2015.

#include "fusewright/cpu/arena.h"
#include "fusewright/cpu/attention/blocks.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"
#include "fusewright/lsh_attention.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

constexpr int64_t hash_rows = 32, hash_columns = 128;

// The largest rotated coordinate so far, lane by lane, and the largest of the negatives; each with its column.
struct Extremes {
  Float largest = broadcast(-__builtin_inff()), smallest = broadcast(__builtin_inff());
  Int largest_at{}, smallest_at{};
};

inline void include(Extremes& extremes, Float values, Int columns) {
  const Int larger = values > extremes.largest, smaller = values < extremes.smallest;
  extremes.largest = select(larger, values, extremes.largest);
  extremes.smallest = select(smaller, values, extremes.smallest);
  extremes.largest_at = (larger & columns) | (~larger & extremes.largest_at);
  extremes.smallest_at = (smaller & columns) | (~smaller & extremes.smallest_at);
}

// Among equals the first coordinate, and a coordinate before a negative. A NaN is never the largest.
inline int64_t digit(const Extremes& extremes, int64_t columns) {
  float largest = extremes.largest[0], smallest = extremes.smallest[0];
  int32_t largest_at = extremes.largest_at[0], smallest_at = extremes.smallest_at[0];
  for (int i = 1; i < lanes; ++i) {
    const float high = extremes.largest[i], low = extremes.smallest[i];
    if (high > largest || (high == largest && extremes.largest_at[i] < largest_at)) {
      largest = high;
      largest_at = extremes.largest_at[i];
    }
    if (low < smallest || (low == smallest && extremes.smallest_at[i] < smallest_at)) {
      smallest = low;
      smallest_at = extremes.smallest_at[i];
    }
  }
  return -smallest > largest ? columns + smallest_at : largest_at;
}

template <class T>
void hash_block(const LshHashParams& params, const Rows<T>& vectors, int64_t first_row, int64_t length, float* rows,
                float* rotated, int64_t* buckets) {
  const int64_t padded = whole_vectors(params.columns);
  LeftOperand left{vectors.data, vectors.stride * 4, 4};
  if constexpr (!is_float<T>) {
    for (int64_t r = 0; r < vectors.count; ++r) to_floats(rows + r * vectors.width, vectors.row(r), vectors.width);
    left = {rows, vectors.width * 4, 4};
  }
  Int lane_index;
  for (int i = 0; i < lanes; ++i) lane_index[i] = i;
  for (int64_t round = 0; round < params.rounds; ++round) {
    float* const rotations = const_cast<float*>(params.rotations) + round * params.width * padded;
    Extremes extremes[hash_rows];
    for (int64_t first = 0; first < params.columns; first += hash_columns) {
      const int64_t rest = padded - first, columns = rest < hash_columns ? rest : hash_columns;
      product<FloatWord>(vectors.count, columns, vectors.width, left, {rotations + first, padded},
                         {rotated, hash_columns}, false);
      for (int64_t r = 0; r < vectors.count; ++r) {
        for (int64_t c = 0; c < columns; c += lanes) {
          const Int column = lane_index + static_cast<int32_t>(first + c);
          Float values = load(rotated + r * hash_columns + c);
          // Zeros behind the last column could be the largest; a NaN is not.
          if (first + c + lanes > params.columns) {
            values = select(column < static_cast<int32_t>(params.columns), values, broadcast(__builtin_nanf("")));
          }
          include(extremes[r], values, column);
        }
      }
    }
    for (int64_t r = 0; r < vectors.count; ++r) {
      int64_t& bucket = buckets[round * length + first_row + r];
      const int64_t value = digit(extremes[r], params.columns) * params.place_value;
      bucket = params.first_digit ? value : bucket + value;
    }
  }
}

}  // namespace

int64_t lsh_hash_columns(int64_t columns) { return whole_vectors(columns); }

int64_t lsh_hash_scratch(const LshHashParams& params) {
  return (hash_rows * (params.width + hash_columns)) * static_cast<int64_t>(sizeof(float)) + 128;
}

void lsh_hash(const LshHashParams& params, int64_t batch, int64_t head, int64_t length, int64_t begin, int64_t end,
              int64_t* buckets, void* scratch) {
  Arena arena(scratch);
  float* const rotated = arena.floats(hash_rows * hash_columns);
  float* const rows = arena.floats(hash_rows * params.width);
  with_type(params.dtype, [&](auto element) {
    using T = decltype(element);
    const T* const vectors = static_cast<const T*>(params.vectors.data);
    for (int64_t row = begin; row < end; row += hash_rows) {
      const int64_t count = end - row < hash_rows ? end - row : hash_rows;
      const Rows<T> block{vectors + params.vectors.offset(batch, head, row), params.vectors.row_stride, count,
                          params.width};
      hash_block(params, block, row, length, rows, rotated, buckets);
    }
  });
}

// A stable sort by one digit of 12 bits after the other, the lowest first; most numbers of buckets have one.
void lsh_sort(const int64_t* buckets, int64_t length, int32_t* order, int32_t* scratch) {
  constexpr int bits = 12;
  constexpr int64_t bins = int64_t{1} << bits;
  int64_t largest = 0;
  for (int64_t i = 0; i < length; ++i) largest = buckets[i] > largest ? buckets[i] : largest;
  int passes = 1;
  while (passes * bits < 63 && (largest >> (passes * bits)) != 0) ++passes;
  // The last pass writes to `order`.
  int32_t *source = passes % 2 == 0 ? order : scratch, *target = passes % 2 == 0 ? scratch : order;
  for (int64_t i = 0; i < length; ++i) source[i] = static_cast<int32_t>(i);
  for (int pass = 0; pass < passes; ++pass) {
    int64_t begin[bins] = {};
    const auto digit = [&](int32_t position) { return (buckets[position] >> (pass * bits)) & (bins - 1); };
    for (int64_t i = 0; i < length; ++i) ++begin[digit(source[i])];
    int64_t sum = 0;
    for (int64_t bin = 0; bin < bins; ++bin) {
      const int64_t count = begin[bin];
      begin[bin] = sum;
      sum += count;
    }
    for (int64_t i = 0; i < length; ++i) target[begin[digit(source[i])]++] = source[i];
    int32_t* const swapped = source;
    source = target;
    target = swapped;
  }
}

void lsh_inverse_norms(const LshAttentionParams& params, int64_t batch, int64_t head, int64_t begin, int64_t end) {
  constexpr float shortest = 1e-12f;
  with_type(params.dtype, [&](auto element) {
    using T = decltype(element);
    const T* const vectors = static_cast<const T*>(params.query_key.data) + params.query_key.offset(batch, head, 0);
    for (int64_t i = begin; i < end; ++i) {
      const T* const row = vectors + i * params.query_key.row_stride;
      Float sum{};
      int64_t c = 0;
      for (; c + lanes <= params.width; c += lanes) sum += load(row + c) * load(row + c);
      if (c < params.width) {
        const Float rest = load_partial(row + c, params.width - c);
        sum += rest * rest;
      }
      const float norm = __builtin_sqrtf(sum_lanes(sum));
      // A NaN stays one; what is too short has no direction.
      params.inverse_norm[params.row(batch, head) + i] = norm <= shortest ? 0.0f : 1.0f / norm;
    }
  });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
