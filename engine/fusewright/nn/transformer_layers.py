"""The layers of a Transformer: torch.nn's encoder and decoder layer on fused attention and normalisation."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusewright import functional
from fusewright.nn.attention import MultiheadAttention
from fusewright.nn.kv_cache import KeyValueCache
from fusewright.nn.linear import Linear
from fusewright.nn.lsh_attention import LSHSelfAttention
from fusewright.nn.normalization import LayerNorm
from fusewright.nn.rotary import RotaryEmbedding
from fusewright_kernels.checks import type_error, value_error

Activation = str | Callable[[Tensor], Tensor]


class _Layer(nn.Module):
    """What both layers share: their parts, in the order in which torch draws initial weights, and the feed-forward."""

    self_attn: Any
    multihead_attn: Any
    linear1: Any
    linear2: Any
    activation: Callable[[Tensor], Tensor]
    batch_first: bool

    def _build(
        self,
        width: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        activation: Activation,
        layer_norm_eps: float,
        batch_first: bool,
        norm_first: bool,
        bias: bool,
        attends_memory: bool,
        options: Mapping[str, Any],
        placed: Mapping[str, Any],
    ) -> None:
        nn.Module.__init__(self)
        options = dict(options)
        lsh = options.pop("lsh")
        common = {"dropout": dropout, "bias": bias, **placed}
        if lsh is None:
            self.self_attn = MultiheadAttention(width, num_heads, batch_first=batch_first, **common, **options)
        else:
            for name, value in options.items():
                if value is not None:
                    raise value_error(name, value, "None where lsh is given")
            self.self_attn = LSHSelfAttention(width, num_heads, **common, **lsh)
        if attends_memory:
            kv_heads = options["num_kv_heads"]
            self.multihead_attn = MultiheadAttention(
                width, num_heads, batch_first=batch_first, num_kv_heads=kv_heads, **common
            )
        self.linear1 = Linear(width, dim_feedforward, bias=bias, **placed)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, width, bias=bias, **placed)
        self.norm_first, self.batch_first = norm_first, batch_first
        for index in range(1, 4 if attends_memory else 3):
            setattr(self, f"norm{index}", LayerNorm(width, eps=layer_norm_eps, bias=bias, **placed))
            setattr(self, f"dropout{index}", nn.Dropout(dropout))
        self.activation = _activation(activation)

    def _attend_self(
        self, hidden: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool, cache: KeyValueCache | None
    ) -> Tensor:
        if isinstance(self.self_attn, LSHSelfAttention):
            return self._attend_by_hashing(self.self_attn, hidden, mask, padding, is_causal, cache)
        extra = {} if cache is None else {"cache": cache}
        return self.self_attn(
            hidden, hidden, hidden, key_padding_mask=padding, need_weights=False, attn_mask=mask, is_causal=is_causal,
            **extra,
        )[0]  # fmt: skip

    def _attend_by_hashing(
        self,
        attention: LSHSelfAttention,
        hidden: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
        is_causal: bool,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """LSH attention of one layout for the layer's three; its causality is its own option."""
        if cache is not None:
            raise value_error("cache", "given", "None where attention is by hashing")
        if is_causal and not attention.is_causal:
            raise value_error("is_causal", is_causal, "False: the layer was made with lsh={'is_causal': False}")
        if mask is not None and not is_causal:
            raise value_error("attn_mask", "given", "None, or the causal mask together with is_causal")
        if padding is not None and padding.dtype is not torch.bool:
            raise type_error("key_padding_mask.dtype", padding.dtype, "torch.bool where attention is by hashing")
        if hidden.ndim == 2:
            return attention(hidden[None], None if padding is None else padding[None])[0]
        if self.batch_first:
            return attention(hidden, padding)
        return attention(hidden.transpose(0, 1), padding).transpose(0, 1)

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        inner = self.linear1(hidden)
        inner = functional.bias_gelu(inner) if self.activation is nn.functional.gelu else self.activation(inner)
        return self.linear2(self.dropout(inner))


class TransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    """:class:`torch.nn.TransformerEncoderLayer` on fused kernels, for training and inference alike.

    Parameters, ``state_dict``, initial weights for a seed and results are torch's; dropout's random numbers are not.
    The differences of :class:`MultiheadAttention` hold here too.

    Args:
        num_kv_heads, rotary, window: as in :class:`MultiheadAttention`.
        lsh: keywords of :class:`LSHSelfAttention`, which then takes the place of exact attention; its ``is_causal`` is
            what makes it causal.
        Others: as torch.nn.TransformerEncoderLayer.

    Shape: (T, B, E), (B, T, E) with ``batch_first``, or one sequence (T, E), to the same.

    Source: Vaswani et al., "Attention is all you need", 2017; Xiong et al., "On layer normalization in the
    Transformer architecture", 2020 (``norm_first``).
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = nn.functional.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        rotary: RotaryEmbedding | None = None,
        window: int | tuple[int, int] | None = None,
        lsh: Mapping[str, Any] | None = None,
    ) -> None:
        options = {"num_kv_heads": num_kv_heads, "rotary": rotary, "window": window, "lsh": lsh}
        self._build(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, False,
            options, {"device": device, "dtype": dtype},
        )  # fmt: skip
        # What torch's stacks read, and torch's own forward for nested tensors.
        is_relu = self.activation is nn.functional.relu or isinstance(self.activation, nn.ReLU)
        is_gelu = self.activation is nn.functional.gelu or isinstance(self.activation, nn.GELU)
        self.activation_relu_or_gelu = 1 if is_relu else 2 if is_gelu else 0

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """As torch's; ``is_causal`` needs no mask. ``cache``: as in :class:`MultiheadAttention`."""
        if src.is_nested:
            return nn.TransformerEncoderLayer.forward(self, src, src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            attended = self._attend_self(self.norm1(src), src_mask, src_key_padding_mask, is_causal, cache)
            normalized, stream = add_norm(attended, src, self.dropout1, self.norm2)
            return add(self._feed_forward(normalized), stream, self.dropout2)
        attended = self._attend_self(src, src_mask, src_key_padding_mask, is_causal, cache)
        normalized, _ = add_norm(attended, src, self.dropout1, self.norm1)
        return add_norm(self._feed_forward(normalized), normalized, self.dropout2, self.norm2)[0]


class TransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    """:class:`torch.nn.TransformerDecoderLayer` on fused kernels; see :class:`TransformerEncoderLayer`.

    Args:
        num_kv_heads: of both attentions.
        rotary, window, lsh: of the self-attention.
        Others: as torch.nn.TransformerDecoderLayer.

    Shape: tgt (T, B, E) and memory (S, B, E), (B, T, E) and (B, S, E) with ``batch_first``, or (T, E) and (S, E), to
    the shape of tgt.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = nn.functional.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        rotary: RotaryEmbedding | None = None,
        window: int | tuple[int, int] | None = None,
        lsh: Mapping[str, Any] | None = None,
    ) -> None:
        options = {"num_kv_heads": num_kv_heads, "rotary": rotary, "window": window, "lsh": lsh}
        self._build(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, True,
            options, {"device": device, "dtype": dtype},
        )  # fmt: skip

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: KeyValueCache | None = None,
        projected_memory: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As torch's; the causal hints need no mask. ``cache``: of the self-attention; ``projected_memory``: what
        ``multihead_attn.project_memory`` made of ``memory``.
        """
        extra = {} if projected_memory is None else {"projected": projected_memory}

        def attend_memory(query: Tensor) -> Tensor:
            return self.multihead_attn(
                query, memory, memory, key_padding_mask=memory_key_padding_mask, need_weights=False,
                attn_mask=memory_mask, is_causal=memory_is_causal, **extra,
            )[0]  # fmt: skip

        hidden = self.norm1(tgt) if self.norm_first else tgt
        attended = self._attend_self(hidden, tgt_mask, tgt_key_padding_mask, tgt_is_causal, cache)
        if self.norm_first:
            normalized, stream = add_norm(attended, tgt, self.dropout1, self.norm2)
            normalized, stream = add_norm(attend_memory(normalized), stream, self.dropout2, self.norm3)
            return add(self._feed_forward(normalized), stream, self.dropout3)
        normalized, _ = add_norm(attended, tgt, self.dropout1, self.norm1)
        normalized, _ = add_norm(attend_memory(normalized), normalized, self.dropout2, self.norm2)
        return add_norm(self._feed_forward(normalized), normalized, self.dropout3, self.norm3)[0]


def add(output: Tensor, residual: Tensor, dropout: Any) -> Tensor:
    """``residual + dropout(output)``, in one pass and without a mask in memory if the module is what it seems."""
    if _is_plain(dropout, nn.Dropout) and dropout.training and dropout.p > 0.0 and output.dtype is residual.dtype:
        return functional.dropout_add(output, residual, dropout.p)
    return residual + dropout(output)


def add_norm(output: Tensor, residual: Tensor, dropout: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """The norm of ``residual + dropout(output)`` and that sum, in one pass if both modules are what they seem.

    Under autocast the two may differ in dtype; the sum and its norm then keep the wider one, as in torch.
    """
    if output.dtype is residual.dtype and _is_plain(norm, LayerNorm) and _is_plain(dropout, nn.Dropout):
        return functional.add_layer_norm(
            output, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps,
            dropout_p=dropout.p if dropout.training else 0.0, zero_centered_weight=norm.zero_centered_weight,
        )  # fmt: skip
    stream = residual + dropout(output)
    return norm(stream), stream


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is just of that kind, and nobody wants to see it called, which a fused pass does not do."""
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _activation(activation: Activation) -> Callable[[Tensor], Tensor]:
    if not isinstance(activation, str):
        return activation
    if activation not in ("relu", "gelu"):
        raise RuntimeError(f"activation should be relu/gelu, not {activation}")  # as torch words it
    return nn.functional.relu if activation == "relu" else nn.functional.gelu
