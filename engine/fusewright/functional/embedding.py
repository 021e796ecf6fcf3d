"""Embedding with positions."""

from torch import Tensor

from fusewright_kernels.embedding import op as _embedding


def embedding(
    tokens: Tensor,
    weight: Tensor,
    table: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    scale: float = 1.0,
    padding_idx: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """``scale * weight[tokens] + table[positions]`` in one pass, rounded once.

    The gradients of both matrices are summed in float32 in a fixed order: torch's own, on a CPU, adds those of a
    bfloat16 matrix in bfloat16, where the gradient of a frequent token stops growing.

    Args:
        tokens: (*), int64 or int32 rows of ``weight``.
        weight: (V, E), float32, bfloat16, float16 or float64.
        table: (P, E) vectors of positions, learned, sinusoidal or axial, in float32 or weight's dtype; None: none.
        positions: rows of ``table``, expandable to tokens' shape; None: 0, 1, 2, ... along the last dimension.
        scale: of the token's vector, often the square root of E.
        padding_idx: a token whose vector gets no gradient, as in torch.

    Returns:
        (*, E) of weight's dtype.

    Raises:
        IndexError: on a CPU, an index is no row. On a GPU, which is not waited for, its vector is NaN.
    """
    return _embedding.embedding(tokens, weight, table, positions, scale, padding_idx, backend)
