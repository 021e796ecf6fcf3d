// CPU kernels of the embedding ops, attached to the schemas of fusewright_kernels/library/embedding.py.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "fusewright/embedding.h"
#include "parallel.h"
#include "tensor_rows.h"
#include "worker.h"

namespace fusewright::ops {
namespace {

IndexedRows indexed_rows(const Tensor& matrix, const std::optional<Tensor>& indices, int64_t period) {
  return {matrix.data_ptr(), data_type(matrix.scalar_type()), matrix.size(0),
          indices.has_value() ? static_cast<const int64_t*>(indices->data_ptr()) : nullptr, period};
}

Tensor forward(Tensor tokens, Tensor weight, std::optional<Tensor> table, std::optional<Tensor> rows, double scale) {
  int64_t sizes[64];
  for (int64_t dim = 0; dim < tokens.dim(); ++dim) sizes[dim] = tokens.size(dim);
  sizes[tokens.dim()] = weight.size(1);
  Tensor output = empty(sizes, tokens.dim() + 1, weight.scalar_type(), weight);
  const Tensor matrix = torch::stable::contiguous(weight), indices = torch::stable::contiguous(tokens);
  EmbeddingForwardParams params;
  params.columns = weight.size(1);
  params.scale = static_cast<float>(scale);
  params.weight = indexed_rows(matrix, indices, 1);
  params.table.dtype = params.weight.dtype;
  std::optional<Tensor> table_matrix, table_rows;
  if (table.has_value()) {
    table_matrix = torch::stable::contiguous(*table);
    if (rows.has_value()) table_rows = torch::stable::contiguous(*rows);
    params.table = indexed_rows(*table_matrix, table_rows, tokens.dim() > 0 ? tokens.size(tokens.dim() - 1) : 1);
  }
  params.output = output.data_ptr();
  const CpuKernels& kernels = cpu_kernels();
  parallel_rows(tokens.numel(), params.columns,
                [&](int64_t begin, int64_t end) { kernels.embedding_forward(params, begin, end); });
  return output;
}

// Places of `indices` by their index, in order, and where those of each index begin; what is no row is left out.
struct Places {
  std::vector<int64_t> order, begins;

  Places(const int64_t* indices, int64_t count, int64_t rows) : order(count), begins(rows + 1, 0) {
    const auto is_row = [&](int64_t i) { return indices[i] >= 0 && indices[i] < rows; };
    for (int64_t i = 0; i < count; ++i) {
      if (is_row(i)) ++begins[indices[i] + 1];
    }
    for (int64_t row = 0; row < rows; ++row) begins[row + 1] += begins[row];
    std::vector<int64_t> next(begins.begin(), begins.end() - 1);
    for (int64_t i = 0; i < count; ++i) {
      if (is_row(i)) order[next[indices[i]]++] = i;
    }
  }

  int64_t most_of_a_row() const {
    int64_t most = 0;
    for (size_t row = 0; row + 1 < begins.size(); ++row) most = std::max(most, begins[row + 1] - begins[row]);
    return most;
  }

  // The first row whose part of the work, a unit for each row and for each place, ends behind `work`.
  int64_t row_behind(int64_t work) const {
    int64_t low = 0, high = static_cast<int64_t>(begins.size()) - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (begins[middle] + middle < work) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

Tensor backward(Tensor grad_output, Tensor indices, int64_t count, double scale, int64_t skipped, ScalarType dtype) {
  const int64_t columns = grad_output.size(grad_output.dim() - 1), sizes[] = {count, columns};
  Tensor gradient = empty(sizes, 2, dtype, grad_output);
  if (count == 0 || columns == 0) return gradient;
  const Tensor rows = torch::stable::contiguous(grad_output), given = torch::stable::contiguous(indices);
  const Places places(static_cast<const int64_t*>(given.data_ptr()), given.numel(), count);
  EmbeddingBackwardParams params;
  params.columns = columns;
  params.scale = static_cast<float>(scale);
  params.skipped = skipped;
  params.grad_output = rows.data_ptr();
  params.dtype = data_type(grad_output.scalar_type());
  params.order = places.order.data();
  params.begins = places.begins.data();
  params.gradient = gradient.data_ptr();
  params.gradient_dtype = data_type(dtype);
  const CpuKernels& kernels = cpu_kernels();
  // Threads take rows, whose gradients lie side by side, unless one row has more than its share of the places.
  constexpr int64_t fewest_columns = 128, parts_per_thread = 4;
  const int64_t threads = torch::stable::get_num_threads(), work = places.begins[count] + count;
  const bool skewed = places.most_of_a_row() * threads * parts_per_thread > work;
  const int64_t slices = skewed ? std::min(threads, (columns + fewest_columns - 1) / fewest_columns) : 1;
  const int64_t parts = std::min(count, (threads + slices - 1) / slices * parts_per_thread);
  for_each_task(slices * parts, static_cast<double>(work) * columns, 0, [&](int64_t task, void*) {
    const int64_t slice = task % slices, part = task / slices;
    const int64_t begin = places.row_behind(work * part / parts);
    const int64_t end = part + 1 == parts ? count : places.row_behind(work * (part + 1) / parts);
    const int64_t first = columns * slice / slices, last = columns * (slice + 1) / slices;
    kernels.embedding_backward(params, begin, end, first, last - first);
  });
  return gradient;
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, CPU, library) {
  library.impl("embedding_forward.cpu", TORCH_BOX(&fusewright::ops::forward));
  library.impl("embedding_backward.cpu", TORCH_BOX(&fusewright::ops::backward));
}
