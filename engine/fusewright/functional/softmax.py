"""Softmax over one dimension."""

import torch
from torch import Tensor

from fusewright_kernels.softmax import op as _softmax


def softmax(
    input: Tensor,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``exp(x - max) / sum(exp(x - max))`` along ``dim``.

    Args:
        input: any shape, float32, bfloat16, float16 or float64.
        dim: the dimension that sums to one.
        dtype: dtype of the result; input's if None.
        out: contiguous tensor of input's shape and the result's dtype to write to; not differentiable.

    Returns:
        A contiguous tensor of input's shape (``out`` if given). A row of only -inf is NaN, as in torch.

    Source: torch.nn.functional.softmax.
    """
    return _softmax.softmax(input, dim, dtype, out=out, backend=backend)
