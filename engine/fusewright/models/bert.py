"""A bidirectional encoder with the heads that it is trained by."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusewright import functional
from fusewright.models.initialization import init_normal
from fusewright.nn import LayerNorm, Linear, TransformerEncoder, TransformerEncoderLayer


class BERTOutput(NamedTuple):
    """
    Attributes:
        hidden: (B, T, E).
        token_logits: (B, T, V) of the masked language model.
        next_sentence_logits: (B, 2): the second sentence follows the first, or does not.
    """

    hidden: Tensor
    token_logits: Tensor
    next_sentence_logits: Tensor


class BERT(nn.Module):
    """BERT: learned positions and segments, post-norm layers with GELU, masked-language and next-sentence heads.

    The output projection of the masked language model is the token embedding once more, with a bias of its own.

    Args:
        vocabulary: number of tokens, V.
        max_positions: the longest sequence.
        width, layers, heads, dim_feedforward, dropout: E and so on; the sizes of BERT-base by default.
        segments: kinds of sentences.

    Shape: tokens (B, T) int64 to :class:`BERTOutput`.

    Source: Devlin et al., "BERT: pre-training of deep bidirectional Transformers for language understanding", 2019.
    """

    def __init__(
        self,
        vocabulary: int,
        max_positions: int = 512,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        dim_feedforward: int | None = None,
        dropout: float = 0.1,
        segments: int = 2,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.tokens = nn.Embedding(vocabulary, width, **placed)
        self.positions = nn.Embedding(max_positions, width, **placed)
        self.segments = nn.Embedding(segments, width, **placed)
        self.norm = LayerNorm(width, eps=1e-12, **placed)
        self.dropout = nn.Dropout(dropout)
        layer = TransformerEncoderLayer(
            width, heads, dim_feedforward or 4 * width, dropout, "gelu", 1e-12, batch_first=True, **placed
        )
        self.encoder = TransformerEncoder(layer, layers)
        self.pooler = Linear(width, width, **placed)
        self.next_sentence = Linear(width, 2, **placed)
        self.transform = Linear(width, width, **placed)
        self.transform_norm = LayerNorm(width, eps=1e-12, **placed)
        self.token_bias = nn.Parameter(torch.zeros(vocabulary, **placed))
        init_normal(self, 0.02)

    def hidden(self, tokens: Tensor, segments: Tensor | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """(B, T, E); arguments as in :meth:`forward`."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        kinds = torch.zeros_like(tokens) if segments is None else segments
        embedded = self.tokens(tokens) + self.positions(places) + self.segments(kinds)
        return self.encoder(self.dropout(self.norm(embedded)), src_key_padding_mask=key_padding_mask)

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> BERTOutput:
        """
        Args:
            segments: (B, T) int64, which sentence a token belongs to; all to the first by default.
            key_padding_mask: (B, T) bool, True for padding.
        """
        hidden = self.hidden(tokens, segments, key_padding_mask)
        token_logits = functional.linear(self._transformed(hidden), self.tokens.weight, self.token_bias)
        return BERTOutput(hidden, token_logits, self._next_sentence_logits(hidden))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        follows: Tensor | None = None,
        segments: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the masked tokens, and of the next sentence if ``follows`` is given.

        Args:
            targets: (B, T) int64, -100 where nothing was masked: those positions cost nothing.
            follows: (B,) int64: 0, the second sentence follows the first, or 1.
        """
        hidden = self.hidden(tokens, segments, key_padding_mask)
        loss = functional.linear_cross_entropy(
            self._transformed(hidden[targets != -100]), self.tokens.weight, targets[targets != -100], self.token_bias
        )
        return loss if follows is None else loss + functional.cross_entropy(self._next_sentence_logits(hidden), follows)

    def _transformed(self, hidden: Tensor) -> Tensor:
        return self.transform_norm(nn.functional.gelu(self.transform(hidden)))

    def _next_sentence_logits(self, hidden: Tensor) -> Tensor:
        return self.next_sentence(self.pooler(hidden[:, 0]).tanh())
