"""Schemas of exact attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusewright_kernels.library.registry import contiguous_like, define

# attention: softmax(cap(scale * query key^T) + biases) value. query (B, H, T, D), key (B, HK, S, D), value
# (B, HK, S, DV) with unit last strides, HK dividing H: query head h meets key head h // (H / HK). cap(x) is
# softcap * tanh(x / softcap), or x where softcap is 0.
#   mask          bool (True takes part) or additive, 4-D, each size 1 or that of (B, H, T, S)
#   block_mask    bool (1 or H, ceil(T / block_size), ceil(S / block_size)): which blocks of pairs take part
#   alibi_slopes  float32 (1 or B, H): adds -slope * |relative position|
#   sinks         (H,): a logit per head that takes part in the softmax and has no value
#   seed          int64 (1,) for dropout: element (b, h, i, j) is column j of row (b * H + h) * T + i of
#                 philox.keep_mask
#   cu_seqlens_*  int32 or int64 (sequences + 1,): with B = 1, rows [cu[n], cu[n + 1]) are sequence n; rows behind the
#                 last give 0. Positions count from the start of each sequence.
#   window_*      key j takes part for query i if -left <= j - i - shift <= right, -1 is no limit; shift is S - T of
#                 the sequence if bottom_right, else 0. Causal is right = 0.
# statistics (2, B, H, T) float32 (float64 for a float64 query): a reference r of the row's logits (their maximum or
# near it; -inf without any key) and the sum of exp(logit - r), the sink's included. Two numbers and not their
# log-sum-exp, because in float32 a row of logits near -1e9 would lose the logarithm of the sum, and its gradients too.


def in_layout_of(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """Empty (B, H, T, D) of ``sizes``, in memory as (B, T, H, D) if ``tensor`` is, else contiguous."""
    batch, heads, length, width = sizes
    if tensor.ndim == 4 and tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty((batch, length, heads, width)).transpose(1, 2)
    return tensor.new_empty((batch, heads, length, width))


_ATTENTION_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? block_mask, Tensor? alibi_slopes, Tensor? sinks,"
    " Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int block_size, float scale, float softcap,"
    " float dropout_p, int window_left, int window_right, bool bottom_right"
)


def _attention_forward_fake(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return (
        in_layout_of(query, (*query.shape[:3], value.shape[3])),
        query.new_empty((2, *query.shape[:3]), dtype=torch.promote_types(query.dtype, torch.float32)),
    )


define("attention_forward", f"({_ATTENTION_INPUTS}) -> (Tensor output, Tensor statistics)", _attention_forward_fake)


def _attention_backward_fake(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    block_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    need_query, need_key, need_value, need_mask, need_sinks = arguments[-5:]
    return (
        in_layout_of(query, query.shape) if need_query else query.new_empty((0,)),
        in_layout_of(key, key.shape) if need_key else query.new_empty((0,)),
        in_layout_of(value, value.shape) if need_value else query.new_empty((0,)),
        query.new_empty((0,)) if mask is None or not need_mask else contiguous_like(mask),
        query.new_empty((0,)) if sinks is None or not need_sinks else contiguous_like(sinks),
    )


_ATTENTION_BACKWARD = (
    f"(Tensor grad_output, Tensor? grad_lse, Tensor output, Tensor statistics, {_ATTENTION_INPUTS}, bool need_query,"
    " bool need_key, bool need_value, bool need_mask, bool need_sinks)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, Tensor grad_sinks)"
)

define("attention_backward", _ATTENTION_BACKWARD, _attention_backward_fake)

# attention_backward_ordered: attention_backward whose results repeat bit for bit, where that costs time: in cuda.
# That of every other backend always repeats.
define("attention_backward_ordered", _ATTENTION_BACKWARD, _attention_backward_fake)

# attention_decode: attention_forward of few queries over a cache, causal with the queries last. Sequence b holds
# lengths[b] keys, query i of T stands at position lengths[b] - T + i. query (B, H, T, D); caches (B, HK, S, D) and
# (B, HK, S, DV), or with block_table (B, pages of a sequence) in pages: caches (pages, HK, page size, D), where key j
# of sequence b is row j % page size of page block_table[b, j // page size]. lengths and block_table are int64.

define(
    "attention_decode",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths, Tensor? block_table, Tensor? alibi_slopes,"
    " Tensor? sinks, float scale, float softcap, int window_left) -> (Tensor output, Tensor statistics)",
    lambda query, key_cache, value_cache, *arguments: _attention_forward_fake(query, key_cache, value_cache),
)

# additive_attention: attention whose scores are scale * sum_d score_weight[h, d] tanh(query[i, d] + key[j, d]);
# score_weight (H, D) float32 (float64 for float64). All else is as in attention, statistics included.

_ADDITIVE_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor score_weight, Tensor? mask, Tensor? seed, float scale,"
    " float dropout_p, int window_left, int window_right, bool bottom_right"
)

define(
    "additive_attention_forward",
    f"({_ADDITIVE_INPUTS}) -> (Tensor output, Tensor statistics)",
    _attention_forward_fake,
)


def _additive_backward_fake(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    mask: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    need_query, need_key, need_value, need_score_weight, need_mask = arguments[-5:]
    return (
        in_layout_of(query, query.shape) if need_query else query.new_empty((0,)),
        in_layout_of(key, key.shape) if need_key else query.new_empty((0,)),
        in_layout_of(value, value.shape) if need_value else query.new_empty((0,)),
        contiguous_like(score_weight) if need_score_weight else query.new_empty((0,)),
        query.new_empty((0,)) if mask is None or not need_mask else contiguous_like(mask),
    )


define(
    "additive_attention_backward",
    f"(Tensor grad_output, Tensor? grad_lse, Tensor output, Tensor statistics, {_ADDITIVE_INPUTS}, bool need_query,"
    " bool need_key, bool need_value, bool need_score_weight, bool need_mask)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_score_weight, Tensor grad_mask)",
    _additive_backward_fake,
)
