// The middle of attention's backward: the gradients of the scores of one block of queries and one of keys.
//
//   p = exp(logit - r) / total, dp = grad_output value^T, delta = sum(grad_output * output) - grad_lse
//   ds = p (dp - delta)
#pragma once

#include "fusewright/cpu/arena.h"
#include "fusewright/cpu/attention/dropout.h"
#include "fusewright/cpu/attention/logits.h"
#include "fusewright/cpu/attention/split_blocks.h"
#include "fusewright/cpu/attention/tanh_scores.h"
#include "fusewright/cpu/dot.h"

namespace fusewright::FUSEWRIGHT_ISA {

// Lanes of three results at one key.
struct ScoreGradient {
  Float kept;        // the weight after dropout
  Float with_logit;  // ds, the gradient of the logit behind cap and biases
  Float with_score;  // ds times the derivative of the cap
};

template <class T>
class ScoreGradients {
 public:
  using Word = typename Multiplied<T>::Word;
  using Stored = typename StoredElement<T>::type;

  ScoreGradients(const AttentionBackwardParams& params, const AttentionSequence& sequence, Arena& arena)
      : params_(params), sequence_(sequence), exponent_(params) {
    constexpr int64_t block = query_block * key_block;
    const bool additive_scores = params.score_weight != nullptr;
    query_lanes_ = arena.floats(additive_scores ? 0 : packed_floats(params.width));
    const int64_t terms = additive_scores ? TanhTerms::floats(params.width) : 0;
    query_terms_ = TanhTerms::in(arena.floats(terms), params.width);
    key_terms_ = TanhTerms::in(arena.floats(terms), params.width);
    grad_lanes_ = arena.floats(packed_floats(params.value_width));
    scores_ = arena.floats(block);
    grad_weights_ = arena.floats(block);
    cap_slopes_ = params.softcap > 0 ? arena.floats(block) : nullptr;
    additive_ = params.mask.kind == MaskKind::additive ? arena.floats(block) : nullptr;
    dropout_ = params.keep_threshold > 0 ? arena.floats(block) : nullptr;
    keys_scratch_ = arena.bytes(left_scratch_bytes<T>(params.width));
    values_scratch_ = arena.bytes(left_scratch_bytes<T>(params.value_width));
  }

  Rows<T> query_rows(const Block& block) const {
    return rows(params_.query, block.head, sequence_.query_begin + block.query, block.queries, params_.width);
  }
  Rows<T> grad_rows(const Block& block) const {
    return rows(params_.grad_output, block.head, sequence_.query_begin + block.query, block.queries,
                params_.value_width);
  }
  Rows<T> key_rows(const Block& block) const {
    return rows(params_.key, key_head(block), sequence_.key_begin + block.key, block.keys, params_.width);
  }
  Rows<T> value_rows(const Block& block) const {
    return rows(params_.value, key_head(block), sequence_.key_begin + block.key, block.keys, params_.value_width);
  }

  // To be called before the block's queries meet any keys.
  void begin_queries(const Block& block) {
    const Rows<T> grads = grad_rows(block);
    if (params_.score_weight != nullptr) {
      query_terms_.read(query_rows(block));
    } else {
      pack(query_lanes_, query_rows(block));
    }
    pack(grad_lanes_, grads);
    read_statistics(block, grads);
  }

  // Scores and gradients of the weights; false if no pair of the block takes part.
  bool form_scores(const Block& block) {
    const Visibility visible = visibility(params_, block);
    if (visible.together() == Visible::none) return false;
    if (additive_ != nullptr && !read_additive_mask(params_.mask, block, additive_)) return false;
    masked_ = visible.together() == Visible::some || additive_ != nullptr;
    if (params_.score_weight != nullptr) {
      key_terms_.read(key_rows(block));
      tanh_scores(query_terms_, block.queries, key_terms_, block.keys, score_weight(block), params_.width, scores_);
    } else {
      multiply(key_rows(block), block.queries, query_lanes_, keys_scratch_, scores_);
    }
    if (exponent_.of_logits) add_biases(params_, block, additive_, scores_, cap_slopes_);
    if (masked_) mask_scores(params_, block, visible, scores_);
    multiply(value_rows(block), block.queries, grad_lanes_, values_scratch_, grad_weights_);
    if (dropout_ != nullptr) dropout_factors(params_, sequence_, block, dropout_);
    return true;
  }

  // Of additive scores, behind form_scores.
  const TanhTerms& query_terms() const { return query_terms_; }
  const TanhTerms& key_terms() const { return key_terms_; }
  const float* score_weight(const Block& block) const {
    return params_.score_weight + block.head * whole_vectors(params_.width);
  }

  // Whether some weight of the block may be zero because its pair takes no part.
  bool partial() const { return masked_ || dropout_ != nullptr; }

  // Gradients at key k of the block and the lanes from v, as the lambda that visits them gets by calling `at(k)`.
  template <class Visit>
  void for_each_vector(const Block& block, Visit visit) const {
    for (int64_t v = 0; v < lane_columns<T>(block.queries); v += lanes) {
      const Float shift = load(shift_ + v), inverse_total = load(inverse_total_ + v), delta = load(delta_ + v);
      visit(v, [&](int64_t k) { return gradient(k * query_block + v, shift, inverse_total, delta); });
    }
  }

 private:
  // Few queries leave most lanes empty: their products are dot products, row by row, which also round less.
  static constexpr int64_t few = attention_decode_queries;

  static int64_t packed_floats(int64_t width) {
    const int64_t as_lanes = padded_words<T>(width) * query_block, as_rows = few * packed_row_words<Stored>(width);
    return as_lanes > as_rows ? as_lanes : as_rows;
  }

  static void pack(float* target, const Rows<T>& rows) {
    if (rows.count > few) return pack_rows_as_lanes(target, rows);
    const Rows<Stored> stored = as_stored(rows);
    for (int64_t r = 0; r < rows.count; ++r) {
      pack_row(target + r * packed_row_words<Stored>(rows.width), stored.row(r), rows.width);
    }
  }

  // Products of keys (or values) with packed queries (or gradients), keys by lanes of queries.
  static void multiply(const Rows<T>& keys, int64_t queries, const float* packed, void* scratch, float* result) {
    if (queries > few) {
      product<Word>(keys.count, lane_columns<T>(queries), words<T>(keys.width), left_rows(keys, scratch),
                    {const_cast<float*>(packed), query_block}, {result, query_block}, false);
      return;
    }
    memset(result, 0, key_block * query_block * sizeof(float));
    float dots[key_block];
    for (int64_t r = 0; r < queries; ++r) {
      dot_products(packed + r * packed_row_words<Stored>(keys.width), as_stored(keys), dots);
      for (int64_t k = 0; k < keys.count; ++k) result[k * query_block + r] = dots[k];
    }
  }

  int64_t key_head(const Block& block) const { return block.head / (params_.heads / params_.key_heads); }

  Rows<T> rows(const HeadsView& view, int64_t head, int64_t first, int64_t count, int64_t width) const {
    return {static_cast<const T*>(view.data) + view.offset(sequence_.batch, head, first), view.row_stride, count,
            width};
  }

  ScoreGradient gradient(int64_t at, Float shift, Float inverse_total, Float delta) const {
    const Float score = load(scores_ + at);
    const Float p = exp2_clamped<as_precise_as_float<T>>(score * exponent_.unit - shift) * inverse_total;
    ScoreGradient result{p, load(grad_weights_ + at), {}};
    if (dropout_ != nullptr) {
      const Float factor = load(dropout_ + at);
      result.kept = p * factor;
      result.with_logit = select(factor == 0.0f, Float{}, result.with_logit * factor);
    }
    result.with_logit = p * (result.with_logit - delta);
    if (masked_) {
      const Int hidden = score == negative_infinity;
      result.kept = select(hidden, Float{}, result.kept);
      result.with_logit = select(hidden, Float{}, result.with_logit);
    }
    result.with_score = cap_slopes_ == nullptr ? result.with_logit : result.with_logit * load(cap_slopes_ + at);
    return result;
  }

  // Lanes behind the last query get an inverse total of zero and so weigh nothing.
  void read_statistics(const Block& block, const Rows<T>& grads) {
    const int64_t first_row = sequence_.query_begin + block.query;
    const int64_t at = (block.batch * params_.heads + block.head) * params_.queries + first_row;
    const Rows<T> outputs = rows(params_.output, block.head, first_row, block.queries, params_.value_width);
    for (int64_t r = 0; r < query_block; ++r) {
      if (r >= block.queries) {
        shift_[r] = inverse_total_[r] = delta_[r] = 0.0f;
        continue;
      }
      const float reference = params_.maximum[at + r], total = params_.total[at + r];
      // As Exponent::shift, on the stored reference, which is in units of the logits.
      shift_[r] = reference == negative_infinity ? 0.0f : reference * log2_e;
      inverse_total_[r] = total == 0.0f ? 0.0f : 1.0f / total;
      delta_[r] = dot(grads.row(r), outputs.row(r), params_.value_width);
      if (params_.grad_lse != nullptr) delta_[r] -= params_.grad_lse[at + r];
      if (params_.grad_sink_rows != nullptr) {
        const float sink = params_.sinks[block.head];
        const Float weight = exp2_clamped<true>(broadcast(sink * log2_e - shift_[r]));
        params_.grad_sink_rows[at + r] = sink == negative_infinity ? 0.0f : -weight[0] * inverse_total_[r] * delta_[r];
      }
    }
  }

  static float dot(const T* a, const T* b, int64_t count) {
    Float sum{};
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) sum += load(a + i) * load(b + i);
    if (i < count) sum += load_partial(a + i, count - i) * load_partial(b + i, count - i);
    return sum_lanes(sum);
  }

  const AttentionBackwardParams& params_;
  const AttentionSequence& sequence_;
  const Exponent exponent_;
  float *query_lanes_, *grad_lanes_;          // words of D and of DV by lanes of queries
  float *scores_, *grad_weights_;             // keys by lanes of queries, as the rest
  float *cap_slopes_, *additive_, *dropout_;  // nullptr where absent
  void *keys_scratch_, *values_scratch_;
  TanhTerms query_terms_, key_terms_;
  bool masked_ = false;
  float shift_[query_block], inverse_total_[query_block], delta_[query_block];
};

}  // namespace fusewright::FUSEWRIGHT_ISA
