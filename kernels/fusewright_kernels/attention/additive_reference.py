"""Additive attention as plain PyTorch, and the default overloads made of it.

It is exact attention without products: the scores come as an additive mask.
"""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import library, philox
from fusewright_kernels.attention import reference

_INFINITY = float("inf")


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _terms(query: Tensor, key: Tensor) -> Tensor:
    """tanh(query + key), (B, H, T, S, D)."""
    return torch.tanh(_wide(query)[:, :, :, None] + _repeated(_wide(key), query.shape[1])[:, :, None])


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _as_mask(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    if mask.dtype is torch.bool:
        return torch.where(mask, scores, -_INFINITY)
    # A masked pair leaves no trace, not even that of a NaN.
    wide = _wide(mask)
    return torch.where(wide == -_INFINITY, -_INFINITY, scores + wide)


def _scores(query: Tensor, key: Tensor, score_weight: Tensor, scale: float) -> Tensor:
    return (_terms(query, key) * score_weight[:, None, None, :]).sum(-1) * scale


def _rest(
    query: Tensor, key: Tensor, seed: Tensor | None, dropout_p: float, left: int, right: int, bottom_right: bool
) -> tuple[Any, ...]:
    """The arguments of the exact reference behind the mask."""
    keep = None
    if seed is not None and dropout_p > 0.0:
        batch, heads, length, _ = query.shape
        keep = philox.keep_mask(seed, batch * heads * length, key.shape[2], dropout_p)
        keep = keep.reshape(batch, heads, length, key.shape[2])
    return (None, None, None, keep, None, None, 0, 1.0, 0.0, dropout_p, left, right, bottom_right)


def plain_additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """The formula, in differentiable operations, with the arguments of the op ``additive_attention_forward``."""
    scores = _as_mask(_scores(query, key, score_weight, scale), mask)
    rest = _rest(query, key, seed, *arguments)
    return reference.attention(query[..., :0], key[..., :0], value, scores, *rest)


def additive_attention_forward(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    output, statistics = plain_additive_attention(query, key, value, *arguments)
    shape = (*query.shape[:3], value.shape[3])
    return library.in_layout_of(query, shape).copy_(output), statistics


def additive_attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *numbers, need_query, need_key, need_value, need_score_weight, need_mask = arguments
    scores = _as_mask(_scores(query, key, score_weight, scale), mask)
    rest = _rest(query, key, seed, *numbers)
    _, _, grad_value, grad_logits, _ = reference.attention_backward(
        grad_output, grad_lse, query[..., :0], key[..., :0], value, scores, *rest
    )
    terms = _terms(query, key)
    grad_scores = (grad_logits * scale)[..., None]
    # What takes no part leaves no trace, whatever it holds.
    grad_sums = torch.where(grad_scores == 0.0, 0.0, grad_scores * (1.0 - terms.square()))
    grad_sums = grad_sums * score_weight[:, None, None, :]
    grad_weight = torch.where(grad_scores == 0.0, 0.0, grad_scores * terms).sum((0, 2, 3))
    grad_key = grad_sums.sum(2)
    if key.shape[1] != query.shape[1]:
        grad_key = grad_key.unflatten(1, (key.shape[1], -1)).sum(2)

    def or_empty(wanted: bool, gradient: Tensor) -> Tensor:
        return gradient.contiguous() if wanted else query.new_empty((0,))

    def in_layout(wanted: bool, gradient: Tensor, like: Tensor) -> Tensor:
        return library.in_layout_of(like, like.shape).copy_(gradient) if wanted else query.new_empty((0,))

    additive = mask is not None and mask.dtype is not torch.bool
    return (
        in_layout(need_query, grad_sums.sum(3), query),
        in_layout(need_key, grad_key, key),
        in_layout(need_value, grad_value, value),
        or_empty(need_score_weight, grad_weight.to(score_weight.dtype)),
        or_empty(need_mask and additive, grad_logits.sum_to_size(mask.shape).to(mask.dtype))
        if mask is not None and additive
        else query.new_empty((0,)),
    )


def attach() -> None:
    for op in (additive_attention_forward, additive_attention_backward):
        library.attach_reference(op.__name__, op)
