"""What a normalisation call must look like; everything is checked before any kernel runs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusewright_kernels.checks import LOW_PRECISION, floating_tensor, same_device, type_error, value_error


def operands(
    input: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> tuple[int, ...]:
    """``normalized_shape`` as a tuple, once input, weight and bias fit it and each other."""
    floating_tensor("input", input)
    if isinstance(normalized_shape, (tuple, list)):  # torch.Size is a tuple
        shape = tuple(normalized_shape)
    elif isinstance(normalized_shape, int):
        shape = (normalized_shape,)
    else:
        raise type_error(
            "normalized_shape", f"a {type(normalized_shape).__name__}", "an int, a tuple or a list of ints"
        )
    if not shape:
        raise value_error("normalized_shape", shape, "at least one dimension")
    if input.shape[-len(shape) :] != shape:
        raise value_error("normalized_shape", shape, f"the trailing sizes of input's shape {tuple(input.shape)}")
    if weight is not None:
        _parameter("weight", weight, shape, input)
    if bias is not None:
        _parameter("bias", bias, shape, input)
    return shape


def _parameter(name: str, tensor: Tensor, shape: tuple[int, ...], input: Tensor) -> None:
    floating_tensor(name, tensor)
    if tensor.shape != shape:
        raise value_error(f"{name}.shape", tuple(tensor.shape), f"normalized_shape {shape}")
    same_device(name, tensor, "input", input)
    if (tensor.dtype is torch.float64) != (input.dtype is torch.float64):
        raise type_error(f"{name}.dtype", tensor.dtype, f"a dtype that mixes with input's {input.dtype}")


def epsilon(eps: object) -> float:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise type_error("eps", f"a {type(eps).__name__}", "a float >= 0")
    if not 0.0 <= eps < math.inf:
        raise value_error("eps", eps, "a finite float >= 0")
    return float(eps)


def residual(tensor: Tensor, input: Tensor, residual_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the new residual, ``residual_dtype`` or the residual's, once both fit ``input``."""
    floating_tensor("residual", tensor)
    if tensor.shape != input.shape:
        raise value_error("residual.shape", tuple(tensor.shape), f"input's shape {tuple(input.shape)}")
    same_device("residual", tensor, "input", input)
    stream_dtype = tensor.dtype if residual_dtype is None else residual_dtype
    for name, dtype in (("residual.dtype", tensor.dtype), ("residual_dtype", stream_dtype)):
        if dtype not in (input.dtype, torch.float32) or (input.dtype is torch.float64) != (dtype is torch.float64):
            raise type_error(name, dtype, f"input's {input.dtype}" + _or_float32(input.dtype))
    return stream_dtype


def _or_float32(dtype: torch.dtype) -> str:
    return " or float32" if dtype in LOW_PRECISION else ""
