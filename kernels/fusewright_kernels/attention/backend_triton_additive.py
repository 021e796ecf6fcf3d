"""Launchers of the Triton kernels of additive attention; shapes and meanings are in the schemas in ``library``."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import library, philox
from fusewright_kernels.attention import tiles
from fusewright_kernels.attention.triton_launch import limit, row_numbers
from fusewright_kernels.dispatch import Call
from fusewright_kernels.matrix_tiles import launch_options
from fusewright_kernels.triton_support import INTERPRETED, ceil_div, launching_on, strides
from fusewright_kernels.triton_support import refuse as refuse_any


def refuse(call: Call) -> str | None:
    """Why the kernels cannot serve ``call``, or None."""
    if any(dtype.is_floating_point for dtype in call.dtypes[1:]):
        return "the Triton kernels of additive attention take boolean masks only"
    return refuse_any(call)


@dataclass(frozen=True)
class _Problem:
    """The arguments that forward and backward have in common, in the order of the schema."""

    query: Tensor
    key: Tensor
    value: Tensor
    score_weight: Tensor
    mask: Tensor | None
    seed: Tensor | None
    scale: float
    dropout_p: float
    window_left: int
    window_right: int
    bottom_right: bool

    def operands(self) -> dict[str, Any]:
        """Tensors, sizes and scalars that every kernel takes under one name."""
        query, key, value = self.query, self.key, self.value
        weight = self.score_weight if self.score_weight.stride(1) == 1 else self.score_weight.contiguous()
        has_dropout = self.seed is not None and self.dropout_p > 0.0
        mask_strides = dict.fromkeys((f"stride_mask_{axis}" for axis in "bhts"), 0)
        if self.mask is not None:
            mask_strides = strides("mask", self.mask.expand(*query.shape[:3], key.shape[2]), "bhts")
        return {
            "p_query": query,
            "p_key": key,
            "p_value": value,
            "p_weight": weight,
            "p_mask": None if self.mask is None else self.mask.view(torch.uint8),
            "p_seed": self.seed if has_dropout else None,
            "H": query.shape[1],
            "T": query.shape[2],
            "S": key.shape[2],
            **strides("query", query, "bht"),
            **strides("key", key, "bhs"),
            **strides("value", value, "bhs"),
            **strides("weight", weight, "h"),
            **mask_strides,
            "before": limit(self.window_left),
            "after": limit(self.window_right),
            "scale": self.scale,
            "keep_threshold": philox.keep_threshold(self.dropout_p),
            "keep_scale": philox.keep_scale(self.dropout_p) if has_dropout else 1.0,
            "D": query.shape[3],
            "DV": value.shape[3],
            "GROUP": query.shape[1] // key.shape[1],
            "BOTTOM_RIGHT": self.bottom_right,
        }


def additive_attention_forward(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, width = query.shape
    output = library.in_layout_of(query, (batch, heads, length, value.shape[3]))
    statistics = query.new_empty((2, batch, heads, length), dtype=torch.float32)
    if statistics.numel() == 0:
        return output, statistics
    from fusewright_kernels.attention import triton_kernels_additive as kernels

    tile = tiles.additive_tile(width, value.shape[3])
    blocks = ceil_div(length, tile.block_m)
    pieces = max(ceil_div(value.shape[3], tile.block_dv), 1)
    with launching_on(query):
        kernels.additive_attention_forward_kernel[(batch * heads * blocks * pieces,)](
            **_Problem(query, key, value, *arguments).operands(),
            p_output=output,
            p_statistics=statistics,
            n_own_blocks=blocks,
            **strides("output", output, "bht"),
            stride_statistics=statistics.stride(0),
            **launch_options(tile),
        )
    return output, statistics


def additive_attention_backward(
    grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, statistics: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *arguments, need_query, need_key, need_value, need_weight, _ = arguments  # type: ignore[assignment]
    problem = _Problem(*arguments)
    query, key, value = problem.query, problem.key, problem.value
    gradients = [
        library.in_layout_of(like, like.shape) if want else like.new_empty((0,))
        for like, want in zip((query, key, value), (need_query, need_key, need_value), strict=True)
    ]
    weight = problem.score_weight
    grad_weight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else None
    absent = query.new_empty((0,))
    if statistics.numel() == 0 or key.shape[2] == 0:
        zeros = [gradient.zero_() for gradient in gradients]
        return *zeros, absent if grad_weight is None else grad_weight, absent
    grad_output = grad_output if grad_output.stride(3) == 1 else grad_output.contiguous()
    with launching_on(query):
        rows = row_numbers(grad_output, grad_lse, output, statistics, natural=True)
        shared = {
            **problem.operands(),
            "p_grad_output": grad_output,
            "p_rows": rows,
            **strides("grad", grad_output, "bht"),
            "stride_rows": rows.stride(0),
        }
        if (need_query or need_weight) and query.shape[3] > 0:
            grad_weight = _launch_query(problem, shared, gradients[0] if need_query else None, need_weight)
        if need_key or need_value:
            _launch_key(problem, shared, gradients[1] if need_key else None, gradients[2] if need_value else None)
    return *gradients, absent if grad_weight is None else grad_weight, absent


def _launch_query(
    problem: _Problem, shared: dict[str, Any], grad_query: Tensor | None, need_weight: bool
) -> Tensor | None:
    """Writes the gradient of query; returns that of the score weight if it is wanted."""
    from fusewright_kernels.attention import triton_kernels_additive as kernels

    batch, heads, length, width = problem.query.shape
    tile = tiles.additive_tile(width, problem.value.shape[3])
    blocks = ceil_div(length, tile.block_m)
    partial = problem.score_weight.new_empty((batch, heads, blocks, width)) if need_weight else None
    kernels.additive_attention_backward_query_kernel[(batch * heads * blocks * ceil_div(width, tile.block_d),)](
        **shared,
        p_grad_query=grad_query,
        p_grad_weight=partial,
        n_own_blocks=blocks,
        **strides("grad_query", problem.query if grad_query is None else grad_query, "bht"),
        **launch_options(tile),
    )
    return None if partial is None else partial.sum((0, 2))


def _launch_key(problem: _Problem, shared: dict[str, Any], grad_key: Tensor | None, grad_value: Tensor | None) -> None:
    from fusewright_kernels.attention import triton_kernels_additive as kernels

    batch, key_heads, length, width = problem.key.shape
    tile = tiles.additive_tile(width, problem.value.shape[3])
    blocks = ceil_div(length, tile.block_n)
    pieces = max(ceil_div(width, tile.block_d), ceil_div(problem.value.shape[3], tile.block_dv))
    if pieces == 0:
        return
    kernels.additive_attention_backward_key_kernel[(batch * key_heads * blocks * pieces,)](
        **shared,
        p_grad_key=grad_key,
        p_grad_value=grad_value,
        n_own_blocks=blocks,
        **strides("grad_key", problem.key if grad_key is None else grad_key, "bhs"),
        **strides("grad_value", problem.value if grad_value is None else grad_value, "bhs"),
        **launch_options(tile),
    )


for _op in (additive_attention_forward, additive_attention_backward):
    library.attach_triton(_op.__name__, _op, interpreted=INTERPRETED)
