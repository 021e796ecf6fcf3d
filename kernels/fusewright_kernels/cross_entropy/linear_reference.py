"""Linear cross-entropy as plain PyTorch: the logits as one matrix, then their cross-entropy."""

import torch
from torch import Tensor

from fusewright_kernels.cross_entropy import reference
from fusewright_kernels.cross_entropy.reference import Options


def logits(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(M, V) in input's dtype."""
    return torch.nn.functional.linear(input, weight, bias)


def losses(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, options: Options
) -> Tensor:
    """A loss per row (M,) in at least float32."""
    return reference.losses(logits(input, weight, bias), target, class_weight, options)


def backward(
    grad_losses: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum of ``grad_losses * losses``; that of an absent bias has no elements."""
    scores = logits(input, weight, bias)
    grad_logits, _ = reference.backward(grad_losses, scores, target, class_weight, options)
    grad_bias = weight.new_empty((0,)) if bias is None else grad_logits.sum(0).to(bias.dtype)
    return grad_logits @ weight, grad_logits.mT @ input, grad_bias
