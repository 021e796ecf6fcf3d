"""A label for each token."""

from typing import Any

import torch
from torch import Tensor, nn

from fusewright import functional
from fusewright.nn import LSTM, Linear


class LSTMTagger(nn.Module):
    """Embedding, bidirectional LSTM, a linear map to tags.

    Args:
        vocabulary, tags: number of tokens and of tags.
        embedding_dim, hidden_dim: of the tokens, and of either direction.
        layers, dropout: of the LSTM.

    Shape: tokens (B, T) int64 to logits (B, T, tags).

    Source: Huang, Xu, Yu, "Bidirectional LSTM-CRF models for sequence tagging", 2015 (their BI-LSTM).
    """

    def __init__(
        self,
        vocabulary: int,
        tags: int,
        embedding_dim: int = 128,
        hidden_dim: int = 128,
        layers: int = 1,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.tokens = nn.Embedding(vocabulary, embedding_dim, **placed)
        self.dropout = nn.Dropout(dropout)
        self.lstm = LSTM(embedding_dim, hidden_dim, layers, batch_first=True, bidirectional=True, **placed)
        self.head = Linear(2 * hidden_dim, tags, **placed)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``lengths``: (B,) int64, how many tokens of each sequence count; the others have the bias as logits."""
        hidden, _ = self.lstm(self.dropout(self.tokens(tokens)), lengths=lengths)
        return self.head(self.dropout(hidden))

    def loss(self, tokens: Tensor, tags: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of ``tags`` (B, T) int64, -100 for none, over the tokens that count."""
        if lengths is not None:
            padding = torch.arange(tags.shape[1], device=tags.device) >= lengths[:, None]
            tags = tags.masked_fill(padding, -100)
        return functional.cross_entropy(self(tokens, lengths).flatten(0, 1), tags.flatten())
