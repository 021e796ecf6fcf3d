"""Rotary position embedding of queries and keys, as plain PyTorch.

Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.
"""

import torch
from torch import Tensor


def rotate(tensor: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """The first 2R elements of each row turned by the angles of its position; the others stay.

    Args:
        tensor: (B, H, T, D), D >= 2R.
        cos, sin: (positions, R), of the angle of each pair of elements at each position.
        positions: (B, T) int64.
        interleaved: pairs are elements (2i, 2i + 1), else (i, i + R).

    Returns:
        tensor's shape and dtype; computed in float32.
    """
    pairs = cos.shape[-1]
    angles_cos, angles_sin = cos[positions][:, None].float(), sin[positions][:, None].float()
    turned, rest = tensor[..., : 2 * pairs].float(), tensor[..., 2 * pairs :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    parts = (first * angles_cos - second * angles_sin, first * angles_sin + second * angles_cos)
    joined = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    return torch.cat([joined.to(tensor.dtype), rest], dim=-1)
