"""Schemas of cross-entropy over the classes in dimension 1."""

import torch
from torch import Tensor

from fusewright_kernels.library.registry import contiguous_like, define, gradient_or_empty

_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float softcap"


def _forward_fake(input: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    rows = (input.shape[0], *input.shape[2:])
    dtype = torch.promote_types(input.dtype, torch.float32)
    return input.new_empty(rows, dtype=dtype), input.new_empty((3, *rows), dtype=dtype)


define(
    "cross_entropy_forward",
    f"(Tensor input, Tensor target, Tensor? weight, {_OPTIONS}) -> (Tensor losses, Tensor statistics)",
    _forward_fake,
)


def _backward_fake(
    grad_losses: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor, *arguments: object
) -> tuple[Tensor, Tensor]:
    *_, need_input, need_target = arguments
    return (
        contiguous_like(input) if need_input else input.new_empty((0,)),
        gradient_or_empty(bool(need_target), target, target.dtype),
    )


_BACKWARD_INPUTS = (
    f"Tensor grad_losses, Tensor input, Tensor target, Tensor? weight, Tensor statistics, {_OPTIONS}"  # as forward
)

define(
    "cross_entropy_backward",
    f"({_BACKWARD_INPUTS}, bool need_input, bool need_target) -> (Tensor grad_input, Tensor grad_target)",
    _backward_fake,
)

# grad_input may be input itself.
define("cross_entropy_backward_out", f"({_BACKWARD_INPUTS}, Tensor(a!) grad_input) -> ()", lambda *args: None)
