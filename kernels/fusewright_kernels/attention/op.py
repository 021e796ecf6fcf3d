"""Exact attention: checks, shapes, dispatch, autograd."""

from collections.abc import Sequence

from torch import Tensor

from fusewright_kernels import autograd, dispatch, library, philox
from fusewright_kernels.attention import backend_native, backend_reference, backend_triton, checks, shapes
from fusewright_kernels.attention.additive import additive_attention
from fusewright_kernels.attention.decode import decode_attention
from fusewright_kernels.attention.function import Attention
from fusewright_kernels.attention.pattern import Global, Pattern, PerHead, Random, Strided, Union, Window
from fusewright_kernels.attention.sdpa_slot import slot_backward, slot_forward
from fusewright_kernels.checks import probability, value_error
from fusewright_kernels.checks import seed as check_seed

__all__ = [
    "Global", "Pattern", "PerHead", "Random", "Strided", "Union", "Window", "additive_attention",
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
        query, key, value, leading = shapes.broadcast(query, key, value, enable_gqa)
    mask = None if attn_mask is None else shapes.four_dimensional_mask(attn_mask, leading, query, key.shape[2])
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
    query, key, value = (autograd.low_precision_under_autocast(tensor) for tensor in (query, key, value))
    mask = None if mask is None else autograd.low_precision_under_autocast(mask)
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    block_mask, block_size = None, 0
    if pattern is not None:
        block_size = pattern.block_size
        block_mask = pattern.block_mask(query.shape[1], query.shape[2], key.shape[2], query.device)
    seed_on_device = philox.seed_tensor(seed, query.device) if dropout_p > 0.0 else None
    dtypes = (query.dtype,) if mask is None else (query.dtype, mask.dtype)
    chosen = dispatch.choose("attention", dispatch.device_type(query), dtypes, query.ndim, backend)
    forced = (backend or dispatch.FORCED_BACKEND) is not None
    arguments = (
        query, key, value, mask, block_mask, alibi_slopes, sinks, seed_on_device, cu_seqlens_q, cu_seqlens_k,
        block_size, scale, softcap_value, float(dropout_p), *window, bottom_right,
    )  # fmt: skip
    if autograd.derivative_possible(query, key, value, mask, sinks):
        output, _, lse = autograd.apply(Attention, *arguments, return_lse, chosen, forced)
        return output, lse
    overload = library.overload("attention_forward", backend_native.forward_backend_of(chosen, forced, arguments))
    output, statistics = overload(*arguments)
    return output, backend_reference.log_sum_exp(statistics) if return_lse else None
