"""The functions that stand in for two of torch.nn.functional's while ours are enabled.

Each serves what our kernels take and hands everything else, bad arguments included, to the function it replaces, so
that a call behaves and fails as torch's does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.bias import CausalBias
from torch.overrides import handle_torch_function, has_torch_function

from fusewright import functional
from fusewright.nn.multi_head import Projections, argument_error, multi_head_attention
from fusewright_kernels import dispatch

# What a subclass does with an op is its own affair: only these two are known to be tensors and nothing else.
_PLAIN = (Tensor, torch.nn.Parameter)

# torch's functions by name, while they are replaced.
torch_functions: dict[str, Callable[..., Any]] = {}


def plain(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary dense tensors, without forward-mode derivatives (which our kernels do not have)."""
    if forward_ad._current_level >= 0:
        return False
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_nested
        ):
            return False
    return True


def _fused(query: Tensor, mask: Tensor | None) -> bool:
    dtypes = (query.dtype,) if mask is None else (query.dtype, mask.dtype)
    return dispatch.serves("attention", query.device.type, dtypes, 4)


def _mask_fits(mask: Tensor, query: Tensor, keys: int) -> bool:
    if mask.dtype not in (torch.bool, torch.float32, query.dtype) or mask.device != query.device:
        return False
    sizes, full = mask.shape, (*query.shape[:-1], keys)
    if len(sizes) > len(full):
        return False
    return all(size in (1, whole) for size, whole in zip(reversed(sizes), reversed(full), strict=False))


def _operands_fit(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether query (..., H, T, D), key (..., HK, S, D) and value (..., HK, S, DV) fit without any broadcasting."""
    if not (query.dtype is key.dtype is value.dtype and query.device == key.device == value.device):
        return False
    # Every access to a shape makes a new one.
    of_query, of_key, of_value = query.shape, key.shape, value.shape
    if not len(of_query) == len(of_key) == len(of_value) >= 2 or 0 in of_query or 0 in of_value:
        return False
    if of_key[:-1] != of_value[:-1] or of_query[-1] != of_key[-1]:
        return False
    if enable_gqa and len(of_query) > 2:
        return of_query[:-3] == of_key[:-3] and of_query[-3] % of_key[-3] == 0
    return of_query[:-2] == of_key[:-2]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As torch.nn.functional.scaled_dot_product_attention."""
    overridden = has_torch_function((query, key, value, attn_mask))
    if overridden and isinstance(attn_mask, CausalBias):
        # It compares the function with what torch.nn.functional holds, which is this one.
        current = torch.nn.functional.scaled_dot_product_attention
        return handle_torch_function(
            current, (query, key, value, attn_mask), query, key, value, attn_mask, dropout_p, is_causal,
            scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    if (
        not overridden
        and plain(query, key, value, attn_mask)
        and _operands_fit(query, key, value, enable_gqa)
        and 0.0 <= dropout_p <= 1.0
        and (attn_mask is None or (not is_causal and _mask_fits(attn_mask, query, key.shape[-2])))
        and _fused(query, attn_mask)
    ):
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
        assert isinstance(output, Tensor)
        return output
    return torch_functions["scaled_dot_product_attention"](
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As torch.nn.functional.multi_head_attention_forward."""
    packed, separate = in_proj_weight, (q_proj_weight, k_proj_weight, v_proj_weight)
    if use_separate_proj_weight:
        packed = None
    else:
        separate = (None, None, None)
    projections = Projections(
        num_heads, num_heads, packed, *separate, in_proj_bias, bias_k, bias_v, out_proj_weight, out_proj_bias
    )
    tensors = (query, key, value, key_padding_mask, attn_mask, *projections[2:])
    # torch hides these keys from causal queries where weights are not wanted, and shows them where they are.
    odd = static_k is not None or static_v is not None or (is_causal and (bias_k is not None or add_zero_attn))
    if (
        not odd
        and not (is_causal and attn_mask is None)
        and not has_torch_function(tensors)
        and plain(*tensors)
        and 0.0 <= dropout_p <= 1.0
        and _parameters_fit(projections, query, embed_dim_to_check)
        and _inputs_fit(query, key, value, projections, key_padding_mask, attn_mask)
        and _fused(query, None)
    ):
        return multi_head_attention(
            query, key, value, projections, batch_first=False, key_padding_mask=key_padding_mask, attn_mask=attn_mask,
            is_causal=is_causal, dropout_p=dropout_p if training else 0.0, need_weights=need_weights,
            average_attn_weights=average_attn_weights, add_zero_attn=add_zero_attn,
        )  # fmt: skip
    return torch_functions["multi_head_attention_forward"](
        query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn,
        dropout_p, out_proj_weight, out_proj_bias, training, key_padding_mask, need_weights, attn_mask,
        use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, static_k, static_v,
        average_attn_weights, is_causal,
    )  # fmt: skip


def _goes_with(tensor: Tensor, query: Tensor) -> bool:
    """Whether ``tensor`` has query's device and dtype, which autocast brings about itself."""
    return tensor.device == query.device and (
        tensor.dtype is query.dtype or torch.is_autocast_enabled(query.device.type)
    )


def _parameters_fit(projections: Projections, query: Tensor, embed_dim: int) -> bool:
    """Whether the parameters are those of a module of width ``embed_dim`` and have one dtype and device with query."""
    given = [tensor for tensor in projections[2:] if tensor is not None]
    separate = (projections.query, projections.key, projections.value)
    if query.shape[-1:] != (embed_dim,) or embed_dim % projections.num_heads != 0:
        return False
    if not all(_goes_with(tensor, query) for tensor in given):
        return False
    if projections.packed is not None:
        fits = projections.packed.shape == (3 * embed_dim, embed_dim)
    else:
        fits = all(weight is not None and weight.ndim == 2 and weight.shape[0] == embed_dim for weight in separate)
    extra = (projections.key_bias, projections.value_bias)
    return (
        fits
        and (extra[0] is None) == (extra[1] is None)
        and all(bias is None or bias.shape == (1, 1, embed_dim) for bias in extra)
        and (projections.bias is None or projections.bias.shape == (3 * embed_dim,))
        and projections.output.ndim == 2
        and projections.output.shape[1] == embed_dim
    )


def _inputs_fit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projections: Projections,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> bool:
    """Whether query, key, value and masks fit each other and the parameters."""
    if projections.packed is not None:
        widths = (query.shape[-1],) * 3
    else:
        assert projections.key is not None and projections.value is not None
        widths = (query.shape[-1], projections.key.shape[1], projections.value.shape[1])
    tensors = (query, key, value)
    if any(tensor.numel() == 0 or not _goes_with(tensor, query) for tensor in tensors):
        return False
    for mask in (key_padding_mask, attn_mask):
        if mask is not None and not _goes_with(mask, query) and mask.dtype is not torch.bool:
            return False
    error = argument_error(query, key, value, projections.num_heads, widths, False, key_padding_mask, attn_mask)
    return error is None


def _scriptable_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    return torch._C._nn.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


# TorchScript compiles what this method returns, in place of a function whose body it does not understand.
scaled_dot_product_attention.__prepare_scriptable__ = (  # type: ignore[attr-defined]
    lambda: _scriptable_attention
)
multi_head_attention_forward.__prepare_scriptable__ = (  # type: ignore[attr-defined]
    lambda: torch_functions["multi_head_attention_forward"]
)
