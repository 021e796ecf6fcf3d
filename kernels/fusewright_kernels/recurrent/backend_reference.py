"""The default overload of each op: the plain formula in the shape of the op's schema.

Its backward starts from the inputs again, so nothing is saved for it.
"""

from typing import Any

from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.recurrent import reference
from fusewright_kernels.recurrent.layer import backward_inputs_of, inputs_of, joined, joined_gradients


def recurrent_forward(input: Tensor, h0: Tensor, c0: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, save_states = arguments
    output, h_n, c_n = reference.recurrent(input, h0, c0, *inputs)
    cell = inputs[-2]
    hidden = inputs[0].shape[0] // library.CELL_GATES[cell]
    gates, cells = library.saved_states(input, hidden, cell, save_states)
    # With no step to take the last states are the first ones, which an op must not return as they are.
    last = tuple(input.new_empty((0,)) if state is None else state.contiguous().clone() for state in (h_n, c_n))
    return (output.contiguous(), *last, gates.zero_(), cells.zero_())


def recurrent_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *inputs, need_input, need_states, need_weights = arguments
    gradients = reference.recurrent_backward(grad_output, grad_h_n, grad_c_n, *inputs)
    wanted = (need_input, need_states, need_states, *(need_weights,) * 5)
    return tuple(
        gradient.contiguous().clone() if want and gradient is not None else output.new_empty((0,))
        for gradient, want in zip(gradients, wanted, strict=True)
    )


def bidirectional_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, save_states = arguments
    return joined(*(recurrent_forward(*own, save_states) for own in inputs_of(*inputs)))


def bidirectional_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return joined_gradients(*(recurrent_backward(*own) for own in backward_inputs_of(*arguments)))


def attach() -> None:
    for op in (recurrent_forward, recurrent_backward, bidirectional_forward, bidirectional_backward):
        library.attach_reference(op.__name__, op)
