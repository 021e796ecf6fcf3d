"""Additive attention as a module."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fusewright import functional
from fusewright.nn.linear import Linear
from fusewright_kernels.checks import probability, value_error


class AdditiveAttention(nn.Module):
    """Bahdanau's attention: scores ``v . tanh(W query + U key)``, softmax over the keys, weighted sum of the values.

    Args:
        query_dim, key_dim: widths of queries and keys.
        hidden_dim: D, the width they are projected to.
        num_heads: heads of D / num_heads elements each with a part of v of their own; values are split likewise.
        dropout: of the weights, in training.
        bias: whether the projection of the query has one.

    Shape: query (B, T, query_dim), key (B, S, key_dim), value (B, S, value_dim) to (B, T, value_dim).

    Source: Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and translate", 2015.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int,
        num_heads: int = 1,
        dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_dim % num_heads != 0:
            raise value_error("num_heads", num_heads, f"a divisor of hidden_dim, {hidden_dim}")
        probability("dropout", dropout)
        self.num_heads, self.dropout = num_heads, dropout
        self.query_proj = Linear(query_dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.key_proj = Linear(key_dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.score_weight = nn.Parameter(torch.empty(num_heads, hidden_dim // num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1.0 / math.sqrt(self.score_weight.shape[1])
        nn.init.uniform_(self.score_weight, -bound, bound)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """
        Args:
            query: (B, T, query_dim).
            key: (B, S, key_dim).
            value: (B, S, value_dim), None is ``key``.
            key_padding_mask: (B, S), bool, True for padding.
            is_causal: query i sees keys 0 to i.
        """
        value = key if value is None else value
        if value.shape[-1] % self.num_heads != 0:
            raise value_error("value.shape[-1]", value.shape[-1], f"a multiple of num_heads, {self.num_heads}")
        queries, keys = self._heads(self.query_proj(query)), self._heads(self.key_proj(key))
        mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
        attended = functional.additive_attention(
            queries,
            keys,
            self._heads(value),
            self.score_weight,
            mask,
            dropout_p=self.dropout if self.training else 0.0,
            window=(-1, 0) if is_causal else None,
        )
        assert isinstance(attended, Tensor)
        return attended.transpose(1, 2).flatten(2)

    def _heads(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dropout={self.dropout}"
