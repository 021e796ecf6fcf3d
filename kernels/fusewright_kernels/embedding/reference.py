"""Embedding with positions as plain PyTorch: oracle in float64, naive baseline, last fallback."""

import torch
from torch import Tensor


def embedding(tokens: Tensor, weight: Tensor, table: Tensor | None, rows: Tensor | None, scale: float) -> Tensor:
    """``scale * weight[tokens] + table[rows]``, computed in at least float32 and rounded once; without ``rows`` those
    of :func:`rows_of`.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    output = torch.nn.functional.embedding(tokens, weight).to(wide) * scale
    if table is not None:
        rows = rows_of(tokens) if rows is None else rows
        output = output + torch.nn.functional.embedding(rows, table).to(wide)
    return output.to(weight.dtype)


def rows_of(tokens: Tensor) -> Tensor:
    """0, 1, 2, ... along the last dimension."""
    return torch.arange(tokens.shape[-1] if tokens.ndim else 1, device=tokens.device).expand(tokens.shape)


def embedding_backward(
    grad_output: Tensor, indices: Tensor, count: int, scale: float, skipped: int, dtype: torch.dtype
) -> Tensor:
    """(``count``, E): the gradient of row r is ``scale`` times the sum over indices that are r; of ``skipped`` zero."""
    wide = torch.promote_types(grad_output.dtype, torch.float32)
    gradients = grad_output.flatten(0, -2).to(wide)
    sums = gradients.new_zeros(count, gradients.shape[1]).index_add(0, indices.flatten(), gradients)
    if skipped >= 0:
        sums = sums.index_fill(0, torch.tensor([skipped], device=sums.device), 0.0)
    return (sums * scale).to(dtype)
