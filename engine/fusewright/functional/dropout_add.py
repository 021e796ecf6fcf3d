"""Dropout with a residual addition."""

from torch import Tensor

from fusewright_kernels.dropout_add import op as _dropout_add


def dropout_add(
    input: Tensor,
    residual: Tensor,
    dropout_p: float = 0.0,
    *,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``dropout(input) + residual``, in one pass; the backward draws the mask again from the seed.

    Args:
        input: (*, F), float32, bfloat16, float16 or float64, any strides.
        residual: of input's shape and dtype.
        dropout_p: probability of an element of ``input`` to be zeroed; the others are divided by ``1 - dropout_p``.
        seed: of the mask; without one it is drawn from torch's default generator.

    Returns:
        A contiguous tensor of input's shape and dtype.
    """
    return _dropout_add.dropout_add(input, residual, dropout_p, seed, backend)
