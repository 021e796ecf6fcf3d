"""The default overload of each op: the plain formula in the shape of the op's schema."""

from typing import Any

from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.cross_entropy import reference
from fusewright_kernels.cross_entropy.reference import Options


def cross_entropy_forward(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    return reference.losses_with_statistics(input, target, weight, Options(*options))


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
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    grad_input, grad_target = reference.backward(grad_losses, input, target, weight, options)
    return (
        grad_input.contiguous() if need_input else input.new_empty((0,)),
        grad_target.contiguous() if need_target else target.new_empty((0,)),
    )


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
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    grad_input.copy_(reference.backward(grad_losses, input, target, weight, options)[0])


def attach() -> None:
    for op in (cross_entropy_forward, cross_entropy_backward, cross_entropy_backward_out):
        library.attach_reference(op.__name__, op)
