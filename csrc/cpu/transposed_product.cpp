// C = A^T B in float32, for gradients of weights: sums over very many rows of A and B.

#include "fusewright/cpu/product.h"
#include "fusewright/cpu/rows.h"
#include "fusewright/cpu/tables.h"

namespace fusewright::FUSEWRIGHT_ISA {
namespace {

// Rows that pass through the cache together: A's are copied in order, once for all columns of B.
constexpr int64_t rows_at_a_time = 256;

// Rows summed in registers before they are added to C, so that rounding errors grow with the number of such sums only.
constexpr int64_t rows_per_sum = 128;

// Columns of A in one product: whole tiles, whose copy and whose part of C stay in the nearest caches.
constexpr int64_t left_columns = 8 * product_rows;
constexpr int64_t right_columns = product_vectors * lanes;

}  // namespace

void transposed_product(const TransposedProductParams& params, int64_t begin, int64_t end) {
  const int64_t blocks = (end - begin + left_columns - 1) / left_columns, n = params.right_width;
  const Scratch packed(blocks * rows_at_a_time * left_columns * sizeof(float));
  // The last columns of B, which may not fill a vector, and their part of C.
  const int64_t last = n / lanes * lanes, last_count = n - last;
  const Scratch right_end(last_count > 0 ? rows_at_a_time * lanes * sizeof(float) : 0);
  const Scratch target_end(last_count > 0 ? left_columns * lanes * sizeof(float) : 0);
  for (int64_t first = 0; first < params.rows; first += rows_at_a_time) {
    const int64_t rest = params.rows - first, rows = rest < rows_at_a_time ? rest : rows_at_a_time;
    float* const left = packed.as<float>();
    const float* const right = params.right + first * params.right_stride;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t column = begin + block * left_columns;
      const int64_t count = end - column < left_columns ? end - column : left_columns;
      const float* source = params.left + first * params.left_stride + column;
      float* target = left + block * rows_at_a_time * left_columns;
      for (int64_t r = 0; r < rows; ++r) {
        memcpy(target + r * left_columns, source + r * params.left_stride, count * sizeof(float));
      }
    }
    const auto multiply = [&](int64_t block, const float* b, int64_t b_stride, int64_t columns, float* c,
                              int64_t c_stride, bool accumulate) {
      const int64_t column = begin + block * left_columns;
      const int64_t count = end - column < left_columns ? end - column : left_columns;
      const float* a = left + block * rows_at_a_time * left_columns;
      for (int64_t r = 0; r < rows; r += rows_per_sum) {
        const int64_t steps = rows - r < rows_per_sum ? rows - r : rows_per_sum;
        const LeftOperand operand{a + r * left_columns, 4, left_columns * 4};
        vector_product<FloatWord>(count, columns, steps, operand, {const_cast<float*>(b) + r * b_stride, b_stride},
                                  {c, c_stride}, accumulate || r > 0);
      }
    };
    for (int64_t column = 0; column < last; column += right_columns) {
      const int64_t columns = last - column < right_columns ? last - column : right_columns;
      for (int64_t block = 0; block < blocks; ++block) {
        float* c = params.target + (begin + block * left_columns) * n + column;
        multiply(block, right + column, params.right_stride, columns, c, n, first > 0);
      }
    }
    if (last_count == 0) continue;
    float* const b = right_end.as<float>();
    float* const c = target_end.as<float>();
    for (int64_t r = 0; r < rows; ++r)
      store(b + r * lanes, load_partial(right + r * params.right_stride + last, last_count));
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t column = begin + block * left_columns;
      multiply(block, b, lanes, lanes, c, lanes, false);
      for (int64_t i = 0; i < left_columns && column + i < end; ++i) {
        float* target = params.target + (column + i) * n + last;
        for (int64_t k = 0; k < last_count; ++k)
          target[k] = first > 0 ? target[k] + c[i * lanes + k] : c[i * lanes + k];
      }
    }
  }
}

}  // namespace fusewright::FUSEWRIGHT_ISA
