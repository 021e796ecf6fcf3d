"""Positions as what their distance adds to the logits."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fusewright_kernels.checks import value_error


class RelativePositionBias(nn.Module):
    """A learned number per head for each bucket of distances: near ones a bucket each, far ones on a logarithmic scale.

    Args:
        num_heads: H.
        num_buckets: how many; half of them for keys behind the query if ``bidirectional``.
        max_distance: from here on all distances share one bucket.
        bidirectional: whether keys behind the query have buckets of their own; else they share that of distance 0.

    Shape: positions of queries (*, T) and of keys (*, S) to a bias (*, H, T, S), for the ``attn_mask`` of
    :class:`fusewright.nn.MultiheadAttention`.

    Source: Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer", 2020.
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_side = num_buckets // 2 if bidirectional else num_buckets
        if one_side < 2 or max_distance <= one_side // 2:
            expected = f"at least 2 buckets of a side and max_distance > {max(one_side // 2, 0)}"
            raise value_error("num_buckets and max_distance", (num_buckets, max_distance), expected)
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        distance = key_positions[..., None, :] - query_positions[..., :, None]
        return nn.functional.embedding(self.buckets(distance), self.weight).movedim(-1, -3)

    def buckets(self, distance: Tensor) -> Tensor:
        """Bucket of each distance (key less query), int64."""
        count, first = self.num_buckets, torch.zeros_like(distance)
        if self.bidirectional:
            count //= 2
            first = torch.where(distance > 0, count, 0)
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = count // 2
        scale = (count - exact) / math.log(self.max_distance / exact)
        far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
        return first + torch.where(distance < exact, distance, far.clamp(max=count - 1))

    def extra_repr(self) -> str:
        return f"{self.num_buckets}, max_distance={self.max_distance}, bidirectional={self.bidirectional}"
