"""From a loss per row to what torch's cross-entropy returns."""

import torch
from torch import Tensor


def reduce(
    losses: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, all_count: bool
) -> Tensor:
    """``losses`` (N, d1, ...) as they are, their sum, or their mean over the weights of the classes that count; with
    ``all_count`` no target is ``ignore_index``.
    """
    if reduction == "none":
        return losses
    if reduction == "mean" and all_count and weight is None:
        return losses.mean()
    total = losses.sum()
    if reduction == "sum":
        return total
    if target.is_floating_point():
        return total / losses.numel()
    valid = target != ignore_index
    if weight is None:
        return total / valid.sum()
    # An index that is not counted may be no class at all.
    return total / torch.where(valid, weight[torch.where(valid, target, 0)], 0.0).sum()
