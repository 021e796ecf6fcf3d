"""Positions as vectors that are added to what stands there."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusewright_kernels.checks import value_error


class SinusoidalPositionalEncoding(nn.Module):
    """Fixed encodings: ``sin(position * base^(-2i / E))`` at 2i and the cosine at 2i + 1.

    Shape: (B, T, E) to the same, the encodings added in float32 and rounded once; any T.

    Source: Vaswani et al., "Attention is all you need", 2017.
    """

    def __init__(self, embed_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        if embed_dim < 1:
            raise value_error("embed_dim", embed_dim, "an int >= 1")
        if not base > 0.0:
            raise value_error("base", base, "a number > 0")
        self.embed_dim, self.base = embed_dim, base

    def encodings(self, positions: Tensor) -> Tensor:
        """(*positions.shape, E) float32."""
        # In float32 the angle of position 100,000 would be wrong by 0.006.
        pairs = torch.arange(0, self.embed_dim, 2, dtype=torch.float64, device=positions.device)
        angles = positions[..., None].double() * self.base ** (-pairs / self.embed_dim)
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., : self.embed_dim].float()

    def forward(self, hidden: Tensor, offset: int = 0) -> Tensor:
        """``offset`` is the position of the first row."""
        positions = torch.arange(offset, offset + hidden.shape[-2], device=hidden.device)
        return (hidden.to(torch.promote_types(hidden.dtype, torch.float32)) + self.encodings(positions)).to(
            hidden.dtype
        )

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, base={self.base}"


class LearnedPositionalEmbedding(nn.Embedding):
    """A learned vector for each of ``max_positions`` positions.

    Shape: (B, T, E) to the same, T + offset <= ``max_positions``.
    """

    def __init__(
        self, max_positions: int, embed_dim: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(max_positions, embed_dim, device=device, dtype=dtype)

    def forward(self, hidden: Tensor, offset: int = 0) -> Tensor:
        """``offset`` is the position of the first row."""
        end = offset + hidden.shape[-2]
        if end > self.num_embeddings:
            raise value_error("the last position", end - 1, f"less than max_positions, {self.num_embeddings}")
        return hidden + self.weight[offset:end].to(hidden.dtype)


class AxialPositionalEmbedding(nn.Module):
    """Positions as points of a grid: a learned vector for each coordinate of each axis, side by side.

    A grid of 256 by 256 holds 65536 positions with 512 vectors. Position ``i * n2 + j`` of a grid (n1, n2) has
    coordinates (i, j).

    Args:
        shape: sizes of the axes; their product is the largest length.
        dims: elements of the embedding that each axis gives; they add up to E.

    Shape: (B, T, E) to the same, T + offset <= the product of ``shape``.

    Source: Kitaev, Kaiser, Levskaya, "Reformer: the efficient transformer", 2020.
    """

    def __init__(
        self, shape: Sequence[int], dims: Sequence[int], device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if len(shape) == 0 or len(shape) != len(dims):
            raise value_error("dims", tuple(dims), f"one size for each axis of {tuple(shape)}")
        if min(*shape, *dims) < 1:
            raise value_error("shape and dims", (tuple(shape), tuple(dims)), "sizes >= 1")
        self.shape, self.dims = tuple(shape), tuple(dims)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(size, dim, device=device, dtype=dtype))
            for size, dim in zip(shape, dims, strict=True)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.weights:
            nn.init.normal_(weight)

    def embeddings(self, positions: Tensor) -> Tensor:
        """(*positions.shape, E)."""
        parts, rest = [], positions
        for size, weight in zip(reversed(self.shape), reversed(list(self.weights)), strict=True):
            parts.append(nn.functional.embedding(rest % size, weight))
            rest = rest // size
        return torch.cat(parts[::-1], dim=-1)

    def forward(self, hidden: Tensor, offset: int = 0) -> Tensor:
        """``offset`` is the position of the first row."""
        end = offset + hidden.shape[-2]
        if end > math.prod(self.shape):
            raise value_error("the last position", end - 1, f"less than {math.prod(self.shape)}, the grid {self.shape}")
        positions = torch.arange(offset, end, device=hidden.device)
        return hidden + self.embeddings(positions).to(hidden.dtype)

    def extra_repr(self) -> str:
        return f"{self.shape}, {self.dims}"
