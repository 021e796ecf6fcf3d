"""The default overload of each op: the plain formula in the shape of the op's schema."""

from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.activation import reference


def swiglu_forward(gate: Tensor, up: Tensor | None) -> Tensor:
    return reference.swiglu(gate, up).contiguous()


def swiglu_backward(grad_output: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = reference.swiglu_backward(grad_output, gate, up)
    return grad_gate.contiguous(), grad_up.contiguous()


def bias_gelu_forward(input: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return reference.bias_gelu(input, bias, tanh).contiguous()


def bias_gelu_backward(grad_output: Tensor, input: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    grad_input, grad_bias = reference.bias_gelu_backward(grad_output, input, bias, tanh)
    return grad_input.contiguous(), grad_bias.contiguous()


def attach() -> None:
    for op in (swiglu_forward, swiglu_backward, bias_gelu_forward, bias_gelu_backward):
        library.attach_reference(op.__name__, op)
