// Cross-entropy of rows of logits, forward and backward, for one instruction set.
//
// The forward reads a row once, a block that stays in the nearest cache at a time: its maximum, then its exponentials,
// added to a sum that is rescaled when the maximum grows.

#include <math.h>

#include "fusewright/cpu/activations.h"
#include "fusewright/cpu/row_maximum.h"
#include "fusewright/cpu/row_moments.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

// Distributions, logits of a block and sums keep their natural order.
using InOrder = SharedOrder<float>;

// Calls body(offset, count) for blocks of a row.
template <class Body>
FUSEWRIGHT_ALWAYS_INLINE void for_blocks(int64_t columns, Body body) {
  for (int64_t begin = 0; begin < columns; begin += sum_block) {
    body(begin, columns - begin < sum_block ? columns - begin : sum_block);
  }
}

template <class T>
Float tanh_for(Float x) {
  return tanh<sizeof(T) == sizeof(float)>(x);
}

// target[i] = softcap * tanh(x[i] / softcap)
template <class T>
void cap_logits(const T* x, float* target, int64_t count, float softcap) {
  const float inverse = 1.0f / softcap;
  const auto cap = [&](Float value) { return tanh_for<T>(value * inverse) * softcap; };
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(target + i, cap(load(x + i)));
  if (i < count) store_partial(target + i, cap(load_partial(x + i, count - i)), count - i);
}

// Sum of exp(x[i] - largest) over a block.
template <class Order, class T>
double exponential_sum(const T* x, float largest, int64_t count) {
  Pair sum[step_pairs] = {};
  const auto add = [&](int a, Pair value) {
    sum[a].first += exp_nonpositive(value.first - largest);
    sum[a].second += exp_nonpositive(value.second - largest);
  };
  int64_t i = 0;
  for (; i + step <= count; i += step) {
    for (int a = 0; a < step_pairs; ++a) add(a, Order::load(x + i + a * pair_lanes));
  }
  for (; i + pair_lanes <= count; i += pair_lanes) add(0, Order::load(x + i));
  const int64_t rest = count - i;
  // The exponential of -Inf adds nothing.
  if (rest > 0) add(0, Order::first_elements(rest, Order::load_partial(x + i, rest), -__builtin_inff()));
  return sum_lanes((sum[0].first + sum[0].second) + (sum[1].first + sum[1].second));
}

// Of the blocks so far: the largest element, 0 where all are -Inf, and the sum of exponentials relative to it.
class OnlineSum {
 public:
  template <class Order, class T>
  void add(const T* x, int64_t count) {
    const float block = row_maximum<Order>(x, count);
    if (block > largest_) {
      sum_ *= exp(static_cast<double>(largest_) - block);
      largest_ = block;
    }
    sum_ += exponential_sum<Order>(x, pivot(), count);
  }
  // -Inf - -Inf would be NaN.
  float pivot() const { return largest_ == -__builtin_inff() ? 0.0f : largest_; }
  float log_sum() const { return static_cast<float>(log(sum_)); }

 private:
  float largest_ = -__builtin_inff();
  double sum_ = 0;
};

// What a row wants of its classes, but for the share of its target class; smoothed and weighted. Where that is the same
// for all classes there is no row.
class Wanted {
 public:
  explicit Wanted(const CrossEntropyParams& params)
      : params_(params),
        keep_(1.0 - params.label_smoothing),
        uniform_(static_cast<float>(params.label_smoothing / static_cast<double>(params.columns))),
        varies_(params.target == nullptr || (params.weight != nullptr && params.label_smoothing > 0.0)),
        row_(varies_ ? params.columns * sizeof(float) : 0) {
    if (varies_ && params.target != nullptr) fill([](int64_t) { return 0.0f; });
  }

  // A row of probabilities.
  template <class T>
  void take(const T* probabilities) {
    float* row = row_.as<float>();
    widen(probabilities, row, params_.columns);
    fill([row](int64_t column) { return row[column]; });
  }

  float uniform() const { return uniform_; }
  const float* row() const { return varies_ ? row_.as<float>() : nullptr; }
  // The share of the target class beside that of all classes.
  float of_target(int64_t target) const {
    return static_cast<float>(params_.weight == nullptr ? keep_ : keep_ * params_.weight[target]);
  }

 private:
  template <class Probability>
  void fill(Probability probability) {
    float* row = row_.as<float>();
    const float keep = static_cast<float>(keep_);
    for (int64_t i = 0; i < params_.columns; ++i) {
      const float value = probability(i) * keep + uniform_;
      row[i] = params_.weight == nullptr ? value : value * params_.weight[i];
    }
  }

  const CrossEntropyParams& params_;
  const double keep_;
  const float uniform_;
  const bool varies_;
  Scratch row_;
};

struct WantedSums {
  double mass = 0;   // sum of q
  double score = 0;  // sum of q * (logit - pivot)
};

// Adds a block; `wanted` is nullptr where every class wants `uniform`.
template <class T>
void add_wanted(const T* x, const float* wanted, float uniform, float pivot, int64_t count, WantedSums& sums) {
  Float mass{}, score{};
  const auto add = [&](Float logit, Float q) {
    mass += q;
    score += q * (logit - pivot);
  };
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) add(load(x + i), wanted == nullptr ? broadcast(uniform) : load(wanted + i));
  if (i < count) {
    const int64_t rest = count - i;
    const Float q = wanted == nullptr ? broadcast(uniform) : load_partial(wanted + i, rest);
    // A logit of 0 would count with the share of nobody.
    const Int present = first_lanes(rest);
    add(select(present, load_partial(x + i, rest), broadcast(pivot)), select(present, q, Float{}));
  }
  sums.mass += sum_lanes(mass);
  sums.score += sum_lanes(score);
}

template <class T>
float logit_at(const T* x, int64_t column, float softcap) {
  const Float value = load_partial(x + column, 1);
  return softcap == 0.0f ? value[0] : (tanh_for<T>(value * (1.0f / softcap)) * softcap)[0];
}

// Calls body(block of logits, its order, offset, count).
template <class T, class Body>
void for_logits(const T* x, const CrossEntropyParams& params, float* capped, Body body) {
  for_blocks(params.columns, [&](int64_t begin, int64_t count) {
    if (params.softcap == 0.0f) return body(x + begin, SharedOrder<T>{}, begin, count);
    cap_logits(x + begin, capped, count, params.softcap);
    body(static_cast<const float*>(capped), InOrder{}, begin, count);
  });
}

// Loss and statistics of row `index`.
template <class T>
void forward_row(const CrossEntropyForwardParams& params, const T* x, const Wanted& wanted, int64_t index,
                 float* capped) {
  const bool by_class = params.target != nullptr;
  const int64_t target = by_class ? params.target[index] : 0;
  params.largest[index] = params.log_sum[index] = params.mass[index] = params.losses[index] = 0.0f;
  if (by_class && target == params.ignore_index) return;
  if (target < 0 || target >= params.columns) {
    params.losses[index] = __builtin_nanf("");
    return;
  }
  OnlineSum online;
  for_logits(x, params, capped, [&](const auto* block, auto order, int64_t, int64_t count) {
    online.template add<decltype(order)>(block, count);
  });
  const float pivot = online.pivot(), log_sum = online.log_sum();
  double loss = 0, mass = 0;
  if (!by_class || params.label_smoothing > 0.0) {
    WantedSums sums;
    for_logits(x, params, capped, [&](const auto* block, auto, int64_t begin, int64_t count) {
      add_wanted(block, wanted.row() == nullptr ? nullptr : wanted.row() + begin, wanted.uniform(), pivot, count, sums);
    });
    mass = sums.mass;
    loss = sums.mass * log_sum - sums.score;
  }
  if (by_class) {
    const double share = wanted.of_target(target);
    mass += share;
    // As one product: with a logit of -Inf both terms are infinite.
    loss += share * (static_cast<double>(log_sum) - (static_cast<double>(logit_at(x, target, params.softcap)) - pivot));
  }
  const double log_sum_exp = static_cast<double>(pivot) + log_sum;
  if (params.z_loss > 0.0f) loss += params.z_loss * log_sum_exp * log_sum_exp;
  params.largest[index] = pivot;
  params.log_sum[index] = log_sum;
  params.mass[index] = static_cast<float>(mass);
  params.losses[index] = static_cast<float>(loss);
}

// Calls body(row index, logits, probabilities or nullptr) for [begin, end); `Probability` is float without any.
template <class T, class Probability, class Body>
void for_rows(const CrossEntropyParams& params, int64_t begin, int64_t end, Body body) {
  const RowReader<T> input(params.input, params.columns);
  const RowReader<Probability> probabilities(params.probabilities, params.columns);
  const T* x[row_block];
  const Probability* q[row_block] = {};
  for (int64_t first = begin; first < end; first += row_block) {
    const int64_t count = end - first < row_block ? end - first : row_block;
    input.read(first, count, x);
    if (params.target == nullptr) probabilities.read(first, count, q);
    body(first, count, x, q);
  }
}

template <class T, class Probability>
void forward_rows(const CrossEntropyForwardParams& params, int64_t begin, int64_t end) {
  Wanted wanted(params);
  const Scratch capped(params.softcap == 0.0f ? 0 : sum_block * sizeof(float));
  for_rows<T, Probability>(params, begin, end, [&](int64_t first, int64_t count, const T** x, const Probability** q) {
    for (int64_t r = 0; r < count; ++r) {
      if (params.target == nullptr) wanted.take(q[r]);
      forward_row(params, x[r], wanted, first + r, capped.as<float>());
    }
  });
}

// The gradient of one element: of its logit, and by the softcap of its input.
template <class T>
struct ElementGradient {
  float grad;     // of the loss
  float largest;  // statistics of the row
  float log_sum;
  float total;  // sum(q) + 2 * z_loss * lse
  float softcap;

  FUSEWRIGHT_ALWAYS_INLINE Float operator()(Float x, Float q) const {
    const Float share = softcap == 0.0f ? Float{} : tanh_for<T>(x * (1.0f / softcap));
    const Float logit = softcap == 0.0f ? x : share * softcap;
    const Float argument = (logit - largest) - log_sum;
    const Float p = sizeof(T) == sizeof(float) ? exp_nonpositive(argument) : exp_nonpositive_for_two_bytes(argument);
    const Float gradient = (p * total - q) * grad;
    return softcap == 0.0f ? gradient : gradient * (1.0f - share * share);
  }
};

template <class Order, class T>
void write_uniform(const T* x, T* target, int64_t columns, float uniform, const ElementGradient<T>& gradient) {
  const ElementGradient<T> of = gradient;  // a copy: the stores might change what the reference leads to
  const Float q = broadcast(uniform);
  int64_t i = 0;
  for (; i + pair_lanes <= columns; i += pair_lanes) {
    const Pair value = Order::load(x + i);
    Order::store(target + i, {of(value.first, q), of(value.second, q)});
  }
  if (i < columns) {
    const int64_t rest = columns - i;
    const Pair value = Order::load_partial(x + i, rest);
    Order::store_partial(target + i, {of(value.first, q), of(value.second, q)}, rest);
  }
}

template <class T>
void write_varying(const T* x, T* target, int64_t columns, const float* wanted, const ElementGradient<T>& gradient) {
  const ElementGradient<T> of = gradient;
  int64_t i = 0;
  for (; i + lanes <= columns; i += lanes) store(target + i, of(load(x + i), load(wanted + i)));
  if (i < columns) {
    const int64_t rest = columns - i;
    store_partial(target + i, of(load_partial(x + i, rest), load_partial(wanted + i, rest)), rest);
  }
}

template <class T>
void backward_row(const CrossEntropyBackwardParams& params, const T* x, T* grad_input, const Wanted& wanted,
                  int64_t index) {
  const bool by_class = params.target != nullptr;
  const int64_t target = by_class ? params.target[index] : 0, columns = params.columns;
  if (by_class && target == params.ignore_index) {
    memset(grad_input, 0, columns * sizeof(T));
    return;
  }
  const bool outside = target < 0 || target >= columns;
  const float log_sum_exp = params.largest[index] + params.log_sum[index];
  const ElementGradient<T> gradient{outside ? __builtin_nanf("") : params.grad_losses[index], params.largest[index],
                                    params.log_sum[index], params.mass[index] + 2.0f * params.z_loss * log_sum_exp,
                                    params.softcap};
  // Read before it is written: the gradient may take the logits' place.
  Float at_target{};
  if (by_class && !outside) {
    const float share = wanted.row() == nullptr ? wanted.uniform() : wanted.row()[target];
    at_target = gradient(load_partial(x + target, 1), broadcast(share + wanted.of_target(target)));
  }
  if (wanted.row() == nullptr) {
    write_uniform<SharedOrder<T>>(x, grad_input, columns, wanted.uniform(), gradient);
  } else {
    write_varying(x, grad_input, columns, wanted.row(), gradient);
  }
  if (by_class && !outside) store_partial(grad_input + target, at_target, 1);
}

// grad_target = grad * (1 - label_smoothing) * weight * (lse - logit)
template <class T, class Probability>
void target_gradient_row(const CrossEntropyBackwardParams& params, const T* x, Probability* grad_target,
                         int64_t index) {
  const float scale = params.grad_losses[index] * static_cast<float>(1.0 - params.label_smoothing);
  const float largest = params.largest[index], log_sum = params.log_sum[index], softcap = params.softcap;
  const auto gradient = [&](Float value, Float weight) {
    const Float logit = softcap == 0.0f ? value : tanh_for<T>(value * (1.0f / softcap)) * softcap;
    return (log_sum - (logit - largest)) * weight * scale;
  };
  const Float one = broadcast(1.0f);
  int64_t i = 0;
  for (; i + lanes <= params.columns; i += lanes) {
    store(grad_target + i, gradient(load(x + i), params.weight == nullptr ? one : load(params.weight + i)));
  }
  if (i < params.columns) {
    const int64_t rest = params.columns - i;
    const Float weight = params.weight == nullptr ? one : load_partial(params.weight + i, rest);
    store_partial(grad_target + i, gradient(load_partial(x + i, rest), weight), rest);
  }
}

template <class T, class Probability>
void backward_rows(const CrossEntropyBackwardParams& params, int64_t begin, int64_t end) {
  Wanted wanted(params);
  const RowWriter<T> grad_input(params.grad_input, params.columns);
  const RowWriter<Probability> grad_target(params.grad_target, params.columns);
  const bool need_input = params.grad_input.data != nullptr, need_target = params.grad_target.data != nullptr;
  T* input_rows[row_block];
  Probability* target_rows[row_block];
  for_rows<T, Probability>(params, begin, end, [&](int64_t first, int64_t count, const T** x, const Probability** q) {
    if (need_input) grad_input.rows(first, count, input_rows);
    if (need_target) grad_target.rows(first, count, target_rows);
    for (int64_t r = 0; r < count; ++r) {
      if (params.target == nullptr) wanted.take(q[r]);
      if (need_target) target_gradient_row(params, x[r], target_rows[r], first + r);
      if (need_input) backward_row(params, x[r], input_rows[r], wanted, first + r);
    }
    if (need_input) grad_input.commit(first, count);
    if (need_target) grad_target.commit(first, count);
  });
}

// Calls body(T{}, P{}) with the types of logits and probabilities.
template <class Body>
void with_types(const CrossEntropyParams& params, Body body) {
  with_type(params.input.dtype, [&](auto element) {
    if (params.target != nullptr) return body(element, float{});
    with_type(params.probabilities.dtype, [&](auto probability) { body(element, probability); });
  });
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForwardParams& params, int64_t begin, int64_t end) {
  with_types(params, [&](auto element, auto probability) {
    forward_rows<decltype(element), decltype(probability)>(params, begin, end);
  });
}

void cross_entropy_backward(const CrossEntropyBackwardParams& params, int64_t begin, int64_t end) {
  with_types(params, [&](auto element, auto probability) {
    backward_rows<decltype(element), decltype(probability)>(params, begin, end);
  });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
