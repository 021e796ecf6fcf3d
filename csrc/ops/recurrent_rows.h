// The rows of a walk through a recurrent layer's samples, gathered from tensors by time and sample and put back, and
// the products over all of them.
#pragma once

#include <cstring>

#include "parallel.h"
#include "recurrent_params.h"

namespace fusewright::ops {

inline const void* row_of(const void* data, int64_t row, int64_t row_bytes) {
  return static_cast<const char*>(data) + row * row_bytes;
}

inline void clear(const Tensor& tensor) {
  std::memset(tensor.data_ptr(), 0, tensor.numel() * static_cast<int64_t>(tensor.element_size()));
}

// Zeros the rows of a (T, B, ...) tensor at steps that samples do not take.
inline void clear_behind_ends(const RecurrentParams& params, void* tensor, int64_t row_bytes) {
  if (tensor == nullptr || params.rows == params.time * params.batch) return;
  for (int64_t p = 0; p < params.batch; ++p) {
    for (int64_t t = params.lengths[p]; t < params.time; ++t) {
      std::memset(static_cast<char*>(tensor) + (t * params.batch + params.samples[p]) * row_bytes, 0, row_bytes);
    }
  }
}

// Rows of `width` elements of `like`'s type, one for each row of the walk: source(step, position) is where to copy it
// from, or nullptr for zeros.
template <class Source>
Tensor gather_rows(const RecurrentParams& params, int64_t width, const Tensor& like, const Source& source) {
  const int64_t sizes[2] = {params.rows, width};
  Tensor gathered = empty(sizes, 2, like.scalar_type(), like);
  char* const target = static_cast<char*>(gathered.data_ptr());
  const int64_t row_bytes = width * static_cast<int64_t>(like.element_size());
  parallel_rows(params.steps, params.batch * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t step = begin; step < end; ++step) {
      for (int64_t p = 0; p < params.active[step]; ++p) {
        char* row = target + (params.first_row[step] + p) * row_bytes;
        if (const void* from = source(step, p)) {
          std::memcpy(row, from, row_bytes);
        } else {
          std::memset(row, 0, row_bytes);
        }
      }
    }
  });
  return gathered;
}

// The hidden state that each row's step began with.
inline Tensor hidden_before(const RecurrentBackwardParams& params, const Tensor& like) {
  const int64_t element = static_cast<int64_t>(like.element_size());
  return gather_rows(params, params.state, like, [&](int64_t step, int64_t p) -> const void* {
    if (params.reset_before(step, p)) return nullptr;
    if (step == 0) return row_of(params.h0, params.samples[p], params.state * element);
    return row_of(params.output, params.tensor_row(step - 1, p), params.output_stride * element);
  });
}

// The input of each row.
inline Tensor input_rows(const RecurrentParams& params, const RecurrentInputs& inputs) {
  if (!inputs.lengths.has_value()) {
    return torch::stable::reshape(inputs.input, {params.rows, params.inputs});
  }
  const int64_t element = static_cast<int64_t>(inputs.input.element_size());
  return gather_rows(params, params.inputs, inputs.input, [&](int64_t step, int64_t p) {
    const int64_t at =
        params.time_of(step, p) * params.input_time_stride + params.samples[p] * params.input_sample_stride;
    return row_of(params.input, at, element);
  });
}

inline Tensor columns(Tensor tensor, int64_t first, int64_t count) {
  return torch::stable::narrow(tensor, 1, first, count);
}

inline Tensor as_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// In the type of the factors, whatever a surrounding autocast would make of them.
inline Tensor product(const Tensor& left, const Tensor& right) {
  return as_type(torch::stable::matmul(left, as_type(right, left.scalar_type())), left.scalar_type());
}

// The sums over rows of `left` by `right`, in the type of the parameter. In float32 by a kernel of our own: torch's
// adds up the rows one by one, which over 340 of them is 5.4u off where a layer that adds up its steps is 2.5u off.
inline Tensor product_over_rows(const Tensor& left, const Tensor& right, ScalarType type) {
  const Tensor factor = torch::stable::contiguous(as_type(right, left.scalar_type()));
  const int64_t rows = left.size(0), width = left.size(1);
  constexpr int64_t few_rows = 128;
  if (left.scalar_type() != ScalarType::Float || rows <= few_rows) {
    return as_type(product(torch::stable::transpose(left, 0, 1), factor), type);
  }
  const int64_t sizes[2] = {width, factor.size(1)};
  Tensor sums = empty(sizes, 2, ScalarType::Float, left);
  const TransposedProductParams params{rows,
                                       static_cast<const float*>(left.data_ptr()),
                                       left.stride(0),
                                       static_cast<const float*>(factor.data_ptr()),
                                       factor.size(1),
                                       factor.size(1),
                                       static_cast<float*>(sums.data_ptr())};
  const CpuKernels& kernels = cpu_kernels();
  constexpr int64_t block = 48;
  parallel_rows((width + block - 1) / block, block * rows * factor.size(1), [&](int64_t begin, int64_t end) {
    kernels.transposed_product(params, begin * block, std::min(end * block, width));
  });
  return as_type(sums, type);
}

// The gradient of the input from that of its rows.
inline Tensor input_gradient(const RecurrentParams& params, const RecurrentInputs& inputs, const Tensor& rows) {
  const int64_t time = inputs.input.size(0);
  if (!inputs.lengths.has_value()) return torch::stable::reshape(rows, {time, params.batch, params.inputs});
  const int64_t sizes[3] = {time, params.batch, params.inputs};
  Tensor gradient = empty(sizes, 3, rows.scalar_type(), rows);
  clear(gradient);
  const int64_t row_bytes = params.inputs * static_cast<int64_t>(rows.element_size());
  parallel_rows(params.steps, params.batch * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t step = begin; step < end; ++step) {
      for (int64_t p = 0; p < params.active[step]; ++p) {
        std::memcpy(static_cast<char*>(gradient.data_ptr()) + params.tensor_row(step, p) * row_bytes,
                    row_of(rows.data_ptr(), params.first_row[step] + p, row_bytes), row_bytes);
      }
    }
  });
  return gradient;
}

}  // namespace fusewright::ops
