"""Which module of a model becomes which of ours, and why another one stays as it is."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusewright import functional
from fusewright import nn as fused

ORIGINAL_CLASS = "_fusewright_original_class"


class Swap(NamedTuple):
    """A new class for a module, and the attributes that it needs beside those that are there."""

    new_class: type[nn.Module]
    attributes: dict[str, Any]


class Kept(NamedTuple):
    """Why a module keeps its class."""

    reason: str


class LlamaStyleRMSNorm(nn.Module):
    """The RMS normalisation of transformers' models: ``weight``, one of the epsilons, nothing else.

    A call whose input has another dtype than the weight runs the original class's forward: what is rounded where then
    differs from model to model.
    """

    weight: Tensor
    zero_centered_weight: bool

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype is not self.weight.dtype:
            return getattr(self, ORIGINAL_CLASS).forward(self, hidden_states)
        return functional.rms_norm(
            hidden_states, self.weight.shape, self.weight, _epsilon(self),
            zero_centered_weight=self.zero_centered_weight,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={_epsilon(self)}"


def choose(module: nn.Module) -> Swap | Kept | None:
    """What is to become of ``module``; None if it is of no kind that we have."""
    kind = type(module)
    if kind in _SWAPS:
        reason = _obstacle(module)
        return _SWAPS[kind](module) if reason is None else Kept(reason)
    if kind.__module__.startswith("fusewright."):
        return None
    for known in _SWAPS:
        if isinstance(module, known):
            return Kept(f"a subclass of {known.__name__}, whose forward may differ")
    if isinstance(module, torch.jit.ScriptModule):
        return Kept("compiled by TorchScript") if module.original_name in _NAMES else None
    if "RMSNorm" in kind.__name__ or kind.__name__ == "T5LayerNorm":
        return _rms_norm(module)
    return None


def _obstacle(module: nn.Module) -> str | None:
    """Why ours could not, or had better not, take the place of a module of a class we know."""
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    if any(parameter.dtype is torch.float64 for parameter in module.parameters()):
        return "float64, for which there is no fused kernel"
    if getattr(module, "proj_size", 0) > 0 and any(parameter.is_cuda for parameter in module.parameters()):
        return f"proj_size={module.proj_size}, for which there is no CUDA kernel"
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        for name, attention in module.named_children():
            if name.endswith("attn") and type(attention) not in (nn.MultiheadAttention, fused.MultiheadAttention):
                return f"its {name} is a {type(attention).__name__}"
    return None


def _to(new_class: type[nn.Module], attributes: Callable[[Any], dict[str, Any]] = lambda module: {}) -> Any:
    return lambda module: Swap(new_class, attributes(module))


def _not_centered(module: nn.Module) -> dict[str, Any]:
    return {"zero_centered_weight": False}


def _plain_attention(module: nn.MultiheadAttention) -> dict[str, Any]:
    return {"num_kv_heads": module.num_heads, "rotary": None, "window": None}


def _layout(module: Any) -> dict[str, Any]:
    return {"batch_first": module.self_attn.batch_first}


def _plain_recurrence(module: nn.RNNBase) -> dict[str, Any]:
    states = 2 if module.mode == "LSTM" else 1
    return {
        "weight_dropout": 0.0, "zoneout": (0.0,) * states, "layer_norm": False, "peephole": False, "_extras": (),
    }  # fmt: skip


_SWAPS: dict[type[nn.Module], Callable[[nn.Module], Swap]] = {
    nn.LayerNorm: _to(fused.LayerNorm, _not_centered),
    nn.RMSNorm: _to(fused.RMSNorm, _not_centered),
    nn.MultiheadAttention: _to(fused.MultiheadAttention, _plain_attention),
    nn.TransformerEncoderLayer: _to(fused.TransformerEncoderLayer, _layout),
    nn.TransformerDecoderLayer: _to(fused.TransformerDecoderLayer, _layout),
    nn.TransformerEncoder: _to(fused.TransformerEncoder, lambda module: {"reversible": False}),
    nn.CrossEntropyLoss: _to(fused.CrossEntropyLoss),
    nn.LSTM: _to(fused.LSTM, _plain_recurrence),
    nn.GRU: _to(fused.GRU, _plain_recurrence),
    nn.RNN: _to(fused.RNN, _plain_recurrence),
    nn.LSTMCell: _to(fused.LSTMCell),
    nn.GRUCell: _to(fused.GRUCell),
    nn.RNNCell: _to(fused.RNNCell),
}
_NAMES = {known.__name__ for known in _SWAPS}


def _epsilon(module: nn.Module) -> float | None:
    """The epsilon of an RMS normalisation, under either of its names."""
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _rms_norm(module: nn.Module) -> Swap | Kept:
    """What a class that is called an RMS normalisation computes, found out by calling it on numbers of ours."""
    epsilon, weight = _epsilon(module), module._parameters.get("weight")
    plain = weight is not None and weight.ndim == 1 and len(module._parameters) == 1 and epsilon is not None
    if not plain or module._buffers or module._modules:
        return Kept("not an RMS normalisation by one weight and one epsilon")
    reason = _obstacle(module)
    if reason is not None:
        return Kept(reason)
    parameters = inspect.signature(type(module).forward).parameters.values()
    required = [parameter for parameter in parameters if parameter.default is inspect.Parameter.empty]
    if len(parameters) != 2 or len(required) != 2:
        return Kept("its forward takes more than the tensor")
    assert weight is not None and epsilon is not None
    try:
        zero_centered = _is_zero_centered(module, weight.shape[0], epsilon)
    except Exception as error:  # it is anybody's code, and any of it may need what the probe has not
        return Kept(f"its forward raises {type(error).__name__} for float32 rows on the CPU: {error}")
    if zero_centered is None:
        return Kept("computes another function than x / sqrt(mean(x^2) + eps) * weight")
    return Swap(LlamaStyleRMSNorm, {"zero_centered_weight": zero_centered})


@torch.no_grad()
def _is_zero_centered(module: nn.Module, width: int, epsilon: float) -> bool | None:
    """Whether the normalised rows are multiplied by 1 + weight, or by weight; None if by neither."""
    generator = torch.Generator().manual_seed(0)
    # Rows of ordinary size, and rows so small that the epsilon counts.
    sizes = torch.tensor([[1.0], [3.0], [epsilon**0.5], [epsilon**0.5]], device="cpu")
    rows = torch.randn(4, width, generator=generator, device="cpu") * sizes
    scale = torch.randn(width, generator=generator, device="cpu")
    probe = object.__new__(type(module))
    probe.__dict__.update(module.__dict__, _parameters={"weight": nn.Parameter(scale, requires_grad=False)})
    result = type(module).forward(probe, rows)
    if not isinstance(result, Tensor) or result.shape != rows.shape or result.dtype is not rows.dtype:
        return None
    normalized = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + epsilon)
    for zero_centered in (False, True):
        expected = normalized * (scale + 1.0 if zero_centered else scale)
        if torch.allclose(result, expected, rtol=1e-4, atol=1e-5):
            return zero_centered
    return None
