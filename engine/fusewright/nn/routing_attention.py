"""Self-attention within clusters of queries and keys as a module."""

from typing import Any

import torch
from torch import Tensor, nn

from fusewright import functional
from fusewright.nn.checks import self_attention_inputs
from fusewright.nn.linear import Linear
from fusewright_kernels.checks import probability, value_error


class RoutingSelfAttention(nn.Module):
    """Multi-head self-attention in which each cluster's closest queries meet its closest keys.

    Queries and keys, at unit length, are compared with one set of means per head. Each mean takes the ``cluster_size``
    queries and as many keys that point most along it, and exact attention runs within; a position that several clusters
    took gets the mean of what it met there, one that met nobody zeros. In training the means move towards the members
    of their clusters when a gradient comes back, so that a recomputed forward has the clusters of the first one.

    Args:
        embed_dim, num_heads: E and H.
        num_clusters: means of a head, about the square root of T.
        cluster_size: queries and keys that a cluster takes, about T / ``num_clusters``; at most T are.
        is_causal: only positions up to the own one are met.
        decay: share of the old means that a step keeps, in [0, 1].
        dropout: of the weights, in training.
        bias: whether the projections have one.

    Shape: (B, T, E) to the same. Time and memory grow with T * ``cluster_size``.

    Source: Roy et al., "Efficient content-based sparse attention with routing transformers", 2021.
    """

    means: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_clusters: int,
        cluster_size: int,
        *,
        is_causal: bool = False,
        decay: float = 0.999,
        dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads != 0:
            raise value_error("num_heads", num_heads, f"a divisor of embed_dim, {embed_dim}")
        for name, value in (("num_clusters", num_clusters), ("cluster_size", cluster_size)):
            if value < 1:
                raise value_error(name, value, "an int >= 1")
        probability("decay", decay)
        probability("dropout", dropout)
        self.embed_dim, self.num_heads, self.cluster_size = embed_dim, num_heads, cluster_size
        self.is_causal, self.decay, self.dropout = is_causal, decay, dropout
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.in_proj = Linear(embed_dim, 3 * embed_dim, **options)
        self.out_proj = Linear(embed_dim, embed_dim, **options)
        means = torch.randn(num_heads, num_clusters, embed_dim // num_heads, device=device)
        self.register_buffer("means", nn.functional.normalize(means, dim=-1))

    def forward(self, hidden: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden: (B, T, E).
            key_padding_mask: (B, T), bool, True for padding, which is met by nobody and moves no mean.
        """
        self_attention_inputs(hidden, self.embed_dim, key_padding_mask=key_padding_mask)
        packed = self.in_proj(hidden).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = (packed[:, :, i].transpose(1, 2) for i in range(3))
        with torch.no_grad():
            units = [nn.functional.normalize(tensor.to(self.means.dtype), dim=-1) for tensor in (query, key)]
            chosen = [self._members(unit, key_padding_mask) for unit in units]
        attended = self._within_clusters(query, key, value, key_padding_mask, *chosen)
        if self.training and attended.requires_grad:
            attended.register_hook(lambda _: self._move_means(units, key_padding_mask))
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def _members(self, unit: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Positions (B, H, clusters, W) that each cluster takes, in order; padding last."""
        similarity = unit @ self.means.mT
        if key_padding_mask is not None:
            similarity = similarity.masked_fill(key_padding_mask[:, None, :, None], -torch.inf)
        size = min(self.cluster_size, unit.shape[2])
        return similarity.topk(size, dim=2).indices.sort(dim=2).values.transpose(2, 3)

    def _within_clusters(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, queries: Tensor, keys: Tensor
    ) -> Tensor:
        batch, heads, clusters, _ = queries.shape
        mask = None
        if key_padding_mask is not None:
            mask = ~key_padding_mask[:, None, None, :].expand(batch, heads, clusters, -1).gather(3, keys)[:, :, :, None]
        if self.is_causal:
            earlier = keys[..., None, :] <= queries[..., :, None]
            mask = earlier if mask is None else mask & earlier
        output, lse = functional.scaled_dot_product_attention(
            _rows(query, queries),
            _rows(key, keys),
            _rows(value, keys),
            None if mask is None else mask.transpose(1, 2).flatten(0, 1),
            self.dropout if self.training else 0.0,
            return_lse=True,
        )
        # (B * clusters, H, W, D) back to the positions.
        output = output.unflatten(0, (batch, clusters)).transpose(1, 2).flatten(2, 3)
        met = (~lse.detach().isneginf()).unflatten(0, (batch, clusters)).transpose(1, 2).flatten(2)
        places = queries.flatten(2)
        counts = torch.zeros(query.shape[:3], device=query.device).scatter_add(2, places, met.float())
        index = places[..., None].expand_as(output)
        sums = torch.zeros_like(value).scatter_add(2, index, torch.where(met[..., None], output, 0.0))
        return sums / counts.clamp(min=1.0)[..., None].to(value.dtype)

    @torch.no_grad()
    def _move_means(self, units: list[Tensor], key_padding_mask: Tensor | None) -> None:
        """Towards the direction of the sum of all queries and keys that are closest to each; empty clusters stay."""
        sums, counts = torch.zeros_like(self.means), torch.zeros_like(self.means[..., :1])
        for unit in units:
            nearest = nn.functional.one_hot((unit @ self.means.mT).argmax(-1), self.means.shape[1]).to(unit.dtype)
            if key_padding_mask is not None:
                nearest = nearest.masked_fill(key_padding_mask[:, None, :, None], 0.0)
            sums += (nearest.mT @ unit).sum(0)
            counts += nearest.sum((0, 2))[..., None]
        moved = torch.lerp(nn.functional.normalize(sums, dim=-1), self.means, self.decay)
        self.means.copy_(torch.where(counts > 0.0, moved, self.means))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, clusters={self.means.shape[1]}, cluster_size={self.cluster_size}"


def _rows(tensor: Tensor, positions: Tensor) -> Tensor:
    """Rows (B, H, clusters, W) of (B, H, T, D) as a batch of clusters, (B * clusters, H, W, D)."""
    index = positions.flatten(2)[..., None].expand(*positions.shape[:2], -1, tensor.shape[3])
    return tensor.gather(2, index).unflatten(2, positions.shape[2:]).transpose(1, 2).flatten(0, 1)
