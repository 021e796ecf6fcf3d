"""Softmax along any dimension: checks, dispatch, autograd."""

import torch
from torch import Tensor

from fusewright_kernels import autograd, dispatch, library, row_kernels
from fusewright_kernels.checks import FLOATING, floating_tensor, output_buffer, type_error, value_error
from fusewright_kernels.softmax import backend_reference, backend_triton, reference
from fusewright_kernels.softmax.function import Softmax

backend_reference.attach()
dispatch.register(
    "softmax",
    {"cuda": row_kernels.refuse_cuda, "triton": backend_triton.refuse, "cpu": row_kernels.refuse_cpu},
)


def softmax(
    input: Tensor,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """See :func:`fusewright.functional.softmax`."""
    floating_tensor("input", input)
    dim = _dimension(dim, input.ndim)
    if dtype is not None and dtype not in FLOATING:
        raise type_error("dtype", dtype, "float32, bfloat16, float16 or float64")
    input = autograd.float32_under_autocast(input)
    output_dtype = dtype or input.dtype
    # As torch.softmax: a wider dtype is the type the input is first converted to, a narrower one rounds the input.
    if output_dtype is not input.dtype and torch.finfo(output_dtype).bits < torch.finfo(input.dtype).bits:
        input = input.to(output_dtype)
    if input.ndim == 0:
        if out is not None:
            output_buffer(out, input, output_dtype)
        row = softmax(input.reshape(1), 0, output_dtype, out=None if out is None else out.reshape(1), backend=backend)
        return row.reshape(()) if out is None else out
    chosen = dispatch.choose("softmax", dispatch.device_type(input), (input.dtype, output_dtype), input.ndim, backend)
    if out is not None:
        output_buffer(out, input, output_dtype)
        if chosen == "reference":
            return out.copy_(reference.softmax(input, dim, output_dtype))
        library.overload("softmax_forward_out", chosen)(input, dim, out)
        return out
    if chosen == "reference":
        return reference.softmax(input, dim, output_dtype)
    if autograd.derivative_possible(input):
        return autograd.apply(Softmax, input, dim, output_dtype, chosen)
    return library.overload("softmax_forward", chosen)(input, dim, output_dtype)


def _dimension(dim: int, ndim: int) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise type_error("dim", f"a {type(dim).__name__}", "an int")
    rank = max(ndim, 1)
    if not -rank <= dim < rank:
        raise value_error("dim", dim, f"a dimension in [{-rank}, {rank - 1}]")
    return dim % rank
