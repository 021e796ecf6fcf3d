"""Rotary position embedding: checks, dispatch, autograd."""

import torch
from torch import Tensor

from fusewright_kernels import autograd, dispatch, library, row_kernels
from fusewright_kernels.checks import (
    ArgumentIndexError,
    floating_tensor,
    has_values,
    same_device,
    type_error,
    value_error,
)
from fusewright_kernels.rotary import backend_reference, backend_triton, reference
from fusewright_kernels.rotary.function import Rotary

backend_reference.attach()
dispatch.register(
    "rotary_embedding",
    {"cuda": row_kernels.refuse_cuda, "triton": backend_triton.refuse, "cpu": row_kernels.refuse_cpu},
)


def rotary_embedding(
    input: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    in_place: bool,
    backend: str | None,
) -> Tensor:
    """See :func:`fusewright.functional.rotary_embedding`."""
    floating_tensor("input", input)
    if input.ndim != 4:
        raise value_error("input.ndim", input.ndim, "4: (B, H, T, D)")
    for name, table in (("cos", cos), ("sin", sin)):
        _check_table(name, table, input)
    if cos.shape != sin.shape:
        raise value_error("sin.shape", tuple(sin.shape), f"{tuple(cos.shape)}, the shape of cos")
    if positions is not None:
        positions = _checked_positions(positions, input, cos)
    elif cos.shape[-2] < input.shape[2]:
        raise value_error("cos.shape", tuple(cos.shape), f"a row for each of the {input.shape[2]} positions of input")
    compute = torch.promote_types(input.dtype, torch.float32)
    cos, sin = (table.to(compute) if table.ndim == 3 else table.to(compute).unsqueeze(0) for table in (cos, sin))
    chosen = dispatch.choose("rotary_embedding", dispatch.device_type(input), (input.dtype,), input.ndim, backend)
    differentiable = autograd.derivative_possible(input)
    if in_place:
        if differentiable:
            raise value_error("in_place", True, "False where a gradient is wanted")
        library.overload("rotary_in_place", chosen)(input, cos, sin, positions, interleaved, False)
        return input
    if chosen == "reference":
        return reference.rotate(input, cos, sin, positions, interleaved)
    if differentiable:
        return autograd.apply(Rotary, input, cos, sin, positions, interleaved, False, chosen)
    return library.overload("rotary_forward", chosen)(input, cos, sin, positions, interleaved, False)


def _check_table(name: str, table: Tensor, input: Tensor) -> None:
    floating_tensor(name, table)
    same_device(name, table, "input", input)
    if table.ndim not in (2, 3):
        raise value_error(f"{name}.ndim", table.ndim, "2 or 3: (P, R) or (B, P, R)")
    if table.ndim == 3 and table.shape[0] not in (1, input.shape[0]):
        raise value_error(f"{name}.shape[0]", table.shape[0], f"1 or {input.shape[0]}, the batch of input")
    if 2 * table.shape[-1] > input.shape[3]:
        raise value_error(f"{name}.shape[-1]", table.shape[-1], f"at most {input.shape[3] // 2}, half of input's D")
    if table.requires_grad:
        raise value_error(f"{name}.requires_grad", True, "False: angles get no gradient")


def _checked_positions(positions: Tensor, input: Tensor, cos: Tensor) -> Tensor:
    """(B, T) int64."""
    if not isinstance(positions, Tensor):
        raise type_error("positions", f"a {type(positions).__name__}", "a torch.Tensor or None")
    if positions.dtype not in (torch.int64, torch.int32):
        raise type_error("positions.dtype", positions.dtype, "int64 or int32")
    same_device("positions", positions, "input", input)
    batch, length = input.shape[0], input.shape[2]
    if tuple(positions.shape) not in ((length,), (1, length), (batch, length)):
        raise value_error("positions.shape", tuple(positions.shape), f"({length},) or ({batch}, {length}): T or (B, T)")
    rows = cos.shape[-2]
    # Where the values cannot be seen, a row out of range turns to NaN.
    if positions.numel() > 0 and has_values(positions):
        smallest, largest = torch.aminmax(positions)
        if smallest < 0 or largest >= rows:
            wrong = smallest if smallest < 0 else largest
            raise ArgumentIndexError(f"positions holds {wrong.item()}, expected a row of cos in [0, {rows - 1}]")
    return positions.long().expand(batch, length)
