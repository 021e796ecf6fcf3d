"""A language model for long texts."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusewright import functional
from fusewright.models.initialization import init_normal
from fusewright.models.state import HashedState
from fusewright.nn import AxialPositionalEmbedding, LayerNorm, Linear, ReformerLayer, ReversibleSequence


class Reformer(nn.Module):
    """The Reformer language model: axial positions, reversible layers of causal LSH attention.

    Args:
        vocabulary: number of tokens, V.
        axial_shape: the grid of positions; its product is the longest sequence.
        axial_dims: elements of the embedding that each axis gives; they add up to ``width``.
        width, layers, heads, dim_feedforward, dropout: E and so on.
        feed_forward_chunk: positions of the feed-forward at a time, 0 for all.
        attention: further keywords of :class:`fusewright.nn.LSHSelfAttention`.

    Shape: tokens (B, T) int64 to logits (B, T, V).

    Source: Kitaev, Kaiser, Levskaya, "Reformer: the efficient transformer", 2020.
    """

    def __init__(
        self,
        vocabulary: int,
        axial_shape: Sequence[int],
        axial_dims: Sequence[int],
        width: int = 256,
        layers: int = 6,
        heads: int = 4,
        dim_feedforward: int | None = None,
        dropout: float = 0.0,
        *,
        feed_forward_chunk: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.max_positions: int | None = math.prod(axial_shape)
        self.tokens = nn.Embedding(vocabulary, width, **placed)
        self.positions = AxialPositionalEmbedding(axial_shape, axial_dims, **placed)
        self.blocks = ReversibleSequence(
            [
                ReformerLayer(
                    width, heads, dim_feedforward or 4 * width, dropout, is_causal=True,
                    feed_forward_chunk=feed_forward_chunk, **placed, **attention,
                )
                for _ in range(layers)
            ],
            merge="concatenate",
        )  # fmt: skip
        self.norm = LayerNorm(2 * width, **placed)
        self.head = Linear(2 * width, vocabulary, **placed)
        init_normal(self, 0.02)
        for weight in self.positions.weights:
            nn.init.normal_(weight, std=0.02)

    def hidden(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """What stands before the output projection, (B, T, 2E)."""
        return self.norm(self.blocks(self.positions(self.tokens(tokens)), key_padding_mask))

    def forward(
        self,
        tokens: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        state: HashedState | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            key_padding_mask: (B, T) bool, True for padding.
            state, lengths: see :class:`fusewright.generation.DecodingModel`. Sequences of one length are hashed once,
                into the state's caches; of different lengths, the whole text is read again at every step.
        """
        if state is None:
            return self.head(self.hidden(tokens, key_padding_mask))
        places = state.append(tokens, lengths)
        if state.caches is not None:
            embedded = self.positions(self.tokens(tokens), state.caches[0].length)
            return self.head(self.norm(self.blocks.with_caches(embedded, state.caches)))
        # Padding lies behind, where causal attention does not look.
        hidden = self.hidden(state.tokens[:, : int(places.max()) + 1])
        return self.head(hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2])))

    def make_state(self, batch_size: int, capacity: int) -> HashedState:
        layers = (module for module in self.modules() if isinstance(module, ReformerLayer))
        caches = [layer.attention.make_cache(batch_size, capacity) for layer in layers]
        return HashedState(batch_size, capacity, caches, self.tokens.weight.device)

    def loss(self, tokens: Tensor, targets: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of ``targets`` (B, T), -100 for none, without the logits of all positions at once."""
        hidden = self.hidden(tokens, key_padding_mask)
        return functional.linear_cross_entropy(hidden, self.head.weight, targets, self.head.bias)
