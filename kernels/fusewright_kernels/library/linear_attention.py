"""Schemas of linear attention."""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels.library.attention import in_layout_of
from fusewright_kernels.library.registry import define

# linear_attention: output[i] = sum_j f(query[i]) f(key[j]) value[j] / (sum_j f(query[i]) f(key[j]) + eps), over j <= i
# if is_causal (as many keys as queries). query (B, H, T, D), key (B, H, S, D), value (B, H, S, DV), unit last strides.
#   key_padding_mask  bool (B, S): true takes no part
#   initial_state     float32 (float64 for float64) (B, H, D, DV + 1): sums of f(key) [value, 1] over earlier positions
#   feature_map       0: f(x) = elu(x) + 1, 1: f(x) = x
# normalizer (B, H, T): the denominators; final_state: initial_state with this call's keys and values added.

_LINEAR_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask, Tensor? initial_state, bool is_causal,"
    " float eps, int feature_map"
)


def _state_like(query: Tensor, value: Tensor) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((*query.shape[:2], query.shape[3], value.shape[3] + 1), dtype=dtype)


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    state = _state_like(query, value)
    return (
        in_layout_of(query, (*query.shape[:3], value.shape[3])),
        query.new_empty(query.shape[:3], dtype=state.dtype),
        state,
    )


define(
    "linear_attention_forward",
    f"({_LINEAR_INPUTS}) -> (Tensor output, Tensor normalizer, Tensor final_state)",
    _forward_fake,
)


def _backward_fake(
    grad_output: Tensor,
    grad_final_state: Tensor | None,
    output: Tensor,
    normalizer: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    need_query, need_key, need_value, need_state = arguments[-4:]
    return (
        in_layout_of(query, query.shape) if need_query else query.new_empty((0,)),
        in_layout_of(key, key.shape) if need_key else query.new_empty((0,)),
        in_layout_of(value, value.shape) if need_value else query.new_empty((0,)),
        _state_like(query, value) if need_state else query.new_empty((0,)),
    )


define(
    "linear_attention_backward",
    f"(Tensor grad_output, Tensor? grad_final_state, Tensor output, Tensor normalizer, {_LINEAR_INPUTS},"
    " bool need_query, bool need_key, bool need_value, bool need_state)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_state)",
    _backward_fake,
)
