"""Cross-entropy as plain PyTorch: oracle in float64, naive baseline, last fallback.

Classes lie along dimension 1 of ``input``; a target is a class index per row or, of ``input``'s shape, a probability
per class. ``softcap`` 0 stands for none.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """The numbers of a call, in the order of the schemas."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0


def compute_dtype(input: Tensor) -> torch.dtype:
    """Of losses, statistics and class weights."""
    return torch.float64 if input.dtype is torch.float64 else torch.float32


def capped(input: Tensor, softcap: float) -> Tensor:
    """The logits: ``softcap * tanh(input / softcap)``, computed in at least float32."""
    x = input.to(compute_dtype(input))
    return x if softcap == 0.0 else softcap * torch.tanh(x / softcap)


def losses_with_statistics(
    input: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """A loss per row (N, d1, ...), and (3, N, d1, ...): the largest logit, the log of the sum of exponentials relative
    to it, and the sum of what the row wants of its classes. The first two add up to the log-sum-exp; apart they keep
    their digits where logits are large. A row that is ignored has zeros.
    """
    logits = capped(input, options.softcap)
    largest = logits.amax(1).detach()
    pivot = torch.where(largest == float("-inf"), 0.0, largest)
    log_sum = torch.exp(logits - pivot.unsqueeze(1)).sum(1).log()
    log_probabilities = logits - pivot.unsqueeze(1) - log_sum.unsqueeze(1)
    valid, wanted = _distribution(input, target, weight, options)
    if valid is None or options.label_smoothing > 0.0:
        losses = -(wanted * log_probabilities).sum(1)
    else:
        # Elsewhere a logit may be -inf, and 0 * inf is no loss.
        losses = -_at_target(wanted, target, valid) * _at_target(log_probabilities, target, valid)
    if options.z_loss > 0.0:
        losses = losses + options.z_loss * (pivot + log_sum).square()
    statistics = torch.stack([pivot, log_sum, wanted.sum(1)])
    if valid is not None:
        losses, statistics = torch.where(valid, losses, 0.0), torch.where(valid, statistics, 0.0)
    return losses, statistics


def losses(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    return losses_with_statistics(input, target, weight, options)[0]


def backward(
    grad_losses: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Gradients of input and of a target of probabilities (else of no elements).

    With q the wanted distribution, already weighted, and p the softmax: ``g * (p * (sum(q) + 2 z lse) - q)``.
    """
    logits = capped(input, options.softcap)
    log_sum_exp = logits.logsumexp(1, keepdim=True)
    log_probabilities = logits - log_sum_exp
    valid, wanted = _distribution(input, target, weight, options)
    grad = (grad_losses if valid is None else torch.where(valid, grad_losses, 0.0)).to(logits.dtype).unsqueeze(1)
    total = wanted.sum(1, keepdim=True) + 2.0 * options.z_loss * log_sum_exp
    grad_logits = grad * (log_probabilities.exp() * total - wanted)
    if options.softcap != 0.0:
        grad_logits = grad_logits * (1.0 - (logits / options.softcap).square())
    if valid is not None:
        return torch.where(valid.unsqueeze(1), grad_logits, 0.0).to(input.dtype), input.new_empty((0,))
    grad_target = -grad * log_probabilities * (1.0 - options.label_smoothing)
    if weight is not None:
        grad_target = grad_target * _per_class(weight, input)
    return grad_logits.to(input.dtype), grad_target.to(target.dtype)


def _per_class(weight: Tensor, input: Tensor) -> Tensor:
    return weight.to(compute_dtype(input)).reshape(-1, *[1] * (input.ndim - 2))


def _at_target(values: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    return values.gather(1, torch.where(valid, target, 0).unsqueeze(1)).squeeze(1)


def _distribution(
    input: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor | None, Tensor]:
    """Which rows count (None: all), and what each wants of its classes, smoothed and weighted, in input's shape."""
    classes = input.shape[1]
    valid = None
    if target.is_floating_point():
        wanted = target.to(compute_dtype(input))
    else:
        valid = target != options.ignore_index
        wanted = torch.zeros_like(input, dtype=compute_dtype(input))
        wanted = wanted.scatter(1, torch.where(valid, target, 0).unsqueeze(1), 1.0)
    if options.label_smoothing > 0.0:
        wanted = wanted * (1.0 - options.label_smoothing) + options.label_smoothing / classes
    return valid, wanted if weight is None else wanted * _per_class(weight, input)
