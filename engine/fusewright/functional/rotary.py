"""Rotary position embedding."""

from torch import Tensor

from fusewright_kernels.rotary import op as _rotary


def rotary_embedding(
    input: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    in_place: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Pair i of the first 2R elements of each head turned by the angle of its position: ``(a, b)`` to
    ``(a cos - b sin, a sin + b cos)``; the elements behind stay as they are.

    Args:
        input: queries or keys (B, H, T, D), float32, bfloat16, float16 or float64; a view of a fused projection's
            output will do.
        cos, sin: cosine and sine of every pair's angle, (P, R) with a row for each position, or (B, P, R) with tables
            for each sequence; used as float32 (float64 for float64). 2R <= D. They get no gradient. transformers'
            tables hold every angle twice: their first half, ``cos[..., :R]``, is meant.
        positions: rows of ``cos`` and ``sin`` for each position of ``input``, (T,) or (B, T) int64 or int32; None: row
            t for position t.
        interleaved: pairs are elements (2i, 2i + 1), as in the paper and GPT-J, else (i, i + R), as in GPT-NeoX and
            Llama.
        in_place: write to ``input`` and return it; not differentiable.

    Returns:
        A tensor of input's shape and dtype; from a kernel in memory as (B, T, H, D) if ``input`` is, else contiguous.

    Raises:
        IndexError: on a CPU, a position is no row of the tables. On a GPU, which is not waited for, its rows are NaN.

    Source: Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.
    """
    return _rotary.rotary_embedding(input, cos, sin, positions, interleaved, in_place, backend)
