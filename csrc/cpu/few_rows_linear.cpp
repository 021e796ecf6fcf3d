// A linear layer on few rows, for one instruction set: bound by reading the weight, which is read once and where it
// lies. Each row's result is the same however many rows there are.

#include "fusewright/cpu/dot_rows.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

// Elements from one packed row of input to the next.
template <class T>
int64_t packed_stride(int64_t width) {
  return packed_row_words<T>(width) * static_cast<int64_t>(sizeof(float) / sizeof(Stored<T>));
}

template <class T>
void pack(const FewRowsLinearParams& params, void* packed) {
  const RowReader<T> input(params.input, params.width);
  const T* rows[row_block];
  float* target = static_cast<float*>(packed);
  for (int64_t first = 0; first < params.rows; first += row_block) {
    const int64_t count = params.rows - first < row_block ? params.rows - first : row_block;
    input.read(first, count, rows);
    for (int64_t r = 0; r < count; ++r, target += packed_row_words<T>(params.width)) {
      pack_row(target, rows[r], params.width);
    }
  }
}

template <class T>
void columns_of(const FewRowsLinearParams& params, const void* packed, int64_t begin, int64_t end) {
  const T* const weight = static_cast<const T*>(params.weight);
  const T* const bias = static_cast<const T*>(params.bias);
  T* const output = static_cast<T*>(params.output);
  const Scratch scratch(params.rows * lanes * sizeof(float));
  float* const sums = scratch.as<float>();
  for (int64_t column = begin; column < end; column += lanes) {
    const int64_t count = end - column < lanes ? end - column : lanes;
    dot_rows<T>(params.rows, params.width, static_cast<const Stored<T>*>(packed), packed_stride<T>(params.width),
                weight + column * params.weight_stride, params.weight_stride, count, {sums, lanes});
    const Float added = bias == nullptr ? Float{} : load_partial(bias + column, count);
    for (int64_t r = 0; r < params.rows; ++r) {
      store_partial(output + r * params.columns + column, load(sums + r * lanes) + added, count);
    }
  }
}

}  // namespace

int64_t few_rows_linear_scratch(const FewRowsLinearParams& params) {
  int64_t words = 0;
  with_type(params.input.dtype, [&](auto element) { words = packed_row_words<decltype(element)>(params.width); });
  return params.rows * words * static_cast<int64_t>(sizeof(float));
}

void few_rows_linear_pack(const FewRowsLinearParams& params, void* packed) {
  with_type(params.input.dtype, [&](auto element) { pack<decltype(element)>(params, packed); });
}

void few_rows_linear(const FewRowsLinearParams& params, const void* packed, int64_t begin, int64_t end) {
  with_type(params.input.dtype, [&](auto element) { columns_of<decltype(element)>(params, packed, begin, end); });
}

}  // namespace fusewright::FUSEWRIGHT_ISA
