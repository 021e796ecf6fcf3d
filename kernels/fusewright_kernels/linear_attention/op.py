"""Linear attention: checks, dispatch, autograd."""

import math

import torch
from torch import Tensor

from fusewright_kernels import autograd, cpu_kernels, dispatch, library
from fusewright_kernels.checks import floating_tensor, same_device, type_error, value_error
from fusewright_kernels.linear_attention import backend_reference, backend_triton, reference
from fusewright_kernels.linear_attention.function import LinearAttention

FEATURE_MAPS = {"elu": reference.ELU, "identity": reference.IDENTITY}

backend_reference.attach()
dispatch.register("linear_attention", {"triton": backend_triton.refuse, "cpu": cpu_kernels.refuse})


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    feature_map: str,
    eps: float,
    state: Tensor | None,
    return_state: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fusewright.functional.linear_attention`."""
    _check_operands(query, key, value, is_causal)
    eps = float(eps)
    if not 0.0 <= eps < math.inf:
        raise value_error("eps", eps, "a finite number >= 0")
    if feature_map not in FEATURE_MAPS:
        raise value_error("feature_map", repr(feature_map), f"one of {', '.join(FEATURE_MAPS)}")
    _check_padding(key_padding_mask, key)
    query, key, value = (autograd.low_precision_under_autocast(tensor) for tensor in (query, key, value))
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    initial_state = _checked_state(state, query, value)
    chosen = dispatch.choose("linear_attention", query.device.type, (query.dtype,), query.ndim, backend)
    arguments = (
        query, key, value, key_padding_mask, initial_state, bool(is_causal), eps, FEATURE_MAPS[feature_map],
    )  # fmt: skip
    if autograd.derivative_possible(query, key, value, initial_state):
        output, _, final_state = autograd.apply(LinearAttention, *arguments, chosen)
    else:
        output, _, final_state = library.overload("linear_attention_forward", chosen)(*arguments)
    return (output, final_state) if return_state else output


def _check_operands(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        floating_tensor(name, tensor)
        if tensor.ndim != 4:
            raise value_error(f"{name}.ndim", tensor.ndim, "4: (B, H, T, D)")
        if tensor.dtype is not query.dtype:
            raise type_error(f"{name}.dtype", tensor.dtype, f"{query.dtype}, the dtype of query")
        same_device(name, tensor, "query", query)
        if tensor.shape[:2] != query.shape[:2]:
            raise value_error(
                f"{name}.shape", tuple(tensor.shape), f"the leading sizes {tuple(query.shape[:2])} of query"
            )
    if key.shape[3] != query.shape[3]:
        raise value_error("key.shape[3]", key.shape[3], f"{query.shape[3]}, the head dimension of query")
    if value.shape[2] != key.shape[2]:
        raise value_error("value.shape[2]", value.shape[2], f"{key.shape[2]}, the number of keys")
    if is_causal and key.shape[2] != query.shape[2]:
        raise value_error(
            "key.shape[2]", key.shape[2], f"{query.shape[2]}, the number of queries, where is_causal is True"
        )


def _check_padding(mask: Tensor | None, key: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise type_error("key_padding_mask", found, "a bool tensor, True where a key is padding")
    same_device("key_padding_mask", mask, "key", key)
    expected = (key.shape[0], key.shape[2])
    if tuple(mask.shape) != expected:
        raise value_error("key_padding_mask.shape", tuple(mask.shape), f"{expected}, (B, S)")


def _checked_state(state: Tensor | None, query: Tensor, value: Tensor) -> Tensor | None:
    if state is None:
        return None
    floating_tensor("state", state)
    same_device("state", state, "query", query)
    expected = (*query.shape[:2], query.shape[3], value.shape[3] + 1)
    if tuple(state.shape) != expected:
        raise value_error("state.shape", tuple(state.shape), f"{expected}, (B, H, D, DV + 1)")
    return state.to(torch.promote_types(query.dtype, torch.float32))
