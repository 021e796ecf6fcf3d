"""A linear layer as plain PyTorch: oracle in float64, naive baseline."""

import torch
from torch import Tensor


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``input weight^T + bias``, computed in at least float32 and rounded once."""
    compute = torch.promote_types(input.dtype, torch.float32)
    product = input.to(compute) @ weight.to(compute).mT
    return (product if bias is None else product + bias.to(compute)).to(input.dtype)
