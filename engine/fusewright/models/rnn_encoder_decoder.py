"""An LSTM from one sequence to another, with attention."""

from typing import Any

import torch
from torch import Tensor, nn

from fusewright import functional
from fusewright.models.state import RecurrentState
from fusewright.nn import LSTM, AdditiveAttention, Linear
from fusewright_kernels.checks import value_error

KINDS = ("additive", "dot", "general", "location", "scaled_dot")


class Alignment(nn.Module):
    """How decoder states find their places in the memory.

    Args:
        kind: the score of query q and key k: ``"additive"`` v . tanh(W q + U k), ``"dot"`` q . k, ``"general"``
            q . W k, ``"scaled_dot"`` q . k / sqrt(N), ``"location"`` row j of W q for the key at j, whatever it is.
        width: N, of queries and memory.
        max_source: the longest memory, for ``"location"``.

    Shape: query (B, T, N) and memory (B, S, N) to (B, T, N).

    Source: Bahdanau, Cho, Bengio, 2015 (additive); Luong, Pham, Manning, "Effective approaches to attention-based
    neural machine translation", 2015; Vaswani et al., 2017 (scaled dot).
    """

    def __init__(
        self,
        kind: str,
        width: int,
        max_source: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise value_error("kind", repr(kind), f"one of {', '.join(KINDS)}")
        if kind == "location" and max_source is None:
            raise value_error("max_source", None, "an int where attention is by location")
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.kind, self.width, self.max_source = kind, width, max_source
        if kind == "additive":
            self.additive = AdditiveAttention(width, width, width, **placed)
        elif kind == "general":
            self.query_proj = Linear(width, width, bias=False, **placed)
        elif kind == "location":
            self.location_proj = Linear(width, max_source or 0, bias=False, **placed)

    def forward(self, query: Tensor, memory: Tensor, padding: Tensor | None = None) -> Tensor:
        """``padding``: (B, S) bool, True where the memory is padding."""
        if self.kind == "additive":
            return self.additive(query, memory, key_padding_mask=padding)
        if self.kind == "location":
            return self._by_location(query, memory, padding)
        if self.kind == "general":
            query = self.query_proj(query)
        scale = self.width**-0.5 if self.kind == "scaled_dot" else 1.0
        mask = None if padding is None else ~padding[:, None]
        attended = functional.scaled_dot_product_attention(query, memory, memory, mask, scale=scale)
        assert isinstance(attended, Tensor)
        return attended

    def _by_location(self, query: Tensor, memory: Tensor, padding: Tensor | None) -> Tensor:
        length = memory.shape[1]
        assert self.max_source is not None
        if length > self.max_source:
            raise value_error("memory.shape[1]", length, f"at most {self.max_source}, the max_source of the attention")
        scores = self.location_proj(query)[..., :length]
        if padding is not None:
            scores = scores.masked_fill(padding[:, None], -torch.inf)
        return functional.softmax(scores, -1) @ memory


class RNNEncoderDecoder(nn.Module):
    """Bidirectional LSTM encoder, LSTM decoder, global attention over the encoder's outputs.

    The decoder runs over the whole target at once; what it attends to joins its outputs, not its next inputs.

    Args:
        source_vocabulary, target_vocabulary: numbers of tokens.
        embedding_dim: of the tokens.
        hidden_dim: N, even: of the decoder, and of the encoder's two directions together.
        layers, dropout: of either side.
        attention: a kind of :class:`Alignment`.
        max_source: the longest source, for attention by location.

    Shape: source (B, S) and target (B, T) int64 to logits (B, T, target_vocabulary): those behind each token.

    Source: Luong, Pham, Manning, "Effective approaches to attention-based neural machine translation", 2015.
    """

    max_positions: int | None = None

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        embedding_dim: int = 256,
        hidden_dim: int = 512,
        layers: int = 1,
        dropout: float = 0.0,
        attention: str = "general",
        max_source: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_dim % 2 != 0:
            raise value_error("hidden_dim", hidden_dim, "an even int")
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        options: dict[str, Any] = {"dropout": dropout if layers > 1 else 0.0, "batch_first": True, **placed}
        self.source_tokens = nn.Embedding(source_vocabulary, embedding_dim, **placed)
        self.target_tokens = nn.Embedding(target_vocabulary, embedding_dim, **placed)
        self.encoder = LSTM(embedding_dim, hidden_dim // 2, layers, bidirectional=True, **options)
        self.decoder = LSTM(embedding_dim, hidden_dim, layers, **options)
        self.attention = Alignment(attention, hidden_dim, max_source, **placed)
        self.combine = Linear(2 * hidden_dim, hidden_dim, bias=False, **placed)
        self.dropout = nn.Dropout(dropout)
        self.head = Linear(hidden_dim, target_vocabulary, **placed)
        # As in the paper.
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def encode(self, source: Tensor, source_lengths: Tensor | None = None) -> RecurrentState:
        """The encoded source, where the decoder starts.

        Args:
            source: (B, S) int64.
            source_lengths: (B,) int64, how many tokens of each source count.
        """
        memory, states = self.encoder(self.dropout(self.source_tokens(source)), lengths=source_lengths)
        padding = None
        if source_lengths is not None:
            padding = torch.arange(source.shape[1], device=source.device) >= source_lengths[:, None]
        # (2 layers, B, N / 2), the directions of a layer side by side, to (layers, B, N).
        joined = tuple(state.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2) for state in states)
        return RecurrentState(joined, memory, padding)

    def make_state(self, batch_size: int, capacity: int) -> RecurrentState:
        raise value_error("state", None, "state=model.encode(source, source_lengths)")

    def hidden(self, target: Tensor, state: RecurrentState, lengths: Tensor | None = None) -> Tensor:
        """What stands before the output projection, (B, T, N); ``state`` is then behind the target."""
        decoded, states = self.decoder(self.dropout(self.target_tokens(target)), state.states, lengths=lengths)
        state.states = states
        attended = self.attention(decoded, state.memory, state.memory_padding)
        return self.dropout(self.combine(torch.cat([attended, decoded], -1)).tanh())

    def forward(
        self,
        tokens: Tensor,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        *,
        state: RecurrentState | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            tokens: (B, T), the target.
            source, source_lengths: as in :meth:`encode`; or ``state``, what it returned.
            lengths: see :class:`fusewright.generation.DecodingModel`.
        """
        if (source is None) == (state is None):
            raise value_error("source and state", "both or neither given", "one of them")
        if source is not None:
            state = self.encode(source, source_lengths)
        assert state is not None
        return self.head(self.hidden(tokens, state, lengths))

    def loss(self, tokens: Tensor, targets: Tensor, source: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of ``targets`` (B, T), -100 for none: the tokens that follow ``tokens``."""
        hidden = self.hidden(tokens, self.encode(source, source_lengths))
        return functional.linear_cross_entropy(hidden, self.head.weight, targets, self.head.bias)
