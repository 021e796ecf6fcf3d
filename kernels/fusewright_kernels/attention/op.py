"""Exact attention: checks, shapes, dispatch, autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusewright_kernels import autograd, dispatch, philox
from fusewright_kernels.attention import backend_native, backend_reference, backend_triton, checks
from fusewright_kernels.attention.decode import decode_attention
from fusewright_kernels.attention.function import Attention
from fusewright_kernels.attention.pattern import Global, Pattern, PerHead, Random, Strided, Union, Window
from fusewright_kernels.attention.sdpa_slot import slot_backward, slot_forward
from fusewright_kernels.checks import probability, value_error
from fusewright_kernels.checks import seed as check_seed

__all__ = [
    "Global", "Pattern", "PerHead", "Random", "Strided", "Union", "Window",
    "decode_attention", "scaled_dot_product_attention", "slot_backward", "slot_forward", "varlen_attention",
]  # fmt: skip

backend_reference.attach()
dispatch.register(
    "attention",
    {"cuda": backend_native.refuse_cuda, "triton": backend_triton.refuse, "cpu": backend_native.refuse_cpu},
)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window: int | Sequence[int] | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    pattern: Pattern | None,
    causal_alignment: str,
    return_lse: bool,
    seed: int | Tensor | None,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fusewright.functional.scaled_dot_product_attention`."""
    checks.operands(query, key, value, smallest_ndim=2, heads_dim=-3, enable_gqa=enable_gqa and query.ndim > 2)
    checks.key_lengths(key, value)
    checks.mask(attn_mask, query, is_causal)
    leading = query.shape[:-2]
    if not (query.ndim == key.ndim == value.ndim == 4 and leading == key.shape[:2] == value.shape[:2]):
        query, key, value, leading = _broadcast(query, key, value, enable_gqa)
    mask = None if attn_mask is None else _four_dimensional_mask(attn_mask, leading, query, key.shape[2])
    results = _attention(
        query, key, value, mask, dropout_p, checks.scale(scale, query.shape[3]), checks.window(window, is_causal),
        softcap, alibi_slopes, sinks, pattern, causal_alignment, return_lse, seed, None, None, backend,
    )  # fmt: skip
    output, lse = results
    if len(leading) == 2:
        return output if lse is None else (output, lse)
    output = output.reshape(*leading, *output.shape[2:])
    return output if lse is None else (output, lse.reshape(*leading, lse.shape[2]))


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    window: int | Sequence[int] | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    causal_alignment: str,
    return_lse: bool,
    seed: int | Tensor | None,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fusewright.functional.varlen_attention`."""
    checks.operands(query, key, value, smallest_ndim=3, heads_dim=-2, enable_gqa=True)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 3:
            raise value_error(f"{name}.ndim", tensor.ndim, "3: (total length, heads, head dimension)")
    if key.shape[0] != value.shape[0]:
        raise value_error("value.shape[0]", value.shape[0], f"{key.shape[0]}, the number of keys")
    checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, query, query.shape[0], "query.shape[0]")
    checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, query, key.shape[0], "key.shape[0]")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise value_error("cu_seqlens_k.shape", tuple(cu_seqlens_k.shape), f"{tuple(cu_seqlens_q.shape)}")
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    output, lse = _attention(
        query, key, value, None, dropout_p, checks.scale(scale, query.shape[3]), checks.window(window, is_causal),
        softcap, alibi_slopes, sinks, None, causal_alignment, return_lse, seed, cu_seqlens_q, cu_seqlens_k, backend,
    )  # fmt: skip
    output = output.squeeze(0).transpose(0, 1)
    return output if lse is None else (output, lse.squeeze(0))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    scale: float,
    window: checks.Window,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    pattern: Pattern | None,
    causal_alignment: str,
    return_lse: bool,
    seed: int | Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """The op on (B, H, T, D) tensors: output and, if asked for, the log-sum-exp (B, H, T)."""
    probability("dropout_p", dropout_p)
    check_seed("seed", seed)
    softcap_value, bottom_right = checks.softcap(softcap), checks.bottom_right(causal_alignment)
    alibi_slopes, sinks = checks.alibi_slopes(alibi_slopes, query), checks.sinks(sinks, query)
    query, key, value = (_under_autocast(tensor) for tensor in (query, key, value))
    mask = None if mask is None else _under_autocast(mask)
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    block_mask, block_size = None, 0
    if pattern is not None:
        block_size = pattern.block_size
        block_mask = pattern.block_mask(query.shape[1], query.shape[2], key.shape[2], query.device)
    seed_on_device = philox.seed_tensor(seed, query.device) if dropout_p > 0.0 else None
    dtypes = (query.dtype,) if mask is None else (query.dtype, mask.dtype)
    chosen = dispatch.choose("attention", query.device.type, dtypes, query.ndim, backend)
    arguments = (
        query, key, value, mask, block_mask, alibi_slopes, sinks, seed_on_device, cu_seqlens_q, cu_seqlens_k,
        block_size, scale, softcap_value, float(dropout_p), *window, bottom_right,
    )  # fmt: skip
    if autograd.derivative_possible(query, key, value, mask, sinks):
        output, _, lse = autograd.apply(Attention, *arguments, return_lse, chosen)
        return output, lse
    output, statistics = backend_native.forward_overload(chosen, arguments)(*arguments)
    return output, backend_reference.log_sum_exp(statistics) if return_lse else None


def _under_autocast(tensor: Tensor) -> Tensor:
    """Mirror of torch's autocast, which runs attention in the low-precision type on every device."""
    device_type = tensor.device.type
    if tensor.dtype is not torch.float32 or not torch.amp.is_autocast_available(device_type):
        return tensor
    if not torch.is_autocast_enabled(device_type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


def _broadcast(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """(B, H, T, D) tensors whose leading dimensions are broadcast, and query's leading sizes.

    With ``enable_gqa`` the heads dimension is left as it is.
    """
    tensors = (query, key, value)
    kept = 3 if enable_gqa and query.ndim > 2 else 2
    try:
        leading = torch.broadcast_shapes(*(tensor.shape[:-kept] for tensor in tensors))
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise value_error("the shapes of query, key and value", shapes, "leading sizes that broadcast") from error
    expanded = [tensor.expand(*leading, *tensor.shape[-kept:]) for tensor in tensors]
    results = [_four_dimensional(tensor) for tensor in expanded]
    return results[0], results[1], results[2], expanded[0].shape[:-2]


def _four_dimensional(tensor: Tensor) -> Tensor:
    """(B, H, T, D): leading dimensions before the heads merged, or missing ones of size 1."""
    if tensor.ndim < 4:
        return tensor.reshape((1,) * (4 - tensor.ndim) + tensor.shape)
    return tensor.flatten(0, -4)


def _four_dimensional_mask(mask: Tensor, leading: torch.Size, query: Tensor, keys: int) -> Tensor:
    """The mask with sizes 1 or those of (B, H, T, S); a view unless more than two leading sizes must be merged."""
    full = (*leading, query.shape[2], keys)
    padded = (1,) * (len(full) - mask.ndim) + tuple(mask.shape)
    if mask.ndim > len(full) or any(size not in (1, expected) for size, expected in zip(padded, full, strict=True)):
        raise value_error("attn_mask.shape", tuple(mask.shape), f"a shape that broadcasts to {full}")
    mask = mask.reshape(padded)
    if len(full) <= 4:
        return mask.reshape((1,) * (4 - len(full)) + padded)
    if all(size == 1 for size in padded[:-3]):
        return mask.reshape((1, *padded[-3:]))
    return mask.expand(*leading[:-1], *padded[-3:]).flatten(0, -4)
