// CPU kernels of LSH attention, attached to the schemas of fusewright_kernels/library/lsh_attention.py.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "heads_tensor.h"
#include "parallel.h"
#include "worker.h"

namespace fusewright::ops {
namespace {

using std::optional;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Positions that a thread takes at a time where each is independent of the others.
constexpr int64_t positions_per_task = 1024;

// Calls body(batch, head, begin, end, scratch) for ranges of the positions of every head; `work` as for_each_task.
template <class Body>
void for_each_range(int64_t batch, int64_t heads, int64_t length, double work, int64_t scratch_bytes,
                    const Body& body) {
  const int64_t ranges = ceil_div(length, positions_per_task);
  for_each_task(batch * heads * ranges, work, scratch_bytes, [&](int64_t task, void* scratch) {
    const int64_t begin = task % ranges * positions_per_task, row = task / ranges;
    body(row / heads, row % heads, begin, std::min(length, begin + positions_per_task), scratch);
  });
}

// Rotations (D, R, columns) of each head as (H, R, D, padded columns), zero behind the last column.
std::vector<float> padded_rotations(const Tensor& rotations, int64_t padded) {
  const int64_t heads = rotations.size(0), width = rotations.size(1), rounds = rotations.size(2);
  const int64_t columns = rotations.size(3);
  std::vector<float> result(heads * rounds * width * padded, 0.0f);
  const float* const source = static_cast<const float*>(rotations.data_ptr());
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t d = 0; d < width; ++d) {
      for (int64_t r = 0; r < rounds; ++r) {
        const int64_t at = h * rotations.stride(0) + d * rotations.stride(1) + r * rotations.stride(2);
        float* const target = result.data() + ((h * rounds + r) * width + d) * padded;
        for (int64_t c = 0; c < columns; ++c) target[c] = source[at + c * rotations.stride(3)];
      }
    }
  }
  return result;
}

Tensor lsh_hash(Tensor vectors, std::vector<Tensor> rotations, optional<Tensor> key_padding_mask) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t batch = vectors.size(0), heads = vectors.size(1), length = vectors.size(2), width = vectors.size(3);
  const int64_t rounds = rotations.front().size(2);
  const int64_t sizes[4] = {batch, heads, rounds, length};
  Tensor buckets = empty(sizes, 4, ScalarType::Long, vectors);
  int64_t* const data = static_cast<int64_t*>(buckets.data_ptr());
  LshHashParams params;
  params.width = width;
  params.rounds = rounds;
  params.dtype = data_type(vectors.scalar_type());
  params.vectors = heads_view(vectors);
  params.place_value = 1;
  params.first_digit = true;
  for (const Tensor& factor : rotations) {
    params.columns = factor.size(3);
    const int64_t padded = kernels.lsh_hash_columns(params.columns);
    const std::vector<float> packed = padded_rotations(factor, padded);
    const double work = static_cast<double>(batch * heads * length) * width * rounds * padded;
    for_each_range(batch, heads, length, work, kernels.lsh_hash_scratch(params),
                   [&](int64_t b, int64_t h, int64_t begin, int64_t end, void* scratch) {
                     LshHashParams head = params;
                     head.rotations = packed.data() + h * rounds * width * padded;
                     kernels.lsh_hash(head, b, h, length, begin, end, data + (b * heads + h) * rounds * length,
                                      scratch);
                   });
    params.place_value *= 2 * params.columns;
    params.first_digit = false;
  }
  if (key_padding_mask.has_value()) {
    const bool* const padding = static_cast<const bool*>(key_padding_mask->data_ptr());
    for (int64_t row = 0; row < batch * heads * rounds; ++row) {
      const int64_t b = row / (heads * rounds);
      for (int64_t i = 0; i < length; ++i) {
        const bool padded = padding[b * key_padding_mask->stride(0) + i * key_padding_mask->stride(1)];
        if (padded) data[row * length + i] = params.place_value;
      }
    }
  }
  return buckets;
}

Tensor lsh_sort(Tensor buckets, int64_t n_buckets) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t length = buckets.size(3), rows = buckets.size(0) * buckets.size(1) * buckets.size(2);
  const int64_t sizes[4] = {buckets.size(0), buckets.size(1), buckets.size(2), length};
  const Tensor unit = torch::stable::contiguous(buckets);
  Tensor order = empty(sizes, 4, ScalarType::Int, buckets);
  const int64_t* const source = static_cast<const int64_t*>(unit.data_ptr());
  int32_t* const target = static_cast<int32_t*>(order.data_ptr());
  const auto [smallest, largest] = std::minmax_element(source, source + rows * length);
  STD_TORCH_CHECK(rows * length == 0 || (*smallest >= 0 && *largest < n_buckets), "buckets are from ", *smallest,
                  " to ", *largest, ", expected from 0 to ", n_buckets - 1);
  const double work = 20.0 * static_cast<double>(rows) * static_cast<double>(length);
  for_each_task(rows, work, length * static_cast<int64_t>(sizeof(int32_t)), [&](int64_t row, void* scratch) {
    kernels.lsh_sort(source + row * length, length, target + row * length, static_cast<int32_t*>(scratch));
  });
  return order;
}

// The arguments that forward and backward share, in the schema's order.
struct LshInputs {
  Tensor query_key, value, order;
  optional<Tensor> buckets, key_padding_mask, seed;
  int64_t chunk_length, chunks_before, chunks_after;
  bool is_causal;
  double scale;
  bool allow_duplicates;
  double dropout_p;
};

// Chunk of each position in each round, numbered round the ring.
std::vector<int32_t> chunk_of_positions(const LshAttentionParams& params) {
  const int64_t rows = params.batch * params.heads * params.rounds;
  std::vector<int32_t> chunks(rows * params.length);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = row % params.rounds * params.chunks_per_round();
    for (int64_t place = 0; place < params.length; ++place) {
      chunks[row * params.length + params.order[row * params.length + place]] =
          static_cast<int32_t>(first + place / params.chunk_length);
    }
  }
  return chunks;
}

// Tensors and tables that the parameters point to.
struct Held {
  Tensor order;
  optional<Tensor> buckets, padding;
  std::vector<int32_t> chunk_of;
  std::vector<float> inverse_norm;
};

void fill(LshAttentionParams& params, Held& held, const LshInputs& inputs, Tensor& statistics) {
  const Tensor& x = inputs.query_key;
  params.batch = x.size(0);
  params.heads = x.size(1);
  params.length = x.size(2);
  params.width = x.size(3);
  params.value_width = inputs.value.size(3);
  params.rounds = inputs.order.size(2);
  params.chunk_length = inputs.chunk_length;
  params.chunks_before = inputs.chunks_before;
  params.chunks_after = inputs.chunks_after;
  params.dtype = data_type(x.scalar_type());
  params.query_key = heads_view(x);
  params.value = heads_view(inputs.value);
  held.order = torch::stable::contiguous(inputs.order);
  params.order = static_cast<const int32_t*>(held.order.data_ptr());
  if (inputs.buckets.has_value()) {
    held.buckets = torch::stable::contiguous(*inputs.buckets);
    params.buckets = static_cast<const int64_t*>(held.buckets->data_ptr());
  }
  if (inputs.key_padding_mask.has_value()) {
    held.padding = torch::stable::contiguous(*inputs.key_padding_mask);
    params.key_padding = static_cast<const bool*>(held.padding->data_ptr());
  }
  params.causal = inputs.is_causal;
  params.scale = static_cast<float>(inputs.scale);
  if (inputs.seed.has_value() && inputs.dropout_p > 0) {
    params.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(inputs.seed->data_ptr()));
    params.keep_threshold = static_cast<uint64_t>(std::nearbyint(inputs.dropout_p * 4294967296.0));
    params.keep_scale = inputs.dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - inputs.dropout_p)) : 0.0f;
  }
  if (!inputs.allow_duplicates) {
    held.chunk_of = chunk_of_positions(params);
    params.chunk_of = held.chunk_of.data();
  }
  params.reference = static_cast<float*>(statistics.data_ptr());
  params.total = params.reference + params.batch * params.heads * params.length;
  const int64_t rows = params.batch * params.heads * params.length;
  held.inverse_norm.resize(rows);
  params.inverse_norm = held.inverse_norm.data();
  const CpuKernels& kernels = cpu_kernels();
  for_each_range(params.batch, params.heads, params.length, static_cast<double>(rows) * params.width, 0,
                 [&](int64_t b, int64_t h, int64_t begin, int64_t end, void*) {
                   kernels.lsh_inverse_norms(params, b, h, begin, end);
                 });
}

// Heads are taken a few at a time, so that their sums take little memory and stay in cache where they can, and still
// every thread has work. Which heads go together changes no bit.
int64_t heads_at_a_time(const LshAttentionParams& params) {
  constexpr int64_t positions_at_a_time = 32768;
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t wanted = std::max(threads, positions_at_a_time / std::max<int64_t>(1, params.length));
  return std::min(params.batch * params.heads, wanted);
}

double work_of_round(const LshAttentionParams& params, int64_t heads) {
  return static_cast<double>(heads * params.length) * static_cast<double>(params.window() * params.chunk_length) *
         static_cast<double>(params.width + params.value_width);
}

// The tasks of one round of heads [first, last), counted over the batch.
std::vector<LshTask> tasks_of_round(const LshAttentionParams& params, int64_t round, int64_t first, int64_t last) {
  std::vector<LshTask> tasks;
  for (int64_t row = first; row < last; ++row) {
    for (int64_t chunk = 0; chunk < params.chunks_per_round(); chunk += lsh_chunks_per_task) {
      LshTask task{};
      task.batch = row / params.heads;
      task.head = row % params.heads;
      task.round = round;
      task.first = chunk;
      task.last = std::min(chunk + lsh_chunks_per_task, params.chunks_per_round());
      tasks.push_back(task);
    }
  }
  return tasks;
}

std::tuple<Tensor, Tensor> lsh_attention_forward(Tensor query_key, Tensor value, Tensor order, optional<Tensor> buckets,
                                                 optional<Tensor> key_padding_mask, optional<Tensor> seed,
                                                 int64_t chunk_length, int64_t chunks_before, int64_t chunks_after,
                                                 bool is_causal, double scale, bool allow_duplicates,
                                                 double dropout_p) {
  const CpuKernels& kernels = cpu_kernels();
  const LshInputs inputs{query_key,     value,        order,     buckets, key_padding_mask, seed,     chunk_length,
                         chunks_before, chunks_after, is_causal, scale,   allow_duplicates, dropout_p};
  const int64_t statistics_sizes[4] = {2, query_key.size(0), query_key.size(1), query_key.size(2)};
  Tensor statistics = empty(statistics_sizes, 4, ScalarType::Float, query_key);
  Tensor output = empty_like(value, value.scalar_type());
  if (statistics.numel() == 0) return {output, statistics};
  LshForwardParams params;
  Held held;
  fill(params, held, inputs, statistics);
  params.output = heads_view(output);
  const int64_t stride = kernels.attention_sum_columns(params.value_width), group = heads_at_a_time(params);
  const int64_t floats = group * params.length * stride;
  Tensor sums = empty(&floats, 1, ScalarType::Float, query_key);
  float* const data = static_cast<float*>(sums.data_ptr());
  const int64_t scratch_bytes = kernels.lsh_forward_scratch(params), heads = params.batch * params.heads;
  for (int64_t first = 0; first < heads; first += group) {
    const int64_t last = std::min(heads, first + group);
    const auto sums_of = [&](int64_t row) { return data + (row - first) * params.length * stride; };
    for (int64_t round = 0; round < params.rounds; ++round) {
      std::vector<LshTask> tasks = tasks_of_round(params, round, first, last);
      for (LshTask& task : tasks) task.sums.value = sums_of(task.batch * params.heads + task.head);
      for_each_task(static_cast<int64_t>(tasks.size()), work_of_round(params, last - first), scratch_bytes,
                    [&](int64_t task, void* scratch) { kernels.lsh_forward(params, tasks[task], scratch); });
    }
    const double copied = static_cast<double>((last - first) * params.length * params.value_width);
    for_each_range(
        1, last - first, params.length, copied, 0, [&](int64_t, int64_t row, int64_t begin, int64_t end, void*) {
          const int64_t head = first + row;
          kernels.lsh_forward_finish(params, head / params.heads, head % params.heads, sums_of(head), begin, end);
        });
  }
  return {output, statistics};
}

std::tuple<Tensor, Tensor> lsh_attention_backward(Tensor grad_output, optional<Tensor> grad_lse, Tensor output,
                                                  Tensor statistics, Tensor query_key, Tensor value, Tensor order,
                                                  optional<Tensor> buckets, optional<Tensor> key_padding_mask,
                                                  optional<Tensor> seed, int64_t chunk_length, int64_t chunks_before,
                                                  int64_t chunks_after, bool is_causal, double scale,
                                                  bool allow_duplicates, double dropout_p) {
  const CpuKernels& kernels = cpu_kernels();
  const LshInputs inputs{query_key,     value,        order,     buckets, key_padding_mask, seed,     chunk_length,
                         chunks_before, chunks_after, is_causal, scale,   allow_duplicates, dropout_p};
  Tensor grad_query_key = empty_like(query_key, query_key.scalar_type());
  Tensor grad_value = empty_like(value, value.scalar_type());
  if (statistics.numel() == 0) return {grad_query_key, grad_value};
  LshBackwardParams params;
  Held held;
  fill(params, held, inputs, statistics);
  const Tensor unit_grad = grad_output.stride(3) == 1 ? grad_output : torch::stable::contiguous(grad_output);
  const Tensor lse_grad = grad_lse.has_value() ? torch::stable::contiguous(*grad_lse) : statistics;
  if (grad_lse.has_value()) params.grad_lse = static_cast<const float*>(lse_grad.data_ptr());
  params.output = heads_view(output);
  params.grad_output = heads_view(unit_grad);
  params.grad_query_key = heads_view(grad_query_key);
  params.grad_value = heads_view(grad_value);
  const int64_t key_stride = kernels.attention_sum_columns(params.width);
  const int64_t value_stride = kernels.attention_sum_columns(params.value_width);
  const int64_t group = heads_at_a_time(params), heads = params.batch * params.heads, rows = params.length;
  const int64_t edge_rows = (chunks_before + chunks_after) * kernels.lsh_chunk_rows(params);
  const int64_t tasks_per_head = ceil_div(params.chunks_per_round(), lsh_chunks_per_task);
  const int64_t head_floats = rows * (key_stride + value_stride);
  const int64_t edge_floats = edge_rows * (key_stride + value_stride);
  const int64_t floats = group * (head_floats + tasks_per_head * edge_floats);
  Tensor workspace = empty(&floats, 1, ScalarType::Float, query_key);
  float* const data = static_cast<float*>(workspace.data_ptr());
  float* const edges = data + group * head_floats;
  const int64_t scratch_bytes = kernels.lsh_backward_scratch(params);
  for (int64_t first = 0; first < heads; first += group) {
    const int64_t last = std::min(heads, first + group), count = last - first;
    const auto sums_of = [&](int64_t row) {
      float* const head = data + (row - first) * head_floats;
      return LshSums{head, head + rows * key_stride};
    };
    for (int64_t round = 0; round < params.rounds; ++round) {
      std::vector<LshTask> tasks = tasks_of_round(params, round, first, last);
      for (size_t i = 0; i < tasks.size(); ++i) {
        tasks[i].sums = sums_of(tasks[i].batch * params.heads + tasks[i].head);
        tasks[i].edge_keys = edges + static_cast<int64_t>(i) * edge_floats;
        tasks[i].edge_values = tasks[i].edge_keys + edge_rows * key_stride;
      }
      for_each_task(static_cast<int64_t>(tasks.size()), 2.5 * work_of_round(params, count), scratch_bytes,
                    [&](int64_t task, void* scratch) { kernels.lsh_backward(params, tasks[task], scratch); });
      // The edges of a head meet the same positions, so they are added one after the other.
      const double added = static_cast<double>(static_cast<int64_t>(tasks.size()) * edge_floats);
      for_each_task(count, added, 0, [&](int64_t head, void*) {
        for (int64_t i = 0; i < tasks_per_head; ++i)
          kernels.lsh_backward_add_edges(params, tasks[head * tasks_per_head + i]);
      });
    }
    for_each_range(1, count, rows, static_cast<double>(count * head_floats), 0,
                   [&](int64_t, int64_t row, int64_t begin, int64_t end, void*) {
                     const int64_t head = first + row;
                     kernels.lsh_backward_finish(params, head / params.heads, head % params.heads, sums_of(head), begin,
                                                 end);
                   });
  }
  return {grad_query_key, grad_value};
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, CPU, library) {
  library.impl("lsh_hash.cpu", TORCH_BOX(&fusewright::ops::lsh_hash));
  library.impl("lsh_sort.cpu", TORCH_BOX(&fusewright::ops::lsh_sort));
  library.impl("lsh_attention_forward.cpu", TORCH_BOX(&fusewright::ops::lsh_attention_forward));
  library.impl("lsh_attention_backward.cpu", TORCH_BOX(&fusewright::ops::lsh_attention_backward));
}
