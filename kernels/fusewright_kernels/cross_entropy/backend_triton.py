"""Launchers of the Triton cross-entropy kernels, one per op of ``library``; shapes and dtypes are in its schemas.

Which operands exist is told to a kernel by passing None, which Triton compiles away.
"""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.cross_entropy import tiles
from fusewright_kernels.row_layout import operand_arguments, rows_along
from fusewright_kernels.triton_support import INTERPRETED, LAUNCH_OPTIONS, ceil_div, launching_on
from fusewright_kernels.triton_support import refuse as refuse


def cross_entropy_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    rows = (input.shape[0], *input.shape[2:])
    losses, statistics = (input.new_empty(size, dtype=torch.float32) for size in (rows, (3, *rows)))
    if losses.numel() == 0:
        return losses, statistics
    from fusewright_kernels.cross_entropy import triton_kernels as kernels

    shared = _arguments(
        {"input": input, "probabilities": target}, weight, ignore_index, label_smoothing, z_loss, softcap
    )
    with launching_on(input):
        kernels.cross_entropy_forward_kernel[(ceil_div(losses.numel(), shared["BLOCK_M"]),)](
            **shared,
            p_losses=losses,
            p_statistics=statistics,
            SPREAD=label_smoothing > 0.0 or target.is_floating_point(),
        )
    return losses, statistics


def cross_entropy_backward(
    grad_losses: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need_input: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    grad_input = input.new_empty(input.shape if need_input else (0,))
    grad_target = target.new_empty(target.shape if need_target else (0,))
    _backward(
        grad_losses, input, target, weight, statistics, ignore_index, label_smoothing, z_loss, softcap,
        grad_input if need_input else None, grad_target if need_target else None,
    )  # fmt: skip
    return grad_input, grad_target


def cross_entropy_backward_out(
    grad_losses: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    grad_input: Tensor,
) -> None:
    _backward(
        grad_losses, input, target, weight, statistics, ignore_index, label_smoothing, z_loss, softcap, grad_input, None
    )


def _backward(
    grad_losses: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    grad_input: Tensor | None,
    grad_target: Tensor | None,
) -> None:
    if input.numel() == 0 or (grad_input is None and grad_target is None):
        return
    from fusewright_kernels.cross_entropy import triton_kernels as kernels

    operands = {"input": input, "probabilities": target, "grad_input": grad_input, "grad_target": grad_target}
    shared = _arguments(operands, weight, ignore_index, label_smoothing, z_loss, softcap)
    programs = ceil_div(shared["M"], shared["BLOCK_M"]) * ceil_div(shared["N"], shared["BLOCK_N"])
    with launching_on(input):
        kernels.cross_entropy_backward_kernel[(programs,)](
            **shared, p_grad_losses=grad_losses.contiguous(), p_statistics=statistics.contiguous()
        )


def _arguments(
    operands: dict[str, Tensor | None],
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> dict[str, Any]:
    """What both kernels take. ``operands`` are of input's shape, but for a target of classes."""
    input, target = operands["input"], operands["probabilities"]
    assert input is not None and target is not None
    classes = input.shape[1]
    names = [name for name, operand in operands.items() if operand is not None and operand.shape == input.shape]
    by_class = not target.is_floating_point()
    if by_class:
        names = [name for name in names if name != "probabilities"]
    layout = rows_along([operand for name in names if (operand := operands[name]) is not None], 1)
    laid_out = dict(zip(names, layout.operands, strict=True))
    tile = tiles.tile(classes, last_dim=input.ndim == 2)
    arguments: dict[str, Any] = {}
    for name in operands:
        arguments |= operand_arguments(name, laid_out.get(name))
    return arguments | {
        "p_target": target.contiguous() if by_class else None,
        "p_weight": None if weight is None else weight.contiguous(),
        "M": input.numel() // classes,
        "N": classes,
        "size_1": layout.sizes[0],
        "size_2": layout.sizes[1],
        "ignore_index": ignore_index,
        "keep": 1.0 - label_smoothing,
        "uniform": label_smoothing / classes,
        "z_loss": z_loss,
        "softcap": softcap,
        "CAPPED": softcap != 0.0,
        "ROW_DIMS": layout.row_dims,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        **LAUNCH_OPTIONS,
    }


for _op in (cross_entropy_forward, cross_entropy_backward, cross_entropy_backward_out):
    library.attach_triton(_op.__name__, _op, interpreted=INTERPRETED)
