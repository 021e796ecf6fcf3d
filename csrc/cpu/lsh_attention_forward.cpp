// LSH attention, forward: each chunk of sorted positions meets its window of the ring, and what a round gives is merged
// into the sums of each position.
//
//   output[i] = sum exp(logit - r[i]) value[j] / total[i] over the copies of keys that i meets in all rounds
//
// A round takes every position once, so no two tasks of a round touch the same sums. Kitaev, Kaiser, Levskaya,
// "Reformer: the efficient transformer", 2020.

#include "fusewright/cpu/attention/online_softmax.h"
#include "fusewright/cpu/lsh_attention/meeting.h"
#include "fusewright/cpu/lsh_attention/ring.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

template <class T>
class LshForward {
 public:
  LshForward(const LshForwardParams& params, const LshTask& task, Arena& arena)
      : params_(params), task_(task), ring_(params, arena), sum_stride_(whole_vectors(params.value_width)) {
    constexpr int64_t block = query_block * key_block;
    queries_ = arena.floats(padded_words<T>(params.width) * query_block);
    scores_ = arena.floats(block);
    weights_ = WeightLanes<T>(in_pairs<T> ? arena.floats(WeightLanes<T>::floats()) : scores_);
    dropout_ = params.keep_threshold > 0 ? arena.floats(block) : nullptr;
    maximum_ = arena.floats(query_block);
    total_ = arena.floats(query_block);
    const int64_t rows = padded_rows<T>(params.value_width);
    output_ = arena.floats((rows > sum_stride_ ? rows : sum_stride_) * query_block);
  }

  void run() {
    [[maybe_unused]] const TileSession tiles;
    for (int64_t chunk = task_.first; chunk < task_.last; ++chunk) {
      ring_.move_to(params_, task_, chunk);
      const auto& own = ring_.chunk(chunk);
      for (int64_t block = 0; block < own.blocks(); ++block) visit(chunk, own, block);
    }
  }

 private:
  using Word = typename Multiplied<T>::Word;
  using KeyChunk = Chunk<T, Pass::forward>;

  void visit(int64_t number, const KeyChunk& own, int64_t block) {
    QueryLanes queries{task_.batch, task_.head, task_.round, 0, {}, {}};
    queries.read(params_, own, block);
    pack_rows_as_lanes(queries_, own.keys(block));
    for (int64_t r = 0; r < query_block; ++r) {
      maximum_[r] = negative_infinity;
      total_[r] = 0.0f;
    }
    Softmax softmax{maximum_, total_, output_, false};
    for (int64_t offset = -params_.chunks_before; offset <= params_.chunks_after; ++offset) {
      const KeyChunk& keys = ring_.chunk(number + offset);
      for (int64_t b = 0; b < keys.blocks(); ++b) {
        meet(queries, keys, b, (offset + params_.chunks_before) * params_.chunk_length + b * key_block, softmax);
      }
    }
    if (!softmax.started) memset(output_, 0, sum_stride_ * query_block * sizeof(float));
    merge(queries);
  }

  void meet(const QueryLanes& queries, const KeyChunk& keys, int64_t b, int64_t first_place, Softmax& softmax) {
    const Block block{queries.batch, queries.head, 0, queries.count, 0, keys.count_of(b), 0};
    const int64_t columns = lane_columns<T>(queries.count);
    product<Word>(block.keys, columns, words<T>(params_.width), keys.key_rows(b), {queries_, query_block},
                  {scores_, query_block}, false);
    if (!form_logits(params_, queries, keys, b, columns, scores_)) return;
    update_maximum<T>(block, scores_, exponent_, params_.value_width, softmax);
    if (dropout_ != nullptr) lsh_dropout_factors(params_, queries, first_place, block.keys, dropout_);
    weigh<T>(block, scores_, exponent_, true, dropout_, softmax, weights_);
    if (!keys.values_finite(b)) {
      if (!softmax.started) memset(output_, 0, sum_stride_ * query_block * sizeof(float));
      add_values_that_take_part(block, keys.values(b), weights_, output_);
    } else {
      product<Word>(params_.value_width, columns, words<T>(block.keys), keys.values_operand(b), weights_.operand(),
                    {output_, query_block}, softmax.started);
    }
    softmax.started = true;
  }

  // Adds the round's result of each position to what the rounds before gave.
  void merge(const QueryLanes& queries) {
    const int64_t row = params_.row(task_.batch, task_.head);
    const bool first_round = task_.round == 0;
    float kept[query_block], added[query_block];
    for (int64_t v = 0; v < queries.count; v += lanes) {
      float old_reference[lanes] = {}, old_total[lanes] = {};
      const int64_t count = queries.count - v < lanes ? queries.count - v : lanes;
      for (int64_t i = 0; i < lanes; ++i) {
        const bool present = i < count && !first_round;
        const int64_t at = present ? row + queries.positions[v + i] : 0;
        old_reference[i] = present ? params_.reference[at] : negative_infinity;
        old_total[i] = present ? params_.total[at] : 0.0f;
      }
      const Float old = load(old_reference), now = load(maximum_ + v);
      const Float larger = maximum(old, now);
      // Sums without any key are zero and need no factor.
      const auto factor = [&](Float reference) {
        const Float power = exp2_clamped<true>(exponent_.shift(reference) - exponent_.shift(larger));
        return select((reference == larger) | (reference == negative_infinity), broadcast(1.0f), power);
      };
      const Float keep = factor(old), add = factor(now);
      store(kept + v, keep);
      store(added + v, add);
      float references[lanes], totals[lanes];
      store(references, larger);
      store(totals, load(old_total) * keep + load(total_ + v) * add);
      for (int64_t i = 0; i < count; ++i) {
        params_.reference[row + queries.positions[v + i]] = references[i];
        params_.total[row + queries.positions[v + i]] = totals[i];
      }
    }
    for (int64_t v = 0; v < queries.count; v += lanes) {
      const int64_t count = queries.count - v < lanes ? queries.count - v : lanes;
      for (int64_t column = 0; column < sum_stride_; column += lanes) {
        Float rows[lanes];
        for (int i = 0; i < lanes; ++i) rows[i] = load(output_ + (column + i) * query_block + v);
        transpose(rows);
        for (int64_t i = 0; i < count; ++i) {
          float* sums = task_.sums.value + queries.positions[v + i] * sum_stride_ + column;
          const Float sum = rows[i] * added[v + i];
          store(sums, first_round ? sum : load(sums) * kept[v + i] + sum);
        }
      }
    }
  }

  const LshForwardParams& params_;
  const LshTask& task_;
  const Exponent exponent_ = Exponent::of_finished_logits();
  Ring<KeyChunk> ring_;
  const int64_t sum_stride_;
  float* queries_;  // words of D by lanes
  float* scores_;   // keys by lanes of queries
  WeightLanes<T> weights_{nullptr};
  float* dropout_;           // likewise, nullptr without
  float *maximum_, *total_;  // lanes
  float* output_;            // DV by lanes
};

template <class T>
void finish_rows(const LshForwardParams& params, int64_t batch, int64_t head, const float* sums, int64_t begin,
                 int64_t end) {
  const int64_t stride = whole_vectors(params.value_width), row = params.row(batch, head);
  T* const outputs = static_cast<T*>(params.output.data) + params.output.offset(batch, head, 0);
  const T* const values = static_cast<const T*>(params.value.data) + params.value.offset(batch, head, 0);
  for (int64_t i = begin; i < end; ++i) {
    T* const target = outputs + i * params.output.row_stride;
    const float total = params.total[row + i];
    if (total == 0.0f) {
      // |x| is the logit of a vector with itself, which is alone in its row.
      const float inverse = params.inverse_norm[row + i];
      params.reference[row + i] = inverse == 0.0f ? 0.0f : params.scale / inverse;
      memcpy(target, values + i * params.value.row_stride, params.value_width * sizeof(T));
      continue;
    }
    const float factor = 1.0f / total;
    int64_t c = 0;
    for (; c + lanes <= params.value_width; c += lanes) store(target + c, load(sums + i * stride + c) * factor);
    if (c < params.value_width) {
      store_partial(target + c, load(sums + i * stride + c) * factor, params.value_width - c);
    }
  }
}

}  // namespace

int64_t lsh_forward_scratch(const LshForwardParams& params) {
  Arena arena(nullptr);
  with_type(params.dtype, [&](auto element) { LshForward<decltype(element)>(params, {}, arena); });
  return arena.used();
}

void lsh_forward(const LshForwardParams& params, const LshTask& task, void* scratch) {
  Arena arena(scratch);
  with_type(params.dtype, [&](auto element) { LshForward<decltype(element)>(params, task, arena).run(); });
}

void lsh_forward_finish(const LshForwardParams& params, int64_t batch, int64_t head, const float* sums, int64_t begin,
                        int64_t end) {
  with_type(params.dtype, [&](auto element) { finish_rows<decltype(element)>(params, batch, head, sums, begin, end); });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
