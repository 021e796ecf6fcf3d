"""Dropout with a residual addition: checks, dispatch, autograd."""

from torch import Tensor

from fusewright_kernels import autograd, dispatch, library, philox, row_kernels
from fusewright_kernels.checks import floating_tensor, probability, same_device, type_error, value_error
from fusewright_kernels.checks import seed as check_seed
from fusewright_kernels.dropout_add import backend_reference, backend_triton, reference
from fusewright_kernels.dropout_add.function import DropoutAdd, keep_mask_of

backend_reference.attach()
dispatch.register(
    "dropout_add", {"cuda": row_kernels.refuse_cuda, "triton": backend_triton.refuse, "cpu": row_kernels.refuse_cpu}
)


def dropout_add(
    input: Tensor, residual: Tensor, dropout_p: float, seed: int | Tensor | None, backend: str | None
) -> Tensor:
    """See :func:`fusewright.functional.dropout_add`."""
    floating_tensor("input", input)
    floating_tensor("residual", residual)
    same_device("residual", residual, "input", input)
    if input.ndim == 0:
        raise value_error("input.ndim", 0, "at least 1")
    if residual.shape != input.shape:
        raise value_error("residual.shape", tuple(residual.shape), f"input's shape {tuple(input.shape)}")
    if residual.dtype is not input.dtype:
        raise type_error("residual.dtype", residual.dtype, f"{input.dtype}, the dtype of input")
    probability("dropout_p", dropout_p)
    check_seed("seed", seed)
    seed_on_device = philox.seed_tensor(seed, input.device) if dropout_p > 0.0 else None
    chosen = dispatch.choose("dropout_add", dispatch.device_type(input), (input.dtype,), input.ndim, backend)
    arguments = (input, residual, seed_on_device, float(dropout_p))
    if chosen == "reference":
        return reference.dropout_add(input, residual, keep_mask_of(input, seed_on_device, dropout_p), dropout_p)
    if autograd.derivative_possible(input, residual):
        return autograd.apply(DropoutAdd, *arguments, chosen)
    return library.overload("dropout_add", chosen)(*arguments)
