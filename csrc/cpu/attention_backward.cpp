// Exact attention, backward: weights are recomputed from the two statistics of each row.
//
//   grad_value = p^T grad_output, grad_key = scale ds^T query, grad_query = scale ds key
//
// with p and ds of score_gradients.h. As in the forward, scores are keys by lanes of queries. Blocks of queries are the
// outer loop: a block's gradient stays in cache while those of keys and values are summed in float32 over the blocks of
// one task, always in the same order. Dao, "FlashAttention-2: faster attention with better parallelism and work
// partitioning", 2023, algorithm 2.

#include "fusewright/cpu/attention/product_type.h"
#include "fusewright/cpu/attention/score_gradients.h"
#include "fusewright/cpu/attention/visible_sums.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

template <class T>
class Backward {
 public:
  using Word = typename Multiplied<T>::Word;

  Backward(const AttentionBackwardParams& params, const AttentionSequence& sequence, const AttentionBackwardTask& task,
           Arena& arena)
      : params_(params),
        sequence_(sequence),
        task_(task),
        key_stride_(whole_vectors(params.width)),
        value_stride_(whole_vectors(params.value_width)),
        gradients_(params, sequence, arena),
        weights_(arena),
        ds_(arena),
        ds_lanes_(arena.floats(WeightLanes<T>::floats())) {
    query_rows_ = arena.floats(words<T>(query_block) * key_stride_);
    grad_rows_ = arena.floats(words<T>(query_block) * value_stride_);
    grad_query_ = arena.floats(padded_rows<T>(params.width) * query_block);
    key_columns_ = arena.bytes(left_scratch_bytes<T>(params.width));
    query_slopes_ = arena.floats(additive_scores() ? query_block * key_stride_ : 0);
  }

  void run() {
    [[maybe_unused]] const TileSession tiles;
    if (wants_keys()) memset(task_.key_sums, 0, sequence_.key_count * key_stride_ * sizeof(float));
    if (wants_values()) memset(task_.value_sums, 0, sequence_.key_count * value_stride_ * sizeof(float));
    if (additive_scores())
      memset(task_.weight_sums, 0, params_.heads / params_.key_heads * key_stride_ * sizeof(float));
    const int64_t group = params_.heads / params_.key_heads;
    const int64_t blocks = (sequence_.query_count + query_block - 1) / query_block;
    for (int64_t head = task_.key_head * group; head < (task_.key_head + 1) * group; ++head) {
      for (int64_t b = task_.first; b < blocks; b += task_.step) visit_queries(head, b * query_block);
    }
  }

 private:
  bool wants_queries() const { return params_.grad_query.data != nullptr; }
  bool wants_keys() const { return task_.key_sums != nullptr; }
  bool wants_values() const { return task_.value_sums != nullptr; }
  bool additive_scores() const { return params_.score_weight != nullptr; }

  void visit_queries(int64_t head, int64_t query) {
    const int64_t rest = sequence_.query_count - query;
    Block block{sequence_.batch, head, query, rest < query_block ? rest : query_block, 0, 0, sequence_.shift};
    gradients_.begin_queries(block);
    const Rows<T> queries = gradients_.query_rows(block), grads = gradients_.grad_rows(block);
    pack_width_as_lanes(query_rows_, queries);
    pack_width_as_lanes(grad_rows_, grads);
    queries_finite_ = all_finite(queries);
    grads_finite_ = all_finite(grads);
    if (additive_scores()) memset(query_slopes_, 0, query_block * key_stride_ * sizeof(float));
    if (wants_queries()) memset(grad_query_, 0, padded_rows<T>(params_.width) * query_block * sizeof(float));

    const KeyRange range = keys_in_window(params_, query, block.queries, sequence_.key_count, sequence_.shift);
    for (int64_t key = range.begin / key_block * key_block; key < range.end; key += key_block) {
      const int64_t keys_left = sequence_.key_count - key;
      block.key = key;
      block.keys = keys_left < key_block ? keys_left : key_block;
      if (!gradients_.form_scores(block)) continue;
      store_gradients(block);
      if (wants_values()) add_to_values(block, grads);
      if (additive_scores()) {
        add_to_tanh_terms(block);
        continue;
      }
      if (wants_keys()) add_to_keys(block, queries);
      if (wants_queries()) add_to_queries(block);
    }
    if (wants_queries() && additive_scores()) {
      write_query_slopes(block);
    } else if (wants_queries()) {
      float scale[query_block];
      for (float& lane : scale) lane = params_.scale;
      const HeadsView& view = params_.grad_query;
      T* target = static_cast<T*>(view.data) + view.offset(sequence_.batch, head, sequence_.query_begin + query);
      write_lanes_as_rows(target, view.row_stride, block.queries, params_.width, grad_query_, scale);
    }
  }

  // Weights and gradients of the scores as the three products take them.
  void store_gradients(const Block& block) {
    weights_.begin(block);
    ds_.begin(block);
    gradients_.for_each_vector(block, [&](int64_t v, auto at) {
      ds_lanes_.store(block, v, [&](int64_t k) __attribute__((always_inline)) {
        const ScoreGradient gradient = at(k);
        weights_.store(k, v, gradient.kept);
        ds_.store(k, v, gradient.with_score);
        return gradient.with_score;
      });
    });
  }

  void add_to_tanh_terms(const Block& block) {
    const int64_t group_head = block.head - task_.key_head * (params_.heads / params_.key_heads);
    const TanhGradients sums{query_slopes_, task_.key_sums + block.key * key_stride_,
                             task_.weight_sums + group_head * key_stride_};
    add_tanh_gradients(gradients_.query_terms(), block.queries, gradients_.key_terms(), block.keys, ds_.data(),
                       gradients_.score_weight(block), params_.width, sums);
  }

  void write_query_slopes(const Block& block) {
    const float* const weight = gradients_.score_weight(block);
    const HeadsView& view = params_.grad_query;
    T* target = static_cast<T*>(view.data) + view.offset(block.batch, block.head, sequence_.query_begin + block.query);
    for (int64_t r = 0; r < block.queries; ++r, target += view.row_stride) {
      for (int64_t c = 0; c < params_.width; c += lanes) {
        const Float gradient = load(query_slopes_ + r * key_stride_ + c) * load(weight + c) * (4.0f * params_.scale);
        if (c + lanes <= params_.width) {
          store(target + c, gradient);
        } else {
          store_partial(target + c, gradient, params_.width - c);
        }
      }
    }
  }

  void add_to_values(const Block& block, const Rows<T>& grads) {
    float* sums = task_.value_sums + block.key * value_stride_;
    if (gradients_.partial() && !grads_finite_) {
      add_rows_that_take_part(block, weights_, grads, sums, value_stride_);
    } else {
      product<Word>(block.keys, value_stride_, words<T>(block.queries), weights_.operand(), {grad_rows_, value_stride_},
                    {sums, value_stride_}, true);
    }
  }

  void add_to_keys(const Block& block, const Rows<T>& queries) {
    float* sums = task_.key_sums + block.key * key_stride_;
    if (gradients_.partial() && !queries_finite_) {
      add_rows_that_take_part(block, ds_, queries, sums, key_stride_);
    } else {
      product<Word>(block.keys, key_stride_, words<T>(block.queries), ds_.operand(), {query_rows_, key_stride_},
                    {sums, key_stride_}, true);
    }
  }

  void add_to_queries(const Block& block) {
    const Rows<T> keys = gradients_.key_rows(block);
    if (gradients_.partial() && !all_finite(keys)) {
      add_keys_that_take_part(block, ds_, keys, grad_query_);
    } else {
      product<Word>(params_.width, lane_columns<T>(block.queries), words<T>(block.keys),
                    left_columns(keys, key_columns_), ds_lanes_.operand(), {grad_query_, query_block}, true);
    }
  }

  const AttentionBackwardParams& params_;
  const AttentionSequence& sequence_;
  const AttentionBackwardTask& task_;
  const int64_t key_stride_, value_stride_;
  ScoreGradients<T> gradients_;
  float *query_rows_, *grad_rows_;  // words of queries by lanes of D and of DV
  float* grad_query_;               // D by lanes of queries, float32 sums
  WeightRows<T> weights_, ds_;
  WeightLanes<T> ds_lanes_;
  float* query_slopes_;  // queries by padded D, of additive scores
  void* key_columns_;
  bool queries_finite_ = true, grads_finite_ = true;
};

// Sums of the parts times `factor`, as rows of the tensor.
template <class T>
void write_sums(const HeadsView& view, int64_t batch, int64_t head, int64_t first, int64_t rows, int64_t width,
                const float* sums, int64_t parts, int64_t part_stride, float factor) {
  if (view.data == nullptr) return;
  const int64_t stride = whole_vectors(width);
  for (int64_t r = 0; r < rows; ++r) {
    T* row = static_cast<T*>(view.data) + view.offset(batch, head, first + r);
    for (int64_t i = 0; i < width; i += lanes) {
      Float sum{};
      for (int64_t part = 0; part < parts; ++part) sum += load(sums + part * part_stride + r * stride + i);
      if (i + lanes <= width) {
        store(row + i, sum * factor);
      } else {
        store_partial(row + i, sum * factor, width - i);
      }
    }
  }
}

}  // namespace

int64_t attention_sum_columns(int64_t width) { return whole_vectors(width); }

int64_t attention_backward_scratch(const AttentionBackwardParams& params) {
  return most_scratch(params, [&](auto element, Arena& arena) { Backward<decltype(element)>(params, {}, {}, arena); });
}

void attention_backward(const AttentionBackwardParams& params, const AttentionSequence& sequence,
                        const AttentionBackwardTask& task, void* scratch) {
  Arena arena(scratch);
  with_product_type(params, sequence, task.key_head,
                    [&](auto element) { Backward<decltype(element)>(params, sequence, task, arena).run(); });
}

void attention_backward_reduce(const AttentionBackwardParams& params, const AttentionSequence& sequence,
                               int64_t key_head, const float* key_sums, const float* value_sums, int64_t parts,
                               int64_t key_part_stride, int64_t value_part_stride) {
  with_type(params.dtype, [&](auto element) {
    using T = decltype(element);
    write_sums<T>(params.grad_key, sequence.batch, key_head, sequence.key_begin, sequence.key_count, params.width,
                  key_sums, parts, key_part_stride, params.scale);
    write_sums<T>(params.grad_value, sequence.batch, key_head, sequence.key_begin, sequence.key_count,
                  params.value_width, value_sums, parts, value_part_stride, 1.0f);
  });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
