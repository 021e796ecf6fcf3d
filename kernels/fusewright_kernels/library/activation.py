"""Schemas of SwiGLU and of GELU with a bias, over tensors of any shape whose last dimension holds the features."""

from torch import Tensor

from fusewright_kernels.library.registry import contiguous_like, define


def _swiglu_fake(gate: Tensor, up: Tensor | None) -> Tensor:
    return contiguous_like(gate) if up is not None else gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2))


# Without `up`, `gate` holds both, one behind the other, and so does its gradient.
define("swiglu_forward", "(Tensor gate, Tensor? up) -> Tensor", _swiglu_fake)

define(
    "swiglu_backward",
    "(Tensor grad_output, Tensor gate, Tensor? up) -> (Tensor grad_gate, Tensor grad_up)",
    lambda grad_output, gate, up: (
        contiguous_like(gate), gate.new_empty((0,)) if up is None else contiguous_like(up),
    ),
)  # fmt: skip

define(
    "bias_gelu_forward",
    "(Tensor input, Tensor? bias, bool tanh) -> Tensor",
    lambda input, bias, tanh: contiguous_like(input),
)

define(
    "bias_gelu_backward",
    "(Tensor grad_output, Tensor input, Tensor? bias, bool tanh) -> (Tensor grad_input, Tensor grad_bias)",
    lambda grad_output, input, bias, tanh: (
        contiguous_like(input), input.new_empty((0,)) if bias is None else contiguous_like(bias),
    ),
)  # fmt: skip
