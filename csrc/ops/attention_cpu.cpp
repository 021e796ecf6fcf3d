// CPU kernels of the attention ops, attached to the schemas of fusewright_kernels/library/attention.py.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <limits>

#include "attention_tasks.h"

namespace fusewright::ops {
namespace {

using std::optional;

// What packed sequences leave of rows of `tensor` behind their last row gets zeros.
void clear_rows_behind(const Tensor& tensor, int64_t first, const HeadsView& view) {
  const int64_t row_bytes = tensor.size(3) * static_cast<int64_t>(tensor.element_size());
  for (int64_t head = 0; head < tensor.size(1); ++head) {
    for (int64_t row = first; row < tensor.size(2); ++row) {
      char* data =
          static_cast<char*>(view.data) + view.offset(0, head, row) * static_cast<int64_t>(tensor.element_size());
      std::memset(data, 0, row_bytes);
    }
  }
}

// Statistics of rows that see no key: at most the sink takes part.
void set_statistics_without_keys(const AttentionParams& params) {
  for (int64_t head = 0; head < params.heads; ++head) {
    const float sink = params.sinks == nullptr ? -std::numeric_limits<float>::infinity() : params.sinks[head];
    std::fill_n(params.maximum + head * params.queries, params.queries, sink);
    std::fill_n(params.total + head * params.queries, params.queries, std::isinf(sink) ? 0.0f : 1.0f);
  }
}

int64_t rows_in_sequences(const optional<Tensor>& cu_seqlens, int64_t rows) {
  return cu_seqlens.has_value() ? offset_at(*cu_seqlens, cu_seqlens->size(0) - 1) : rows;
}

// The weights of additive scores (H, D) as the kernels take them.
std::vector<float> padded_score_weight(const optional<Tensor>& weight) {
  if (!weight.has_value()) return {};
  const int64_t heads = weight->size(0), width = weight->size(1);
  const int64_t columns = cpu_kernels().attention_sum_columns(width);
  std::vector<float> padded(heads * columns, 0.0f);
  const float* const source = static_cast<const float*>(weight->data_ptr());
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t d = 0; d < width; ++d) {
      padded[h * columns + d] = source[h * weight->stride(0) + d * weight->stride(1)];
    }
  }
  return padded;
}

std::tuple<Tensor, Tensor> forward(const AttentionInputs& inputs) {
  const Tensor& query = inputs.query;
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
  Tensor output = empty_in_layout_of(query, batch, heads, queries, inputs.value.size(3));
  const int64_t statistics_sizes[4] = {2, batch, heads, queries};
  Tensor statistics = empty(statistics_sizes, 4, ScalarType::Float, query);
  AttentionDecodeParams params;
  fill(params, inputs);
  const std::vector<float> score_weight = padded_score_weight(inputs.score_weight);
  if (inputs.score_weight.has_value()) params.score_weight = score_weight.data();
  params.split_float32 = fusewright_cpu_float32_split();
  params.output = heads_view(output);
  params.maximum = static_cast<float*>(statistics.data_ptr());
  params.total = params.maximum + batch * heads * queries;
  const int64_t used = rows_in_sequences(inputs.cu_seqlens_q, queries);
  if (used < queries) {
    clear_rows_behind(output, used, params.output);
    set_statistics_without_keys(params);
  }
  const std::vector<AttentionSequence> sequences = sequences_of(inputs);
  if (decoding_pays(params, sequences)) {
    run_decode(params, sequences);
  } else {
    run_forward(params, sequences);
  }
  return {output, statistics};
}

std::tuple<Tensor, Tensor> attention_forward(Tensor query, Tensor key, Tensor value, optional<Tensor> mask,
                                             optional<Tensor> block_mask, optional<Tensor> alibi_slopes,
                                             optional<Tensor> sinks, optional<Tensor> seed,
                                             optional<Tensor> cu_seqlens_q, optional<Tensor> cu_seqlens_k,
                                             int64_t block_size, double scale, double softcap, double dropout_p,
                                             int64_t window_left, int64_t window_right, bool bottom_right) {
  return forward({query, key, value, mask, block_mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k,
                  block_size, scale, softcap, dropout_p, window_left, window_right, bottom_right});
}

// The arguments of additive attention as those of attention.
AttentionInputs additive_inputs(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& score_weight,
                                const optional<Tensor>& mask, const optional<Tensor>& seed, double scale,
                                double dropout_p, int64_t window_left, int64_t window_right, bool bottom_right) {
  AttentionInputs inputs{query, key, value};
  inputs.score_weight = score_weight;
  inputs.mask = mask;
  inputs.seed = seed;
  inputs.scale = scale;
  inputs.dropout_p = dropout_p;
  inputs.window_left = window_left;
  inputs.window_right = window_right;
  inputs.bottom_right = bottom_right;
  return inputs;
}

std::tuple<Tensor, Tensor> additive_attention_forward(Tensor query, Tensor key, Tensor value, Tensor score_weight,
                                                      optional<Tensor> mask, optional<Tensor> seed, double scale,
                                                      double dropout_p, int64_t window_left, int64_t window_right,
                                                      bool bottom_right) {
  return forward(additive_inputs(query, key, value, score_weight, mask, seed, scale, dropout_p, window_left,
                                 window_right, bottom_right));
}

std::tuple<Tensor, Tensor> attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths,
                                            optional<Tensor> block_table, optional<Tensor> alibi_slopes,
                                            optional<Tensor> sinks, double scale, double softcap, int64_t window_left) {
  AttentionInputs inputs{query, key_cache, value_cache};
  inputs.alibi_slopes = alibi_slopes;
  inputs.sinks = sinks;
  inputs.scale = scale;
  inputs.softcap = softcap;
  inputs.window_left = window_left;
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
  Tensor output = empty_in_layout_of(query, batch, heads, queries, value_cache.size(3));
  const int64_t statistics_sizes[4] = {2, batch, heads, queries};
  Tensor statistics = empty(statistics_sizes, 4, ScalarType::Float, query);
  AttentionDecodeParams params;
  fill(params, inputs);
  params.output = heads_view(output);
  params.maximum = static_cast<float*>(statistics.data_ptr());
  params.total = params.maximum + batch * heads * queries;
  if (block_table.has_value()) {
    params.block_table = static_cast<const int64_t*>(block_table->data_ptr());
    params.block_table_stride = block_table->size(1);
    params.page_size = key_cache.size(2);
  }
  std::vector<AttentionSequence> sequences;
  const int64_t* length = static_cast<const int64_t*>(lengths.data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t keys = length[b * lengths.stride(0)];
    sequences.push_back({b, 0, queries, 0, keys, keys - queries});
  }
  run_decode(params, sequences);
  return {output, statistics};
}

// Which gradients a backward gives.
struct Wanted {
  bool query, key, value, mask, sinks, score_weight;
};

struct Gradients {
  Tensor query, key, value, mask, sinks, score_weight;
};

Gradients backward(const Tensor& grad_output, const optional<Tensor>& grad_lse, const Tensor& output,
                   const Tensor& statistics, const AttentionInputs& inputs, const Wanted& wanted) {
  const Tensor &query = inputs.query, &key = inputs.key, &value = inputs.value;
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
  const Tensor unit_grad = grad_output.stride(3) == 1 ? grad_output : torch::stable::contiguous(grad_output);
  Tensor lse_grad = grad_lse.has_value() ? torch::stable::contiguous(*grad_lse) : statistics;
  const auto like = [&](bool wanted, const Tensor& input) {
    return wanted ? empty_in_layout_of(input, input.size(0), input.size(1), input.size(2), input.size(3))
                  : no_elements(query.scalar_type(), query);
  };
  Tensor grad_query = like(wanted.query, query), grad_key = like(wanted.key, key),
         grad_value = like(wanted.value, value);
  Tensor grad_mask = no_elements(query.scalar_type(), query), grad_sinks = no_elements(query.scalar_type(), query);
  Tensor sink_rows = grad_sinks, grad_score_weight = grad_sinks;

  AttentionBackwardParams params;
  fill(params, inputs);
  const std::vector<float> score_weight = padded_score_weight(inputs.score_weight);
  if (inputs.score_weight.has_value()) params.score_weight = score_weight.data();
  params.split_float32 = fusewright_cpu_float32_split();
  params.maximum = static_cast<float*>(statistics.data_ptr());
  params.total = params.maximum + batch * heads * queries;
  params.output = heads_view(output);
  params.grad_output = heads_view(unit_grad);
  if (grad_lse.has_value()) params.grad_lse = static_cast<const float*>(lse_grad.data_ptr());
  const int64_t used_queries = rows_in_sequences(inputs.cu_seqlens_q, queries);
  const int64_t used_keys = rows_in_sequences(inputs.cu_seqlens_k, key.size(2));
  const auto gradient_view = [](bool wanted, const Tensor& gradient, int64_t used) {
    if (!wanted) return HeadsView{};
    const HeadsView view = heads_view(gradient);
    if (used < gradient.size(2)) clear_rows_behind(gradient, used, view);
    return view;
  };
  params.grad_query = gradient_view(wanted.query, grad_query, used_queries);
  params.grad_key = gradient_view(wanted.key, grad_key, used_keys);
  params.grad_value = gradient_view(wanted.value, grad_value, used_keys);
  if (wanted.sinks) {
    const int64_t sizes[3] = {batch, heads, queries};
    sink_rows = empty(sizes, 3, ScalarType::Float, query);
    params.grad_sink_rows = static_cast<float*>(sink_rows.data_ptr());
    // A row behind the packed sequences has the sink's logit as its log-sum-exp.
    for (int64_t row = 0; row < batch * heads * queries; ++row) {
      params.grad_sink_rows[row] = params.grad_lse == nullptr ? 0.0f : params.grad_lse[row];
    }
  }
  if (wanted.score_weight) {
    grad_score_weight = empty_like(*inputs.score_weight, ScalarType::Float);
    params.grad_score_weight = static_cast<float*>(grad_score_weight.data_ptr());
    std::fill_n(params.grad_score_weight, grad_score_weight.numel(), 0.0f);
  }
  if (wanted.query || wanted.key || wanted.value || wanted.sinks || wanted.score_weight)
    run_backward(params, sequences_of(inputs), query);
  if (wanted.sinks) grad_sinks = sum_sink_rows(params, sink_rows, *inputs.sinks);
  if (wanted.mask) {
    params.grad_sink_rows = nullptr;
    grad_mask = mask_gradient(params, *inputs.mask, inputs.bottom_right ? key.size(2) - queries : 0);
  }
  return {grad_query, grad_key, grad_value, grad_mask, grad_sinks, grad_score_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_output, optional<Tensor> grad_lse, Tensor output, Tensor statistics, Tensor query, Tensor key,
    Tensor value, optional<Tensor> mask, optional<Tensor> block_mask, optional<Tensor> alibi_slopes,
    optional<Tensor> sinks, optional<Tensor> seed, optional<Tensor> cu_seqlens_q, optional<Tensor> cu_seqlens_k,
    int64_t block_size, double scale, double softcap, double dropout_p, int64_t window_left, int64_t window_right,
    bool bottom_right, bool need_query, bool need_key, bool need_value, bool need_mask, bool need_sinks) {
  const AttentionInputs inputs{query,   key,       value,        mask,         block_mask,  alibi_slopes,
                               sinks,   seed,      cu_seqlens_q, cu_seqlens_k, block_size,  scale,
                               softcap, dropout_p, window_left,  window_right, bottom_right};
  const Gradients gradients = backward(grad_output, grad_lse, output, statistics, inputs,
                                       {need_query, need_key, need_value, need_mask, need_sinks, false});
  return {gradients.query, gradients.key, gradients.value, gradients.mask, gradients.sinks};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> additive_attention_backward(
    Tensor grad_output, optional<Tensor> grad_lse, Tensor output, Tensor statistics, Tensor query, Tensor key,
    Tensor value, Tensor score_weight, optional<Tensor> mask, optional<Tensor> seed, double scale, double dropout_p,
    int64_t window_left, int64_t window_right, bool bottom_right, bool need_query, bool need_key, bool need_value,
    bool need_score_weight, bool need_mask) {
  const AttentionInputs inputs = additive_inputs(query, key, value, score_weight, mask, seed, scale, dropout_p,
                                                 window_left, window_right, bottom_right);
  const Gradients gradients = backward(grad_output, grad_lse, output, statistics, inputs,
                                       {need_query, need_key, need_value, need_mask, false, need_score_weight});
  return {gradients.query, gradients.key, gradients.value, gradients.score_weight, gradients.mask};
}

}  // namespace
}  // namespace fusewright::ops

STABLE_TORCH_LIBRARY_IMPL(fusewright, CPU, library) {
  library.impl("attention_forward.cpu", TORCH_BOX(&fusewright::ops::attention_forward));
  library.impl("attention_decode.cpu", TORCH_BOX(&fusewright::ops::attention_decode));
  library.impl("attention_backward.cpu", TORCH_BOX(&fusewright::ops::attention_backward));
  library.impl("additive_attention_forward.cpu", TORCH_BOX(&fusewright::ops::additive_attention_forward));
  library.impl("additive_attention_backward.cpu", TORCH_BOX(&fusewright::ops::additive_attention_backward));
}
