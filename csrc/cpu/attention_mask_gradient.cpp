// The gradient of an additive mask: gradients of the logits, summed over the dimensions the mask is broadcast along.
// Only a mask that wants a gradient pays for it, with two products per block, and nothing is stored but the result.

#include "fusewright/cpu/attention/score_gradients.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

template <class T>
class MaskGradient {
 public:
  MaskGradient(const AttentionBackwardParams& params, const AttentionMaskTask& task, Arena& arena)
      : params_(params), task_(task), sums_(arena.floats(query_block * key_block)), arena_(arena) {}

  void run() {
    [[maybe_unused]] const TileSession tiles;
    memset(sums_, 0, query_block * key_block * sizeof(float));
    const Arena rest = arena_;
    for (int64_t batch = task_.batch; batch < task_.batch + task_.batches; ++batch) {
      const AttentionSequence sequence{batch, 0, params_.queries, 0, params_.keys, task_.shift};
      arena_ = rest;
      ScoreGradients<T> gradients(params_, sequence, arena_);
      for (int64_t head = task_.head; head < task_.head + task_.heads; ++head) add_head(gradients, batch, head);
    }
    with_type(params_.mask.dtype, [&](auto element) { write(static_cast<decltype(element)*>(task_.target)); });
  }

 private:
  static int64_t at_most(int64_t count, int64_t block) { return count < block ? count : block; }

  void add_head(ScoreGradients<T>& gradients, int64_t batch, int64_t head) {
    for (int64_t query = task_.query; query < task_.query + task_.queries; query += query_block) {
      const int64_t queries = at_most(task_.query + task_.queries - query, query_block);
      Block block{batch, head, query, queries, 0, 0, task_.shift};
      gradients.begin_queries(block);
      for (block.key = task_.key; block.key < task_.key + task_.keys; block.key += key_block) {
        block.keys = at_most(task_.key + task_.keys - block.key, key_block);
        if (!gradients.form_scores(block)) continue;
        gradients.for_each_vector(block, [&](int64_t v, auto at) {
          for (int64_t k = 0; k < block.keys; ++k) {
            float* sums = sums_ + k * query_block + v;
            store(sums, load(sums) + at(k).with_logit);
          }
        });
      }
    }
  }

  // Along a broadcast dimension the blocks were added onto each other; what is left is the sum within the block.
  template <class Element>
  void write(Element* target) const {
    const int64_t rows = task_.one_query ? 1 : task_.queries, columns = task_.one_key ? 1 : task_.keys;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        float sum = 0;
        for (int64_t k = c; k < (task_.one_key ? key_block : c + 1); ++k) {
          for (int64_t q = r; q < (task_.one_query ? query_block : r + 1); ++q) sum += sums_[k * query_block + q];
        }
        Element* place = target + r * task_.target_stride + c;
        store_partial(place, broadcast(sum), 1);
      }
    }
  }

  const AttentionBackwardParams& params_;
  const AttentionMaskTask& task_;
  float* sums_;  // keys by lanes of queries
  Arena& arena_;
};

}  // namespace

int64_t attention_mask_gradient_scratch(const AttentionBackwardParams& params) {
  Arena arena(nullptr);
  with_type(params.dtype, [&](auto element) {
    using T = decltype(element);
    MaskGradient<T>(params, {}, arena);
    ScoreGradients<T>(params, {}, arena);
  });
  return arena.used();
}

void attention_mask_gradient(const AttentionBackwardParams& params, const AttentionMaskTask& task, void* scratch) {
  Arena arena(scratch);
  with_type(params.dtype, [&](auto element) { MaskGradient<decltype(element)>(params, task, arena).run(); });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
