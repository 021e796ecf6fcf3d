"""A Transformer from one sequence to another."""

from typing import Any

import torch
from torch import Tensor, nn

from fusewright import functional
from fusewright.models.initialization import init_normal
from fusewright.models.state import CachedState, positions_of
from fusewright.nn import LayerNorm, RelativePositionBias, Transformer, TransformerDecoder, TransformerEncoder
from fusewright_kernels.checks import value_error


class EncoderDecoder(nn.Module):
    """Encoder and decoder with T5's relative positions: one bias for all layers of either, none for the memory.

    Pre-norm layers with ReLU and without biases; the embedding is shared by source, target and output projection.

    Args:
        vocabulary: number of tokens, V.
        width, layers, heads, dim_feedforward, dropout: E, the layers of either side and so on.
        num_buckets, max_distance: see :class:`fusewright.nn.RelativePositionBias`.

    Shape: source (B, S) and target (B, T) int64 to logits (B, T, V): those behind each token of the target.

    Source: Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer", 2020.
    """

    max_positions: int | None = None

    def __init__(
        self,
        vocabulary: int,
        width: int = 512,
        layers: int = 6,
        heads: int = 8,
        dim_feedforward: int | None = None,
        dropout: float = 0.1,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.tokens = nn.Embedding(vocabulary, width, **placed)
        self.dropout = nn.Dropout(dropout)
        stacks = Transformer(
            width, heads, layers, layers, dim_feedforward or 4 * width, dropout, batch_first=True, norm_first=True,
            bias=False, **placed,
        )  # fmt: skip
        self.encoder: TransformerEncoder = stacks.encoder
        self.decoder: TransformerDecoder = stacks.decoder
        self.encoder.norm, self.decoder.norm = (LayerNorm(width, bias=False, **placed) for _ in range(2))
        self.source_bias = RelativePositionBias(heads, num_buckets, max_distance, True, **placed)
        self.target_bias = RelativePositionBias(heads, num_buckets, max_distance, False, **placed)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in T5, whose queries start smaller by what our attention divides the products by."""
        init_normal(self, self.tokens.embedding_dim**-0.5)
        nn.init.normal_(self.tokens.weight)
        for layer in (*self.encoder.layers, *self.decoder.layers):
            nn.init.normal_(layer.linear2.weight, std=layer.linear2.in_features**-0.5)

    def encode(self, source: Tensor, source_padding: Tensor | None = None, capacity: int | None = None) -> CachedState:
        """The encoded source, with room for a target of ``capacity`` tokens to be generated (none if None).

        Args:
            source: (B, S) int64.
            source_padding: (B, S) bool, True for padding.
        """
        places = positions_of(source, 0)
        embedded = self.dropout(self.tokens(source))
        memory = self.encoder(embedded, self.source_bias(places, places), source_padding, is_causal=False)
        if capacity is None:
            return CachedState([], memory, source_padding)
        caches = self.decoder.make_caches(source.shape[0], capacity)
        return CachedState(caches, memory, source_padding, self.decoder.project_memory(memory))

    def make_state(self, batch_size: int, capacity: int) -> CachedState:
        raise value_error("state", None, "state=model.encode(source, source_padding, capacity)")

    def decode(self, target: Tensor, state: CachedState, lengths: Tensor | None = None) -> Tensor:
        """What stands before the output projection, (B, T, E)."""
        embedded, memory = self.dropout(self.tokens(target)), state.memory
        options: dict[str, Any] = {"memory_key_padding_mask": state.memory_padding}
        if not state.caches:
            places = positions_of(target, 0)
            later = places > places[:, None]
            bias = self.target_bias(places, places).masked_fill(later, -torch.inf)
            return self.decoder(embedded, memory, bias, tgt_is_causal=False, **options)
        keys = torch.arange(state.caches[0].capacity, device=target.device)
        bias = self.target_bias(positions_of(target, state.positions), keys).flatten(0, 1)
        hidden = self.decoder(
            embedded,
            memory,
            bias,
            tgt_is_causal=False,
            caches=state.caches,
            projected_memory=state.projected_memory,
            **options,
        )
        state.drop_padding(target.shape[1], lengths)
        return hidden

    def forward(
        self,
        tokens: Tensor,
        source: Tensor | None = None,
        source_padding: Tensor | None = None,
        *,
        state: CachedState | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            tokens: (B, T), the target.
            source, source_padding: as in :meth:`encode`; or ``state``, what it returned.
            lengths: see :class:`fusewright.generation.DecodingModel`.
        """
        if (source is None) == (state is None):
            raise value_error("source and state", "both or neither given", "one of them")
        if source is not None:
            state = self.encode(source, source_padding)
        assert state is not None
        # The embedding is as wide as tokens are told apart by; as a projection it is scaled down again, as in T5.
        hidden = self.decode(tokens, state, lengths) * self.tokens.embedding_dim**-0.5
        return functional.linear(hidden, self.tokens.weight)

    def loss(self, tokens: Tensor, targets: Tensor, source: Tensor, source_padding: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of ``targets`` (B, T), -100 for none: the tokens that follow ``tokens``."""
        hidden = self.decode(tokens, self.encode(source, source_padding)) * self.tokens.embedding_dim**-0.5
        return functional.linear_cross_entropy(hidden, self.tokens.weight, targets)
