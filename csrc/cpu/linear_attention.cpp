// Linear attention: softmax's exponential replaced by a product of features, so that sums over keys can be shared.
//
//   S[i] = sum of f(key[j]) [value[j], 1] over j <= i (all j unless causal),   [N, z] = f(query[i]) S[i]
//   output[i] = N / (z + eps)
//
// A chunk of positions meets itself as a matrix and everything before it through S, a state of D by DV + 1. The last
// column carries the sums of features, with values of one. Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are
// RNNs", 2020.

#include "fusewright/linear_attention.h"

#include "fusewright/cpu/arena.h"
#include "fusewright/cpu/attention/blocks.h"
#include "fusewright/cpu/attention/logits.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

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

  const LinearAttentionParams& params_;
  const int64_t batch_, head_;

 private:
  const int64_t width_, columns_;
};

template <class T>
class LinearForward : Chunks<T> {
  using Base = Chunks<T>;

 public:
  LinearForward(const LinearForwardParams& params, int64_t batch, int64_t head, Arena& arena)
      : Base(params, batch, head), params_(params) {
    state_ = arena.floats(params.width * this->columns());
    features_q_ = arena.floats(chunk_rows * this->width());
    features_k_ = arena.floats(chunk_rows * this->width());
    values_ = arena.floats(chunk_rows * this->columns());
    sums_ = arena.floats(chunk_rows * this->columns());
    turned_ = arena.floats(params.width * chunk_rows);
    matrix_ = arena.floats(chunk_rows * chunk_rows);
  }

  void run() {
    const float* const initial = params_.initial_state;
    this->read_state(initial == nullptr ? nullptr : initial + params_.state(this->batch_, this->head_), state_);
    if (!params_.causal) {
      for (int64_t key = 0; key < params_.keys; key += chunk_rows) add_keys(key);
    }
    for (int64_t row = 0; row < params_.queries; row += chunk_rows) visit(row);
    this->write_state(state_, params_.final_state + params_.state(this->batch_, this->head_));
  }

 private:
  void read_keys(int64_t key, int64_t count) {
    const bool* const hidden = this->hidden_from(key);
    this->read_features(params_.key, key, count, hidden, features_k_);
    this->read_values(key, count, hidden, values_);
  }

  void add_read_keys(int64_t count) {
    Base::multiply(params_.width, this->columns(), count, columns_of(features_k_, this->width()), values_,
                   this->columns(), state_, this->columns(), true);
  }

  void add_keys(int64_t key) {
    const int64_t count = Base::count_at(key, params_.keys);
    read_keys(key, count);
    add_read_keys(count);
  }

  void visit(int64_t row) {
    const int64_t count = Base::count_at(row, params_.queries);
    this->read_features(params_.query, row, count, nullptr, features_q_);
    Base::multiply(count, this->columns(), params_.width, rows_of(features_q_, this->width()), state_, this->columns(),
                   sums_, this->columns(), false);
    if (params_.causal) {
      read_keys(row, count);
      this->meet(features_q_, features_k_, count, count, this->width(), params_.width, turned_, matrix_);
      Base::multiply(count, this->columns(), count, rows_of(matrix_, chunk_rows), values_, this->columns(), sums_,
                     this->columns(), true);
      add_read_keys(count);
    }
    const int64_t at = (this->batch_ * params_.heads + this->head_) * params_.queries + row;
    T* target = static_cast<T*>(params_.output.data) + params_.output.offset(this->batch_, this->head_, row);
    for (int64_t r = 0; r < count; ++r, target += params_.output.row_stride) {
      const float* const sums = sums_ + r * this->columns();
      const float normalizer = sums[params_.value_width] + params_.eps;
      params_.normalizer[at + r] = normalizer;
      for (int64_t c = 0; c < params_.value_width; c += lanes) {
        const Float quotient = load(sums + c) / normalizer;
        if (c + lanes <= params_.value_width) {
          store(target + c, quotient);
        } else {
          store_partial(target + c, quotient, params_.value_width - c);
        }
      }
    }
  }

  const LinearForwardParams& params_;
  float* state_;                                       // D by DV + 1
  float *features_q_, *features_k_, *values_, *sums_;  // rows of the chunk
  float *turned_, *matrix_;
};

template <class T>
class LinearBackward : Chunks<T> {
  using Base = Chunks<T>;

 public:
  LinearBackward(const LinearBackwardParams& params, int64_t batch, int64_t head, Arena& arena)
      : Base(params, batch, head), params_(params) {
    const int64_t columns = this->columns(), width = this->width();
    turned_state_ = arena.floats(columns * width);
    grad_state_ = arena.floats(params.width * columns);
    turned_grad_state_ = arena.floats(columns * width);
    features_q_ = arena.floats(chunk_rows * width);
    features_k_ = arena.floats(chunk_rows * width);
    grad_features_ = arena.floats(chunk_rows * width);
    values_ = arena.floats(chunk_rows * columns);
    grad_sums_ = arena.floats(chunk_rows * columns);
    grad_values_ = arena.floats(chunk_rows * columns);
    const int64_t steps = params.width > params.state_columns() ? params.width : params.state_columns();
    turned_ = arena.floats(steps * chunk_rows);
    matrix_ = arena.floats(chunk_rows * chunk_rows);
    grad_matrix_ = arena.floats(chunk_rows * chunk_rows);
  }

  void run() {
    queries_forwards();
    keys_backwards();
  }

 private:
  // grad f(query) = [grad N, grad z] S^T, with the S that each query saw.
  void queries_forwards() {
    const int64_t columns = this->columns(), width = this->width();
    const float* const initial = params_.initial_state;
    this->read_state(initial == nullptr ? nullptr : initial + params_.state(this->batch_, this->head_), grad_state_);
    turn(grad_state_, turned_state_);
    if (!params_.causal) {
      for (int64_t key = 0; key < params_.keys; key += chunk_rows) {
        const int64_t count = Base::count_at(key, params_.keys);
        read_keys(key, count);
        add_to_turned_state(count);
      }
    }
    for (int64_t row = 0; row < params_.queries; row += chunk_rows) {
      const int64_t count = Base::count_at(row, params_.queries);
      read_grad_sums(row, count);
      Base::multiply(count, width, params_.state_columns(), rows_of(grad_sums_, columns), turned_state_, width,
                     grad_features_, width, false);
      if (params_.causal) {
        read_keys(row, count);
        this->meet(grad_sums_, values_, count, count, columns, params_.state_columns(), turned_, grad_matrix_);
        Base::multiply(count, width, count, rows_of(grad_matrix_, chunk_rows), features_k_, width, grad_features_,
                       width, true);
        add_to_turned_state(count);
      }
      if (params_.grad_query.data != nullptr) write_slopes(params_.query, params_.grad_query, row, count);
    }
  }

  // grad f(key) = [value, 1] U^T and grad value = f(key) U, U = sum of f(query) [grad N, grad z] over the queries that
  // see the key, and what comes from the final state.
  void keys_backwards() {
    const int64_t columns = this->columns(), width = this->width();
    const float* const given = params_.grad_final_state;
    this->read_state(given == nullptr ? nullptr : given + params_.state(this->batch_, this->head_), grad_state_);
    turn(grad_state_, turned_grad_state_);
    if (!params_.causal) {
      for (int64_t row = 0; row < params_.queries; row += chunk_rows) {
        const int64_t count = Base::count_at(row, params_.queries);
        this->read_features(params_.query, row, count, nullptr, features_q_);
        read_grad_sums(row, count);
        add_to_grad_state(count);
      }
    }
    const int64_t last = params_.keys == 0 ? -1 : (params_.keys - 1) / chunk_rows * chunk_rows;
    for (int64_t key = last; key >= 0; key -= chunk_rows) {
      const int64_t count = Base::count_at(key, params_.keys);
      read_keys(key, count);
      Base::multiply(count, width, params_.state_columns(), rows_of(values_, columns), turned_grad_state_, width,
                     grad_features_, width, false);
      Base::multiply(count, columns, params_.width, rows_of(features_k_, width), grad_state_, columns, grad_values_,
                     columns, false);
      if (params_.causal) {
        this->read_features(params_.query, key, count, nullptr, features_q_);
        read_grad_sums(key, count);
        this->meet(grad_sums_, values_, count, count, columns, params_.state_columns(), turned_, grad_matrix_);
        Base::multiply(count, width, count, columns_of(grad_matrix_, chunk_rows), features_q_, width, grad_features_,
                       width, true);
        this->meet(features_q_, features_k_, count, count, width, params_.width, turned_, matrix_);
        Base::multiply(count, columns, count, columns_of(matrix_, chunk_rows), grad_sums_, columns, grad_values_,
                       columns, true);
        add_to_grad_state(count);
      }
      write_key_gradients(key, count);
    }
    if (params_.grad_initial_state != nullptr) {
      this->write_state(grad_state_, params_.grad_initial_state + params_.state(this->batch_, this->head_));
    }
  }

  void read_keys(int64_t key, int64_t count) {
    const bool* const hidden = this->hidden_from(key);
    this->read_features(params_.key, key, count, hidden, features_k_);
    this->read_values(key, count, hidden, values_);
  }

  // [grad N, grad z] = [grad_output, -grad_output output] / normalizer.
  void read_grad_sums(int64_t row, int64_t count) {
    const int64_t at = (this->batch_ * params_.heads + this->head_) * params_.queries + row;
    const auto rows = [&](const HeadsView& view) {
      return static_cast<const T*>(view.data) + view.offset(this->batch_, this->head_, row);
    };
    const T* grads = rows(params_.grad_output);
    const T* outputs = rows(params_.output);
    for (int64_t r = 0; r < count; ++r) {
      float* const target = grad_sums_ + r * this->columns();
      const float inverse = 1.0f / params_.normalizer[at + r];
      Float along{};
      for (int64_t c = 0; c < this->columns(); c += lanes) {
        const Float grad = Base::part_of(grads + r * params_.grad_output.row_stride, c, params_.value_width);
        along += grad * Base::part_of(outputs + r * params_.output.row_stride, c, params_.value_width);
        store(target + c, grad * inverse);
      }
      target[params_.value_width] = -sum_lanes(along) * inverse;
    }
  }

  void add_to_turned_state(int64_t count) {
    Base::multiply(params_.state_columns(), this->width(), count, columns_of(values_, this->columns()), features_k_,
                   this->width(), turned_state_, this->width(), true);
  }

  void add_to_grad_state(int64_t count) {
    Base::multiply(params_.width, this->columns(), count, columns_of(features_q_, this->width()), grad_sums_,
                   this->columns(), grad_state_, this->columns(), true);
    Base::multiply(params_.state_columns(), this->width(), count, columns_of(grad_sums_, this->columns()), features_q_,
                   this->width(), turned_grad_state_, this->width(), true);
  }

  void turn(const float* state, float* turned) const {
    memset(turned, 0, this->columns() * this->width() * sizeof(float));
    for (int64_t d = 0; d < params_.width; ++d) {
      for (int64_t c = 0; c < params_.state_columns(); ++c) {
        turned[c * this->width() + d] = state[d * this->columns() + c];
      }
    }
  }

  static void write(T* target, int64_t column, int64_t width, Float value) {
    if (column + lanes <= width) {
      store(target + column, value);
    } else {
      store_partial(target + column, value, width - column);
    }
  }

  // Gradients of features times the slope of the feature map.
  void write_slopes(const HeadsView& source, const HeadsView& target, int64_t first, int64_t count,
                    const bool* hidden = nullptr) {
    const T* rows = static_cast<const T*>(source.data) + source.offset(this->batch_, this->head_, first);
    T* gradients = static_cast<T*>(target.data) + target.offset(this->batch_, this->head_, first);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = 0; c < params_.width; c += lanes) {
        const Float slope =
            feature_slope(params_.feature_map, Base::part_of(rows + r * source.row_stride, c, params_.width));
        Float gradient = load(grad_features_ + r * this->width() + c) * slope;
        if (hidden != nullptr && hidden[r]) gradient = Float{};
        write(gradients + r * target.row_stride, c, params_.width, gradient);
      }
    }
  }

  void write_key_gradients(int64_t key, int64_t count) {
    const bool* const hidden = this->hidden_from(key);
    if (params_.grad_key.data != nullptr) write_slopes(params_.key, params_.grad_key, key, count, hidden);
    const HeadsView& view = params_.grad_value;
    if (view.data == nullptr) return;
    T* const target = static_cast<T*>(view.data) + view.offset(this->batch_, this->head_, key);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = 0; c < params_.value_width; c += lanes) {
        const Float gradient = hidden != nullptr && hidden[r] ? Float{} : load(grad_values_ + r * this->columns() + c);
        write(target + r * view.row_stride, c, params_.value_width, gradient);
      }
    }
  }

  const LinearBackwardParams& params_;
  float *turned_state_, *grad_state_, *turned_grad_state_;  // DV + 1 by D, D by DV + 1, DV + 1 by D
  float *features_q_, *features_k_, *grad_features_;        // rows of D
  float *values_, *grad_sums_, *grad_values_;               // rows of DV + 1
  float *turned_, *matrix_, *grad_matrix_;
};

}  // namespace

int64_t linear_forward_scratch(const LinearForwardParams& params) {
  Arena arena(nullptr);
  with_type(params.dtype, [&](auto element) { LinearForward<decltype(element)>(params, 0, 0, arena); });
  return arena.used();
}

void linear_forward(const LinearForwardParams& params, int64_t batch, int64_t head, void* scratch) {
  Arena arena(scratch);
  with_type(params.dtype, [&](auto element) { LinearForward<decltype(element)>(params, batch, head, arena).run(); });
}

int64_t linear_backward_scratch(const LinearBackwardParams& params) {
  Arena arena(nullptr);
  with_type(params.dtype, [&](auto element) { LinearBackward<decltype(element)>(params, 0, 0, arena); });
  return arena.used();
}

void linear_backward(const LinearBackwardParams& params, int64_t batch, int64_t head, void* scratch) {
  Arena arena(scratch);
  with_type(params.dtype, [&](auto element) { LinearBackward<decltype(element)>(params, batch, head, arena).run(); });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
