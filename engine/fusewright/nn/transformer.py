"""Stacks of Transformer layers: torch.nn's encoder, decoder and Transformer on fused layers."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusewright.nn.attention import MultiheadAttention
from fusewright.nn.kv_cache import KeyValueCache
from fusewright.nn.normalization import LayerNorm
from fusewright.nn.reversible import ReversibleBlock, ReversibleSequence
from fusewright.nn.rotary import RotaryEmbedding
from fusewright.nn.transformer_layers import Activation, TransformerDecoderLayer, TransformerEncoderLayer
from fusewright_kernels.checks import has_values, type_error, value_error

Caches = Sequence[KeyValueCache]


class TransformerEncoder(nn.TransformerEncoder):
    """:class:`torch.nn.TransformerEncoder` on dense tensors throughout.

    A causal mask on a CPU is recognised, as in torch, except in a trace; else ``is_causal`` says it.

    Args:
        enable_nested_tensor, mask_check: where torch would leave padding out by nested tensors (in inference, under the
            conditions it names), padded positions are set to 0 before ``norm``, as they are there.
        reversible: keep no activations but the last ones for the backward: the layers, all
            :class:`TransformerEncoderLayer` with ``norm_first``, become :class:`ReversibleSequence`'s, whose function
            differs from the plain residual one. Without caches.
        Others: as torch.nn.TransformerEncoder.

    Shape: (T, B, E), (B, T, E) with ``batch_first``, or one sequence (T, E), to the same.
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
        *,
        reversible: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleList(copy.deepcopy(encoder_layer) for _ in range(num_layers))
        self.num_layers, self.norm, self.reversible = num_layers, norm, reversible
        self.enable_nested_tensor, self.mask_check = enable_nested_tensor, mask_check
        self.use_nested_tensor = enable_nested_tensor and _has_nested_path(encoder_layer)
        if reversible and not (isinstance(encoder_layer, TransformerEncoderLayer) and encoder_layer.norm_first):
            what = f"a {type(encoder_layer).__name__}"
            raise type_error("encoder_layer", what, "fusewright's TransformerEncoderLayer with norm_first=True")

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        caches: Caches | None = None,
    ) -> Tensor:
        """As torch's; ``is_causal`` needs no mask. ``caches``: one for each layer, from :meth:`make_caches`."""
        if src.is_nested:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        causal = _is_causal(mask, is_causal)
        if self.reversible:
            if caches is not None:
                raise value_error("caches", "given", "None where reversible is True")
            output = self._run_reversibly(src, mask, src_key_padding_mask, causal)
        else:
            output = src
            for index, layer in enumerate(self.layers):
                extra = {} if caches is None else {"cache": caches[index]}
                output = layer(
                    output, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask, **extra
                )
        if src_key_padding_mask is not None and mask is None and self._clears_padding(src, src_key_padding_mask):
            output = output.masked_fill((src_key_padding_mask != 0)[..., None], 0.0)
        return output if self.norm is None else self.norm(output)

    def _clears_padding(self, src: Tensor, padding: Tensor) -> bool:
        """Whether torch would run this call on nested tensors, whose padding comes back as 0."""
        if not (self.use_nested_tensor and torch.backends.mha.get_fastpath_enabled()):
            return False
        if self.layers[0].training or src.ndim != 3 or torch.is_autocast_enabled():
            return False
        tensors = (src, *self.layers[0].parameters())
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return False
        if torch._C._are_functorch_transforms_active() or torch.overrides.has_torch_function(tensors):
            return False
        if not self.mask_check:
            return True
        hidden = padding != 0
        return not torch.compiler.is_compiling() and bool((hidden[:, 1:] >= hidden[:, :-1]).all())

    def _run_reversibly(self, src: Tensor, mask: Tensor | None, padding: Tensor | None, causal: bool) -> Tensor:
        blocks = [ReversibleBlock(_Attention(layer), _FeedForward(layer)) for layer in self.layers]
        return ReversibleSequence(blocks)(src, mask, padding, causal)

    def make_caches(self, batch_size: int, capacity: int, **options: Any) -> list[KeyValueCache]:
        """An empty cache for each layer: see :meth:`MultiheadAttention.make_cache`."""
        return make_caches(self.layers, batch_size, capacity, **options)


class _Attention(nn.Module):
    """``f`` of a reversible encoder layer: normalisation, attention, dropout."""

    def __init__(self, layer: TransformerEncoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, stream: Tensor, mask: Tensor | None, padding: Tensor | None, causal: bool) -> Tensor:
        layer = self.layer
        hidden = layer.norm1(stream).to(layer.norm1.weight.dtype)
        return layer.dropout1(layer._attend_self(hidden, mask, padding, causal, None))


class _FeedForward(nn.Module):
    """``g`` of a reversible encoder layer: normalisation, feed-forward, dropout."""

    def __init__(self, layer: TransformerEncoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, stream: Tensor) -> Tensor:
        layer = self.layer
        return layer.dropout2(layer._feed_forward(layer.norm2(stream).to(layer.norm2.weight.dtype)))


class TransformerDecoder(nn.TransformerDecoder):
    """:class:`torch.nn.TransformerDecoder`: the same arguments, and caches of the self-attentions.

    Shape: tgt (T, B, E) and memory (S, B, E), (B, T, E) and (B, S, E) with ``batch_first``, or (T, E) and (S, E), to
    the shape of tgt.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        caches: Caches | None = None,
        projected_memory: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """As torch's; the causal hints need no mask.

        Args:
            caches: one for each layer, from :meth:`make_caches`.
            projected_memory: of each layer, from :meth:`project_memory`.
        """
        causal = _is_causal(tgt_mask, tgt_is_causal)
        output = tgt
        for index, layer in enumerate(self.layers):
            extra: dict[str, Any] = {} if caches is None else {"cache": caches[index]}
            if projected_memory is not None:
                extra["projected_memory"] = projected_memory[index]
            output = layer(
                output, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask, tgt_is_causal=causal,
                memory_is_causal=memory_is_causal, **extra,
            )  # fmt: skip
        return output if self.norm is None else self.norm(output)

    def make_caches(self, batch_size: int, capacity: int, **options: Any) -> list[KeyValueCache]:
        """An empty cache for each self-attention: see :meth:`MultiheadAttention.make_cache`."""
        return make_caches(self.layers, batch_size, capacity, **options)

    def project_memory(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of ``memory`` for each layer, for many calls that attend to it."""
        return [layer.multihead_attn.project_memory(memory) for layer in self.layers]


class Transformer(nn.Transformer):
    """:class:`torch.nn.Transformer` on fused layers, with the same ``state_dict`` and initial weights for a seed.

    Args:
        num_kv_heads, rotary, window, lsh: as in :class:`TransformerEncoderLayer` and :class:`TransformerDecoderLayer`.
        reversible: of the encoder, see :class:`TransformerEncoder`; needs ``norm_first``.
        Others: as torch.nn.Transformer.

    Shape: src (S, B, E) and tgt (T, B, E), (B, S, E) and (B, T, E) with ``batch_first``, or (S, E) and (T, E), to the
    shape of tgt.

    Source: Vaswani et al., "Attention is all you need", 2017.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = nn.functional.relu,
        custom_encoder: nn.Module | None = None,
        custom_decoder: nn.Module | None = None,
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
        reversible: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        placed = {"device": device, "dtype": dtype}
        positional = (
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias
        )  # fmt: skip
        options = {"num_kv_heads": num_kv_heads, "rotary": rotary, "window": window, "lsh": lsh, **placed}
        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(*positional, **options)
            norm = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **placed)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm, reversible=reversible)
        self.encoder = custom_encoder
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(*positional, **options)
            norm = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **placed)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm)
        self.decoder = custom_decoder
        self._reset_parameters()
        self.d_model, self.nhead, self.batch_first = d_model, nhead, batch_first


def _has_nested_path(layer: nn.Module) -> bool:
    """Whether torch's encoder would take nested tensors through such layers, ours being the same to it."""
    attention = getattr(layer, "self_attn", None)
    if not (isinstance(layer, nn.TransformerEncoderLayer) and isinstance(attention, nn.MultiheadAttention)):
        return False
    return bool(
        not layer.norm_first
        and attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.in_proj_bias is not None
        and layer.activation_relu_or_gelu
        and layer.norm1.eps == layer.norm2.eps
        and attention.num_heads % 2 == 0
    )


def make_caches(layers: nn.ModuleList, batch_size: int, capacity: int, **options: Any) -> list[KeyValueCache]:
    """An empty cache for the self-attention of each layer."""
    caches = []
    for layer in layers:
        attention = layer.self_attn
        if not isinstance(attention, MultiheadAttention):
            raise type_error("self_attn", f"a {type(attention).__name__}", "a MultiheadAttention: others have no cache")
        caches.append(attention.make_cache(batch_size, capacity, **options))
    return caches


def _is_causal(mask: Tensor | None, hint: bool | None) -> bool:
    """What the caller says, else whether ``mask`` holds what a causal mask does."""
    if hint is not None or mask is None:
        return bool(hint)
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or not has_values(mask):
        return False
    causal = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if mask.dtype is not torch.bool:
        return torch.equal(mask, torch.zeros_like(mask).masked_fill(causal, -torch.inf))
    return torch.equal(mask, causal)
