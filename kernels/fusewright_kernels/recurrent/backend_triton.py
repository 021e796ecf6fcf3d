"""Triton launchers of a cell: a single step, whose two products are torch's and all the rest one kernel.

Sequences are not served: with a launch for each step they would wait for launches.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.checks import value_error
from fusewright_kernels.triton_support import INTERPRETED, LAUNCH_OPTIONS, ceil_div, element_wise_tile, launching_on
from fusewright_kernels.triton_support import refuse as refuse


def recurrent_forward(
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *features, cell, _, save_states = arguments
    _check_cell(input, features)
    hidden = h0.shape[1]
    output, h_n = h0.new_empty((1, *h0.shape)), h0.new_empty(h0.shape)
    c_n = input.new_empty((0,)) if c0 is None else c0.new_empty(c0.shape)
    gates, cells = library.saved_states(input, hidden, cell, save_states)
    if h_n.numel() > 0:
        operands: dict[str, Tensor | None] = {
            "from_input": input[0] @ weight_ih.mT, "from_hidden": h0 @ weight_hh.mT, "bias_ih": bias_ih,
            "bias_hh": bias_hh, "output": output, "h_after": h_n,
        }  # fmt: skip
        saved = gates if save_states else None
        if cell == "lstm":
            operands |= {"c": c0, "c_after": c_n, "gates": saved, "cells": cells if save_states else None}
        elif cell == "gru":
            operands |= {"h": h0, "gates": saved}
        _launch(cell, "forward", h_n, operands)
    return output, h_n, c_n, gates, cells


def recurrent_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *features, cell, _, need_input, need_states, need_weights = arguments
    _check_cell(input, features)
    grad_hh = h0.new_empty((h0.shape[0], weight_hh.shape[0]))  # of the gates, as the hidden state reaches them
    grad_ih = torch.empty_like(grad_hh) if cell == "gru" else grad_hh
    past = h0.new_empty(h0.shape) if cell == "gru" else None
    grad_c0 = None if c0 is None else c0.new_empty(c0.shape)
    if h0.numel() > 0:
        operands: dict[str, Tensor | None] = {"grad_output": grad_output, "grad_h": grad_h_n}
        if cell == "lstm":
            operands |= {
                "grad_c": grad_c_n, "gates": gates, "cells": cells, "c": c0, "grad_gates": grad_hh,
                "grad_c_before": grad_c0,
            }  # fmt: skip
        elif cell == "gru":
            operands |= {
                "gates": gates, "h": h0, "grad_gates_ih": grad_ih, "grad_gates_hh": grad_hh, "grad_h_past": past,
            }  # fmt: skip
        else:
            operands |= {"h_after": output, "grad_gates": grad_hh}
        _launch(cell, "backward", h0, operands)

    def of_hidden() -> Tensor:
        return grad_hh @ weight_hh if past is None else torch.addmm(past, grad_hh, weight_hh)

    def if_wanted(wanted: bool, gradient: Callable[[], Tensor]) -> Tensor:
        return gradient() if wanted else input.new_empty((0,))

    with_bias = need_weights and bias_ih is not None
    return (
        if_wanted(need_input, lambda: (grad_ih @ weight_ih).unsqueeze(0)),
        if_wanted(need_states, of_hidden),
        grad_c0 if grad_c0 is not None and need_states else input.new_empty((0,)),
        if_wanted(need_weights, lambda: grad_ih.mT @ input[0]),
        if_wanted(need_weights, lambda: grad_hh.mT @ h0),
        if_wanted(with_bias, lambda: _sum_of_rows(grad_ih)),
        if_wanted(with_bias, lambda: _sum_of_rows(grad_hh)),
        input.new_empty((0,)),
    )


def _sum_of_rows(rows: Tensor) -> Tensor:
    return rows.sum(0, dtype=torch.float32).to(rows.dtype)


def _check_cell(input: Tensor, features: list[Any]) -> None:
    if input.shape[0] != 1 or any(feature is not None for feature in features):
        raise value_error("input", tuple(input.shape), "a single step without weight_hr, lengths or resets")


def _launch(cell: str, direction: str, like: Tensor, operands: dict[str, Tensor | None]) -> None:
    """One program for each tile of ``like``, (M, N). Kernels read everything in order."""
    from fusewright_kernels.recurrent import triton_kernels as kernels

    rows, columns = like.shape
    tile = element_wise_tile(columns)
    flags = {"RELU": cell == "rnn_relu"} if cell.startswith("rnn") else {}
    kernel = getattr(kernels, f"{cell.partition('_')[0]}_step_{direction}_kernel")
    with launching_on(like):
        kernel[(ceil_div(rows, tile.block_m) * ceil_div(columns, tile.block_n),)](
            **{f"p_{name}": None if operand is None else operand.contiguous() for name, operand in operands.items()},
            **flags,
            M=rows,
            N=columns,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            **LAUNCH_OPTIONS,
        )


for _op in (recurrent_forward, recurrent_backward):
    library.attach_triton(_op.__name__, _op, interpreted=INTERPRETED)
