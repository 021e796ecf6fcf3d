"""Dropout with a residual addition as plain PyTorch: oracle in float64, naive baseline, last fallback."""

import torch
from torch import Tensor


def dropout_add(input: Tensor, residual: Tensor | None, keep: Tensor | None, dropout_p: float) -> Tensor:
    """``where(keep, input / (1 - dropout_p), 0) + residual``, computed in at least float32 and rounded once."""
    compute = torch.promote_types(input.dtype, torch.float32)
    output = input.to(compute)
    if keep is not None:
        # A dropped NaN is gone.
        output = torch.where(keep, output, 0.0)
        output = output / (1.0 - dropout_p) if dropout_p < 1.0 else output
    if residual is not None:
        output = output + residual.to(compute)
    return output.to(input.dtype)
