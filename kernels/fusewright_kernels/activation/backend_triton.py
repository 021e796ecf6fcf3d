"""Launchers of the Triton activation kernels, one per op of ``library``; shapes and dtypes are in its schemas.

Which operands exist is told to a kernel by passing None, which Triton compiles away.
"""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.activation import tiles
from fusewright_kernels.activation.reference import halves
from fusewright_kernels.element_wise import launch_element_wise
from fusewright_kernels.triton_support import INTERPRETED, ceil_div, element_wise_tile
from fusewright_kernels.triton_support import refuse as refuse


def swiglu_forward(gate: Tensor, up: Tensor | None) -> Tensor:
    first, second = halves(gate, up)
    output = gate.new_empty(first.shape)
    if output.numel() > 0:
        from fusewright_kernels.activation import triton_kernels as kernels

        operands = {"gate": first, "up": second, "output": output}
        launch_element_wise(kernels.swiglu_forward_kernel, element_wise_tile(output.shape[-1]), operands)
    return output


def swiglu_backward(grad_output: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if gate.ndim > 4 and up is None:
        # The halves of a packed gradient are written in place, so they must be rows that no layout has to copy.
        grad_gate, grad_up = swiglu_backward(grad_output.flatten(0, -2), gate.flatten(0, -2), None)
        return grad_gate.reshape(gate.shape), grad_up
    grad_gate = gate.new_empty(gate.shape)
    grad_up = gate.new_empty((0,)) if up is None else up.new_empty(up.shape)
    if grad_output.numel() > 0:
        from fusewright_kernels.activation import triton_kernels as kernels

        first, second = halves(gate, up)
        grad_first, grad_second = halves(grad_gate, None if up is None else grad_up)
        operands = {
            "grad_output": grad_output, "gate": first, "up": second, "grad_gate": grad_first, "grad_up": grad_second,
        }  # fmt: skip
        launch_element_wise(kernels.swiglu_backward_kernel, element_wise_tile(grad_output.shape[-1]), operands)
    return grad_gate, grad_up


def bias_gelu_forward(input: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    output = input.new_empty(input.shape)
    if output.numel() > 0:
        from fusewright_kernels.activation import triton_kernels as kernels

        operands = {"input": input, "output": output}
        launch_element_wise(
            kernels.bias_gelu_forward_kernel, element_wise_tile(input.shape[-1]), operands, **_bias(bias), TANH=tanh
        )
    return output


def bias_gelu_backward(grad_output: Tensor, input: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    grad_input = input.new_empty(input.shape)
    if input.numel() == 0:
        return grad_input, input.new_empty((0,)) if bias is None else bias.new_zeros(bias.shape)
    from fusewright_kernels.activation import triton_kernels as kernels

    columns = input.shape[-1]
    partial, tile = None, element_wise_tile(columns)
    if bias is not None:
        tile = tiles.BIAS_GRADIENT
        partial = input.new_empty((ceil_div(input.numel() // columns, tile.block_m), columns), dtype=torch.float32)
    operands = {"grad_output": grad_output, "input": input, "grad_input": grad_input}
    launch_element_wise(
        kernels.bias_gelu_backward_kernel, tile, operands, **_bias(bias), p_bias_partial=partial, TANH=tanh
    )
    if bias is None or partial is None:
        return grad_input, input.new_empty((0,))
    return grad_input, partial.sum(0).to(bias.dtype)


def _bias(bias: Tensor | None) -> dict[str, Any]:
    return {"p_bias": bias, "stride_bias": 1 if bias is None else bias.stride(0)}


for _op in (swiglu_forward, swiglu_backward, bias_gelu_forward, bias_gelu_backward):
    library.attach_triton(_op.__name__, _op, interpreted=INTERPRETED)
