"""Whether two texts say the same."""

from typing import Any

import torch
from torch import Tensor, nn

from fusewright.nn import LSTM
from fusewright_kernels.checks import value_error


class SiameseLSTM(nn.Module):
    """One LSTM for either text; a text is the direction of the mean of its outputs, so that products are cosines.

    Args:
        vocabulary: number of tokens.
        embedding_dim, hidden_dim, layers: of the tokens and of the LSTM.

    Shape: tokens (B, T) int64 to (B, hidden_dim) of length 1.

    Source: Mueller, Thyagarajan, "Siamese recurrent architectures for learning sentence similarity", 2016.
    """

    def __init__(
        self,
        vocabulary: int,
        embedding_dim: int = 128,
        hidden_dim: int = 128,
        layers: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.tokens = nn.Embedding(vocabulary, embedding_dim, **placed)
        self.lstm = LSTM(embedding_dim, hidden_dim, layers, batch_first=True, **placed)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``lengths``: (B,) int64, how many tokens of each text count."""
        # Behind its length a text's outputs are 0.
        total = self.lstm(self.tokens(tokens), lengths=lengths)[0].sum(1)
        return nn.functional.normalize(total, dim=-1)

    def loss(
        self,
        first: Tensor,
        second: Tensor,
        first_lengths: Tensor | None = None,
        second_lengths: Tensor | None = None,
        margin: float = 0.25,
    ) -> Tensor:
        """:func:`hard_negative_triplet_loss` of texts that say the same row by row."""
        return hard_negative_triplet_loss(self(first, first_lengths), self(second, second_lengths), margin)


def hard_negative_triplet_loss(first: Tensor, second: Tensor, margin: float = 0.25) -> Tensor:
    """Triplet losses of the pairs (i, i) against the mean of the other pairs (i, j), and against the hardest of them.

    The hardest is the one most alike that is still less alike than the pair itself: one beyond that would let all
    vectors fall into one at the start.

    Args:
        first, second: (B, N) of length 1, B > 1.
        margin: by how much a pair is to be more alike than the others.

    Returns:
        The mean over the batch, float32 (float64 for float64).

    Source: Schroff, Kalenichenko, Philbin, "FaceNet: a unified embedding for face recognition and clustering", 2015.
    """
    batch = first.shape[0]
    if first.ndim != 2 or first.shape != second.shape or batch < 2:
        raise value_error("first.shape and second.shape", (tuple(first.shape), tuple(second.shape)), "(B, N), B > 1")
    dtype = torch.promote_types(first.dtype, torch.float32)
    alike = first.to(dtype) @ second.to(dtype).T
    positive = alike.diagonal()
    own = torch.eye(batch, dtype=torch.bool, device=alike.device)
    mean_negative = alike.masked_fill(own, 0.0).sum(1) / (batch - 1)
    # Cosines are at least -1: what is left out can never be the hardest.
    hardest = alike.masked_fill(own | (alike >= positive[:, None]), -2.0).amax(1)
    return ((margin + mean_negative - positive).relu() + (margin + hardest - positive).relu()).mean()
