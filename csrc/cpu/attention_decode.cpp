// Exact attention for few queries, as in decoding: lanes run along the head dimension and along keys, since queries
// would leave most of a vector empty. Bound by reading keys and values once.
//
// The keys of a head are split into parts of fixed length, so that one sequence keeps several threads busy; a part
// leaves, for each row, a reference r, the sum of exp(logit - r) and the weighted sum of values, and parts are joined
// in order. Dao et al., "Flash-Decoding for long-context inference", 2023.

#include "fusewright/cpu/arena.h"
#include "fusewright/cpu/attention/logits.h"
#include "fusewright/cpu/dot.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

// One row of queries: its head, its position, and its running softmax.
struct Row {
  int64_t head, query;
  float reference;  // in units of logits
  float total;
};

template <class T>
class Decode {
 public:
  Decode(const AttentionDecodeParams& params, const AttentionSequence& sequence, const AttentionDecodeTask& task,
         Arena& arena)
      : params_(params), sequence_(sequence), task_(task), group_(params.heads / params.key_heads) {
    row_count_ = group_ * sequence.query_count;
    query_stride_ = packed_row_words<T>(params.width);
    value_stride_ = whole_vectors(params.value_width);
    rows_ = static_cast<Row*>(arena.bytes(row_count_ * static_cast<int64_t>(sizeof(Row))));
    queries_ = arena.floats(row_count_ * query_stride_);
    weights_ = arena.floats(row_count_ * key_block);
    values_ = arena.floats(key_block * value_stride_);
  }

  void run() {
    float* sums = task_.sums;
    memset(sums, 0, row_count_ * value_stride_ * sizeof(float));
    for (int64_t r = 0; r < row_count_; ++r) begin_row(r);
    for (int64_t key = task_.first_key; key < task_.last_key;) {
      const int64_t in_page = params_.page_size == 0 ? key_block : params_.page_size - key % params_.page_size;
      int64_t count = task_.last_key - key;
      if (count > key_block) count = key_block;
      if (count > in_page) count = in_page;
      visit(key, count, sums);
      key += count;
    }
    for (int64_t r = 0; r < row_count_; ++r) {
      task_.references[r] = rows_[r].reference;
      task_.totals[r] = rows_[r].total;
    }
  }

 private:
  void begin_row(int64_t r) {
    const int64_t head = task_.key_head * group_ + r / sequence_.query_count, query = r % sequence_.query_count;
    rows_[r] = {head, query, negative_infinity, 0.0f};
    const T* source = static_cast<const T*>(params_.query.data) +
                      params_.query.offset(sequence_.batch, head, sequence_.query_begin + query);
    pack_row(queries_ + r * query_stride_, source, params_.width);
  }

  Rows<T> rows_of(const HeadsView& view, int64_t key, int64_t count, int64_t width) const {
    int64_t batch = sequence_.batch, row = sequence_.key_begin + key;
    if (params_.page_size > 0) {
      batch = params_.block_table[sequence_.batch * params_.block_table_stride + key / params_.page_size];
      row = key % params_.page_size;
    }
    return {static_cast<const T*>(view.data) + view.offset(batch, task_.key_head, row), view.row_stride, count, width};
  }

  void visit(int64_t key, int64_t count, float* sums) {
    using Word = typename Multiplied<T>::Word;
    const Rows<T> keys = rows_of(params_.key, key, count, params_.width);
    const Rows<T> values = rows_of(params_.value, key, count, params_.value_width);
    prefetch(values);
    bool any = false, partial = false;
    for (int64_t r = 0; r < row_count_; ++r) {
      const Block block{sequence_.batch, rows_[r].head, rows_[r].query, 1, key, count, sequence_.shift};
      float* weights = weights_ + r * key_block;
      const Visibility visible = visibility(params_, block);
      partial |= visible.together() != Visible::all || params_.mask.kind == MaskKind::additive;
      if (visible.together() == Visible::none) {
        memset(weights, 0, key_block * sizeof(float));
        continue;
      }
      any = true;
      dot_products(queries_ + r * query_stride_, keys, weights);
      form_logits(block, visible, weights);
      weigh(rows_[r], count, weights, sums + r * value_stride_);
    }
    if (!any) return;
    if (key + count + key_block <= task_.last_key && params_.page_size == 0) {
      prefetch(rows_of(params_.key, key + count, key_block, params_.width));
    }
    if (partial && !all_finite(values)) return add_values_that_take_part(values, sums);
    if constexpr (in_pairs<T>) round_weights();
    const bool in_place = is_float<T> && params_.value_width % lanes == 0;
    Lanes right{values_, value_stride_};
    if constexpr (is_float<T>) {
      if (in_place) right = {const_cast<float*>(values.data), values.stride};
    }
    if (!in_place) pack_width_as_lanes(values_, values);
    vector_product<Word>(row_count_, value_stride_, words<T>(count), {weights_, weight_bytes(), 4}, right,
                         {sums, value_stride_}, true);
  }

  // Asks for rows before they are needed: keys and values take turns, and the processor's own prefetching stops at each
  // turn.
  static void prefetch(const Rows<T>& rows) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t r = 0; r < rows.count; ++r) {
      for (int64_t i = 0; i < rows.width; i += line) __builtin_prefetch(rows.row(r) + i);
    }
  }

  static constexpr int64_t weight_bytes() { return key_block * (in_pairs<T> ? 2 : 4); }

  // Scaled, capped, biased and masked; keys in lanes.
  void form_logits(const Block& block, const Visibility& visible, float* logits) const {
    const float slope = params_.alibi_slopes == nullptr
                            ? 0.0f
                            : params_.alibi_slopes[block.batch * params_.alibi_batch_stride + block.head];
    const float inverse_cap = params_.softcap > 0 ? 1.0f / params_.softcap : 0.0f;
    const float first = static_cast<float>(block.key - block.query - block.shift);
    for (int64_t k = 0; k < block.keys; k += lanes) {
      Float x = load(logits + k) * params_.scale;
      if (params_.softcap > 0) x = tanh_lanes(x * inverse_cap) * params_.softcap;
      if (slope != 0.0f) x -= absolute(lane_numbers(k) + first) * slope;
      store(logits + k, x);
    }
    if (params_.mask.kind == MaskKind::additive) add_mask(block, logits);
    const int64_t position = block.query + block.shift;
    for (int64_t k = 0; k < block.keys; ++k) {
      if (!takes_part(block, visible, position, k)) logits[k] = negative_infinity;
    }
    for (int64_t k = block.keys; k < whole_vectors(block.keys); ++k) logits[k] = negative_infinity;
  }

  bool takes_part(const Block& block, const Visibility& visible, int64_t position, int64_t k) const {
    const int64_t key = block.key + k;
    if (visible.window == Visible::some) {
      if (params_.window_right >= 0 && key > position + params_.window_right) return false;
      if (params_.window_left >= 0 && key < position - params_.window_left) return false;
    }
    if (visible.block_mask == Visible::some) {
      const bool* head = params_.block_mask + block.head * params_.block_head_stride;
      if (!head[block.query / params_.block_size * params_.block_columns + key / params_.block_size]) return false;
    }
    if (visible.mask == Visible::some) {
      return static_cast<const bool*>(params_.mask.data)[mask_offset(params_.mask, block) + k * params_.mask.stride[3]];
    }
    return true;
  }

  void add_mask(const Block& block, float* logits) const {
    with_type(params_.mask.dtype, [&](auto type) {
      const auto* mask = static_cast<const decltype(type)*>(params_.mask.data) + mask_offset(params_.mask, block);
      for (int64_t k = 0; k < block.keys; ++k) {
        const float bias = element(mask + k * params_.mask.stride[3]);
        logits[k] = bias == negative_infinity ? bias : logits[k] + bias;
      }
    });
  }

  // Logits become weights; the row's sums follow its maximum.
  void weigh(Row& row, int64_t count, float* weights, float* sums) const {
    Float largest = load(weights);
    for (int64_t k = lanes; k < count; k += lanes) largest = maximum(load(weights + k), largest);
    const float block_maximum = maximum_lanes(largest);
    if (block_maximum > row.reference) {
      const Float change = exp2_clamped<true>(broadcast((row.reference - block_maximum) * log2_e));
      row.total *= change[0];
      for (int64_t i = 0; i < value_stride_; i += lanes) store(sums + i, load(sums + i) * change);
      row.reference = block_maximum;
    }
    const float shift = row.reference == negative_infinity ? 0.0f : row.reference * log2_e;
    Float total{};
    for (int64_t k = 0; k < key_block; k += lanes) {
      if (k >= count) {
        store(weights + k, Float{});
        continue;
      }
      const Float logit = load(weights + k);
      const Float w =
          select(logit == negative_infinity, Float{}, exp2_clamped<is_float<T>>(logit * log2_e - broadcast(shift)));
      total += w;
      store(weights + k, w);
    }
    row.total += sum_lanes(total);
  }

  // float32 weights to bfloat16 in place: row r moves down from r * 256 to r * 128 bytes.
  void round_weights() const {
    for (int64_t r = 0; r < row_count_; ++r) {
      BFloat16* target = reinterpret_cast<BFloat16*>(weights_) + r * key_block;
      for (int64_t k = 0; k < key_block; k += lanes) store(target + k, load(weights_ + r * key_block + k));
    }
  }

  // Pairs whose weight is zero are left out: there a value may be NaN or infinite.
  void add_values_that_take_part(const Rows<T>& values, float* sums) const {
    for (int64_t r = 0; r < row_count_; ++r) {
      for (int64_t k = 0; k < values.count; ++k) {
        const float weight = weights_[r * key_block + k];
        if (weight == 0.0f) continue;
        for (int64_t i = 0; i < values.width; ++i) sums[r * value_stride_ + i] += weight * element(values.row(k) + i);
      }
    }
  }

  const AttentionDecodeParams& params_;
  const AttentionSequence& sequence_;
  const AttentionDecodeTask& task_;
  const int64_t group_;
  int64_t row_count_, query_stride_, value_stride_;
  Row* rows_;
  float* queries_;  // rows of words
  float* weights_;  // rows by keys
  float* values_;   // words of keys by lanes of DV
};

}  // namespace

int64_t attention_decode_scratch(const AttentionDecodeParams& params, int64_t queries) {
  Arena arena(nullptr);
  const AttentionSequence sequence{0, 0, queries, 0, 0, 0};
  with_type(params.dtype, [&](auto element) { Decode<decltype(element)>(params, sequence, {}, arena); });
  return arena.used();
}

void attention_decode(const AttentionDecodeParams& params, const AttentionSequence& sequence,
                      const AttentionDecodeTask& task, void* scratch) {
  Arena arena(scratch);
  with_type(params.dtype, [&](auto element) { Decode<decltype(element)>(params, sequence, task, arena).run(); });
}

// Joins the parts of the rows of one key head, in order, and writes output and statistics.
void attention_decode_join(const AttentionDecodeParams& params, const AttentionSequence& sequence, int64_t key_head,
                           const AttentionDecodeTask* parts, int64_t part_count) {
  const int64_t group = params.heads / params.key_heads, stride = whole_vectors(params.value_width);
  for (int64_t r = 0; r < group * sequence.query_count; ++r) {
    const int64_t head = key_head * group + r / sequence.query_count;
    const int64_t row = sequence.query_begin + r % sequence.query_count;
    float reference = params.sinks == nullptr ? negative_infinity : params.sinks[head];
    for (int64_t p = 0; p < part_count; ++p) {
      // Written so that a NaN stays: a comparison with it is false.
      if (!(parts[p].references[r] <= reference)) reference = parts[p].references[r];
    }
    const auto factor_of = [&](float part_reference) {
      if (part_reference == negative_infinity) return 0.0f;
      return exp2_clamped<true>(broadcast((part_reference - reference) * log2_e))[0];
    };
    float total = params.sinks == nullptr ? 0.0f : factor_of(params.sinks[head]);
    for (int64_t p = 0; p < part_count; ++p) total += parts[p].totals[r] * factor_of(parts[p].references[r]);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    const int64_t at = (sequence.batch * params.heads + head) * params.queries + row;
    params.maximum[at] = reference;
    params.total[at] = total;
    with_type(params.dtype, [&](auto type) {
      using T = decltype(type);
      T* output = static_cast<T*>(params.output.data) + params.output.offset(sequence.batch, head, row);
      for (int64_t i = 0; i < params.value_width; i += lanes) {
        Float sum{};
        for (int64_t p = 0; p < part_count; ++p) {
          sum += load(parts[p].sums + r * stride + i) * factor_of(parts[p].references[r]);
        }
        const int64_t rest = params.value_width - i;
        if (rest >= lanes) {
          store(output + i, sum * inverse);
        } else {
          store_partial(output + i, sum * inverse, rest);
        }
      }
    });
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
