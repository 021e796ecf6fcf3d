// How the work of attention is cut into tasks for torch's threads.
#pragma once

#include <algorithm>
#include <memory>

#include "attention_params.h"
#include "parallel.h"
#include "worker.h"

namespace fusewright::ops {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Multiply-adds of one product of queries and keys, masks left out of account.
inline double pairs(const std::vector<AttentionSequence>& sequences) {
  double total = 0;
  for (const AttentionSequence& sequence : sequences) {
    total += static_cast<double>(sequence.query_count) * static_cast<double>(sequence.key_count);
  }
  return total;
}

// Tasks of as many queries each as still give every thread several; the longest first where lengths differ.
inline std::vector<AttentionForwardTask> forward_tasks(const AttentionParams& params,
                                                       const std::vector<AttentionSequence>& sequences) {
  constexpr int64_t tasks_per_thread = 4;
  const int64_t wanted = tasks_per_thread * static_cast<int64_t>(torch::stable::get_num_threads());
  int64_t queries = attention_queries_per_task;
  const auto count = [&] {
    int64_t tasks = 0;
    for (const AttentionSequence& sequence : sequences) tasks += ceil_div(sequence.query_count, queries);
    return tasks * params.heads;
  };
  while (queries > attention_query_block && count() < wanted) queries /= 2;
  std::vector<AttentionForwardTask> tasks;
  tasks.reserve(count());
  for (size_t n = 0; n < sequences.size(); ++n) {
    for (int64_t head = 0; head < params.heads; ++head) {
      for (int64_t first = 0; first < sequences[n].query_count; first += queries) {
        tasks.push_back({static_cast<int64_t>(n), head, first, std::min(queries, sequences[n].query_count - first)});
      }
    }
  }
  if (params.window_right >= 0 || sequences.size() > 1) {
    const auto cost = [&](const AttentionForwardTask& task) {
      const AttentionSequence& sequence = sequences[task.sequence];
      int64_t keys = sequence.key_count;
      if (params.window_right >= 0) {
        keys = std::min(keys, std::max<int64_t>(0, task.first + task.count + sequence.shift + params.window_right));
      }
      return keys * task.count;
    };
    std::stable_sort(tasks.begin(), tasks.end(), [&](const auto& a, const auto& b) { return cost(a) > cost(b); });
  }
  return tasks;
}

inline void run_forward(const AttentionForwardParams& params, const std::vector<AttentionSequence>& sequences) {
  const CpuKernels& kernels = cpu_kernels();
  const std::vector<AttentionForwardTask> tasks = forward_tasks(params, sequences);
  if (tasks.empty()) return;
  int64_t longest = 0;
  for (const AttentionForwardTask& task : tasks) longest = std::max(longest, task.count);
  const double work = pairs(sequences) * params.heads * (params.width + params.value_width);
  for_each_task(static_cast<int64_t>(tasks.size()), work, kernels.attention_forward_scratch(params, longest),
                [&](int64_t task, void* scratch) {
                  kernels.attention_forward(params, sequences[tasks[task].sequence], tasks[task], scratch);
                });
}

// The keys that the first to the last query may see: a window or a causal limit spares reading the others.
inline std::pair<int64_t, int64_t> keys_seen(const AttentionParams& params, const AttentionSequence& sequence) {
  int64_t begin = 0, end = sequence.key_count;
  if (params.window_left >= 0) begin = std::max<int64_t>(0, sequence.shift - params.window_left);
  if (params.window_right >= 0) {
    end = std::min(end, sequence.query_count - 1 + sequence.shift + params.window_right + 1);
  }
  return {begin, std::max(begin, end)};
}

inline void run_decode(const AttentionDecodeParams& params, const std::vector<AttentionSequence>& sequences) {
  if (params.key_heads == 0) return;
  const CpuKernels& kernels = cpu_kernels();
  const int64_t columns = kernels.attention_sum_columns(params.value_width);
  std::vector<AttentionDecodeTask> tasks;
  std::vector<std::pair<int64_t, int64_t>> heads;  // first task and number of tasks of each (sequence, key head)
  int64_t most_queries = 0, floats = 0;
  for (size_t n = 0; n < sequences.size(); ++n) {
    const AttentionSequence& sequence = sequences[n];
    most_queries = std::max(most_queries, sequence.query_count);
    const auto [begin, end] = keys_seen(params, sequence);
    // Parts begin at multiples of their length, so that a row's result does not depend on how the window cuts them.
    const int64_t first = begin / attention_decode_keys, last = ceil_div(end, attention_decode_keys);
    for (int64_t key_head = 0; key_head < params.key_heads; ++key_head) {
      heads.push_back({static_cast<int64_t>(tasks.size()), std::max<int64_t>(0, last - first)});
      for (int64_t part = first; part < last; ++part) {
        tasks.push_back({static_cast<int64_t>(n), key_head, std::max(begin, part * attention_decode_keys),
                         std::min(end, (part + 1) * attention_decode_keys), nullptr, nullptr, nullptr});
        floats += params.heads / params.key_heads * sequence.query_count * (columns + 2);
      }
    }
  }
  const std::unique_ptr<float[]> partial_results(new float[floats]);
  float* next = partial_results.get();
  for (AttentionDecodeTask& task : tasks) {
    const int64_t rows = params.heads / params.key_heads * sequences[task.sequence].query_count;
    task.sums = next;
    task.references = task.sums + rows * columns;
    task.totals = task.references + rows;
    next = task.totals + rows;
  }
  const double work = pairs(sequences) * params.heads * (params.width + params.value_width);
  for_each_task(static_cast<int64_t>(tasks.size()), work, kernels.attention_decode_scratch(params, most_queries),
                [&](int64_t task, void* scratch) {
                  kernels.attention_decode(params, sequences[tasks[task].sequence], tasks[task], scratch);
                });
  for (size_t head = 0; head < heads.size(); ++head) {
    const auto [first, count] = heads[head];
    const int64_t key_heads = params.key_heads;
    kernels.attention_decode_join(params, sequences[head / key_heads], static_cast<int64_t>(head) % key_heads,
                                  tasks.data() + first, count);
  }
}

inline bool decoding_pays(const AttentionParams& params, const std::vector<AttentionSequence>& sequences) {
  int64_t queries = 0;
  for (const AttentionSequence& sequence : sequences) queries = std::max(queries, sequence.query_count);
  return queries <= attention_decode_queries && params.keep_threshold == 0 && params.score_weight == nullptr;
}

// Sums of keys and values that one backward task writes, laid out one behind the other.
struct SumSizes {
  int64_t key_columns, value_columns;

  // Rows in whole blocks: products in tiles write all of a tile.
  int64_t rows(const AttentionSequence& sequence) const {
    return ceil_div(sequence.key_count, attention_key_block) * attention_key_block;
  }
  int64_t of(const AttentionSequence& sequence) const { return rows(sequence) * (key_columns + value_columns); }
};

// A head whose queries are split over several tasks, so that few heads still keep several threads busy. The number of
// parts follows from the shapes alone, so sums are added in the same order for every number of threads.
inline int64_t parts_of(const AttentionSequence& sequence, int64_t heads_in_all) {
  constexpr int64_t wanted_tasks = 8, least_blocks_per_part = 4;
  const int64_t blocks = ceil_div(sequence.query_count, attention_query_block);
  return std::max<int64_t>(1, std::min(ceil_div(wanted_tasks, heads_in_all), blocks / least_blocks_per_part));
}

inline void run_backward(const AttentionBackwardParams& params, const std::vector<AttentionSequence>& sequences,
                         const Tensor& like) {
  const CpuKernels& kernels = cpu_kernels();
  const SumSizes sizes{kernels.attention_sum_columns(params.width), kernels.attention_sum_columns(params.value_width)};
  const int64_t heads_in_all = params.key_heads * static_cast<int64_t>(sequences.size());
  if (heads_in_all == 0) return;
  struct Head {
    int64_t sequence, key_head, parts, offset;  // offset of its first part's sums, if there are several
  };
  std::vector<Head> heads;
  std::vector<std::pair<int64_t, int64_t>> tasks;  // (head, part)
  int64_t shared_floats = 0, own_floats = 0;
  for (size_t n = 0; n < sequences.size(); ++n) {
    const int64_t parts = parts_of(sequences[n], heads_in_all), floats = sizes.of(sequences[n]);
    for (int64_t key_head = 0; key_head < params.key_heads; ++key_head) {
      for (int64_t part = 0; part < parts; ++part) tasks.push_back({static_cast<int64_t>(heads.size()), part});
      heads.push_back({static_cast<int64_t>(n), key_head, parts, shared_floats});
      if (parts > 1) {
        shared_floats += parts * floats;
      } else {
        own_floats = std::max(own_floats, floats);
      }
    }
  }
  // Additive scores form the gradients of queries, keys and weight together.
  const bool wants_keys = params.grad_key.data != nullptr || params.score_weight != nullptr;
  Tensor shared = empty(&shared_floats, 1, ScalarType::Float, like);
  float* const shared_sums = static_cast<float*>(shared.data_ptr());
  const int64_t scratch_floats = ceil_div(kernels.attention_backward_scratch(params), 64) * 16;
  // Parts of the score weight's gradient, of every task, added in order behind them.
  const int64_t weight_floats =
      params.score_weight == nullptr ? 0 : params.heads / params.key_heads * sizes.key_columns;
  std::vector<float> weight_sums(tasks.size() * weight_floats);
  const double work = 2.5 * pairs(sequences) * params.heads * (params.width + params.value_width);
  const int64_t scratch_bytes = (scratch_floats + own_floats) * static_cast<int64_t>(sizeof(float));
  for_each_task(static_cast<int64_t>(tasks.size()), work, scratch_bytes, [&](int64_t index, void* scratch) {
    const auto [head_index, part] = tasks[index];
    const Head& head = heads[head_index];
    const AttentionSequence& sequence = sequences[head.sequence];
    float* const sums = head.parts > 1 ? shared_sums + head.offset + part * sizes.of(sequence)
                                       : static_cast<float*>(scratch) + scratch_floats;
    float* const value_sums = sums + sizes.rows(sequence) * sizes.key_columns;
    const AttentionBackwardTask task{head.sequence,
                                     head.key_head,
                                     part,
                                     head.parts,
                                     wants_keys ? sums : nullptr,
                                     params.grad_value.data != nullptr ? value_sums : nullptr,
                                     weight_sums.data() + index * weight_floats};
    kernels.attention_backward(params, sequence, task, scratch);
    if (head.parts == 1) kernels.attention_backward_reduce(params, sequence, head.key_head, sums, value_sums, 1, 0, 0);
  });
  if (params.grad_score_weight != nullptr) {
    const int64_t group = params.heads / params.key_heads;
    for (size_t task = 0; task < tasks.size(); ++task) {
      const int64_t first_head = heads[tasks[task].first].key_head * group;
      for (int64_t row = 0; row < group; ++row) {
        const float* const sums = weight_sums.data() + task * weight_floats + row * sizes.key_columns;
        float* const target = params.grad_score_weight + (first_head + row) * params.width;
        for (int64_t d = 0; d < params.width; ++d) target[d] += sums[d] * params.scale;
      }
    }
  }
  if (shared_floats == 0) return;
  for_each_task(static_cast<int64_t>(heads.size()), work, 0, [&](int64_t index, void*) {
    const Head& head = heads[index];
    if (head.parts == 1) return;
    const AttentionSequence& sequence = sequences[head.sequence];
    const float* const sums = shared_sums + head.offset;
    kernels.attention_backward_reduce(params, sequence, head.key_head, sums,
                                      sums + sizes.rows(sequence) * sizes.key_columns, head.parts, sizes.of(sequence),
                                      sizes.of(sequence));
  });
}

// The gradient of each head's sink from the rows' parts, added in order in float64.
inline Tensor sum_sink_rows(const AttentionBackwardParams& params, const Tensor& rows, const Tensor& sinks) {
  Tensor gradient = empty_like(sinks, ScalarType::Float);
  const float* data = static_cast<const float*>(rows.data_ptr());
  for (int64_t head = 0; head < params.heads; ++head) {
    double sum = 0;
    for (int64_t batch = 0; batch < params.batch; ++batch) {
      const float* row = data + (batch * params.heads + head) * params.queries;
      for (int64_t i = 0; i < params.queries; ++i) sum += row[i];
    }
    static_cast<float*>(gradient.data_ptr())[head] = static_cast<float>(sum);
  }
  return gradient;
}

// One task per block of the mask, or per row or column of blocks where it is broadcast.
inline Tensor mask_gradient(const AttentionBackwardParams& params, const Tensor& mask, int64_t shift) {
  const CpuKernels& kernels = cpu_kernels();
  Tensor gradient = empty_like(mask, mask.scalar_type());
  struct Side {
    bool one;
    int64_t parts, step, count;
  };
  const auto side = [](int64_t mask_size, int64_t count, int64_t block) {
    const bool one = mask_size == 1;
    return one ? Side{true, 1, count, count} : Side{false, ceil_div(count, block), block, count};
  };
  const Side batches = side(mask.size(0), params.batch, 1), heads = side(mask.size(1), params.heads, 1);
  const Side queries = side(mask.size(2), params.queries, attention_query_block);
  const Side keys = side(mask.size(3), params.keys, attention_key_block);
  const int64_t tasks = batches.parts * heads.parts * queries.parts * keys.parts;
  const int64_t strides[3] = {gradient.stride(0), gradient.stride(1), gradient.stride(2)};
  const double pairs = static_cast<double>(params.queries) * static_cast<double>(params.keys);
  const double work = pairs * params.batch * params.heads * (params.width + params.value_width);
  const auto clip = [](const Side& s, int64_t first) { return std::min(s.step, s.count - first); };
  for_each_task(tasks, work, kernels.attention_mask_gradient_scratch(params), [&](int64_t index, void* scratch) {
    AttentionMaskTask task;
    task.key = index % keys.parts * keys.step;
    task.query = index / keys.parts % queries.parts * queries.step;
    task.head = index / (keys.parts * queries.parts) % heads.parts * heads.step;
    task.batch = index / (keys.parts * queries.parts * heads.parts) * batches.step;
    task.keys = clip(keys, task.key);
    task.queries = clip(queries, task.query);
    task.heads = clip(heads, task.head);
    task.batches = clip(batches, task.batch);
    task.one_query = queries.one;
    task.one_key = keys.one;
    task.shift = shift;
    const int64_t offset = task.batch * (batches.one ? 0 : strides[0]) + task.head * (heads.one ? 0 : strides[1]) +
                           task.query * (queries.one ? 0 : strides[2]) + (keys.one ? 0 : task.key);
    task.target = static_cast<char*>(gradient.data_ptr()) + offset * static_cast<int64_t>(gradient.element_size());
    task.target_stride = strides[2];
    kernels.attention_mask_gradient(params, task, scratch);
  });
  return gradient;
}

}  // namespace fusewright::ops
