"""Attention weights from the saved log-sum-exp, ``exp(scale * query key^T + mask - lse)``, by blocks of queries.

Whoever asks for weights gets (B, T, S) or (B, H, T, S) and pays for that; nothing else of that size is made, in the
backward neither, where each block is computed again.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusewright_kernels import philox

# Logits of one block, over batch and heads: 16 MiB of float32.
_BLOCK_ELEMENTS = 2**22


class WeightOptions(NamedTuple):
    """What decides the weights besides query, key and lse.

    Attributes:
        scale: factor of the products.
        window: (left, right) as in :func:`fusewright.functional.scaled_dot_product_attention`, (-1, -1) is no limit.
        zero_key: one more column, for a key of zeros that every query sees.
        average: mean over heads.
        seed: (1,) int64 of the dropout mask, None without dropout.
        dropout_p: its probability.
    """

    scale: float
    window: tuple[int, int]
    zero_key: bool
    average: bool
    seed: Tensor | None
    dropout_p: float


def attention_weights(query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, options: WeightOptions) -> Tensor:
    """The weights that attention gave each key, differentiable.

    Args:
        query: (B, H, T, D).
        key: (B, HK, S, D).
        lse: (B, H, T), the log-sum-exp of the logits; where it is -inf the weights are 0.
        mask: 4-D, broadcasts to (B, H, T, S), True takes part or added to the logits.

    Returns:
        (B, H, T, S), or (B, T, S) if averaged, of query's dtype; with dropout those that remain, scaled up.
    """
    batch, heads, length, _ = query.shape
    rows = max(1, _BLOCK_ELEMENTS // max(1, batch * heads * key.shape[2]))
    # Saved-tensor hooks, which checkpoint is made of, work neither under functorch nor for the tracer.
    recompute = torch.is_grad_enabled() and not (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    )
    blocks = []
    for start in range(0, max(length, 1), rows):
        end = min(start + rows, length)
        block_mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, start:end]
        arguments = (query[:, :, start:end], key, lse[:, :, start:end], block_mask, start, length, options)
        if recompute:
            blocks.append(checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(_block(*arguments))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-2)


def _block(
    query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, start: int, length: int, options: WeightOptions
) -> Tensor:
    """The weights of queries start to start + query.shape[2] of ``length``."""
    rows, keys = query.shape[2], key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = _products(query.to(dtype) * options.scale, key.to(dtype))
    allowed = _inside_window(start, rows, keys, options.window, query.device)
    if mask is not None and mask.dtype is torch.bool:
        allowed = mask if allowed is None else allowed & mask
    elif mask is not None:
        logits = logits + mask
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if options.zero_key:
        logits = torch.nn.functional.pad(logits, (0, 1))
    if allowed is not None or mask is not None:
        # Without any key -inf - -inf would be NaN; the weights, and their gradients, are 0.
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = (logits - lse[..., None]).exp()
    if options.seed is not None:
        keep = _kept(options.seed, query, start, length, weights.shape[-1], keys, options.dropout_p)
        weights = weights * keep * (0.0 if options.dropout_p >= 1.0 else 1.0 / (1.0 - options.dropout_p))
    return (weights.mean(dim=1) if options.average else weights).to(query.dtype)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """query key^T (B, H, T, S); heads that share a key head are rows of one matrix, so that no key is repeated."""
    batch, heads, rows, width = query.shape
    key_heads = key.shape[1]
    grouped = query.reshape(batch, key_heads, heads // key_heads * rows, width)
    if not torch.is_autocast_enabled(query.device.type):
        return (grouped @ key.transpose(-1, -2)).reshape(batch, heads, rows, key.shape[2])
    with torch.autocast(query.device.type, enabled=False):
        return (grouped @ key.transpose(-1, -2)).reshape(batch, heads, rows, key.shape[2])


def _inside_window(start: int, rows: int, keys: int, window: tuple[int, int], device: torch.device) -> Tensor | None:
    """bool (rows, keys): which keys the window leaves to queries start, start + 1, ...; None without a window."""
    left, right = window
    if left < 0 and right < 0:
        return None
    distance = torch.arange(keys, device=device) - torch.arange(start, start + rows, device=device)[:, None]
    inside = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        inside = inside & (distance >= -left)
    return inside & (distance <= right) if right >= 0 else inside


def _kept(seed: Tensor, query: Tensor, start: int, length: int, columns: int, keys: int, dropout_p: float) -> Tensor:
    """The block's part of dropout's keep mask, see ``philox``: row (b * H + h) * length + i, one column per key."""
    batch, heads, rows, _ = query.shape
    blocks_per_row = -(-keys // 4)
    queries = torch.arange(start, start + rows, device=query.device)
    row = torch.arange(batch * heads, device=query.device)[:, None] * length + queries
    counters = row[..., None] * blocks_per_row + torch.arange(blocks_per_row, device=query.device)
    words = philox.random_words(seed.reshape(()), counters).flatten(-2)[..., :keys]
    keep = (words >= philox.keep_threshold(dropout_p)).reshape(batch, heads, rows, keys)
    # The key of zeros has no value that could be dropped.
    return torch.nn.functional.pad(keep, (0, columns - keys), value=True)
