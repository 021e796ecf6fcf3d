"""The default overload of each op: the plain formula in the shape of the op's schema."""

import torch
from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.softmax import reference


def softmax_forward(input: Tensor, dim: int, output_dtype: torch.dtype) -> Tensor:
    return reference.softmax(input, dim, output_dtype).contiguous()


def softmax_forward_out(input: Tensor, dim: int, output: Tensor) -> None:
    output.copy_(reference.softmax(input, dim, output.dtype))


def softmax_backward(grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    return reference.softmax_backward(grad_output, output, dim, input_dtype).contiguous()


def attach() -> None:
    for op in (softmax_forward, softmax_forward_out, softmax_backward):
        library.attach_reference(op.__name__, op)
