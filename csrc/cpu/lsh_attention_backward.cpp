// LSH attention, backward: weights are recomputed from the order and the two statistics of each row.
//
//   p = exp(logit - r) / total, dp = grad_output value^T, ds = p (dp - delta), delta = grad_output output - grad_lse
//   grad of x as a query: sum_j ds scale x_j / |x_j|, as a key: the part of sum_i ds scale x_i / |x_j| across x_j
//   grad_value[j] = sum_i p grad_output[i], sums over all places where i and j meet
//
// A task owns the positions of its chunks, in this round: only it adds to their sums. What it adds to keys of chunks
// outside of it waits in its edge sums until all tasks of the round are done.

#include "fusewright/cpu/attention/visible_sums.h"
#include "fusewright/cpu/lsh_attention/meeting.h"
#include "fusewright/cpu/lsh_attention/ring.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

// Rows of one chunk's sums: products in tiles write all of a tile.
inline int64_t rows_of_chunk(const LshAttentionParams& params) {
  return (params.chunk_length + key_block - 1) / key_block * key_block;
}

template <class T>
float dot_product(const T* a, const T* b, int64_t count) {
  Float sum{};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) sum += load(a + i) * load(b + i);
  if (i < count) sum += load_partial(a + i, count - i) * load_partial(b + i, count - i);
  return sum_lanes(sum);
}

// A vector of a row of `width` elements, zero behind the last.
template <class T>
Float part_of(const T* row, int64_t column, int64_t width) {
  return column + lanes <= width ? load(row + column) : load_partial(row + column, width - column);
}

// sums[position] (+)= rows of `source`.
inline void add_rows_at(float* sums, int64_t stride, const int32_t* positions, int64_t count, const float* source,
                        bool overwrite = false) {
  for (int64_t r = 0; r < count; ++r) {
    float* const target = sums + positions[r] * stride;
    const float* const row = source + r * stride;
    if (overwrite) {
      memcpy(target, row, stride * sizeof(float));
    } else {
      for (int64_t c = 0; c < stride; c += lanes) store(target + c, load(target + c) + load(row + c));
    }
  }
}

template <class T>
class LshBackward {
 public:
  using Word = typename Multiplied<T>::Word;
  using KeyChunk = Chunk<T, Pass::backward>;

  LshBackward(const LshBackwardParams& params, const LshTask& task, Arena& arena)
      : params_(params),
        task_(task),
        ring_(params, arena),
        key_stride_(whole_vectors(params.width)),
        value_stride_(whole_vectors(params.value_width)),
        chunk_rows_(rows_of_chunk(params)),
        weights_(arena),
        ds_(arena),
        ds_lanes_(arena.floats(WeightLanes<T>::floats())) {
    constexpr int64_t block = query_block * key_block;
    key_sums_ = arena.floats(params.window() * chunk_rows_ * key_stride_);
    value_sums_ = arena.floats(params.window() * chunk_rows_ * value_stride_);
    query_lanes_ = arena.floats(padded_words<T>(params.width) * query_block);
    grad_lanes_ = arena.floats(padded_words<T>(params.value_width) * query_block);
    query_rows_ = arena.floats(padded_words<T>(query_block) * key_stride_);
    grad_rows_ = arena.floats(padded_words<T>(query_block) * value_stride_);
    gathered_ = static_cast<T*>(arena.bytes(query_block * params.value_width * static_cast<int64_t>(sizeof(T))));
    const int64_t rows = padded_rows<T>(params.width);
    grad_query_ = arena.floats((rows > key_stride_ ? rows : key_stride_) * query_block);
    scores_ = arena.floats(block);
    grad_weights_ = arena.floats(block);
    dropout_ = params.keep_threshold > 0 ? arena.floats(block) : nullptr;
  }

  void run() {
    [[maybe_unused]] const TileSession tiles;
    const auto leave = [&](const KeyChunk& chunk, int64_t number) { add_chunk(chunk, number); };
    int64_t present = task_.first - params_.chunks_before;
    for (int64_t number = task_.first; number < task_.last; ++number) {
      ring_.move_to(params_, task_, number, leave);
      for (; present <= number + params_.chunks_after; ++present) {
        memset(key_sums(present), 0, chunk_rows_ * key_stride_ * sizeof(float));
        memset(value_sums(present), 0, chunk_rows_ * value_stride_ * sizeof(float));
      }
      const KeyChunk& own = ring_.chunk(number);
      for (int64_t block = 0; block < own.blocks(); ++block) visit(number, own, block);
    }
    ring_.clear(leave);
  }

 private:
  float* key_sums(int64_t number) const { return key_sums_ + ring_.index(number) * chunk_rows_ * key_stride_; }
  float* value_sums(int64_t number) const { return value_sums_ + ring_.index(number) * chunk_rows_ * value_stride_; }

  // A chunk that no later one meets: its sums go to its positions, or wait.
  void add_chunk(const KeyChunk& chunk, int64_t number) {
    float *const keys = key_sums(number), *const values = value_sums(number);
    through_norm(chunk, keys);
    if (number >= task_.first && number < task_.last) {
      // Its queries were there before: a chunk leaves after its own visit.
      add_rows_at(task_.sums.query_key, key_stride_, chunk.positions(0), chunk.count(), keys);
      add_rows_at(task_.sums.value, value_stride_, chunk.positions(0), chunk.count(), values, task_.round == 0);
      return;
    }
    const int64_t edge = number < task_.first ? number - (task_.first - params_.chunks_before)
                                              : params_.chunks_before + number - task_.last;
    memcpy(task_.edge_keys + edge * chunk_rows_ * key_stride_, keys, chunk.count() * key_stride_ * sizeof(float));
    memcpy(task_.edge_values + edge * chunk_rows_ * value_stride_, values,
           chunk.count() * value_stride_ * sizeof(float));
  }

  // From sums of ds x_i to gradients of the keys' vectors: d(x / |x|) takes away what points along x.
  void through_norm(const KeyChunk& chunk, float* sums) {
    const int64_t row = params_.row(task_.batch, task_.head);
    for (int64_t i = 0; i < chunk.count(); ++i, sums += key_stride_) {
      const T* const x = chunk.keys(i / key_block).row(i % key_block);
      const float inverse = params_.inverse_norm[row + chunk.positions(0)[i]];
      Float along{};
      for (int64_t c = 0; c < params_.width; c += lanes) {
        along += first_columns(sums, c) * (part_of(x, c, params_.width) * inverse);
      }
      const float projection = sum_lanes(along), factor = params_.scale * inverse;
      for (int64_t c = 0; c < params_.width; c += lanes) {
        store(sums + c, (load(sums + c) - part_of(x, c, params_.width) * (inverse * projection)) * factor);
      }
    }
  }

  // Columns behind the last hold whatever the products left there.
  Float first_columns(const float* row, int64_t column) const {
    const int64_t left = params_.width - column;
    return left >= lanes ? load(row + column) : select(first_lanes(left), load(row + column), Float{});
  }

  void visit(int64_t number, const KeyChunk& own, int64_t block) {
    QueryLanes queries{task_.batch, task_.head, task_.round, 0, {}, {}};
    queries.read(params_, own, block);
    const Rows<T> query_rows = own.keys(block), grads = gather_gradients(queries);
    pack_rows_as_lanes(query_lanes_, query_rows);
    pack_width_as_lanes(query_rows_, query_rows);
    pack_rows_as_lanes(grad_lanes_, grads);
    pack_width_as_lanes(grad_rows_, grads);
    const bool queries_finite = own.keys_finite(block), grads_finite = all_finite(grads);
    read_statistics(queries, grads);
    memset(grad_query_, 0, padded_rows<T>(params_.width) * query_block * sizeof(float));
    for (int64_t offset = -params_.chunks_before; offset <= params_.chunks_after; ++offset) {
      const KeyChunk& keys = ring_.chunk(number + offset);
      for (int64_t b = 0; b < keys.blocks(); ++b) {
        const int64_t place = (offset + params_.chunks_before) * params_.chunk_length + b * key_block;
        const Block pairs{queries.batch, queries.head, 0, queries.count, 0, keys.count_of(b), 0};
        if (!form_gradients(pairs, queries, keys, b, place)) continue;
        add_to_values(pairs, grads, grads_finite, value_sums(number + offset) + b * key_block * value_stride_);
        add_to_keys(pairs, query_rows, queries_finite, key_sums(number + offset) + b * key_block * key_stride_);
        add_to_queries(pairs, keys, b);
      }
    }
    add_queries(queries);
  }

  Rows<T> gather_gradients(const QueryLanes& queries) {
    const HeadsView& view = params_.grad_output;
    const T* const source = static_cast<const T*>(view.data) + view.offset(task_.batch, task_.head, 0);
    for (int64_t r = 0; r < queries.count; ++r) {
      memcpy(gathered_ + r * params_.value_width, source + queries.positions[r] * view.row_stride,
             params_.value_width * sizeof(T));
    }
    return {gathered_, params_.value_width, queries.count, params_.value_width};
  }

  // Lanes behind the last query, and rows that see themselves alone, get an inverse total of zero and so weigh nothing.
  void read_statistics(const QueryLanes& queries, const Rows<T>& grads) {
    const int64_t row = params_.row(task_.batch, task_.head);
    const T* const outputs =
        static_cast<const T*>(params_.output.data) + params_.output.offset(task_.batch, task_.head, 0);
    for (int64_t r = 0; r < query_block; ++r) {
      shift_[r] = inverse_total_[r] = delta_[r] = 0.0f;
      if (r >= queries.count) continue;
      const int64_t position = queries.positions[r];
      const float total = params_.total[row + position];
      if (total == 0.0f) continue;
      shift_[r] = params_.reference[row + position] * log2_e;
      inverse_total_[r] = 1.0f / total;
      delta_[r] = dot_product(grads.row(r), outputs + position * params_.output.row_stride, params_.value_width);
      if (params_.grad_lse != nullptr) delta_[r] -= params_.grad_lse[row + position];
    }
  }

  bool form_gradients(const Block& block, const QueryLanes& queries, const KeyChunk& keys, int64_t b,
                      int64_t first_place) {
    const int64_t columns = lane_columns<T>(queries.count), count = block.keys;
    product<Word>(count, columns, words<T>(params_.width), keys.key_rows(b), {query_lanes_, query_block},
                  {scores_, query_block}, false);
    if (!form_logits(params_, queries, keys, b, columns, scores_)) return false;
    product<Word>(count, columns, words<T>(params_.value_width), keys.values_operand(b), {grad_lanes_, query_block},
                  {grad_weights_, query_block}, false);
    if (dropout_ != nullptr) lsh_dropout_factors(params_, queries, first_place, count, dropout_);
    const float* const factors = keys.factors(b);
    weights_.begin(block);
    ds_.begin(block);
    for (int64_t v = 0; v < columns; v += lanes) {
      const Float shift = load(shift_ + v), inverse_total = load(inverse_total_ + v), delta = load(delta_ + v);
      ds_lanes_.store(block, v, [&](int64_t k) __attribute__((always_inline)) {
        const int64_t at = k * query_block + v;
        const Float score = load(scores_ + at);
        const Int hidden = score == negative_infinity;
        const Float p = exp2_clamped<is_float<T>>(score * log2_e - shift) * inverse_total;
        Float kept = p, grad_weight = load(grad_weights_ + at);
        if (dropout_ != nullptr) {
          const Float factor = load(dropout_ + at);
          kept = p * factor;
          grad_weight = select(factor == 0.0f, Float{}, grad_weight * factor);
        }
        const Float ds = select(hidden, Float{}, p * (grad_weight - delta));
        weights_.store(k, v, select(hidden, Float{}, kept));
        ds_.store(k, v, ds);
        return select(hidden, Float{}, ds * factors[k]);
      });
    }
    return true;
  }

  void add_to_values(const Block& block, const Rows<T>& grads, bool finite, float* sums) {
    if (!finite) return add_rows_that_take_part(block, weights_, grads, sums, value_stride_);
    product<Word>(block.keys, value_stride_, words<T>(block.queries), weights_.operand(), {grad_rows_, value_stride_},
                  {sums, value_stride_}, true);
  }

  void add_to_keys(const Block& block, const Rows<T>& queries, bool finite, float* sums) {
    if (!finite) return add_rows_that_take_part(block, ds_, queries, sums, key_stride_);
    product<Word>(block.keys, key_stride_, words<T>(block.queries), ds_.operand(), {query_rows_, key_stride_},
                  {sums, key_stride_}, true);
  }

  void add_to_queries(const Block& block, const KeyChunk& keys, int64_t b) {
    if (!keys.keys_finite(b)) return add_finite_keys(block, keys, b);
    product<Word>(params_.width, lane_columns<T>(block.queries), words<T>(block.keys), keys.key_columns(b),
                  ds_lanes_.operand(), {grad_query_, query_block}, true);
  }

  void add_finite_keys(const Block& block, const KeyChunk& chunk, int64_t b) {
    const Rows<T> keys = chunk.keys(b);
    for (int64_t k = 0; k < block.keys; ++k) {
      for (int64_t r = 0; r < block.queries; ++r) {
        const float weight = ds_.at(k, r);
        if (weight == 0.0f) continue;
        for (int64_t i = 0; i < keys.width; ++i) {
          grad_query_[i * query_block + r] += weight * chunk.factors(b)[k] * element(keys.row(k) + i);
        }
      }
    }
  }

  void add_queries(const QueryLanes& queries) {
    const bool first_round = task_.round == 0;
    for (int64_t v = 0; v < queries.count; v += lanes) {
      const int64_t count = queries.count - v < lanes ? queries.count - v : lanes;
      for (int64_t column = 0; column < key_stride_; column += lanes) {
        Float rows[lanes];
        for (int i = 0; i < lanes; ++i) rows[i] = load(grad_query_ + (column + i) * query_block + v);
        transpose(rows);
        for (int64_t i = 0; i < count; ++i) {
          float* const sums = task_.sums.query_key + queries.positions[v + i] * key_stride_ + column;
          store(sums, first_round ? rows[i] : load(sums) + rows[i]);
        }
      }
    }
  }

  const LshBackwardParams& params_;
  const LshTask& task_;
  Ring<KeyChunk> ring_;
  const int64_t key_stride_, value_stride_, chunk_rows_;
  float *key_sums_, *value_sums_;             // of each slot of the ring
  float *query_lanes_, *grad_lanes_;          // words of D and of DV by lanes of queries
  float *query_rows_, *grad_rows_;            // words of queries by lanes of D and of DV
  T* gathered_;                               // gradients of the outputs
  float* grad_query_;                         // D by lanes of queries
  float *scores_, *grad_weights_, *dropout_;  // keys by lanes of queries
  WeightRows<T> weights_, ds_;
  WeightLanes<T> ds_lanes_;  // times scale / |x_j|
  float shift_[query_block], inverse_total_[query_block], delta_[query_block];
};

template <class T>
void finish_rows(const LshBackwardParams& params, int64_t batch, int64_t head, const LshSums& sums, int64_t begin,
                 int64_t end) {
  const int64_t key_stride = whole_vectors(params.width), value_stride = whole_vectors(params.value_width);
  const int64_t row = params.row(batch, head);
  const auto at = [&](const HeadsView& view, int64_t i) {
    return static_cast<T*>(view.data) + view.offset(batch, head, i);
  };
  const auto write = [](T* target, int64_t column, int64_t width, Float value) {
    if (column + lanes <= width) {
      store(target + column, value);
    } else {
      store_partial(target + column, value, width - column);
    }
  };
  for (int64_t i = begin; i < end; ++i) {
    const bool alone = params.total[row + i] == 0.0f;
    // The logit of a row alone is scale * |x|.
    const float own = alone && params.grad_lse != nullptr
                          ? params.grad_lse[row + i] * params.scale * params.inverse_norm[row + i]
                          : 0.0f;
    const T* const x = at(params.query_key, i);
    T* const grad_x = at(params.grad_query_key, i);
    for (int64_t c = 0; c < params.width; c += lanes) {
      Float gradient = load(sums.query_key + i * key_stride + c);
      if (own != 0.0f) gradient += part_of(x, c, params.width) * own;
      write(grad_x, c, params.width, gradient);
    }
    const T* const grad_output = at(params.grad_output, i);
    T* const grad_value = at(params.grad_value, i);
    for (int64_t c = 0; c < params.value_width; c += lanes) {
      Float gradient = load(sums.value + i * value_stride + c);
      if (alone) gradient += part_of(grad_output, c, params.value_width);
      write(grad_value, c, params.value_width, gradient);
    }
  }
}

}  // namespace

int64_t lsh_backward_scratch(const LshBackwardParams& params) {
  Arena arena(nullptr);
  with_type(params.dtype, [&](auto element) { LshBackward<decltype(element)>(params, {}, arena); });
  return arena.used();
}

int64_t lsh_chunk_rows(const LshBackwardParams& params) { return rows_of_chunk(params); }

void lsh_backward(const LshBackwardParams& params, const LshTask& task, void* scratch) {
  Arena arena(scratch);
  with_type(params.dtype, [&](auto element) { LshBackward<decltype(element)>(params, task, arena).run(); });
}

void lsh_backward_add_edges(const LshBackwardParams& params, const LshTask& task) {
  const int64_t key_stride = whole_vectors(params.width), value_stride = whole_vectors(params.value_width);
  const int64_t rows = rows_of_chunk(params), per_round = params.chunks_per_round(), ring = params.ring();
  for (int64_t edge = 0; edge < params.chunks_before + params.chunks_after; ++edge) {
    const int64_t number = edge < params.chunks_before ? task.first - params.chunks_before + edge
                                                       : task.last + edge - params.chunks_before;
    const int64_t at = ((task.round * per_round + number) % ring + ring) % ring;
    const int64_t first = at % per_round * params.chunk_length;
    const int64_t left = params.length - first, count = left < params.chunk_length ? left : params.chunk_length;
    const int32_t* const positions = params.order + params.row(task.batch, task.head, at / per_round) + first;
    add_rows_at(task.sums.query_key, key_stride, positions, count, task.edge_keys + edge * rows * key_stride);
    add_rows_at(task.sums.value, value_stride, positions, count, task.edge_values + edge * rows * value_stride);
  }
}

void lsh_backward_finish(const LshBackwardParams& params, int64_t batch, int64_t head, const LshSums& sums,
                         int64_t begin, int64_t end) {
  with_type(params.dtype, [&](auto element) { finish_rows<decltype(element)>(params, batch, head, sums, begin, end); });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
