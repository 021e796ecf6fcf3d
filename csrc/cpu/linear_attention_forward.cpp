// Linear attention, forward. The formulas stand in linear_attention/chunks.h.

#include "fusewright/cpu/linear_attention/chunks.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

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
      Base::add_seen(count, this->columns(), matrix_, values_, sums_);
      add_read_keys(count);
    }
    const int64_t at = (this->batch_ * params_.heads + this->head_) * params_.queries + row;
    T* target = static_cast<T*>(params_.output.data) + params_.output.offset(this->batch_, this->head_, row);
    for (int64_t r = 0; r < count; ++r, target += params_.output.row_stride) {
      const float* const sums = sums_ + r * this->columns();
      const float normalizer = sums[params_.value_width] + params_.eps;
      params_.normalizer[at + r] = normalizer;
      for (int64_t c = 0; c < params_.value_width; c += lanes) {
        Base::write_part(target, c, params_.value_width, load(sums + c) / normalizer);
      }
    }
  }

  const LinearForwardParams& params_;
  float* state_;                                       // D by DV + 1
  float *features_q_, *features_k_, *values_, *sums_;  // rows of the chunk
  float *turned_, *matrix_;
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

}  // namespace fusewright::FUSEWRIGHT_ISA
