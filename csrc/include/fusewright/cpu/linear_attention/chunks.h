// Linear attention: softmax's exponential replaced by a product of features, so that sums over keys can be shared.
//
//   S[i] = sum of f(key[j]) [value[j], 1] over j <= i (all j unless causal),   [N, z] = f(query[i]) S[i]
//   output[i] = N / (z + eps)
//
// A chunk of positions meets itself as a matrix and everything before it through S, a state of D by DV + 1. The last
// column carries the sums of features, with values of one. Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are
// RNNs", 2020.
#pragma once

#include "fusewright/cpu/arena.h"
#include "fusewright/cpu/attention/blocks.h"
#include "fusewright/cpu/attention/logits.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/linear_attention.h"

namespace fusewright::FUSEWRIGHT_ISA {

constexpr int64_t chunk_rows = linear_chunk;
static_assert(chunk_rows == query_block, "pack_rows_as_lanes writes rows of query_block lanes");

// f(x), and its derivative: elu(x) + 1 is exp(x) below 0, where it is its own derivative.
inline Float feature(FeatureMap map, Float x) {
  if (map == FeatureMap::identity) return x;
  return select(x > 0.0f, x + 1.0f, select(x != x, x, exp2_clamped<true>(x * log2_e)));
}
inline Float feature_slope(FeatureMap map, Float x) {
  if (map == FeatureMap::identity) return broadcast(1.0f);
  return select(x > 0.0f, broadcast(1.0f), feature(map, x));
}

inline LeftOperand rows_of(const float* data, int64_t stride) { return {data, stride * 4, 4}; }
inline LeftOperand columns_of(const float* data, int64_t stride) { return {data, 4, stride * 4}; }

// What forward and backward share: chunks as float32 rows of whole vectors, and products of them.
template <class T>
class Chunks {
 public:
  Chunks(const LinearAttentionParams& params, int64_t batch, int64_t head)
      : params_(params),
        batch_(batch),
        head_(head),
        width_(whole_vectors(params.width)),
        columns_(whole_vectors(params.state_columns())) {}

  int64_t width() const { return width_; }      // of rows of features
  int64_t columns() const { return columns_; }  // of rows of values
  static int64_t count_at(int64_t first, int64_t length) {
    return length - first < chunk_rows ? length - first : chunk_rows;
  }

  // Features of rows [first, first + count), zero behind the last column and where `hidden` says so.
  void read_features(const HeadsView& view, int64_t first, int64_t count, const bool* hidden, float* target) const {
    const T* const rows = static_cast<const T*>(view.data) + view.offset(batch_, head_, first);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = 0; c < width_; c += lanes) {
        const int64_t left = params_.width - c;
        Float features = feature(params_.feature_map, part_of(rows + r * view.row_stride, c, params_.width));
        if (left < lanes) features = select(first_lanes(left), features, Float{});
        store(target + r * width_ + c, hidden != nullptr && hidden[r] ? Float{} : features);
      }
    }
  }

  // [value, 1] of rows, zero behind, and where `hidden` says so.
  void read_values(int64_t first, int64_t count, const bool* hidden, float* target) const {
    const HeadsView& view = params_.value;
    const T* const rows = static_cast<const T*>(view.data) + view.offset(batch_, head_, first);
    memset(target, 0, count * columns_ * sizeof(float));
    for (int64_t r = 0; r < count; ++r) {
      if (hidden != nullptr && hidden[r]) continue;
      to_floats(target + r * columns_, rows + r * view.row_stride, params_.value_width);
      target[r * columns_ + params_.value_width] = 1.0f;
    }
  }

  const bool* hidden_from(int64_t key) const {
    return params_.key_padding == nullptr ? nullptr : params_.key_padding + batch_ * params_.keys + key;
  }

  static Float part_of(const T* row, int64_t column, int64_t width) {
    const int64_t left = width - column;
    if (left <= 0) return Float{};
    return left >= lanes ? load(row + column) : load_partial(row + column, left);
  }

  static void write_part(T* target, int64_t column, int64_t width, Float value) {
    if (column + lanes <= width) {
      store(target + column, value);
    } else {
      store_partial(target + column, value, width - column);
    }
  }

  // A state in rows of whole vectors from (D, DV + 1); zeros where there is none.
  void read_state(const float* source, float* target) const {
    memset(target, 0, params_.width * columns_ * sizeof(float));
    if (source == nullptr) return;
    for (int64_t d = 0; d < params_.width; ++d) {
      memcpy(target + d * columns_, source + d * params_.state_columns(), params_.state_columns() * sizeof(float));
    }
  }
  void write_state(const float* source, float* target) const {
    for (int64_t d = 0; d < params_.width; ++d) {
      memcpy(target + d * params_.state_columns(), source + d * columns_, params_.state_columns() * sizeof(float));
    }
  }

  // target (rows, columns) (+)= left right.
  static void multiply(int64_t rows, int64_t columns, int64_t steps, LeftOperand left, const float* right,
                       int64_t right_stride, float* target, int64_t target_stride, bool accumulate) {
    if (rows == 0) return;
    if (steps == 0) {
      for (int64_t r = 0; r < rows && !accumulate; ++r) memset(target + r * target_stride, 0, columns * sizeof(float));
      return;
    }
    product<FloatWord>(rows, columns, steps, left, {const_cast<float*>(right), right_stride}, {target, target_stride},
                       accumulate);
  }

  // matrix[i][j] = left[i] right[j], rows of chunk_rows, 0 for j > i if causal. `turned` is scratch.
  void meet(const float* left, const float* right, int64_t left_count, int64_t right_count, int64_t stride,
            int64_t width, float* turned, float* matrix) const {
    pack_rows_as_lanes(turned, Rows<float>{right, stride, right_count, width});
    multiply(left_count, chunk_rows, width, rows_of(left, stride), turned, chunk_rows, matrix, chunk_rows, false);
    if (!params_.causal) return;
    for (int64_t i = 0; i < left_count; ++i) {
      for (int64_t j = i + 1; j < chunk_rows; ++j) matrix[i * chunk_rows + j] = 0.0f;
    }
  }

  // target[i] += sum of matrix[i][j] right[j] over j <= i. All of `matrix` is multiplied where its zeros do no harm:
  // one times a NaN or an infinity would carry it to rows that do not see it.
  static void add_seen(int64_t count, int64_t columns, const float* matrix, const float* right, float* target) {
    const LeftOperand left = rows_of(matrix, chunk_rows);
    if (all_finite(Rows<float>{right, columns, count, columns})) {
      return multiply(count, columns, count, left, right, columns, target, columns, true);
    }
    for (int64_t i = 0; i < count; ++i) {
      multiply(1, columns, i + 1, left.from_row(i), right, columns, target + i * columns, columns, true);
    }
  }

  // The same of the transposed matrix: target[j] += sum of matrix[i][j] right[i] over i >= j.
  static void add_seen_by(int64_t count, int64_t columns, const float* matrix, const float* right, float* target) {
    if (all_finite(Rows<float>{right, columns, count, columns})) {
      const LeftOperand left = columns_of(matrix, chunk_rows);
      return multiply(count, columns, count, left, right, columns, target, columns, true);
    }
    for (int64_t j = 0; j < count; ++j) {
      const LeftOperand left = columns_of(matrix + j * chunk_rows + j, chunk_rows);
      multiply(1, columns, count - j, left, right + j * columns, columns, target + j * columns, columns, true);
    }
  }

  const LinearAttentionParams& params_;
  const int64_t batch_, head_;

 private:
  const int64_t width_, columns_;
};

}  // namespace fusewright::FUSEWRIGHT_ISA
