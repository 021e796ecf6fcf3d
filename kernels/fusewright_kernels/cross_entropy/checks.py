"""Checks of the arguments that cross-entropy and linear cross-entropy share."""

import torch
from torch import Tensor

from fusewright_kernels.checks import (
    ArgumentIndexError,
    floating_tensor,
    has_values,
    same_device,
    type_error,
    value_error,
)
from fusewright_kernels.cross_entropy.reference import Options

REDUCTIONS = ("mean", "sum", "none")


def options(ignore_index: int, reduction: str, label_smoothing: float, z_loss: float, softcap: float | None) -> Options:
    """The checked numbers of a call."""
    if reduction not in REDUCTIONS:
        raise value_error("reduction", repr(reduction), f"one of {', '.join(REDUCTIONS)}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise type_error("ignore_index", f"a {type(ignore_index).__name__}", "an int")
    if not 0.0 <= label_smoothing <= 1.0:
        raise value_error("label_smoothing", label_smoothing, "a float in [0, 1]")
    if not 0.0 <= z_loss < float("inf"):
        raise value_error("z_loss", z_loss, "a finite float >= 0")
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise value_error("softcap", softcap, "a finite float > 0 or None")
    return Options(ignore_index, float(label_smoothing), float(z_loss), 0.0 if softcap is None else float(softcap))


def logits_and_target(input: Tensor, target: Tensor) -> None:
    """Logits (C) or (N, C, d1, ...), and a class index for each row or a probability for each logit."""
    floating_tensor("input", input)
    if input.ndim == 0:
        raise value_error("input.ndim", 0, "at least 1: (C) or (N, C, d1, ...)")
    if input.shape[min(input.ndim - 1, 1)] == 0:
        raise value_error("input.shape", tuple(input.shape), "at least one class")
    target_dtype(target, input)
    rows = input.shape[:1] + input.shape[2:] if input.ndim > 1 else input.shape[:0]
    if target.is_floating_point():
        if target.shape != input.shape:
            raise value_error("target.shape", tuple(target.shape), f"input's shape {tuple(input.shape)}")
    elif target.shape != rows:
        raise value_error("target.shape", tuple(target.shape), f"{tuple(rows)}, a class for each row of input")


def target_dtype(target: Tensor, input: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise type_error("target", f"a {type(target).__name__}", "a torch.Tensor")
    if target.dtype not in (torch.int64, torch.uint8) and not target.is_floating_point():
        raise type_error("target.dtype", target.dtype, "int64 or uint8 for classes, a floating dtype for probabilities")
    same_device("target", target, "input", input)


def class_weight(weight: Tensor | None, input: Tensor, classes: int, name: str = "weight") -> None:
    if weight is None:
        return
    floating_tensor(name, weight)
    same_device(name, weight, "input", input)
    if tuple(weight.shape) != (classes,):
        raise value_error(f"{name}.shape", tuple(weight.shape), f"({classes},), one for each class")
    if weight.requires_grad:
        raise value_error(f"{name}.requires_grad", True, "False: class weights get no gradient")


def class_indices(target: Tensor, classes: int, ignore_index: int) -> bool:
    """Every index is a class or ``ignore_index``; where that cannot be seen, a loss out of range is NaN.

    Returns:
        Whether it is known that no index is ``ignore_index``.
    """
    if target.numel() == 0 or not has_values(target):
        return False
    smallest, largest = (bound.item() for bound in torch.aminmax(target))
    if smallest >= 0 and largest < classes:
        return not smallest <= ignore_index <= largest
    outside = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if outside.numel() > 0:
        raise ArgumentIndexError(
            f"target is {outside[0].item()}, expected a class in [0, {classes - 1}] or ignore_index, {ignore_index}"
        )
    return False
