"""A decoder-only Transformer."""

from typing import Any

import torch
from torch import Tensor, nn

from fusewright import functional
from fusewright.models.initialization import init_normal, scale_residual_projections
from fusewright.models.state import CachedState, positions_of
from fusewright.nn import LayerNorm, RotaryEmbedding, TransformerEncoder, TransformerEncoderLayer
from fusewright_kernels.checks import value_error


class GPT(nn.Module):
    """GPT-2's decoder: learned positions, pre-norm layers with GELU, the embedding once more as output projection.

    Args:
        vocabulary: number of tokens, V.
        max_positions: the longest sequence; None, for no limit, with ``rotary`` only.
        width, layers, heads: E, the number of layers, H.
        dim_feedforward: 4 E if None.
        dropout: of embeddings, attention weights and branches.
        num_kv_heads, window: of the attention, see :class:`fusewright.nn.MultiheadAttention`; a window is the number of
            positions met before the own one.
        rotary: rotary positions in place of learned ones.
        lsh: keywords of :class:`fusewright.nn.LSHSelfAttention`, made causal; without generation, as it has no cache.
        reversible: see :class:`fusewright.nn.TransformerEncoder`; without generation too.

    Shape: tokens (B, T) int64 to logits (B, T, V).

    Source: Radford et al., "Language models are unsupervised multitask learners", 2019.
    """

    def __init__(
        self,
        vocabulary: int,
        max_positions: int | None = 1024,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        dim_feedforward: int | None = None,
        dropout: float = 0.1,
        *,
        num_kv_heads: int | None = None,
        window: int | None = None,
        rotary: bool = False,
        lsh: dict[str, Any] | None = None,
        reversible: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if max_positions is None and not rotary:
            raise value_error("max_positions", None, "an int where positions are learned")
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.max_positions, self.window = max_positions, window
        self.tokens = nn.Embedding(vocabulary, width, **placed)
        self.positions = None if rotary else nn.Embedding(max_positions, width, **placed)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(dropout)
        lsh = None if lsh is None else {**lsh, "is_causal": True}
        turned = RotaryEmbedding(width // heads, device=device) if rotary else None
        layer = TransformerEncoderLayer(
            width, heads, dim_feedforward or 4 * width, dropout, "gelu", batch_first=True, norm_first=True,
            num_kv_heads=num_kv_heads, rotary=turned, window=None if window is None else (window, 0), lsh=lsh, **placed,
        )  # fmt: skip
        self.blocks = TransformerEncoder(layer, layers, LayerNorm(width, **placed), reversible=reversible)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_normal(self, 0.02)
        scale_residual_projections(self, 0.02, 2 * len(self.blocks.layers))

    def hidden(
        self,
        tokens: Tensor,
        *,
        prefix_lengths: Tensor | None = None,
        state: CachedState | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """What stands before the output projection, (B, T, E); arguments as in :meth:`forward`."""
        if self.positions is None:
            embedded = functional.embedding(tokens, self.tokens.weight)
        else:
            places = positions_of(tokens, 0 if state is None else state.positions)
            embedded = functional.embedding(tokens, self.tokens.weight, self.positions.weight, places)
        embedded = self.dropout(embedded)
        if state is not None:
            hidden = self.blocks(embedded, caches=state.caches)
            state.drop_padding(tokens.shape[1], lengths)
            return hidden
        if prefix_lengths is None:
            return self.blocks(embedded, is_causal=True)
        heads = self.blocks.layers[0].self_attn.num_heads
        mask = prefix_mask(prefix_lengths, tokens.shape[1]).repeat_interleave(heads, 0)
        return self.blocks(embedded, mask, is_causal=False)

    def forward(
        self,
        tokens: Tensor,
        *,
        prefix_lengths: Tensor | None = None,
        state: CachedState | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            prefix_lengths: (B,): the first so many positions of each sequence see one another in both directions
                (a prefix language model).
            state, lengths: see :class:`fusewright.generation.DecodingModel`.
        """
        hidden = self.hidden(tokens, prefix_lengths=prefix_lengths, state=state, lengths=lengths)
        return functional.linear(hidden, self.tokens.weight)

    def loss(self, tokens: Tensor, targets: Tensor, ignore_index: int = -100, **options: Any) -> Tensor:
        """Mean cross-entropy of ``targets`` (B, T), without the logits of all positions at once."""
        hidden = self.hidden(tokens, **options)
        return functional.linear_cross_entropy(hidden, self.tokens.weight, targets, ignore_index=ignore_index)

    def make_state(self, batch_size: int, capacity: int, page_size: int | None = None) -> CachedState:
        """The state of empty sequences. Its caches roll if there is a window, else are in pages if a size is given."""
        if self.window is not None and capacity > 2 * self.window + 1:
            return CachedState(self.blocks.make_caches(batch_size, 2 * self.window + 1, rolling=True))
        return CachedState(self.blocks.make_caches(batch_size, capacity, page_size=page_size))


def prefix_mask(prefix_lengths: Tensor, length: int) -> Tensor:
    """(B, T, T) bool, True for pairs that do not meet: later positions, but for two of the prefix.

    Source: Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer", 2020.
    """
    places = torch.arange(length, device=prefix_lengths.device)
    return (places > places[:, None]) & (places >= prefix_lengths[:, None, None])
