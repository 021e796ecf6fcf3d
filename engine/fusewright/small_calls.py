"""One small call of every op, for ``doctor`` to check and ``explain`` to trace."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusewright import functional

Make = Callable[..., Tensor]


def _norm(function: Callable[..., Tensor]) -> Callable[[Make], Callable[..., Any]]:
    return lambda make: lambda **options: function(make(7, 129), 129, **options)


def _add_norm(function: Callable[..., Any]) -> Callable[[Make], Callable[..., Any]]:
    return lambda make: lambda **options: function(make(7, 129), make(7, 129), 129, **options)[0]


def _recurrent(function: Callable[..., Any], gates: int, states: int) -> Callable[[Make], Callable[..., Any]]:
    def bind(make: Make) -> Callable[..., Any]:
        given = [make(3, 16) for _ in range(states)]
        weights = [make(gates * 16, 8) / 4, make(gates * 16, 16) / 4]
        return lambda **options: function(make(5, 3, 8), *given, *weights, **options)[0]

    return bind


def _attention(make: Make) -> Callable[..., Any]:
    return lambda **options: functional.scaled_dot_product_attention(
        make(1, 2, 70, 16), make(1, 2, 70, 16), make(1, 2, 70, 16), is_causal=True, **options
    )


def _decode(make: Make) -> Callable[..., Any]:
    cache = make(1, 2, 70, 16)
    lengths = torch.full((1,), 70, device=cache.device)
    return lambda **options: functional.decode_attention(
        make(1, 4, 1, 16), cache, make(1, 2, 70, 16), lengths, **options
    )


def _additive(make: Make) -> Callable[..., Any]:
    return lambda **options: functional.additive_attention(
        make(1, 2, 9, 16), make(1, 2, 70, 16), make(1, 2, 70, 16), make(2, 16), **options
    )


def _lsh(make: Make) -> Callable[..., Any]:
    buckets = torch.arange(140, device=make(1).device).remainder(6).reshape(1, 1, 2, 70)
    return lambda **options: functional.lsh_attention(
        make(1, 1, 70, 16), make(1, 1, 70, 16), buckets=buckets, chunk_length=16, **options
    )


def _targets(make: Make) -> Tensor:
    return torch.arange(7, device=make(1).device)


_CALLS: dict[str, Callable[[Make], Callable[..., Any]]] = {
    "layer_norm": _norm(functional.layer_norm),
    "rms_norm": _norm(functional.rms_norm),
    "add_layer_norm": _add_norm(functional.add_layer_norm),
    "add_rms_norm": _add_norm(functional.add_rms_norm),
    "softmax": lambda make: lambda **options: functional.softmax(make(7, 129), -1, **options),
    "cross_entropy": lambda make: lambda **options: functional.cross_entropy(make(7, 129), _targets(make), **options),
    "linear_cross_entropy": lambda make: (
        lambda **options: functional.linear_cross_entropy(make(7, 16), make(129, 16), _targets(make), **options)
    ),
    "embedding": lambda make: (
        lambda **options: functional.embedding(_targets(make), make(129, 16), make(7, 16), **options)
    ),
    "linear": lambda make: lambda **options: functional.linear(make(2, 129), make(129, 129), make(129), **options),
    "rotary_embedding": lambda make: (
        lambda **options: functional.rotary_embedding(make(1, 2, 7, 16), make(7, 8), make(7, 8), **options)
    ),
    "swiglu": lambda make: lambda **options: functional.swiglu(make(7, 258), **options),
    "bias_gelu": lambda make: lambda **options: functional.bias_gelu(make(7, 129), make(129), **options),
    "dropout_add": lambda make: lambda **options: functional.dropout_add(make(7, 129), make(7, 129), **options),
    "scaled_dot_product_attention": _attention,
    "decode_attention": _decode,
    "additive_attention": _additive,
    "lsh_attention": _lsh,
    "lstm": _recurrent(functional.lstm, 4, 2),
    "gru": _recurrent(functional.gru, 3, 1),
    "rnn_tanh": _recurrent(functional.rnn_tanh, 1, 1),
}

OPS = tuple(_CALLS)


def small_call(op: str, dtype: torch.dtype, device: str) -> Callable[..., Any]:
    """A call of ``op`` that takes further keywords, such as ``backend``; the same values for every dtype and device."""

    def make(*size: int) -> Tensor:
        count = torch.Size(size).numel()
        values = torch.sin(torch.arange(count, dtype=torch.float64) * 1.7 + len(size)).reshape(size)
        return values.float().to(device, dtype)

    return _CALLS[op](make)
