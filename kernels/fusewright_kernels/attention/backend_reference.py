"""The default overload of each op: the plain formula in the shape of the op's schema."""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import library, philox
from fusewright_kernels.attention import reference


def keep_mask_of(query: Tensor, key: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    """Dropout's keep mask (B, H, T, S), None without dropout; see ``library`` for its rows and columns."""
    if seed is None or dropout_p == 0.0:
        return None
    batch, heads, length, _ = query.shape
    keep = philox.keep_mask(seed, batch * heads * length, key.shape[2], dropout_p)
    return keep.reshape(batch, heads, length, key.shape[2])


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    block_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """:func:`reference.attention` with the arguments of the op ``attention_forward``."""
    keep = keep_mask_of(query, key, seed, arguments[5])
    return reference.attention(query, key, value, mask, block_mask, alibi_slopes, sinks, keep, *arguments)


def attention_forward(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    output, statistics = plain_attention(query, key, value, *arguments)
    shape = (*query.shape[:3], value.shape[3])
    return library.in_layout_of(query, shape).copy_(output), statistics


def log_sum_exp(statistics: Tensor) -> Tensor:
    """(B, H, T) of the statistics (2, B, H, T); -inf where no key takes part."""
    return statistics[0] + statistics[1].log()


def plain_gradients(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    block_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """:func:`reference.attention_backward` with the arguments of the op, an additive mask's in the mask's shape."""
    keep = keep_mask_of(query, key, seed, arguments[5])
    *gradients, grad_logits, grad_sinks = reference.attention_backward(
        grad_output, grad_lse, query, key, value, mask, block_mask, alibi_slopes, sinks, keep, *arguments
    )
    additive = mask is not None and mask.dtype is not torch.bool
    grad_mask = grad_logits.sum_to_size(mask.shape).to(mask.dtype) if additive and mask is not None else None
    return gradients[0], gradients[1], gradients[2], grad_mask, grad_sinks


def attention_backward(
    grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, statistics: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *inputs, need_query, need_key, need_value, need_mask, need_sinks = arguments
    query = inputs[0]
    gradients = plain_gradients(grad_output, grad_lse, *inputs)
    results = []
    for gradient, want in zip(gradients, (need_query, need_key, need_value, need_mask, need_sinks), strict=True):
        results.append(gradient.contiguous() if want and gradient is not None else query.new_empty((0,)))
    for index, want in enumerate((need_query, need_key, need_value)):
        if want:
            results[index] = library.in_layout_of(inputs[index], results[index].shape).copy_(results[index])
    return tuple(results)


def attention_decode(query: Tensor, key_cache: Tensor, value_cache: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    output, statistics = reference.attention_decode(query, key_cache, value_cache, *arguments)
    return library.in_layout_of(query, (*query.shape[:3], value_cache.shape[3])).copy_(output), statistics


def attach() -> None:
    for op in (attention_forward, attention_backward, attention_decode):
        library.attach_reference(op.__name__, op)
    library.attach_reference("attention_backward_ordered", attention_backward)
