"""Softmax as plain PyTorch: oracle in float64, naive baseline, last fallback."""

import torch
from torch import Tensor


def softmax(input: Tensor, dim: int, output_dtype: torch.dtype) -> Tensor:
    """exp(x - max) / sum(exp(x - max)) along ``dim``, computed in at least float32 and rounded once."""
    compute = torch.float64 if torch.float64 in (input.dtype, output_dtype) else torch.float32
    x = input.to(compute)
    if x.numel() == 0:
        return x.to(output_dtype)
    exponentials = torch.exp(x - x.amax(dim, keepdim=True).detach())
    return (exponentials / exponentials.sum(dim, keepdim=True)).to(output_dtype)


def softmax_backward(grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    """y * (dy - sum(y * dy)) along ``dim``."""
    compute = torch.float64 if torch.float64 in (output.dtype, input_dtype) else torch.float32
    y, grad = output.to(compute), grad_output.to(compute)
    return (y * (grad - (y * grad).sum(dim, keepdim=True))).to(input_dtype)
