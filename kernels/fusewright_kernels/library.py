"""Every operator schema and its fake (shape) function, in one place.

An op is defined once per backend as an overload of one name, ``fusewright::norm_forward.cpu`` and so on, all with
the same schema and the same fake. ``dispatch`` picks the overload in Python, so a traced graph names the kernel
that will run, and the choice costs nothing inside the op. The default overload is the plain PyTorch formula: it
exists without any binary, on every device, and is what the compiled overloads are compared with.

Reference formulas and Triton kernels attach from Python; compiled kernels attach from C++ when their library loads.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "fusewright"
COMPILED_BACKENDS = ("cuda", "triton", "cpu")

_library = torch.library.Library(NAMESPACE, "DEF")
_overloads: dict[tuple[str, str], torch._ops.OpOverload] = {}


def _define(name: str, schema: str, fake: Callable) -> None:
    for suffix in ("", *(f".{backend}" for backend in COMPILED_BACKENDS)):
        _library.define(f"{name}{suffix}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}{suffix}", fake, lib=_library)
    packet = getattr(torch.ops.fusewright, name)
    _overloads[name, "reference"] = packet.default
    for backend in COMPILED_BACKENDS:
        _overloads[name, backend] = getattr(packet, backend)


def attach_reference(name: str, implementation: Callable) -> None:
    """Register the plain PyTorch formula as the default overload of op ``name``."""
    _library.impl(name, implementation, "CompositeExplicitAutograd")


def attach_triton(name: str, implementation: Callable, *, interpreted: bool) -> None:
    """Register the Triton launcher of op ``name``.

    Under the interpreter (``TRITON_INTERPRET=1``) kernels run on CPU tensors, so the overload serves those as well.
    """
    for key in ("CUDA", "CPU") if interpreted else ("CUDA",):
        _library.impl(f"{name}.triton", implementation, key)


def overload(name: str, backend: str) -> torch._ops.OpOverload:
    """Op ``name`` as one backend runs it: ``reference`` or one of ``COMPILED_BACKENDS``."""
    return _overloads[name, backend]


def _contiguous_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.new_empty(tensor.shape, dtype=dtype or tensor.dtype)


def _gradient_or_empty(wanted: bool, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An op returns a 0-element tensor for a gradient that was not asked for."""
    return _contiguous_like(like, dtype) if wanted else like.new_empty((0,), dtype=dtype)


def _parameter_gradient_or_empty(wanted: bool, parameter: Tensor | None, input: Tensor) -> Tensor:
    if parameter is None:
        return input.new_empty((0,))
    return _gradient_or_empty(wanted, parameter, parameter.dtype)


def norm_statistics(input: Tensor, normalized_ndim: int, center: bool, save: bool) -> Tensor:
    """Empty statistics of M rows, float32: (2, M) with rstd and mean if ``center``, else (1, M) with rstd.

    ``M`` is the product of the leading sizes. (0,) if they are not to be saved.
    """
    if not save:
        return input.new_empty((0,), dtype=torch.float32)
    rows = math.prod(input.shape[: input.ndim - normalized_ndim])
    return input.new_empty((2 if center else 1, rows), dtype=torch.float32)


# norm: y = (x - mean) * rstd * (weight + weight_offset) + bias over the last normalized_ndim dimensions; layer
# normalisation if center, else RMS normalisation, which has no mean. Weight and bias have the normalised shape.

_define(
    "norm_forward",
    "(Tensor input, Tensor? weight, Tensor? bias, int normalized_ndim, float eps, bool center, float weight_offset,"
    " bool save_statistics) -> (Tensor output, Tensor statistics)",
    lambda input, weight, bias, normalized_ndim, eps, center, weight_offset, save_statistics: (
        _contiguous_like(input),
        norm_statistics(input, normalized_ndim, center, save_statistics),
    ),
)

_define(
    "norm_forward_out",
    "(Tensor input, Tensor? weight, Tensor? bias, int normalized_ndim, float eps, bool center, float weight_offset,"
    " Tensor(a!) output) -> ()",
    lambda *args: None,
)


def _norm_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    center: bool,
    weight_offset: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _gradient_or_empty(need_input, input, input.dtype),
        _parameter_gradient_or_empty(need_weight, weight, input),
        _parameter_gradient_or_empty(need_bias, bias, input),
    )


_define(
    "norm_backward",
    "(Tensor grad_output, Tensor input, Tensor statistics, Tensor? weight, Tensor? bias, int normalized_ndim,"
    " bool center, float weight_offset, bool need_input, bool need_weight, bool need_bias)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _norm_backward_fake,
)

# add_norm: new_residual = dropout(input) + residual, rounded to residual_dtype, then the norm of it as stored.
# Dropout keeps element i of a row where philox_uint32(seed, row, i) >= dropout_p * 2^32, see philox.py.

_define(
    "add_norm_forward",
    "(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, int normalized_ndim, float eps,"
    " bool center, float weight_offset, float dropout_p, ScalarType residual_dtype, bool save_statistics)"
    " -> (Tensor output, Tensor new_residual, Tensor statistics)",
    lambda input, residual, weight, bias, seed, normalized_ndim, eps, center, weight_offset, dropout_p, residual_dtype,
    save_statistics: (
        _contiguous_like(input),
        _contiguous_like(input, residual_dtype),
        norm_statistics(input, normalized_ndim, center, save_statistics),
    ),
)  # fmt: skip


def _add_norm_backward_fake(
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    normalized_ndim: int,
    center: bool,
    weight_offset: float,
    dropout_p: float,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    need_input: bool,
    need_residual: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _gradient_or_empty(need_input, new_residual, input_dtype),
        _gradient_or_empty(need_residual, new_residual, residual_dtype),
        _parameter_gradient_or_empty(need_weight, weight, new_residual),
        _parameter_gradient_or_empty(need_bias, bias, new_residual),
    )


_define(
    "add_norm_backward",
    "(Tensor grad_output, Tensor? grad_new_residual, Tensor new_residual, Tensor statistics, Tensor? weight,"
    " Tensor? bias, Tensor? seed, int normalized_ndim, bool center, float weight_offset, float dropout_p,"
    " ScalarType input_dtype, ScalarType residual_dtype, bool need_input, bool need_residual, bool need_weight,"
    " bool need_bias) -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    _add_norm_backward_fake,
)

_define(
    "softmax_forward",
    "(Tensor input, int dim, ScalarType output_dtype) -> Tensor",
    lambda input, dim, output_dtype: _contiguous_like(input, output_dtype),
)

_define("softmax_forward_out", "(Tensor input, int dim, Tensor(a!) output) -> ()", lambda *args: None)

_define(
    "softmax_backward",
    "(Tensor grad_output, Tensor output, int dim, ScalarType input_dtype) -> Tensor",
    lambda grad_output, output, dim, input_dtype: _contiguous_like(output, input_dtype),
)

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


_define("attention_forward", f"({_ATTENTION_INPUTS}) -> (Tensor output, Tensor statistics)", _attention_forward_fake)


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
        query.new_empty((0,)) if mask is None or not need_mask else _contiguous_like(mask),
        query.new_empty((0,)) if sinks is None or not need_sinks else _contiguous_like(sinks),
    )


_define(
    "attention_backward",
    f"(Tensor grad_output, Tensor? grad_lse, Tensor output, Tensor statistics, {_ATTENTION_INPUTS}, bool need_query,"
    " bool need_key, bool need_value, bool need_mask, bool need_sinks)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, Tensor grad_sinks)",
    _attention_backward_fake,
)

# attention_decode: attention_forward of few queries over a cache, causal with the queries last. Sequence b holds
# lengths[b] keys, query i of T stands at position lengths[b] - T + i. query (B, H, T, D); caches (B, HK, S, D) and
# (B, HK, S, DV), or with block_table (B, pages of a sequence) in pages: caches (pages, HK, page size, D), where key j
# of sequence b is row j % page size of page block_table[b, j // page size]. lengths and block_table are int64.

_define(
    "attention_decode",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths, Tensor? block_table, Tensor? alibi_slopes,"
    " Tensor? sinks, float scale, float softcap, int window_left) -> (Tensor output, Tensor statistics)",
    lambda query, key_cache, value_cache, *arguments: _attention_forward_fake(query, key_cache, value_cache),
)
