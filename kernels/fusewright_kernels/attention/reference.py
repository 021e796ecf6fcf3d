"""Exact attention as plain PyTorch: oracle in float64, naive baseline, last fallback.

Low precision is computed in float32 and rounded once. Every function is made of differentiable operations, so
derivatives of any order follow from autograd. Letters as in the op's README: B batch, H query heads, HK key/value
heads, T query length, S key length, D head dimension, DV value head dimension.
"""

import torch
from torch import Tensor

_INFINITY = float("inf")


def _compute(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _finite(tensor: Tensor) -> Tensor:
    return torch.where(torch.isfinite(tensor), tensor, torch.zeros_like(tensor))


def _heads(tensor: Tensor, heads: int) -> Tensor:
    """Key or value heads repeated so that query head h meets key head h // (H / HK)."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _sequence_of(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(number of the packed sequence, position in it) of each of ``length`` rows; -1 for rows behind the last."""
    positions = torch.arange(length, device=cu_seqlens.device)
    ends = cu_seqlens[1:].to(torch.int64)
    sequence = torch.searchsorted(ends, positions, right=True)
    within = positions - torch.cat([cu_seqlens.to(torch.int64), ends[-1:]])[sequence]
    return torch.where(positions < cu_seqlens[-1], sequence, -1), within


def relative_positions(
    query_length: int,
    key_length: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    bottom_right: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """How far key j lies behind the key that query i is aligned with, (T, S) int64, and which pairs share a sequence.

    Query i is aligned with key i, or with key i + S - T if ``bottom_right``. The second is None without packing.
    """
    if cu_seqlens_q is None or cu_seqlens_k is None:
        shift = key_length - query_length if bottom_right else 0
        queries, keys = torch.arange(query_length, device=device), torch.arange(key_length, device=device)
        return keys[None, :] - queries[:, None] - shift, None
    (sequence_q, queries), (sequence_k, keys) = (
        _sequence_of(cu_seqlens_q, query_length),
        _sequence_of(cu_seqlens_k, key_length),
    )
    relative = keys[None, :] - queries[:, None]
    if bottom_right:
        shifts = (cu_seqlens_k.diff() - cu_seqlens_q.diff()).to(torch.int64)
        relative = relative - shifts[sequence_q.clamp(0, max(shifts.numel() - 1, 0))][:, None]
    return relative, (sequence_q[:, None] == sequence_k[None, :]) & (sequence_q >= 0)[:, None]


def bias_and_visibility(
    logits: Tensor,
    mask: Tensor | None,
    block_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    window_left: int,
    window_right: int,
    bottom_right: bool,
) -> tuple[Tensor, Tensor]:
    """``logits`` (B, H, T, S) with every bias added, and which of them take part."""
    query_length, key_length = logits.shape[-2:]
    relative, same_sequence = relative_positions(
        query_length, key_length, cu_seqlens_q, cu_seqlens_k, bottom_right, logits.device
    )
    visible = torch.ones_like(relative, dtype=torch.bool) if same_sequence is None else same_sequence
    if window_left >= 0:
        visible = visible & (relative >= -window_left)
    if window_right >= 0:
        visible = visible & (relative <= window_right)
    if block_mask is not None:
        rows = torch.arange(query_length, device=logits.device) // block_size
        columns = torch.arange(key_length, device=logits.device) // block_size
        visible = visible & block_mask[:, rows][:, :, columns]
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.to(logits.dtype).reshape(-1, logits.shape[1], 1, 1) * relative.abs()
    if mask is not None:
        if mask.dtype is torch.bool:
            visible = visible & mask
        else:
            logits = logits + _compute(mask).to(logits.dtype)
            visible = visible & (mask != -_INFINITY)
    return logits, visible.expand_as(logits)


def _weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    block_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Softmax of the logits of every pair of ``query`` and ``key``, computed types with as many heads as each other.

    Returns:
        The probabilities (B, H, T, S), 0 where a pair takes no part; which pairs take part; the sink's probability
        (B, H, T, 1) or None; the derivative of the cap at each logit or None; the statistics of the rows.
    """
    logits = torch.matmul(query, key.mT) * scale
    cap_slope = None
    if softcap > 0.0:
        capped = torch.tanh(logits / softcap)
        logits, cap_slope = softcap * capped, 1.0 - capped.square()
    logits, visible = bias_and_visibility(
        logits, mask, block_mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k,
        block_size, window_left, window_right, bottom_right,
    )  # fmt: skip
    logits = torch.where(visible, logits, -_INFINITY)
    if sinks is not None:
        shape = (*logits.shape[:-1], 1)
        logits = torch.cat([logits, sinks.to(logits.dtype).reshape(1, -1, 1, 1).expand(shape)], dim=-1)
    if logits.shape[-1] == 0:
        maximum = logits.new_full((*logits.shape[:-1], 1), -_INFINITY)
    else:
        maximum = logits.detach().amax(-1, keepdim=True)
    weights = torch.exp(logits - torch.where(maximum == -_INFINITY, 0.0, maximum))
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0.0, 1.0, total)
    keys = visible.shape[-1]
    return (
        torch.where(visible, weights[..., :keys], 0.0),
        visible,
        None if sinks is None else weights[..., keys:],
        cap_slope,
        torch.stack([maximum, total]).squeeze(-1),
    )


def _kept(weights: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    """Dropout of weights, or of the gradients of weights; what is dropped leaves no trace."""
    if keep is None:
        return weights
    return torch.where(keep, weights * (1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0), 0.0)


def _reached(visible: Tensor, tensor: Tensor) -> Tensor:
    """Where a sum of rows of ``tensor`` over visible pairs holds something that is not finite."""
    return torch.matmul(visible.to(tensor.dtype), (~torch.isfinite(tensor)).to(tensor.dtype)) > 0


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    block_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    keep: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
) -> tuple[Tensor, Tensor]:
    """softmax(cap(scale * query key^T) + biases) value, and the statistics of its rows.

    ``keep`` is dropout's keep mask (B, H, T, S) or None; the other arguments are those of ``attention_forward`` in
    ``library``, which also says what the statistics are.
    """
    key, value = (_heads(_compute(tensor), query.shape[1]) for tensor in (key, value))
    probabilities, visible, _, _, statistics = _weights(
        _compute(query), key, mask, block_mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k,
        block_size, scale, softcap, window_left, window_right, bottom_right,
    )  # fmt: skip
    # A masked value must not reach a result whatever it holds, and 0 * NaN is NaN: sums are taken of finite values, and
    # what is not finite comes back only where it takes part. So in the backward for all that is summed there.
    output = torch.matmul(_kept(probabilities, keep, dropout_p), _finite(value))
    output = torch.where(_reached(visible, value), float("nan"), output)
    return output.to(query.dtype), statistics


def attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    block_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    keep: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value, an additive mask (B, H, T, S) before its broadcasting is undone, and sinks."""
    heads, key_heads = query.shape[1], key.shape[1]
    wide_query, grad = _compute(query), _compute(grad_output)
    wide_key, wide_value = _heads(_compute(key), heads), _heads(_compute(value), heads)
    probabilities, visible, sink, cap_slope, _ = _weights(
        wide_query, wide_key, mask, block_mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k,
        block_size, scale, softcap, window_left, window_right, bottom_right,
    )  # fmt: skip
    grad_weights = torch.matmul(grad, wide_value.mT)
    grad_weights = torch.where(visible, _kept(grad_weights, keep, dropout_p), 0.0)
    delta = (probabilities * grad_weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.to(delta.dtype)[..., None]
    grad_logits = torch.where(visible, probabilities * (grad_weights - delta), 0.0)
    grad_sinks = None
    if sink is not None and sinks is not None:
        grad_sinks = -(sink * delta).sum((0, 2, 3)).to(sinks.dtype)
    grad_scores = grad_logits * scale
    if cap_slope is not None:
        grad_scores = grad_scores * cap_slope
    kept = _kept(probabilities, keep, dropout_p)
    grad_value = torch.matmul(kept.mT, _finite(grad))
    grad_value = torch.where(_reached(visible.mT, grad), float("nan"), grad_value)
    return (
        torch.matmul(grad_scores, _finite(wide_key)).to(query.dtype),
        _sum_of_group(torch.matmul(grad_scores.mT, _finite(wide_query)), key_heads).to(key.dtype),
        _sum_of_group(grad_value, key_heads).to(value.dtype),
        grad_logits,
        grad_sinks,
    )


def _sum_of_group(tensor: Tensor, key_heads: int) -> Tensor:
    """Gradients (B, H, S, D) of repeated heads summed over those that share a key head, (B, HK, S, D)."""
    return tensor if tensor.shape[1] == key_heads else tensor.unflatten(1, (key_heads, -1)).sum(2)


def _in_pages(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """A cache (B, HK, S, D), gathered from its pages if it has any."""
    if block_table is None:
        return cache
    return cache[block_table].transpose(1, 2).flatten(2, 3)


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    window_left: int,
) -> tuple[Tensor, Tensor]:
    """Attention of ``query`` over the first ``lengths[b]`` keys of each sequence, see ``library``."""
    key, value = _in_pages(key_cache, block_table), _in_pages(value_cache, block_table)
    queries = torch.arange(query.shape[2], device=query.device)
    positions = lengths[:, None] - query.shape[2] + queries
    relative = torch.arange(key.shape[2], device=query.device) - positions[..., None]
    visible = (relative <= 0) & (
        torch.ones_like(relative, dtype=torch.bool) if window_left < 0 else relative >= -window_left
    )
    bias = torch.zeros_like(relative, dtype=_compute(query).dtype)[:, None]
    if alibi_slopes is not None:
        bias = -alibi_slopes.to(bias.dtype)[..., None, None] * relative.abs()[:, None]
    mask = torch.where(visible[:, None], bias, -_INFINITY)
    return attention(
        query, key, value, mask, None, None, sinks, None, None, None, 0, scale, softcap, 0.0, -1, -1, False
    )
