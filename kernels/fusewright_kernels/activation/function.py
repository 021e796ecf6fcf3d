"""SwiGLU and GELU with a bias as ``autograd.Function``s, with the rules for vmap and for double backward.

Elements are independent, so a vmap dimension is only one more dimension in front; only a bias that differs between
samples has no kernel.
"""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import autograd, library
from fusewright_kernels.activation import reference


class SwiGLU(torch.autograd.Function):
    """(gate, up, backend) -> output."""

    @staticmethod
    def forward(gate: Tensor, up: Tensor | None, backend: str) -> Tensor:
        return library.overload("swiglu_forward", backend)(gate, up)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gate, up, ctx.backend = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if autograd.second_derivative_possible(grad_output, gate, up):
            grad_gate, grad_up = SwiGLUBackward.apply(grad_output, gate, up, ctx.backend)
        else:
            grad_gate, grad_up = library.overload("swiglu_backward", ctx.backend)(grad_output, gate, up)
        return grad_gate, None if up is None else grad_up, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        gate, up = (_batch_first(tensor, dim, info) for tensor, dim in zip(inputs[:2], in_dims[:2], strict=True))
        return SwiGLU.apply(gate, up, inputs[2]), 0


class SwiGLUBackward(torch.autograd.Function):
    """(grad_output, gate, up, backend) -> (grad_gate, grad_up)."""

    @staticmethod
    def forward(grad_output: Tensor, gate: Tensor, up: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        return library.overload("swiglu_backward", backend)(grad_output, gate, up)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        def plain(*tensors: Any) -> list[Tensor]:
            grad_gate, grad_up = reference.swiglu_backward(*tensors)
            return [grad_gate] if tensors[2] is None else [grad_gate, grad_up]

        incoming = grad_gradients[:1] if ctx.saved_tensors[2] is None else grad_gradients
        return *autograd.pullback(plain, ctx.saved_tensors, incoming), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        tensors = [_batch_first(tensor, dim, info) for tensor, dim in zip(inputs[:3], in_dims[:3], strict=True)]
        grad_gate, grad_up = SwiGLUBackward.apply(*tensors, inputs[3])
        return (grad_gate, grad_up.expand(info.batch_size, 0) if tensors[2] is None else grad_up), (0, 0)


class BiasGELU(torch.autograd.Function):
    """(input, bias, tanh, backend) -> output."""

    @staticmethod
    def forward(input: Tensor, bias: Tensor | None, tanh: bool, backend: str) -> Tensor:
        return library.overload("bias_gelu_forward", backend)(input, bias, tanh)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, bias, ctx.tanh, ctx.backend = inputs
        ctx.save_for_backward(input, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, bias = ctx.saved_tensors
        if autograd.second_derivative_possible(grad_output, input, bias):
            grad_input, grad_bias = BiasGELUBackward.apply(grad_output, input, bias, ctx.tanh, ctx.backend)
        else:
            backward = library.overload("bias_gelu_backward", ctx.backend)
            grad_input, grad_bias = backward(grad_output, input, bias, ctx.tanh)
        return grad_input, None if bias is None else grad_bias, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        input, bias, tanh, _ = inputs
        if in_dims[1] is not None:

            def plain(input: Tensor, bias: Tensor) -> Tensor:
                return reference.bias_gelu(input, bias, tanh)

            return torch.vmap(plain, in_dims[:2])(input, bias), 0
        return BiasGELU.apply(_batch_first(input, in_dims[0], info), *inputs[1:]), 0


class BiasGELUBackward(torch.autograd.Function):
    """(grad_output, input, bias, tanh, backend) -> (grad_input, grad_bias)."""

    @staticmethod
    def forward(
        grad_output: Tensor, input: Tensor, bias: Tensor | None, tanh: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        return library.overload("bias_gelu_backward", backend)(grad_output, input, bias, tanh)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.tanh, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        def plain(grad_output: Tensor, input: Tensor, bias: Tensor | None) -> list[Tensor]:
            grad_input, grad_bias = reference.bias_gelu_backward(grad_output, input, bias, ctx.tanh)
            return [grad_input] if bias is None else [grad_input, grad_bias]

        incoming = grad_gradients[:1] if ctx.saved_tensors[2] is None else grad_gradients
        return *autograd.pullback(plain, ctx.saved_tensors, incoming), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        grad_output, input, bias, tanh, _ = inputs

        # A sample's own sum over its rows is no kernel's.
        def plain(grad_output: Tensor, input: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            return reference.bias_gelu_backward(grad_output, input, bias, tanh)

        return torch.vmap(plain, in_dims[:3])(grad_output, input, bias), (0, 0)


def _batch_first(tensor: Tensor | None, batch_dim: int | None, info: Any) -> Tensor | None:
    return None if tensor is None else autograd.batch_first(tensor, batch_dim, info.batch_size)
