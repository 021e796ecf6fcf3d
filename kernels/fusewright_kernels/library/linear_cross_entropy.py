"""Schemas of the cross-entropy of ``input @ weight.T + bias``, for input (M, E), weight (V, E) and target (M,)."""

import torch
from torch import Tensor

from fusewright_kernels.library.registry import contiguous_like, define, gradient_or_empty

_INPUTS = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight,"
    " int ignore_index, float label_smoothing, float z_loss, float softcap"
)


def _losses(input: Tensor) -> Tensor:
    return input.new_empty((input.shape[0],), dtype=torch.promote_types(input.dtype, torch.float32))


define("linear_cross_entropy_forward", f"({_INPUTS}) -> Tensor", lambda input, *_: _losses(input))


def _gradients_fake(
    grad_losses: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_input, need_weight, need_bias = arguments[-3:]
    return (
        _losses(input),
        gradient_or_empty(bool(need_input), input, input.dtype),
        gradient_or_empty(bool(need_weight), weight, weight.dtype),
        weight.new_empty((0,)) if bias is None or not need_bias else contiguous_like(bias),
    )


# Of the sum of grad_losses * losses, without grad_losses of the sum of losses; with the losses themselves.
define(
    "linear_cross_entropy_gradients",
    f"(Tensor? grad_losses, {_INPUTS}, bool need_input, bool need_weight, bool need_bias)"
    " -> (Tensor losses, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _gradients_fake,
)
