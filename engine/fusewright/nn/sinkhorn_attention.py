"""Self-attention within blocks and the blocks that a learned sorting puts beside them, as a module."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fusewright import functional
from fusewright.nn.checks import self_attention_inputs
from fusewright.nn.linear import Linear
from fusewright_kernels.checks import probability, value_error


class SinkhornSelfAttention(nn.Module):
    """Multi-head self-attention in which each block meets itself and the block that is sorted to its place.

    A linear map of sums over blocks scores the places of blocks; Sinkhorn's iteration makes the scores a soft
    permutation, of which each row keeps its largest entry. That block's keys and values come in multiplied by the
    entry, through which the map learns. Causal: the map reads the first position of a block and the mean of the keys
    up to it, only earlier blocks can be sorted to a place, by a softmax over them, and the first block meets itself
    alone.

    Args:
        embed_dim, num_heads: E and H.
        num_blocks: blocks that the sequence is cut into; T must be a multiple.
        is_causal: only positions up to the own one are met.
        iterations: of the normalisation of rows and columns.
        temperature: the scores are divided by it; a low one brings the soft permutation near a hard one.
        dropout: of the weights, in training.
        bias: whether the projections have one.

    Shape: (B, T, E) to the same. Time and memory grow with T * T / ``num_blocks``. In training the scores get Gumbel
    noise, from torch's default generator.

    Source: Tay et al., "Sparse Sinkhorn attention", 2020.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_blocks: int,
        *,
        is_causal: bool = False,
        iterations: int = 7,
        temperature: float = 0.75,
        dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads != 0:
            raise value_error("num_heads", num_heads, f"a divisor of embed_dim, {embed_dim}")
        for name, value in (("num_blocks", num_blocks), ("iterations", iterations)):
            if value < 1:
                raise value_error(name, value, "an int >= 1")
        if not temperature > 0.0:
            raise value_error("temperature", temperature, "a number > 0")
        probability("dropout", dropout)
        self.embed_dim, self.num_heads, self.num_blocks = embed_dim, num_heads, num_blocks
        self.is_causal, self.iterations, self.temperature, self.dropout = is_causal, iterations, temperature, dropout
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.in_proj = Linear(embed_dim, 3 * embed_dim, **options)
        self.out_proj = Linear(embed_dim, embed_dim, **options)
        width = 2 * embed_dim // num_heads
        sort_weight = torch.empty(num_heads, width, num_blocks, device=device, dtype=dtype)
        self.sort_weight = nn.Parameter(sort_weight.normal_(std=1.0 / math.sqrt(width)))

    def forward(self, hidden: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden: (B, T, E).
            key_padding_mask: (B, T), bool, True for padding, which is met by nobody.
        """
        self_attention_inputs(hidden, self.embed_dim, key_padding_mask=key_padding_mask)
        if hidden.shape[1] % self.num_blocks != 0:
            raise value_error("hidden.shape[1]", hidden.shape[1], f"a multiple of {self.num_blocks} blocks")
        packed = self.in_proj(hidden).unflatten(-1, (3, self.num_heads, -1)).unflatten(1, (self.num_blocks, -1))
        # (B, H, blocks, block length, D).
        query, key, value = (packed[:, :, :, i].permute(0, 3, 1, 2, 4) for i in range(3))
        present = None
        if key_padding_mask is not None:
            present = (~key_padding_mask).unflatten(1, (self.num_blocks, -1))[:, None]
        weight, source = self._sorted(query, key, present).max(dim=-1)
        attended = self._attend(query, key, value, present, weight, source)
        return self.out_proj(attended.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2))

    def _sorted(self, query: Tensor, key: Tensor, present: Tensor | None) -> Tensor:
        """Shares (B, H, blocks, blocks) of the second block in the place beside the first; float32."""
        if present is not None:
            query, key = (torch.where(present[..., None], tensor, 0.0) for tensor in (query, key))
        if self.is_causal:
            counts = torch.arange(1, key.shape[2] * key.shape[3] + 1, device=key.device, dtype=key.dtype)
            means = (key.flatten(2, 3).cumsum(2) / counts[:, None]).unflatten(2, key.shape[2:4])
            features = torch.cat([means[:, :, :, 0], key[:, :, :, 0]], dim=-1)
        else:
            features = torch.cat([query.sum(3), key.sum(3)], dim=-1)
        scores = torch.matmul(features, self.sort_weight).float()
        if self.training:
            uniform = torch.rand_like(scores).clamp_(min=torch.finfo(torch.float32).tiny)
            scores = scores - (-uniform.log()).clamp(min=torch.finfo(torch.float32).tiny).log()
        scores = scores / self.temperature
        if self.is_causal:
            blocks = torch.arange(self.num_blocks, device=scores.device)
            earlier = blocks < blocks[:, None]
            # The first block has no earlier one: its row is zero.
            return torch.softmax(scores.masked_fill(~earlier, torch.finfo(torch.float32).min), -1) * earlier
        for _ in range(self.iterations):
            scores = torch.log_softmax(torch.log_softmax(scores, dim=-1), dim=-2)
        return scores.exp()

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, present: Tensor | None, weight: Tensor, source: Tensor
    ) -> Tensor:
        batch, heads, blocks, length, width = query.shape

        def beside(tensor: Tensor) -> Tensor:
            index = source[..., None, None].expand(-1, -1, -1, length, width)
            moved = tensor.gather(2, index) * weight[..., None, None].to(tensor.dtype)
            return _as_batch(torch.cat([moved, tensor], dim=3))

        mask = None
        if present is not None or self.is_causal:
            shown = torch.ones((batch, 1, blocks, length), dtype=torch.bool, device=query.device)
            shown = (shown if present is None else present).expand(-1, heads, -1, -1)
            moved = shown.gather(2, source[..., None].expand(-1, -1, -1, length)) & (weight > 0.0)[..., None]
            mask = _as_batch(torch.cat([moved, shown], dim=3)[..., None, :])
        output = functional.scaled_dot_product_attention(
            _as_batch(query),
            beside(key),
            beside(value),
            mask,
            self.dropout if self.training else 0.0,
            # The block sorted to the place lies before the own one, which is met up to the own position.
            window=(-1, 0) if self.is_causal else None,
            causal_alignment="bottom_right",
        )
        assert isinstance(output, Tensor)
        return output.unflatten(0, (batch, blocks)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, num_blocks={self.num_blocks}, is_causal={self.is_causal}"


def _as_batch(tensor: Tensor) -> Tensor:
    """(B, H, blocks, ...) as (B * blocks, H, ...)."""
    return tensor.transpose(1, 2).flatten(0, 1)
