"""The error of a result against its float64 oracle, in units of the result's dtype.

``error = RMS(actual - oracle) / max(RMS(oracle), magnitude) / u``

A unit u is a quarter of the spacing just above 1 for bfloat16 and float16, half of it for float32 and float64. The
magnitude is the root-sum-square of the terms before they cancel: a sum that cancels to almost nothing is not wrong by
its own size, only by the size of what went into it. It is given in terms rounded as the result is; terms that were
computed in a finer type count for less, see :func:`magnitude_in`.
"""

import math

import torch
from torch import Tensor

UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-9,
    torch.float16: 2.0**-12,
}

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def unit(dtype: torch.dtype) -> float:
    """The unit u of ``dtype``."""
    if dtype not in UNIT:
        raise TypeError(f"dtype is {dtype}, expected float64, float32, bfloat16 or float16")
    return UNIT[dtype]


def rms(tensor: Tensor) -> float:
    """Root of the mean square in float64; 0 for an empty tensor."""
    if tensor.numel() == 0:
        return 0.0
    return tensor.detach().double().square().mean().sqrt().item()


def magnitude_in(magnitude: float, computed: torch.dtype, result: torch.dtype) -> float:
    """``magnitude`` of terms held in dtype ``computed``, as the error of a result of dtype ``result`` counts it.

    A bfloat16 result of float32 sums has the rounding of those sums and its own, not bfloat16 rounding of every term.
    """
    return magnitude * unit(computed) / unit(result)


def error_in_u(actual: Tensor, oracle: Tensor, magnitude: float | None = None) -> float:
    """The root-mean-square error of ``actual``.

    Args:
        actual: the result, any shape, floating point; its dtype sets the unit.
        oracle: the same shape, float64.
        magnitude: the uncancelled root-sum-square size of the terms of the result, if that can exceed its RMS.

    Returns:
        The error in u: 0 for an empty tensor, inf where NaN or a signed infinity stands in one and not in the other.
    """
    difference, scale = _difference_and_scale(actual, oracle, magnitude)
    return _ratio(rms(difference), scale) if difference is not None else math.inf


def max_element_error_in_u(actual: Tensor, oracle: Tensor, magnitude: float | None = None) -> float:
    """The largest error of an element, against its own size where that is above the scale of :func:`error_in_u`.

    A softmax holds elements a hundred times its RMS, whose rounding alone is a hundred times that of the others.
    """
    difference, scale = _difference_and_scale(actual, oracle, magnitude)
    if difference is None:
        return math.inf
    if difference.numel() == 0:
        return 0.0
    own = oracle.to(difference.device)[oracle.isfinite().to(difference.device)].abs() * unit(actual.dtype)
    ratios = difference.abs() / own.clamp_min(scale)
    return ratios.nan_to_num(0.0, posinf=math.inf).max().item()


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of ``tensor`` as integers of its width, contiguous: equal NaNs compare equal."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()])


def bits_equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bit patterns."""
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(bits(left), bits(right))


def _difference_and_scale(actual: Tensor, oracle: Tensor, magnitude: float | None) -> tuple[Tensor | None, float]:
    """The differences of the finite elements, None where non-finite ones disagree; and the scale in absolute terms."""
    if oracle.dtype is not torch.float64:
        raise TypeError(f"oracle.dtype is {oracle.dtype}, expected torch.float64")
    if actual.shape != oracle.shape:
        raise ValueError(f"actual.shape is {tuple(actual.shape)}, expected the oracle's {tuple(oracle.shape)}")
    u = unit(actual.dtype)
    actual, oracle = actual.detach().double(), oracle.detach().to(actual.device)
    finite = oracle.isfinite()
    if not _same_values(actual[~finite], oracle[~finite]) or not actual[finite].isfinite().all():
        return None, 0.0
    oracle = oracle[finite]
    return actual[finite] - oracle, max(rms(oracle), magnitude or 0.0) * u


def _same_values(left: Tensor, right: Tensor) -> bool:
    """Whether NaN and each infinity stand at the same places."""
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(left.nan_to_num(0.0), right.nan_to_num(0.0))


def _ratio(error: float, scale: float) -> float:
    if error == 0.0:
        return 0.0
    return error / scale if scale > 0.0 else math.inf
