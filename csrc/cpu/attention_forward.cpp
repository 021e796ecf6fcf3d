// Exact attention, forward: online softmax with queries in vector lanes.
//
//   output[i] = sum_j exp(logit[i][j] - r[i]) value[j] / total[i],   total[i] = sum_j exp(logit[i][j] - r[i])
//
// Scores are formed as key query^T and the output as value^T weights, both with queries in lanes: maximum, exponential
// and sum of a row are plain vector operations without a reduction across lanes, and keys and values are read where
// they lie. Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023.

#include "fusewright/cpu/arena.h"
#include "fusewright/cpu/attention/dropout.h"
#include "fusewright/cpu/attention/online_softmax.h"
#include "fusewright/cpu/attention/product_type.h"
#include "fusewright/cpu/attention/tanh_scores.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

template <class T>
class Forward {
 public:
  Forward(const AttentionForwardParams& params, const AttentionSequence& sequence, const AttentionForwardTask& task,
          Arena& arena)
      : params_(params),
        sequence_(sequence),
        task_(task),
        key_head_(task.head / (params.heads / params.key_heads)),
        exponent_(params) {
    constexpr int64_t block = query_block * key_block;
    query_floats_ = additive_scores() ? TanhTerms::floats(params.width) : padded_words<T>(params.width) * query_block;
    queries_ = arena.floats(blocks(task.count) * query_floats_);
    key_terms_ =
        TanhTerms::in(additive_scores() ? arena.floats(TanhTerms::floats(params.width)) : nullptr, params.width);
    states_ = arena.floats(blocks(task.count) * (2 + padded_rows<T>(params.value_width)) * query_block);
    scores_ = arena.floats(block);
    weights_ = WeightLanes<T>(in_pairs<T> ? arena.floats(WeightLanes<T>::floats()) : scores_);
    additive_ = params.mask.kind == MaskKind::additive ? arena.floats(block) : nullptr;
    dropout_ = params.keep_threshold > 0 ? arena.floats(block) : nullptr;
    keys_scratch_ = arena.bytes(left_scratch_bytes<T>(params.width));
    values_scratch_ = arena.bytes(left_scratch_bytes<T>(params.value_width));
  }

  static int64_t blocks(int64_t queries) { return (queries + query_block - 1) / query_block; }

  void run() {
    [[maybe_unused]] const TileSession tiles;
    for (int64_t b = 0; b < blocks(task_.count); ++b) begin_block(b);
    const KeyRange range = keys_in_window(params_, task_.first, task_.count, sequence_.key_count, sequence_.shift);
    for (int64_t key = range.begin / key_block * key_block; key < range.end; key += key_block) visit_keys(key);
    for (int64_t b = 0; b < blocks(task_.count); ++b) finish_block(b);
  }

 private:
  Block block_at(int64_t b, int64_t key) const {
    const int64_t query = task_.first + b * query_block;
    const int64_t queries = task_.first + task_.count - query;
    const int64_t keys = sequence_.key_count - key;
    return {sequence_.batch,
            task_.head,
            query,
            queries < query_block ? queries : query_block,
            key,
            keys < key_block ? keys : key_block,
            sequence_.shift};
  }

  bool additive_scores() const { return params_.score_weight != nullptr; }

  float* packed_queries(int64_t b) const { return queries_ + b * query_floats_; }

  Softmax state(int64_t b) const {
    float* first = states_ + b * (2 + padded_rows<T>(params_.value_width)) * query_block;
    return {first, first + query_block, first + 2 * query_block, started_[b]};
  }

  void begin_block(int64_t b) {
    const Block block = block_at(b, 0);
    const Rows<T> queries =
        rows(params_.query, task_.head, sequence_.query_begin + block.query, block.queries, params_.width);
    if (additive_scores()) {
      query_terms_[b] = TanhTerms::in(packed_queries(b), params_.width);
      query_terms_[b].read(queries);
    } else {
      pack_rows_as_lanes(packed_queries(b), queries);
    }
    const Softmax fresh = state(b);
    for (int64_t r = 0; r < query_block; ++r) {
      fresh.maximum[r] = negative_infinity;
      fresh.total[r] = 0.0f;
    }
    started_[b] = false;
  }

  Rows<T> rows(const HeadsView& view, int64_t head, int64_t first, int64_t count, int64_t width) const {
    return {static_cast<const T*>(view.data) + view.offset(sequence_.batch, head, first), view.row_stride, count,
            width};
  }

  void visit_keys(int64_t key) {
    const int64_t rest = sequence_.key_count - key;
    const int64_t count = rest < key_block ? rest : key_block;
    const Rows<T> keys = rows(params_.key, key_head_, sequence_.key_begin + key, count, params_.width);
    const Rows<T> values = rows(params_.value, key_head_, sequence_.key_begin + key, count, params_.value_width);
    LeftOperand left_keys{}, left_values{};
    bool prepared = false;
    for (int64_t b = 0; b < blocks(task_.count); ++b) {
      const Block block = block_at(b, key);
      const Visibility visible = visibility(params_, block);
      if (visible.together() == Visible::none) continue;
      if (additive_ != nullptr && !read_additive_mask(params_.mask, block, additive_)) continue;
      if (!prepared) {
        if (additive_scores()) {
          key_terms_.read(keys);
        } else {
          left_keys = left_rows(keys, keys_scratch_);
        }
        left_values = left_columns(values, values_scratch_);
        prepared = true;
      }
      const bool partial = visible.together() == Visible::some || additive_ != nullptr;
      visit(b, block, visible, partial, left_keys, left_values, values);
    }
  }

  void visit(int64_t b, const Block& block, const Visibility& visible, bool partial, LeftOperand keys,
             LeftOperand left_values, const Rows<T>& values) {
    using Word = typename Multiplied<T>::Word;
    const int64_t columns = lane_columns<T>(block.queries);
    Softmax softmax = state(b);
    if (additive_scores()) {
      const float* weight = params_.score_weight + task_.head * whole_vectors(params_.width);
      tanh_scores(query_terms_[b], block.queries, key_terms_, block.keys, weight, params_.width, scores_);
    } else {
      product<Word>(block.keys, columns, words<T>(params_.width), keys, {packed_queries(b), query_block},
                    {scores_, query_block}, false);
    }
    if (exponent_.of_logits) {
      add_biases(params_, block, additive_, scores_, nullptr);
    }
    if (partial) mask_scores(params_, block, visible, scores_);
    update_maximum<T>(block, scores_, exponent_, params_.value_width, softmax);
    if (dropout_ != nullptr) dropout_factors(params_, sequence_, block, dropout_);
    weigh<T>(block, scores_, exponent_, partial, dropout_, softmax, weights_);
    if ((partial || dropout_ != nullptr) && !all_finite(values)) {
      if (!softmax.started) memset(softmax.output, 0, params_.value_width * query_block * sizeof(float));
      add_values_that_take_part(block, values, weights_, softmax.output);
    } else {
      product<Word>(params_.value_width, columns, words<T>(block.keys), left_values, weights_.operand(),
                    {softmax.output, query_block}, softmax.started);
    }
    started_[b] = true;
  }

  void finish_block(int64_t b) {
    const Block block = block_at(b, 0);
    const Softmax softmax = state(b);
    if (!softmax.started) memset(softmax.output, 0, params_.value_width * query_block * sizeof(float));
    float scale[query_block];
    const int64_t first_row = sequence_.query_begin + block.query;
    const int64_t statistics = (sequence_.batch * params_.heads + task_.head) * params_.queries + first_row;
    for (int64_t r = 0; r < block.queries; ++r) {
      float reference = softmax.maximum[r] * exponent_.to_natural, total = softmax.total[r], factor = 1.0f;
      if (params_.sinks != nullptr) include_sink(params_.sinks[task_.head], reference, total, factor);
      scale[r] = total == 0.0f ? 0.0f : factor / total;
      params_.maximum[statistics + r] = reference;
      params_.total[statistics + r] = total;
    }
    T* output = static_cast<T*>(params_.output.data) + params_.output.offset(sequence_.batch, task_.head, first_row);
    write_lanes_as_rows(output, params_.output.row_stride, block.queries, params_.value_width, softmax.output, scale);
  }

  // The sink takes part in the total and has no value. `factor` is what the sums so far are multiplied by.
  static void include_sink(float sink, float& reference, float& total, float& factor) {
    const float larger = sink > reference ? sink : reference;
    if (larger == negative_infinity) return;
    const auto exp = [](float x) { return exp2_clamped<true>(broadcast(x * log2_e))[0]; };
    factor = reference == negative_infinity ? 0.0f : exp(reference - larger);
    total = total * factor + (sink == negative_infinity ? 0.0f : exp(sink - larger));
    reference = larger;
  }

  const AttentionForwardParams& params_;
  const AttentionSequence& sequence_;
  const AttentionForwardTask& task_;
  const int64_t key_head_;
  int64_t query_floats_;  // of a block of queries_
  float* queries_;        // each block's words of D by lanes, or its terms of additive scores
  float* states_;         // each block's maximum, total and output
  float* scores_;         // keys by lanes of queries
  WeightLanes<T> weights_{nullptr};
  float *additive_, *dropout_;  // likewise, nullptr where absent
  void *keys_scratch_, *values_scratch_;
  const Exponent exponent_;
  TanhTerms key_terms_, query_terms_[attention_queries_per_task / attention_query_block];
  bool started_[attention_queries_per_task / attention_query_block] = {};
};

}  // namespace

int64_t attention_forward_scratch(const AttentionForwardParams& params, int64_t queries) {
  const AttentionForwardTask task{0, 0, 0, queries};
  return most_scratch(params, [&](auto element, Arena& arena) { Forward<decltype(element)>(params, {}, task, arena); });
}

void attention_forward(const AttentionForwardParams& params, const AttentionSequence& sequence,
                       const AttentionForwardTask& task, void* scratch) {
  Arena arena(scratch);
  const int64_t key_head = task.head / (params.heads / params.key_heads);
  with_product_type(params, sequence, key_head,
                    [&](auto element) { Forward<decltype(element)>(params, sequence, task, arena).run(); });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
