// Parameters of an attention call from its tensors. Schemas and meaning: fusewright_kernels/library/attention.py.
#pragma once

#include <cmath>
#include <vector>

#include "heads_tensor.h"

namespace fusewright::ops {

// The arguments that forward and backward share, in the schema's order.
struct AttentionInputs {
  Tensor query, key, value;
  std::optional<Tensor> mask = {}, block_mask = {}, alibi_slopes = {}, sinks = {}, seed = {};
  std::optional<Tensor> cu_seqlens_q = {}, cu_seqlens_k = {};
  int64_t block_size = 0;
  double scale = 1, softcap = 0, dropout_p = 0;
  int64_t window_left = -1, window_right = 0;
  bool bottom_right = true;
  std::optional<Tensor> score_weight = {};  // (H, D) float32
};

inline MaskView mask_view(const std::optional<Tensor>& mask) {
  MaskView view;
  if (!mask.has_value()) return view;
  view.kind = mask->scalar_type() == ScalarType::Bool ? MaskKind::boolean : MaskKind::additive;
  if (view.kind == MaskKind::additive) view.dtype = data_type(mask->scalar_type());
  view.data = mask->data_ptr();
  for (int dim = 0; dim < 4; ++dim) view.stride[dim] = mask->size(dim) == 1 ? 0 : mask->stride(dim);
  return view;
}

inline void fill(AttentionParams& params, const AttentionInputs& inputs) {
  params.batch = inputs.query.size(0);
  params.heads = inputs.query.size(1);
  params.key_heads = inputs.key.size(1);
  params.queries = inputs.query.size(2);
  params.keys = inputs.key.size(2);
  params.width = inputs.query.size(3);
  params.value_width = inputs.value.size(3);
  params.dtype = data_type(inputs.query.scalar_type());
  params.query = heads_view(inputs.query);
  params.key = heads_view(inputs.key);
  params.value = heads_view(inputs.value);
  params.mask = mask_view(inputs.mask);
  if (inputs.block_mask.has_value()) {
    const Tensor& mask = *inputs.block_mask;
    params.block_mask = static_cast<const bool*>(mask.data_ptr());
    params.block_size = inputs.block_size;
    params.block_columns = mask.size(2);
    params.block_head_stride = mask.size(0) == 1 ? 0 : mask.size(1) * mask.size(2);
  }
  if (inputs.alibi_slopes.has_value()) {
    params.alibi_slopes = static_cast<const float*>(inputs.alibi_slopes->data_ptr());
    params.alibi_batch_stride = inputs.alibi_slopes->size(0) == 1 ? 0 : params.heads;
  }
  if (inputs.sinks.has_value()) params.sinks = static_cast<const float*>(inputs.sinks->data_ptr());
  params.scale = static_cast<float>(inputs.scale);
  params.softcap = static_cast<float>(inputs.softcap);
  params.window_left = inputs.window_left;
  params.window_right = inputs.window_right;
  if (inputs.seed.has_value() && inputs.dropout_p > 0) {
    params.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(inputs.seed->data_ptr()));
    params.keep_threshold = static_cast<uint64_t>(std::nearbyint(inputs.dropout_p * 4294967296.0));
    params.keep_scale = inputs.dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - inputs.dropout_p)) : 0.0f;
  }
}

inline int64_t offset_at(const Tensor& cu_seqlens, int64_t index) {
  const int64_t at = index * cu_seqlens.stride(0);
  return cu_seqlens.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(cu_seqlens.data_ptr())[at]
                                                     : static_cast<const int64_t*>(cu_seqlens.data_ptr())[at];
}

inline std::vector<AttentionSequence> sequences_of(const AttentionInputs& inputs) {
  std::vector<AttentionSequence> sequences;
  const auto add = [&](int64_t batch, int64_t query_begin, int64_t queries, int64_t key_begin, int64_t keys) {
    sequences.push_back({batch, query_begin, queries, key_begin, keys, inputs.bottom_right ? keys - queries : 0});
  };
  if (!inputs.cu_seqlens_q.has_value()) {
    for (int64_t batch = 0; batch < inputs.query.size(0); ++batch) {
      add(batch, 0, inputs.query.size(2), 0, inputs.key.size(2));
    }
    return sequences;
  }
  const Tensor &queries = *inputs.cu_seqlens_q, &keys = *inputs.cu_seqlens_k;
  for (int64_t n = 0; n + 1 < queries.size(0); ++n) {
    const int64_t query = offset_at(queries, n), key = offset_at(keys, n);
    add(0, query, offset_at(queries, n + 1) - query, key, offset_at(keys, n + 1) - key);
  }
  return sequences;
}

}  // namespace fusewright::ops
