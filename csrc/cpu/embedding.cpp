// Embedding with positions and the gradient of its matrices, for one instruction set.

#include "fusewright/embedding.h"

#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"
#include "fusewright/cpu/words.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

// Calls body(i, count) for vectors of a row, the last of which may not be full.
template <class Body>
FUSEWRIGHT_ALWAYS_INLINE void for_vectors(int64_t columns, Body body) {
  int64_t i = 0;
  for (; i + lanes <= columns; i += lanes) body(i, lanes);
  if (i < columns) body(i, columns - i);
}

template <class T>
FUSEWRIGHT_ALWAYS_INLINE Float load_some(const T* source, int64_t count) {
  return count == lanes ? load(source) : load_partial(source, count);
}

template <class T>
FUSEWRIGHT_ALWAYS_INLINE void store_some(T* target, Float value, int64_t count) {
  return count == lanes ? store(target, value) : store_partial(target, value, count);
}

// The row of `from` that output m takes, or nullptr where there is no such row.
template <class T>
const T* row_at(const IndexedRows& from, int64_t m, int64_t columns) {
  const int64_t index = from.indices == nullptr ? m % from.period : from.indices[m];
  return index < 0 || index >= from.rows ? nullptr : static_cast<const T*>(from.data) + index * columns;
}

template <class T, class Table>
void forward_rows(const EmbeddingForwardParams& params, int64_t begin, int64_t end) {
  const int64_t columns = params.columns;
  const Float unknown = broadcast(__builtin_nanf(""));
  for (int64_t m = begin; m < end; ++m) {
    const T* const vector = row_at<T>(params.weight, m, columns);
    T* const target = static_cast<T*>(params.output) + m * columns;
    const bool with_table = params.table.data != nullptr;
    const Table* const added = with_table ? row_at<Table>(params.table, m, columns) : nullptr;
    if (vector == nullptr || (with_table && added == nullptr)) {
      for_vectors(columns, [&](int64_t i, int64_t count) { store_some(target + i, unknown, count); });
      continue;
    }
    for_vectors(columns, [&](int64_t i, int64_t count) {
      Float sum = load_some(vector + i, count) * params.scale;
      if (with_table) sum += load_some(added + i, count);
      store_some(target + i, sum, count);
    });
  }
}

// Rows added in float32 before the sum moves to double: the error does not grow with how often an index occurs.
constexpr int64_t rows_per_partial = 64;

template <class T, class Gradient>
void sum_rows(const EmbeddingBackwardParams& params, int64_t row, int64_t column, int64_t count, float* sums,
              double* totals) {
  Gradient* const target = static_cast<Gradient*>(params.gradient) + row * params.columns + column;
  const int64_t begin = params.begins[row], end = row == params.skipped ? begin : params.begins[row + 1];
  // Most rows of a large vocabulary do not occur, and most others once.
  if (begin == end) {
    memset(target, 0, count * sizeof(Gradient));
    return;
  }
  if (begin + 1 == end) {
    const T* const source = static_cast<const T*>(params.grad_output) + params.order[begin] * params.columns + column;
    for_vectors(count, [&](int64_t c, int64_t some) {
      store_some(target + c, load_some(source + c, some) * params.scale, some);
    });
    return;
  }
  const bool many = end - begin > rows_per_partial;
  memset(sums, 0, count * sizeof(float));
  if (many) memset(totals, 0, count * sizeof(double));
  for (int64_t i = begin; i < end; ++i) {
    const T* const source = static_cast<const T*>(params.grad_output) + params.order[i] * params.columns + column;
    for_vectors(count, [&](int64_t c, int64_t some) {
      store_some(sums + c, load_some(sums + c, some) + load_some(source + c, some), some);
    });
    if (many && ((i - begin) % rows_per_partial == rows_per_partial - 1 || i + 1 == end)) {
      for (int64_t c = 0; c < count; ++c) totals[c] += static_cast<double>(sums[c]);
      memset(sums, 0, count * sizeof(float));
    }
  }
  if (many) {
    for (int64_t c = 0; c < count; ++c) sums[c] = static_cast<float>(totals[c]);
  }
  for_vectors(count,
              [&](int64_t c, int64_t some) { store_some(target + c, load_some(sums + c, some) * params.scale, some); });
}

}  // namespace

void embedding_forward(const EmbeddingForwardParams& params, int64_t begin, int64_t end) {
  with_type(params.weight.dtype, [&](auto element) {
    using T = decltype(element);
    // A table of another type is float32.
    if (params.table.dtype == params.weight.dtype) return forward_rows<T, T>(params, begin, end);
    forward_rows<T, float>(params, begin, end);
  });
}

void embedding_backward(const EmbeddingBackwardParams& params, int64_t begin, int64_t end, int64_t column,
                        int64_t count) {
  const Scratch sums(count * sizeof(float)), totals(count * sizeof(double));
  with_type(params.dtype, [&](auto element) {
    with_type(params.gradient_dtype, [&](auto gradient) {
      for (int64_t row = begin; row < end; ++row) {
        sum_rows<decltype(element), decltype(gradient)>(params, row, column, count, sums.as<float>(),
                                                        totals.as<double>());
      }
    });
  });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
