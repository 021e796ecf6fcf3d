"""Launchers of the Triton kernels of linear attention; shapes and meanings are in the schemas of ``library``."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.linear_attention import reference, tiles
from fusewright_kernels.matrix_tiles import REGISTER_OPTIONS
from fusewright_kernels.triton_support import INTERPRETED, LAUNCH_OPTIONS, ceil_div, launching_on, strides
from fusewright_kernels.triton_support import refuse as refuse


@dataclass(frozen=True)
class _Problem:
    """The arguments that forward and backward have in common, in the order of the schema."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    initial_state: Tensor | None
    is_causal: bool
    eps: float
    feature_map: int

    @property
    def heads(self) -> int:
        return self.query.shape[0] * self.query.shape[1]

    @property
    def tile(self) -> tiles.Tile:
        widths = self.query.shape[3], self.value.shape[3]
        return tiles.tile(self.query.itemsize, *widths, self.is_causal)

    @property
    def padding(self) -> Tensor | None:
        mask = self.key_padding_mask
        return None if mask is None else mask.contiguous().view(torch.uint8)

    def new_state(self) -> Tensor:
        sizes = (*self.query.shape[:2], self.query.shape[3], self.value.shape[3] + 1)
        return self.query.new_empty(sizes, dtype=torch.float32)

    def constants(self) -> dict[str, Any]:
        tile = self.tile
        return {
            "H": self.query.shape[1],
            "L": tile.length,
            "D": self.query.shape[3],
            "DV": self.value.shape[3],
            "ELU": self.feature_map == reference.ELU,
            "BLOCK_T": tile.block_t,
            "BLOCK_D": tile.block_d,
            "BLOCK_DV": tile.block_dv,
            "num_warps": tile.num_warps,
            "num_stages": 1,
            **REGISTER_OPTIONS,
            **LAUNCH_OPTIONS,
        }

    def operands(self, states: Tensor, positions: int) -> dict[str, Any]:
        """What the kernels that meet a state take under one name; ``positions``: of the rows that they own."""
        return {
            "p_query": self.query,
            "p_key": self.key,
            "p_value": self.value,
            "p_padding": self.padding,
            "p_states": states,
            "T": positions,
            "n_tiles": ceil_div(positions, self.tile.block_t),
            "n_states": states.shape[2],
            "CAUSAL": self.is_causal,
            "PRECISION": "tf32x3" if self.query.dtype is torch.float32 else "tf32",
            **strides("query", self.query, "bht"),
            **strides("key", self.key, "bht"),
            **strides("value", self.value, "bht"),
            **self.constants(),
        }

    def states(
        self, rows: Tensor, columns: Tensor, numbers: Tensor | None, initial: Tensor | None, final: Tensor | None
    ) -> Tensor:
        """f(rows)^T [columns, 1] over the blocks before each block, (B, H, blocks, D, DV + 1), or if not causal over
        all, (B, H, 1, D, DV + 1). With ``numbers`` rows are queries, and blocks come from behind."""
        from fusewright_kernels.linear_attention import triton_kernels_state as kernels

        tile, length = self.tile, rows.shape[2]
        blocks = ceil_div(length, tile.length)
        sums = rows.new_empty((*rows.shape[:2], blocks, rows.shape[3], columns.shape[3] + 1), dtype=torch.float32)
        if not self.is_causal and final is None:
            final = self.new_state()
        pieces = ceil_div(rows.shape[3], tile.block_d) * max(ceil_div(columns.shape[3], tile.block_dv), 1)
        if sums.numel() > 0:
            kernels.linear_attention_sums_kernel[(self.heads * blocks * pieces,)](
                p_rows=rows,
                p_columns=columns,
                p_numbers=numbers,
                p_padding=self.padding if numbers is None else None,
                p_sums=sums,
                T=length,
                n_blocks=blocks,
                n_rows=self.heads * length,
                **strides("rows", rows, "bht"),
                **strides("columns", columns, "bht"),
                **self.constants(),
            )
        size = rows.shape[3] * (columns.shape[3] + 1)
        n_tiles = ceil_div(size, tiles.SCAN_BLOCK)
        if self.heads * size > 0:
            kernels.linear_attention_scan_kernel[(self.heads * n_tiles,)](
                p_sums=sums,
                p_initial=None if initial is None else initial.contiguous(),
                p_final=final,
                size=size,
                n_blocks=blocks,
                n_tiles=n_tiles,
                BACKWARDS=numbers is not None,
                REPLACE=self.is_causal,
                BLOCK=tiles.SCAN_BLOCK,
                num_warps=tiles.SMALL_WARPS,
                **LAUNCH_OPTIONS,
            )
        return sums if final is None or self.is_causal else final[:, :, None]


def linear_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _Problem(query, key, value, *arguments)
    output = library.in_layout_of(query, (*query.shape[:3], value.shape[3]))
    normalizer = query.new_empty(query.shape[:3], dtype=torch.float32)
    final_state = problem.new_state()
    if problem.heads == 0:
        return output, normalizer, final_state
    from fusewright_kernels.linear_attention import triton_kernels_forward as kernels

    with launching_on(query):
        states = problem.states(key, value, None, problem.initial_state, final_state)
        if normalizer.numel() > 0:
            operands = problem.operands(states, query.shape[2])
            pieces = max(ceil_div(value.shape[3], problem.tile.block_dv), 1)
            kernels.linear_attention_forward_kernel[(problem.heads * operands["n_tiles"] * pieces,)](
                p_output=output,
                p_normalizer=normalizer,
                eps=problem.eps,
                **strides("output", output, "bht"),
                **operands,
            )
    return output, normalizer, final_state


def linear_attention_backward(
    grad_output: Tensor,
    grad_final_state: Tensor | None,
    output: Tensor,
    normalizer: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, need_query, need_key, need_value, need_state = arguments
    problem = _Problem(query, key, value, *inputs)
    grad_query, grad_key, grad_value = (
        library.in_layout_of(like, like.shape) if wanted else query.new_empty((0,))
        for like, wanted in ((query, need_query), (key, need_key), (value, need_value))
    )
    grad_state = problem.new_state() if need_state else query.new_empty((0,))
    if problem.heads == 0:
        return grad_query, grad_key, grad_value, grad_state
    from fusewright_kernels.linear_attention import triton_kernels_backward as kernels

    grad_output = grad_output if grad_output.stride(3) == 1 else grad_output.contiguous()
    with launching_on(query):
        numbers = _row_numbers(grad_output, output, normalizer)
        shared = {"p_grad_output": grad_output, "p_numbers": numbers, **strides("grad", grad_output, "bht")}
        shared["n_rows"] = normalizer.numel()
        if grad_query.numel() > 0:
            operands = problem.operands(problem.states(key, value, None, problem.initial_state, None), query.shape[2])
            pieces = ceil_div(query.shape[3], problem.tile.block_d)
            kernels.linear_attention_backward_query_kernel[(problem.heads * operands["n_tiles"] * pieces,)](
                p_grad_query=grad_query, **strides("grad_query", grad_query, "bht"), **shared, **operands
            )
        if need_key or need_value or need_state:
            final = grad_state if need_state else None
            states = problem.states(query, grad_output, numbers, grad_final_state, final)
            if grad_key.numel() > 0 or grad_value.numel() > 0:
                _launch_key_kernel(problem, states, shared, grad_key, grad_value)
    return grad_query, grad_key, grad_value, grad_state


def _row_numbers(grad_output: Tensor, output: Tensor, normalizer: Tensor) -> Tensor:
    from fusewright_kernels.linear_attention import triton_kernels_state as kernels

    numbers = normalizer.new_empty((2, *normalizer.shape))
    if normalizer.numel() > 0:
        kernels.linear_attention_numbers_kernel[(ceil_div(normalizer.numel(), tiles.NUMBER_ROWS),)](
            p_grad_output=grad_output,
            p_output=output,
            p_normalizer=normalizer,
            p_numbers=numbers,
            H=normalizer.shape[1],
            T=normalizer.shape[2],
            n_rows=normalizer.numel(),
            **strides("grad", grad_output, "bht"),
            **strides("output", output, "bht"),
            DV=output.shape[3],
            BLOCK_M=tiles.NUMBER_ROWS,
            BLOCK_DV=tiles.NUMBER_COLUMNS,
            num_warps=tiles.SMALL_WARPS,
            **LAUNCH_OPTIONS,
        )
    return numbers


def _launch_key_kernel(
    problem: _Problem, states: Tensor, shared: dict[str, Any], grad_key: Tensor, grad_value: Tensor
) -> None:
    from fusewright_kernels.linear_attention import triton_kernels_backward as kernels

    operands, tile = problem.operands(states, problem.key.shape[2]), problem.tile
    gradients: dict[str, Any] = {}
    # An absent gradient has no strides that matter.
    for name, gradient, like in (("grad_key", grad_key, problem.key), ("grad_value", grad_value, problem.value)):
        wanted = gradient.numel() > 0
        gradients |= {f"p_{name}": gradient if wanted else None, **strides(name, gradient if wanted else like, "bht")}
    pieces = max(ceil_div(problem.key.shape[3], tile.block_d), ceil_div(problem.value.shape[3], tile.block_dv))
    kernels.linear_attention_backward_key_kernel[(problem.heads * operands["n_tiles"] * pieces,)](
        **gradients, **shared, **operands
    )


for _op in (linear_attention_forward, linear_attention_backward):
    library.attach_triton(_op.__name__, _op, interpreted=INTERPRETED)
