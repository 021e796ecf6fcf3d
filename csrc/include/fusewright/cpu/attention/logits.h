// From products of queries and keys to logits: scale, cap, biases, masks, on a block in cache.
// Scores are rows of keys by lanes of queries.
#pragma once

#include "fusewright/cpu/attention/blocks.h"
#include "fusewright/cpu/attention/exp2.h"
#include "fusewright/cpu/attention/visibility.h"

namespace fusewright::FUSEWRIGHT_ISA {

constexpr float negative_infinity = -__builtin_inff();

inline Float lane_numbers(int64_t first) {
  Float numbers;
  for (int i = 0; i < lanes; ++i) numbers[i] = static_cast<float>(first + i);
  return numbers;
}

inline Float absolute(Float x) { return bit_cast<Float>(bit_cast<Int>(x) & 0x7fffffff); }

// tanh within 2 units in the last place: an odd polynomial (Cephes' tanhf) near zero, where the quotient of
// exponentials would cancel.
inline Float tanh_lanes(Float x) {
  const Float square = x * x;
  Float p = broadcast(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Float near_zero = p * square * x + x;
  constexpr float two_log2_e = 2.88539008178f;
  const Float magnitude = absolute(x);
  const Float capped = select(magnitude > 9.0f, broadcast(9.0f), magnitude);
  const Float e = exp2_clamped<true>(capped * two_log2_e);
  const Float far = 1.0f - 2.0f / (e + 1.0f);
  const Float signed_far = bit_cast<Float>(bit_cast<Int>(far) | (bit_cast<Int>(x) & INT32_MIN));
  return select(magnitude < 0.625f, near_zero, select(x != x, x, signed_far));
}

// Whether logits are more than the scaled product, so that they are formed before the softmax.
inline bool needs_logits(const AttentionParams& params) {
  return params.softcap > 0 || params.alibi_slopes != nullptr || params.mask.kind == MaskKind::additive ||
         !(params.scale > 0);
}

constexpr float log2_e = 1.44269504088896341f;

// How a score becomes the exponent of a weight: weight = 2^(score * unit - shift(reference)).
// Forward and backward must form the shift alike: then its rounding cancels between a weight and the total.
struct Exponent {
  bool of_logits;    // scores have become logits; else they are bare products, still to be scaled
  float unit;        // from a score to a power of two
  float to_natural;  // from a score to a logit

  explicit Exponent(const AttentionParams& params)
      : of_logits(needs_logits(params)),
        unit(of_logits ? log2_e : params.scale * log2_e),
        to_natural(of_logits ? 1.0f : params.scale) {}

  static Exponent of_finished_logits() { return Exponent{}; }

  // `reference` in units of the scores. A row without any key has reference -inf; -inf - -inf would be NaN.
  Float shift(Float reference) const {
    return select(reference == negative_infinity, Float{}, (reference * to_natural) * log2_e);
  }

 private:
  Exponent() : of_logits(true), unit(log2_e), to_natural(1.0f) {}
};

// An additive mask's part of a block, keys by lanes of queries. Returns whether any of it is not -inf.
template <class T>
inline bool read_additive_mask(const MaskView& mask, const Block& block, float* target) {
  const T* data = static_cast<const T*>(mask.data) + mask_offset(mask, block);
  // Lanes behind the last query weigh nothing, but nothing times NaN would be NaN.
  if (block.queries < query_block) memset(target, 0, block.keys * query_block * sizeof(float));
  bool any = false;
  for (int64_t r = 0; r < block.queries; ++r) {
    const T* row = data + r * mask.stride[2];
    float values[key_block];
    if (mask.stride[3] == 1) {
      to_floats(values, row, block.keys);
    } else {
      for (int64_t c = 0; c < block.keys; ++c) values[c] = element(row + c * mask.stride[3]);
    }
    for (int64_t c = 0; c < block.keys; ++c) {
      any |= values[c] != negative_infinity;
      target[c * query_block + r] = values[c];
    }
  }
  return any;
}

inline bool read_additive_mask(const MaskView& mask, const Block& block, float* target) {
  switch (mask.dtype) {
    case DataType::float32:
      return read_additive_mask<float>(mask, block, target);
    case DataType::bfloat16:
      return read_additive_mask<BFloat16>(mask, block, target);
    default:
      return read_additive_mask<Float16>(mask, block, target);
  }
}

// cap(scale * score) + biases. With `slope_of_cap`, also the derivative of the cap at each logit.
inline void add_biases(const AttentionParams& params, const Block& block, const float* additive, float* scores,
                       float* slope_of_cap) {
  const float slope =
      params.alibi_slopes == nullptr ? 0.0f : params.alibi_slopes[block.batch * params.alibi_batch_stride + block.head];
  const float inverse_cap = params.softcap > 0 ? 1.0f / params.softcap : 0.0f;
  // Every lane of the products, also those behind the last query.
  const int64_t columns = (block.queries + 2 * tile_words - 1) / (2 * tile_words) * (2 * tile_words);
  for (int64_t v = 0; v < columns; v += lanes) {
    // Positions are exact in float32 below 2^24; they meet a slope, and a bias that far off is rounded anyway.
    const Float query = lane_numbers(0) + static_cast<float>(v);
    for (int64_t k = 0; k < block.keys; ++k) {
      float* row = scores + k * query_block + v;
      Float x = load(row) * params.scale;
      if (params.softcap > 0) {
        const Float t = tanh_lanes(x * inverse_cap);
        if (slope_of_cap != nullptr) store(slope_of_cap + k * query_block + v, 1.0f - t * t);
        x = t * params.softcap;
      }
      if (slope != 0.0f) {
        const Float distance = static_cast<float>(block.key + k - block.query - block.shift) - query;
        x -= absolute(distance) * slope;
      }
      if (additive != nullptr) {
        const Float bias = load(additive + k * query_block + v);
        // A masked key leaves no trace, not even that of a NaN.
        x = select(bias == negative_infinity, bias, x + bias);
      }
      store(row, x);
    }
  }
}

// The boolean mask of a block, turned into keys by queries as the scores are; then a vector at a time. A branch for
// each element costs three times the products of the block where the mask is irregular.
inline void apply_boolean_mask(const MaskView& mask, const Block& block, float* scores) {
  typedef uint8_t Bytes __attribute__((vector_size(lanes)));
  const char* data = static_cast<const char*>(mask.data) + mask_offset(mask, block);
  alignas(64) uint8_t turned[key_block * query_block] = {};
  for (int64_t r = 0; r < block.queries; ++r) {
    const char* row = data + r * mask.stride[2];
    for (int64_t k = 0; k < block.keys; ++k) turned[k * query_block + r] = row[k * mask.stride[3]];
  }
  for (int64_t k = 0; k < block.keys; ++k) {
    for (int64_t v = 0; v < block.queries; v += lanes) {
      Bytes bytes;
      memcpy(&bytes, turned + k * query_block + v, sizeof(bytes));
      const Int visible = __builtin_convertvector(bytes, Int) != 0;
      float* row = scores + k * query_block + v;
      store(row, select(visible, load(row), broadcast(negative_infinity)));
    }
  }
}

// Puts -inf where a pair of a partly visible block takes no part.
inline void mask_scores(const AttentionParams& params, const Block& block, const Visibility& visible, float* scores) {
  if (visible.window == Visible::some) {
    // Relative to the first query, so that 32 bits hold every position that matters.
    const int64_t base = block.key - block.query - block.shift;
    const int64_t most = int64_t{1} << 30;
    const int32_t right = params.window_right < 0 || params.window_right > most ? most : params.window_right;
    const int32_t left = params.window_left < 0 || params.window_left > most ? most : params.window_left;
    for (int64_t v = 0; v < block.queries; v += lanes) {
      Int query;
      for (int i = 0; i < lanes; ++i) query[i] = static_cast<int32_t>(v + i);
      for (int64_t k = 0; k < block.keys; ++k) {
        float* row = scores + k * query_block + v;
        const Int relative = static_cast<int32_t>(base + k) - query;
        store(row, select((relative > right) | (relative < -left), broadcast(negative_infinity), load(row)));
      }
    }
  }
  if (visible.block_mask == Visible::some) {
    const bool* head = params.block_mask + block.head * params.block_head_stride;
    for (int64_t k = 0; k < block.keys; ++k) {
      const int64_t column = (block.key + k) / params.block_size;
      for (int64_t r = 0; r < block.queries; ++r) {
        if (!head[(block.query + r) / params.block_size * params.block_columns + column]) {
          scores[k * query_block + r] = negative_infinity;
        }
      }
    }
  }
  if (visible.mask == Visible::some) apply_boolean_mask(params.mask, block, scores);
}

}  // namespace fusewright::FUSEWRIGHT_ISA
