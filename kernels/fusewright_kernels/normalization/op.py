"""Layer and RMS normalisation, plain and fused with a residual addition: checks, dispatch, autograd.

Both kinds are one op: layer normalisation centres and may add a bias, RMS normalisation does neither.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusewright_kernels import autograd, dispatch, library, philox, row_kernels
from fusewright_kernels.checks import output_buffer, probability
from fusewright_kernels.checks import seed as check_seed
from fusewright_kernels.normalization import backend_reference, backend_triton, checks, reference
from fusewright_kernels.normalization.add_norm_function import AddNorm, keep_mask_of
from fusewright_kernels.normalization.norm_function import Norm

backend_reference.attach()
dispatch.register(
    "norm",
    {"cuda": row_kernels.refuse_cuda, "triton": backend_triton.refuse, "cpu": row_kernels.refuse_cpu},
)


def norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    center: bool,
    zero_centered_weight: bool,
    out: Tensor | None,
    backend: str | None,
) -> Tensor:
    """Layer normalisation if ``center``, else RMS normalisation; see :mod:`fusewright.functional`."""
    shape = checks.operands(input, normalized_shape, weight, bias)
    eps = default_rms_epsilon(input) if eps is None and not center else checks.epsilon(eps)
    input = autograd.float32_under_autocast(input)
    chosen = dispatch.choose("norm", dispatch.device_type(input), _dtypes(input, weight, bias), input.ndim, backend)
    arguments = (weight, bias, len(shape), eps, center, 1.0 if zero_centered_weight else 0.0)
    if out is not None:
        output_buffer(out, input, input.dtype)
        if chosen == "reference":
            return out.copy_(reference.norm(input, *arguments))
        library.overload("norm_forward_out", chosen)(input, *arguments, out)
        return out
    if chosen == "reference":
        return reference.norm(input, *arguments)
    if autograd.derivative_possible(input, weight, bias):
        return autograd.apply(Norm, input, *arguments, chosen)[0]
    return library.overload("norm_forward", chosen)(input, *arguments, False)[0]


def add_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    center: bool,
    dropout_p: float,
    seed: int | Tensor | None,
    residual_dtype: torch.dtype | None,
    zero_centered_weight: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Residual addition and normalisation; see :mod:`fusewright.functional`."""
    shape = checks.operands(input, normalized_shape, weight, bias)
    stream_dtype = checks.residual(residual, input, residual_dtype)
    eps = default_rms_epsilon(input) if eps is None and not center else checks.epsilon(eps)
    probability("dropout_p", dropout_p)
    check_seed("seed", seed)
    seed_on_device = philox.seed_tensor(seed, input.device) if dropout_p > 0.0 else None
    input = autograd.float32_under_autocast(input)
    dtypes = (*_dtypes(input, weight, bias), residual.dtype, stream_dtype)
    chosen = dispatch.choose("norm", dispatch.device_type(input), dtypes, input.ndim, backend)
    arguments = (len(shape), eps, center, 1.0 if zero_centered_weight else 0.0, float(dropout_p), stream_dtype)
    if chosen == "reference":
        keep = keep_mask_of(input, seed_on_device, len(shape), dropout_p)
        return reference.add_norm_with_statistics(input, residual, weight, bias, keep, *arguments)[:2]
    if autograd.derivative_possible(input, residual, weight, bias):
        return autograd.apply(AddNorm, input, residual, seed_on_device, weight, bias, *arguments, chosen)[:2]
    forward = library.overload("add_norm_forward", chosen)
    return forward(input, residual, weight, bias, seed_on_device, *arguments, False)[:2]


def default_rms_epsilon(input: Tensor) -> float:
    """torch's default for RMS normalisation: the machine epsilon of the type the statistics are computed in."""
    return torch.finfo(torch.float64 if input.dtype is torch.float64 else torch.float32).eps


def _dtypes(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[torch.dtype, ...]:
    """Every dtype a kernel may refuse; an absent parameter counts as float32, which none refuses."""
    return (
        input.dtype,
        torch.float32 if weight is None else weight.dtype,
        torch.float32 if bias is None else bias.dtype,
    )
