// Rotary position embedding of the rows of queries or keys, for one instruction set.

#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

struct Angles {
  const float* cos;
  const float* sin;
};

// Finds the angles of a row. A position that is no row of the tables has the angle NaN.
class AnglesOfRows {
 public:
  explicit AnglesOfRows(const RotaryParams& params) : params_(params), unknown_(params.pairs * sizeof(float)) {
    for (int64_t i = 0; i < params.pairs; ++i) unknown_.as<float>()[i] = __builtin_nanf("");
  }

  Angles of(int64_t row) const {
    const int64_t per_sequence = params_.heads * params_.length;
    const int64_t b = row / per_sequence, within = row % per_sequence;
    const int64_t t = params_.heads_inside ? within / params_.heads : within % params_.length;
    const int64_t position = params_.positions == nullptr ? t : params_.positions[b * params_.length + t];
    if (position < 0 || position >= params_.table_rows) return {unknown_.as<float>(), unknown_.as<float>()};
    const int64_t offset = b * params_.table_stride + position * params_.pairs;
    return {params_.cos + offset, params_.sin + offset};
  }

 private:
  const RotaryParams& params_;
  Scratch unknown_;
};

// The pairs' elements turned: `first` and `second` hold one element of each pair.
FUSEWRIGHT_ALWAYS_INLINE Pair turn(Pair value, Float cos, Float sin) {
  return {value.first * cos - value.second * sin, value.first * sin + value.second * cos};
}

// Even elements first, odd ones second.
template <class T>
FUSEWRIGHT_ALWAYS_INLINE Pair split_interleaved(Pair value) {
  if constexpr (has_pair_order<T>) {
    return value;
  } else {
    Int even, odd;
    for (int i = 0; i < lanes; ++i) {
      even[i] = 2 * i;
      odd[i] = 2 * i + 1;
    }
    return {__builtin_shuffle(value.first, value.second, even), __builtin_shuffle(value.first, value.second, odd)};
  }
}

template <class T>
FUSEWRIGHT_ALWAYS_INLINE Pair interleave(Pair value) {
  if constexpr (has_pair_order<T>) {
    return value;
  } else {
    Int low, high;
    for (int i = 0; i < lanes; ++i) {
      low[i] = i / 2 + (i % 2) * lanes;
      high[i] = low[i] + lanes / 2;
    }
    return {__builtin_shuffle(value.first, value.second, low), __builtin_shuffle(value.first, value.second, high)};
  }
}

template <class T>
void turn_interleaved(const T* x, T* y, int64_t pairs, const Angles& angles, float direction) {
  int64_t i = 0;
  for (; i + lanes <= pairs; i += lanes) {
    const Pair value = split_interleaved<T>(load_pair(x + 2 * i));
    store_pair(y + 2 * i, interleave<T>(turn(value, load(angles.cos + i), load(angles.sin + i) * direction)));
  }
  if (i < pairs) {
    const int64_t rest = pairs - i;
    const Pair value = split_interleaved<T>(load_pair_partial(x + 2 * i, 2 * rest));
    const Float cos = load_partial(angles.cos + i, rest), sin = load_partial(angles.sin + i, rest) * direction;
    store_pair_partial(y + 2 * i, interleave<T>(turn(value, cos, sin)), 2 * rest);
  }
}

template <class T>
void turn_halves(const T* x, T* y, int64_t pairs, const Angles& angles, float direction) {
  int64_t i = 0;
  for (; i + lanes <= pairs; i += lanes) {
    const Pair turned =
        turn({load(x + i), load(x + pairs + i)}, load(angles.cos + i), load(angles.sin + i) * direction);
    store(y + i, turned.first);
    store(y + pairs + i, turned.second);
  }
  if (i < pairs) {
    const int64_t rest = pairs - i;
    const Float cos = load_partial(angles.cos + i, rest), sin = load_partial(angles.sin + i, rest) * direction;
    const Pair turned = turn({load_partial(x + i, rest), load_partial(x + pairs + i, rest)}, cos, sin);
    store_partial(y + i, turned.first, rest);
    store_partial(y + pairs + i, turned.second, rest);
  }
}

template <class T>
void rotate_rows(const RotaryParams& params, int64_t begin, int64_t end) {
  const RowReader<T> input(params.input, params.columns);
  const RowWriter<T> output(params.output, params.columns);
  const AnglesOfRows angles(params);
  const int64_t turned = 2 * params.pairs, rest = params.columns - turned;
  const float direction = params.inverse ? -1.0f : 1.0f;
  const T* x[row_block];
  T* y[row_block];
  for (int64_t first = begin; first < end; first += row_block) {
    const int64_t count = end - first < row_block ? end - first : row_block;
    input.read(first, count, x);
    output.rows(first, count, y);
    for (int64_t r = 0; r < count; ++r) {
      const Angles of_row = angles.of(first + r);
      if (params.interleaved) {
        turn_interleaved(x[r], y[r], params.pairs, of_row, direction);
      } else {
        turn_halves(x[r], y[r], params.pairs, of_row, direction);
      }
      if (x[r] != y[r]) memcpy(y[r] + turned, x[r] + turned, rest * sizeof(T));
    }
    output.commit(first, count);
  }
}

}  // namespace

void rotary_forward(const RotaryParams& params, int64_t begin, int64_t end) {
  with_type(params.input.dtype, [&](auto element) { rotate_rows<decltype(element)>(params, begin, end); });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
