"""The layer of the Reformer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusewright.nn.linear import Linear
from fusewright.nn.lsh_attention import LSHSelfAttention
from fusewright.nn.normalization import LayerNorm
from fusewright.nn.reversible import ReversibleBlock
from fusewright_kernels.checks import probability, value_error


class ChunkedFeedForward(nn.Module):
    """Two linear maps with an activation between them, a part of the positions at a time.

    Without a gradient only ``chunk_length`` positions have their (E to ``dim_feedforward``) hidden vectors in memory at
    once; with one, inside a reversible layer, the same holds but for the layer that is being differentiated.

    Args:
        embed_dim: E.
        dim_feedforward: width between the two maps.
        chunk_length: positions at a time, 0 for all at once.
        dropout: behind the activation and behind the second map.
        activation: applied element by element.

    Shape: (B, T, E) to the same.
    """

    def __init__(
        self,
        embed_dim: int,
        dim_feedforward: int,
        chunk_length: int = 0,
        dropout: float = 0.0,
        activation: Callable[[Tensor], Tensor] = nn.functional.gelu,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if chunk_length < 0:
            raise value_error("chunk_length", chunk_length, "an int >= 0")
        probability("dropout", dropout)
        self.linear1 = Linear(embed_dim, dim_feedforward, device=device, dtype=dtype)
        self.linear2 = Linear(dim_feedforward, embed_dim, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.chunk_length, self.activation = chunk_length, activation

    def forward(self, hidden: Tensor) -> Tensor:
        if self.chunk_length == 0 or hidden.shape[1] <= self.chunk_length:
            return self._of_chunk(hidden)
        return torch.cat([self._of_chunk(chunk) for chunk in hidden.split(self.chunk_length, dim=1)], dim=1)

    def _of_chunk(self, hidden: Tensor) -> Tensor:
        inner = self.dropout(self.activation(self.linear1(hidden)))
        return self.dropout(self.linear2(inner))


class _Normalized(nn.Module):
    """A sublayer of a float32 stream: normalisation, then the sublayer in the dtype of its parameters."""

    def __init__(self, embed_dim: int, sublayer: nn.Module, eps: float, device: Any, dtype: Any) -> None:
        super().__init__()
        self.norm = LayerNorm(embed_dim, eps=eps, device=device, dtype=dtype)
        self.sublayer = sublayer

    def forward(self, stream: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        normalized = self.norm(stream)
        return self.sublayer(normalized.to(self.norm.weight.dtype), *args, **kwargs)


class ReformerLayer(ReversibleBlock):
    """LSH attention and a chunked feed-forward on two streams, each behind a layer normalisation.

    Args:
        embed_dim, num_heads: E and H.
        dim_feedforward: width of the feed-forward.
        dropout: of the feed-forward, and of the attention weights unless ``attention_dropout`` is given.
        feed_forward_chunk: positions of the feed-forward at a time, 0 for all.
        layer_norm_eps: of both normalisations.
        attention: further keywords of :class:`LSHSelfAttention`, such as ``n_hashes`` and ``is_causal``.

    Shape: two streams (B, T, E); :class:`ReversibleSequence` takes a stack of such layers.

    Source: Kitaev, Kaiser, Levskaya, "Reformer: the efficient transformer", 2020.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float = 0.0,
        *,
        attention_dropout: float | None = None,
        feed_forward_chunk: int = 0,
        layer_norm_eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        weights_dropout = dropout if attention_dropout is None else attention_dropout
        placed = {"device": device, "dtype": dtype}
        attend = LSHSelfAttention(embed_dim, num_heads, dropout=weights_dropout, **attention, **placed)
        feed_forward = ChunkedFeedForward(embed_dim, dim_feedforward, feed_forward_chunk, dropout, **placed)
        super().__init__(
            _Normalized(embed_dim, attend, layer_norm_eps, device, dtype),
            _Normalized(embed_dim, feed_forward, layer_norm_eps, device, dtype),
        )

    @property
    def attention(self) -> LSHSelfAttention:
        return self.f.sublayer  # type: ignore[return-value]
