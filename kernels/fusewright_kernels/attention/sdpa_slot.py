"""Attention in the shape of PyTorch's flash slots: for who puts our kernels where PyTorch calls its own.

A slot saves one log-sum-exp per row, our backward takes a reference r and the sum of exp(logit - r): the log-sum-exp
is such an r, with the sum 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import dispatch, library
from fusewright_kernels.attention import backend_native, backend_reference, checks


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Any, ...]:
    """The inputs of the op ``attention_forward``."""
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
    right = 0 if is_causal else -1
    numbers = (0, checks.scale(scale, query.shape[3]), 0.0, 0.0, -1, right, False)
    return (query, key, value, mask, *(None,) * 6, *numbers)


def _backend(backend_of: Callable[[str, bool, tuple[Any, ...]], str], arguments: tuple[Any, ...]) -> str:
    query, mask = arguments[0], arguments[3]
    dtypes = (query.dtype,) if mask is None else (query.dtype, mask.dtype)
    chosen = dispatch.choose("attention", dispatch.device_type(query), dtypes, query.ndim)
    return backend_of(chosen, dispatch.FORCED_BACKEND is not None, arguments)


def slot_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, DV) and log-sum-exp (B, H, T), float32, of query (B, H, T, D) over key and value (B, HK, S, .).

    ``mask`` has 2 to 4 dimensions and broadcasts to (B, H, T, S). Without autograd.
    """
    arguments = _arguments(query, key, value, mask, is_causal, scale)
    backend = _backend(backend_native.forward_backend_of, arguments)
    output, statistics = library.overload("attention_forward", backend)(*arguments)
    return output, backend_reference.log_sum_exp(statistics)


def slot_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from the results of :func:`slot_forward`."""
    statistics = torch.stack((lse, (lse != -torch.inf).to(lse.dtype)))
    inputs = _arguments(query, key, value, mask, is_causal, scale)
    overload = backend_native.backward_overload(_backend(backend_native.backward_backend_of, inputs))
    gradients = overload(grad_output, None, output, statistics, *inputs, True, True, True, False, False)
    return gradients[0], gradients[1], gradients[2]
