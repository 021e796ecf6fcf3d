"""Schemas of the recurrent layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusewright_kernels.library.registry import contiguous_like, define

# recurrent: one layer, one direction. cell is one of CELL_GATES, G its number of gates, in torch's order (LSTM input,
# forget, cell, output; GRU reset, update, new).
#   input       (T, B, I), any strides
#   h0          (B, H), or (B, P) with weight_hr; c0 (B, H) for an LSTM, else None
#   weight_ih   (G * H, I); weight_hh (G * H, H or P); biases (G * H,); weight_hr (P, H): h = weight_hr (o tanh(c))
#   lengths     int64 (B,): a sample keeps its states and has output 0 from its end on; its reverse begins at its end
#   resets      bool (T, B): where true a sample's states are set to zero before the step
# Steps run from T - 1 to 0 if reverse. With save_states the forward also returns what the backward reads, else empty
# tensors: gates (T, B, S * H) of the input's dtype, S of CELL_SAVED, and the LSTM's cells (T, B, H), float32 (float64
# for a float64 input), both 0 at steps that a sample does not take.

CELL_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
# The gates after their activation; a GRU also keeps weight_hh h + bias_hh of its new gate, a plain RNN's is its output.
CELL_SAVED = {"lstm": 4, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}

_RECURRENT_INPUTS = (
    "Tensor input, Tensor h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh,"
    " Tensor? weight_hr, Tensor? lengths, Tensor? resets, str cell, bool reverse"
)


def saved_states(
    input: Tensor, hidden: int, cell: str, save: bool, directions: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Empty ``gates`` and ``cells`` of a layer of ``hidden`` units; ``directions`` is (2,) where there are two."""
    cell_dtype = torch.promote_types(input.dtype, torch.float32)
    sizes = (*directions, *input.shape[:2])
    gates = input.new_empty((*sizes, CELL_SAVED[cell] * hidden) if save else (0,))
    cells = (*sizes, hidden) if save and cell == "lstm" else (0,)
    return gates, input.new_empty(cells, dtype=cell_dtype)


def _forward_fake(
    input: Tensor, h0: Tensor, c0: Tensor | None, weight_ih: Tensor, cell: str, save_states: bool
) -> tuple[Tensor, ...]:
    hidden = weight_ih.shape[0] // CELL_GATES[cell]
    directions = tuple(h0.shape[:-2])
    width = h0.shape[-1] * (2 if directions else 1)
    return (
        input.new_empty((*input.shape[:2], width)),
        contiguous_like(h0),
        input.new_empty((0,)) if c0 is None else contiguous_like(c0),
        *saved_states(input, hidden, cell, save_states, directions),
    )


def _recurrent_forward_fake(
    input: Tensor, h0: Tensor, c0: Tensor | None, weight_ih: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *_, cell, _, save_states = arguments
    return _forward_fake(input, h0, c0, weight_ih, cell, save_states)


define(
    "recurrent_forward",
    f"({_RECURRENT_INPUTS}, bool save_states) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    _recurrent_forward_fake,
)


def _recurrent_backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *parameters, _, _, _, _, need_input, need_states, need_weights = arguments
    return _gradients_fake(input, h0, c0, parameters, need_input, need_states, need_weights)


def _gradients_fake(
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    parameters: Sequence[Tensor | None],
    need_input: bool,
    need_states: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    return (
        contiguous_like(input) if need_input else input.new_empty((0,)),
        contiguous_like(h0) if need_states else input.new_empty((0,)),
        contiguous_like(c0) if c0 is not None and need_states else input.new_empty((0,)),
        *(
            contiguous_like(parameter) if parameter is not None and need_weights else input.new_empty((0,))
            for parameter in parameters
        ),
    )


define(
    "recurrent_backward",
    "(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor output, Tensor gates, Tensor cells,"
    f" {_RECURRENT_INPUTS}, bool need_input, bool need_states, bool need_weights)"
    " -> (Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor grad_weight_ih, Tensor grad_weight_hh,"
    " Tensor grad_bias_ih, Tensor grad_bias_hh, Tensor grad_weight_hr)",
    _recurrent_backward_fake,
)

# bidirectional: a layer with both directions, the second one in reverse. States (2, B, ...), parameters of either
# direction, output (T, B, 2 H or 2 P) with the directions next to each other; what is saved has them in front.

_BIDIRECTIONAL_INPUTS = (
    "Tensor input, Tensor h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh,"
    " Tensor? weight_hr, Tensor weight_ih_reverse, Tensor weight_hh_reverse, Tensor? bias_ih_reverse,"
    " Tensor? bias_hh_reverse, Tensor? weight_hr_reverse, Tensor? lengths, Tensor? resets, str cell"
)


def _bidirectional_forward_fake(
    input: Tensor, h0: Tensor, c0: Tensor | None, weight_ih: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *_, cell, save_states = arguments
    return _forward_fake(input, h0, c0, weight_ih, cell, save_states)


define(
    "bidirectional_forward",
    f"({_BIDIRECTIONAL_INPUTS}, bool save_states)"
    " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    _bidirectional_forward_fake,
)


def _bidirectional_backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *parameters, _, _, _, need_input, need_states, need_weights = arguments
    return _gradients_fake(input, h0, c0, parameters, need_input, need_states, need_weights)


define(
    "bidirectional_backward",
    "(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor output, Tensor gates, Tensor cells,"
    f" {_BIDIRECTIONAL_INPUTS}, bool need_input, bool need_states, bool need_weights)"
    " -> (Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor grad_weight_ih, Tensor grad_weight_hh,"
    " Tensor grad_bias_ih, Tensor grad_bias_hh, Tensor grad_weight_hr, Tensor grad_weight_ih_reverse,"
    " Tensor grad_weight_hh_reverse, Tensor grad_bias_ih_reverse, Tensor grad_bias_hh_reverse,"
    " Tensor grad_weight_hr_reverse)",
    _bidirectional_backward_fake,
)
