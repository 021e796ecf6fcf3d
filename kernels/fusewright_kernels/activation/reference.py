"""SwiGLU and GELU of a biased input as plain PyTorch: oracle in float64, naive baseline, last fallback."""

import math

import torch
from torch import Tensor

# tanh(c * (z + a * z^3)), Hendrycks and Gimpel's approximation.
_TANH_SCALE = math.sqrt(2.0 / math.pi)
_TANH_CUBE = 0.044715


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gate and up; without ``up``, ``gate`` holds both, one behind the other in the last dimension."""
    if up is not None:
        return gate, up
    first, second = gate.chunk(2, dim=-1)
    return first, second


def swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    """``gate * sigmoid(gate) * up``, computed in at least float32 and rounded once."""
    first, second = halves(gate, up)
    return (torch.nn.functional.silu(_wide(first)) * _wide(second)).to(gate.dtype)


def swiglu_backward(grad_output: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; without ``up``, of the packed gate, and no elements."""
    first, second = halves(gate, up)
    g, u, grad = _wide(first), _wide(second), _wide(grad_output)
    sigmoid = torch.sigmoid(g)
    grad_gate = (grad * u * sigmoid * (1.0 + g * (1.0 - sigmoid))).to(gate.dtype)
    grad_up = (grad * g * sigmoid).to(gate.dtype)
    if up is not None:
        return grad_gate, grad_up
    return torch.cat([grad_gate, grad_up], dim=-1), gate.new_empty((0,))


def bias_gelu(input: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """``z * P(Z < z)`` for z = input + bias and a normal Z, computed in at least float32 and rounded once."""
    z = _wide(input) if bias is None else _wide(input) + _wide(bias)
    return torch.nn.functional.gelu(z, approximate="tanh" if tanh else "none").to(input.dtype)


def bias_gelu_backward(grad_output: Tensor, input: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """Gradients of input and bias; of no elements without a bias."""
    z = _wide(input) if bias is None else _wide(input) + _wide(bias)
    if tanh:
        t = torch.tanh(_TANH_SCALE * (z + _TANH_CUBE * z**3))
        inner = _TANH_SCALE * (1.0 + 3.0 * _TANH_CUBE * z.square())
        slope = 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t.square()) * inner
    else:
        density = torch.exp(-0.5 * z.square()) / math.sqrt(2.0 * math.pi)
        slope = 0.5 * torch.erfc(-z / math.sqrt(2.0)) + z * density
    gradient = _wide(grad_output) * slope
    if bias is None:
        return gradient.to(input.dtype), input.new_empty((0,))
    return gradient.to(input.dtype), gradient.sum_to_size(bias.shape).to(bias.dtype)
