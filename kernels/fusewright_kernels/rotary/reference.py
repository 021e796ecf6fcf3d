"""Rotary position embedding as plain PyTorch: oracle in float64, naive baseline, last fallback."""

import torch
from torch import Tensor


def rotate(
    input: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool = False
) -> Tensor:
    """The first 2R elements of each row turned by the angles of its position, the others as they are.

    Args:
        input: (B, H, T, D), D >= 2R.
        cos, sin: (B or 1, P, R), of the angle of each pair of elements.
        positions: (B, T) int64, rows of ``cos`` and ``sin``; None: row t turns by row t.
        interleaved: pairs are elements (2i, 2i + 1), else (i, i + R).
        inverse: turn back.

    Returns:
        input's shape and dtype; computed in at least float32.
    """
    compute = torch.promote_types(input.dtype, torch.float32)
    if positions is None:
        cos, sin = cos[:, : input.shape[2]], sin[:, : input.shape[2]]
    else:
        batch = torch.arange(cos.shape[0], device=cos.device)[:, None]
        cos, sin = cos[batch, positions], sin[batch, positions]
    cos, sin = cos[:, None].to(compute), sin[:, None].to(compute)
    if inverse:
        sin = -sin
    pairs = cos.shape[-1]
    turned, rest = input[..., : 2 * pairs].to(compute), input[..., 2 * pairs :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    parts = (first * cos - second * sin, first * sin + second * cos)
    joined = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    return torch.cat([joined.to(input.dtype), rest], dim=-1)
