"""Positions as rotations of queries and keys."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusewright import functional
from fusewright_kernels.checks import value_error


class RotaryEmbedding(nn.Module):
    """Rotary position embedding: pair i of a head's elements turns by ``position * base^(-2i / dim)``.

    The product of a turned query and a turned key depends on the distance of their positions alone.

    Args:
        dim: how many elements of each head turn, even; those behind stay as they are.
        base: ratio of the longest to the shortest period.
        interleaved: pairs are elements (2i, 2i + 1), as in the paper, else (i, i + dim / 2), as in GPT-NeoX and Llama.
        max_positions: how many positions the tables hold at first; they grow with the calls.

    Shape: (B, H, T, D) to the same, D >= dim, any floating dtype; computed in float32 at least.

    Source: Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        max_positions: int = 2048,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2 != 0:
            raise value_error("dim", dim, "an even int >= 2")
        if not base > 0.0:
            raise value_error("base", base, "a number > 0")
        if max_positions < 1:
            raise value_error("max_positions", max_positions, "an int >= 1")
        self.dim, self.base, self.interleaved = dim, base, interleaved
        cos, sin = self._angles(torch.arange(max_positions, device=device))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (*positions.shape, dim / 2) in float32 of every pair's angle."""
        # In float32 the angle of position 100,000 would be wrong by 0.006.
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float64, device=positions.device) / self.dim
        angles = positions[..., None].double() * self.base**-exponents
        return angles.cos().float(), angles.sin().float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        """Moves the tables with the module, float32 whatever its dtype: angles in bfloat16 would be worthless.

        They are filled again, as nothing else does it for a module that was made on the meta device.
        """
        before = (self.cos.dtype, self.cos.device)
        super()._apply(fn, recurse)
        if (self.cos.dtype, self.cos.device) != before:
            self._fill(self.cos.shape[0], self.cos.device)
        return self

    def _fill(self, positions: int, device: torch.device) -> None:
        self.cos, self.sin = self._angles(torch.arange(positions, device=device))

    def forward(self, heads: Tensor, offset: int | Tensor = 0) -> Tensor:
        """Turn row t of ``heads`` (B, H, T, D) by position ``offset + t``.

        Args:
            heads: queries or keys.
            offset: position of the first row, an int or one per sequence, (B,) integers.
        """
        if heads.ndim != 4 or heads.shape[-1] < self.dim:
            raise value_error("heads.shape", tuple(heads.shape), f"(B, H, T, D) with D >= {self.dim}")
        cos, sin = self._of_rows(heads.shape[2], offset, heads.device)
        return functional.rotary_embedding(heads, cos, sin, interleaved=self.interleaved)

    def _of_rows(self, length: int, offset: int | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine (T, dim / 2), or (B, T, dim / 2) with an offset for each sequence."""
        if isinstance(offset, Tensor):
            # Whether the tables reach that far only the device knows; asking it would stall a decoding loop.
            return self._angles(offset[:, None] + torch.arange(length, device=device))
        if offset < 0:
            raise value_error("offset", offset, "an int >= 0")
        end = offset + length
        if end > self.cos.shape[0]:
            self._fill(max(end, 2 * self.cos.shape[0]), self.cos.device)
        return self.cos[offset:end], self.sin[offset:end]

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"
