// Linear attention, backward: queries from the first chunk on, keys from the last. The formulas stand in
// linear_attention/chunks.h.

#include "fusewright/cpu/linear_attention/chunks.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

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
        Base::add_seen(count, width, grad_matrix_, features_k_, grad_features_);
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
        Base::add_seen_by(count, width, grad_matrix_, features_q_, grad_features_);
        this->meet(features_q_, features_k_, count, count, width, params_.width, turned_, matrix_);
        Base::add_seen_by(count, columns, matrix_, grad_sums_, grad_values_);
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
        Base::write_part(gradients + r * target.row_stride, c, params_.width, gradient);
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
        Base::write_part(target + r * view.row_stride, c, params_.value_width, gradient);
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
