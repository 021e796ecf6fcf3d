"""The models of :mod:`fusewright.models` as one writes them with torch.nn: the same weights, the same function.

Each takes over its model's constructor and ``state_dict`` and replaces modules and losses by torch's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusewright import models
from fusewright import nn as fused
from fusewright.models.state import positions_of


class GPT(models.GPT):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.blocks = _encoder(self.blocks)

    def hidden(self, tokens: Tensor, **unused: Any) -> Tensor:
        assert self.positions is not None
        embedded = self.dropout(self.tokens(tokens) + self.positions(positions_of(tokens, 0)))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=embedded.dtype)
        return self.blocks(embedded, mask, is_causal=True)

    def forward(self, tokens: Tensor, **unused: Any) -> Tensor:
        return F.linear(self.hidden(tokens), self.tokens.weight)

    def loss(self, tokens: Tensor, targets: Tensor, ignore_index: int = -100, **unused: Any) -> Tensor:
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten(), ignore_index=ignore_index)

    def generate(self, prompt: Tensor, new_tokens: int) -> Tensor:
        """Greedy, with a cache, as one writes it with torch.nn.functional: tokens (B, T) to (B, T + ``new_tokens``)."""
        assert self.positions is not None and self.blocks.norm is not None
        caches: list[list[Tensor]] = [[] for _ in self.blocks.layers]
        tokens = step = prompt
        for _ in range(new_tokens):
            places = torch.arange(tokens.shape[1] - step.shape[1], tokens.shape[1])
            hidden = self.tokens(step) + self.positions(places)
            for layer, cache in zip(self.blocks.layers, caches, strict=True):
                hidden = hidden + _attend_with_cache(layer.self_attn, layer.norm1(hidden), cache)
                hidden = hidden + layer.linear2(F.gelu(layer.linear1(layer.norm2(hidden))))
            step = F.linear(self.blocks.norm(hidden[:, -1:]), self.tokens.weight).argmax(-1)
            tokens = torch.cat([tokens, step], 1)
        return tokens


def _attend_with_cache(attention: nn.MultiheadAttention, hidden: Tensor, cache: list[Tensor]) -> Tensor:
    """Causal attention of (B, T, E) to what ``cache`` holds and to itself; it grows by the new keys and values."""
    projected = F.linear(hidden, attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = (
        part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in projected.chunk(3, dim=-1)
    )
    first = not cache
    cache[:] = (
        [key, value] if first else [torch.cat([old, new], 2) for old, new in zip(cache, (key, value), strict=True)]
    )
    attended = F.scaled_dot_product_attention(query, cache[0], cache[1], is_causal=first)
    return F.linear(attended.transpose(1, 2).flatten(2), attention.out_proj.weight, attention.out_proj.bias)


class BERT(models.BERT):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoder = _encoder(self.encoder)
        _replace_parts(self)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        follows: Tensor | None = None,
        segments: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        output = self(tokens, segments, key_padding_mask)
        loss = F.cross_entropy(output.token_logits.flatten(0, 1), targets.flatten())
        return loss if follows is None else loss + F.cross_entropy(output.next_sentence_logits, follows)


class EncoderDecoder(models.EncoderDecoder):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoder, decoder = _encoder(self.encoder), self.decoder
        first = decoder.layers[0]
        layer = nn.TransformerDecoderLayer(
            first.self_attn.embed_dim, first.self_attn.num_heads, first.linear1.out_features, first.dropout.p,
            batch_first=True, norm_first=True, bias=False,
        )  # fmt: skip
        norm = nn.LayerNorm(first.self_attn.embed_dim, bias=False)
        self.decoder = _loaded(nn.TransformerDecoder(layer, len(decoder.layers), norm), decoder)

    def forward(
        self, tokens: Tensor, source: Tensor | None = None, source_padding: Tensor | None = None, **unused: Any
    ) -> Tensor:
        assert source is not None
        heads, batch = self.decoder.layers[0].self_attn.num_heads, tokens.shape[0]
        places = positions_of(source, 0)
        bias = self.source_bias(places, places).repeat(batch, 1, 1)
        # torch wants masks of one kind.
        hidden_keys = None
        if source_padding is not None:
            hidden_keys = torch.zeros(source.shape, dtype=bias.dtype).masked_fill(source_padding, -torch.inf)
        memory = self.encoder(self.dropout(self.tokens(source)), bias, hidden_keys, is_causal=False)
        places = positions_of(tokens, 0)
        bias = self.target_bias(places, places).masked_fill(places > places[:, None], -torch.inf)
        assert bias.shape[0] == heads
        hidden = self.decoder(
            self.dropout(self.tokens(tokens)), memory, bias.repeat(batch, 1, 1), tgt_is_causal=False,
            memory_key_padding_mask=source_padding,
        )  # fmt: skip
        return F.linear(hidden * self.tokens.embedding_dim**-0.5, self.tokens.weight)

    def loss(self, tokens: Tensor, targets: Tensor, source: Tensor, source_padding: Tensor | None = None) -> Tensor:
        return F.cross_entropy(self(tokens, source, source_padding).flatten(0, 1), targets.flatten())


class ViT(models.ViT):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoder = _encoder(self.encoder)
        _replace_parts(self)

    def loss(self, images: Tensor, classes: Tensor) -> Tensor:
        return F.cross_entropy(self(images), classes)


class RNNEncoderDecoder(models.RNNEncoderDecoder):
    """With packed sequences, which is how torch leaves padding out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoder, self.decoder = _PaddedLSTM.of(self.encoder), _PaddedLSTM.of(self.decoder)
        _replace_parts(self)

    def loss(self, tokens: Tensor, targets: Tensor, source: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        return F.cross_entropy(self(tokens, source, source_lengths).flatten(0, 1), targets.flatten())


class SiameseLSTM(models.SiameseLSTM):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lstm = _PaddedLSTM.of(self.lstm)


class LSTMTagger(models.LSTMTagger):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lstm = _PaddedLSTM.of(self.lstm)
        _replace_parts(self)

    def loss(self, tokens: Tensor, tags: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None:
            tags = tags.masked_fill(torch.arange(tags.shape[1]) >= lengths[:, None], -100)
        return F.cross_entropy(self(tokens, lengths).flatten(0, 1), tags.flatten())


class _PaddedLSTM(nn.Module):
    """torch's LSTM on padded sequences (B, T, I), packed and unpacked round it."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    @classmethod
    def of(cls, ours: fused.LSTM) -> Any:
        theirs = nn.LSTM(
            ours.input_size, ours.hidden_size, ours.num_layers, batch_first=True, dropout=ours.dropout,
            bidirectional=ours.bidirectional,
        )  # fmt: skip
        return cls(_loaded(theirs, ours))

    def forward(self, input: Tensor, states: Any = None, *, lengths: Tensor | None = None) -> Any:
        if lengths is None:
            return self.lstm(input, states)
        packed = nn.utils.rnn.pack_padded_sequence(input, lengths, True, enforce_sorted=False)
        output, states = self.lstm(packed, states)
        return nn.utils.rnn.pad_packed_sequence(output, True, total_length=input.shape[1])[0], states


def _loaded(theirs: nn.Module, ours: nn.Module) -> Any:
    theirs.load_state_dict(ours.state_dict())
    return theirs


def _encoder(ours: fused.TransformerEncoder) -> Any:
    first = ours.layers[0]
    layer = nn.TransformerEncoderLayer(
        first.self_attn.embed_dim, first.self_attn.num_heads, first.linear1.out_features, first.dropout.p,
        first.activation, first.norm1.eps, True, first.norm_first, first.linear1.bias is not None,
    )  # fmt: skip
    norm: Any = ours.norm
    if norm is not None:
        norm = nn.LayerNorm(norm.normalized_shape, norm.eps, bias=norm.bias is not None)
    return _loaded(nn.TransformerEncoder(layer, len(ours.layers), norm, enable_nested_tensor=False), ours)


def _replace_parts(model: nn.Module) -> None:
    """The normalisations and linear layers beside the stack by torch's."""
    for name, module in list(model.named_children()):
        if isinstance(module, fused.LayerNorm):
            setattr(model, name, _loaded(nn.LayerNorm(module.normalized_shape, module.eps), module))
        elif isinstance(module, fused.Linear):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            setattr(model, name, _loaded(plain, module))
