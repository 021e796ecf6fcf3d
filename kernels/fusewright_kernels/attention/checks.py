"""Argument checks of the attention ops, and the shapes they bring their arguments to."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusewright_kernels.checks import FLOATING, floating_tensor, same_device, type_error, value_error

ALIGNMENTS = ("top_left", "bottom_right")


class Window(NamedTuple):
    """Keys at relative positions -left to right take part; -1 is no limit."""

    left: int
    right: int


def operands(query: Tensor, key: Tensor, value: Tensor, smallest_ndim: int, heads_dim: int, enable_gqa: bool) -> None:
    """Types, devices, ranks, head counts and widths of query, key and value; D is last, ``heads_dim`` holds heads."""
    # One expression for calls that are in order, which pay for every microsecond; what is wrong is told below.
    if not (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and query.dtype is key.dtype is value.dtype
        and query.dtype in FLOATING
        and query.device == key.device == value.device
        and query.layout is key.layout is value.layout is torch.strided
        and query.ndim >= smallest_ndim <= key.ndim
        and value.ndim >= smallest_ndim
    ):
        _refuse_operands(query, key, value, smallest_ndim)
    if key.shape[-1] != query.shape[-1]:
        raise value_error("key.shape[-1]", key.shape[-1], f"{query.shape[-1]}, the head dimension of query")
    if enable_gqa:
        heads, key_heads = query.shape[heads_dim], key.shape[heads_dim]
        if key_heads != value.shape[heads_dim]:
            raise value_error("value's number of heads", value.shape[heads_dim], f"{key_heads}, that of key")
        if heads != 0 and (key_heads == 0 or heads % key_heads != 0):
            raise value_error("key's number of heads", key_heads, f"a divisor of query's {heads}")


def _refuse_operands(query: Tensor, key: Tensor, value: Tensor, smallest_ndim: int) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        floating_tensor(name, tensor)
        if tensor.ndim < smallest_ndim:
            raise value_error(f"{name}.ndim", tensor.ndim, f"at least {smallest_ndim}")
        if tensor.dtype is not query.dtype:
            raise type_error(f"{name}.dtype", tensor.dtype, f"{query.dtype}, the dtype of query")
        same_device(name, tensor, "query", query)


def key_lengths(key: Tensor, value: Tensor) -> None:
    if key.shape[-2] != value.shape[-2]:
        raise value_error("value.shape[-2]", value.shape[-2], f"{key.shape[-2]}, the number of keys")


def mask(attn_mask: object, query: Tensor, is_causal: bool) -> None:
    if attn_mask is None:
        return
    if not isinstance(attn_mask, Tensor):
        raise type_error("attn_mask", f"a {type(attn_mask).__name__}", "a torch.Tensor or None")
    if is_causal:
        raise value_error("is_causal", True, "False where attn_mask is given; window=(-1, 0) adds causality to a mask")
    same_device("attn_mask", attn_mask, "query", query)
    if attn_mask.dtype is not torch.bool:
        if not attn_mask.dtype.is_floating_point:
            raise type_error("attn_mask.dtype", attn_mask.dtype, "torch.bool or a floating dtype")
        if attn_mask.dtype is torch.float64 and query.dtype is not torch.float64:
            raise type_error("attn_mask.dtype", attn_mask.dtype, f"{query.dtype}, torch.bool or a narrower dtype")


def scale(value: float | None, width: int) -> float:
    if value is None:
        return 1.0 / math.sqrt(width) if width > 0 else 1.0
    value = float(value)
    # Not math.isfinite: a trace may hold a symbol here, which can be compared.
    if not -math.inf < value < math.inf:
        raise value_error("scale", value, "a finite number")
    return value


def softcap(value: float | None) -> float:
    if value is None:
        return 0.0
    value = float(value)
    if not 0.0 < value < math.inf:
        raise value_error("softcap", value, "a finite number > 0, or None")
    return value


def window(value: int | Sequence[int] | None, is_causal: bool) -> Window:
    """An int w is (w, w): that many keys on either side."""
    if value is None:
        return Window(-1, 0 if is_causal else -1)
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(isinstance(side, bool) or not isinstance(side, int) for side in pair):
        raise type_error("window", repr(value), "an int or two ints (left, right)")
    if min(pair) < -1:
        raise value_error("window", value, "sides >= 0, or -1 for no limit")
    return Window(pair[0], 0 if is_causal else pair[1])


def bottom_right(causal_alignment: str) -> bool:
    if causal_alignment not in ALIGNMENTS:
        raise value_error("causal_alignment", repr(causal_alignment), f"one of {', '.join(ALIGNMENTS)}")
    return causal_alignment == "bottom_right"


def alibi_slopes(slopes: Tensor | None, query: Tensor) -> Tensor | None:
    """Slopes as float32 (1 or B, H) for a query (B, H, T, D)."""
    if slopes is None:
        return None
    floating_tensor("alibi_slopes", slopes)
    same_device("alibi_slopes", slopes, "query", query)
    batch, heads = query.shape[:2]
    if tuple(slopes.shape) not in ((heads,), (1, heads), (batch, heads)):
        raise value_error("alibi_slopes.shape", tuple(slopes.shape), f"({heads},) or ({batch}, {heads})")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise value_error("alibi_slopes.requires_grad", True, "False: slopes get no gradient; pass a mask for one")
    return slopes.to(torch.float32).reshape(-1, heads).contiguous()


def sinks(logits: Tensor | None, query: Tensor) -> Tensor | None:
    """Sink logits as contiguous (H,), float32 unless the query is float64."""
    if logits is None:
        return None
    floating_tensor("sinks", logits)
    same_device("sinks", logits, "query", query)
    if tuple(logits.shape) != (query.shape[1],):
        raise value_error("sinks.shape", tuple(logits.shape), f"({query.shape[1]},), one per query head")
    return logits.to(torch.float64 if query.dtype is torch.float64 else torch.float32).contiguous()


def cu_seqlens(name: str, offsets: Tensor, query: Tensor, rows: int, rows_name: str) -> None:
    """Offsets start at 0, never decrease and end within ``rows``.

    On a GPU the values are checked there, without waiting: a breach is a device-side assertion.
    """
    if not isinstance(offsets, Tensor):
        raise type_error(name, f"a {type(offsets).__name__}", "a torch.Tensor")
    same_device(name, offsets, "query", query)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise type_error(f"{name}.dtype", offsets.dtype, "torch.int32 or torch.int64")
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        raise value_error(f"{name}.shape", tuple(offsets.shape), "(sequences + 1,)")
    sound = (offsets[0] == 0) & (offsets.diff() >= 0).all() & (offsets[-1] <= rows)
    if torch.compiler.is_compiling() or offsets.is_cuda:
        torch._assert_async(sound, f"{name} must start at 0, never decrease and end within {rows_name}")
    elif not sound:
        raise value_error(
            name, offsets.tolist(), f"offsets from 0 that never decrease and end within {rows_name} ({rows})"
        )
