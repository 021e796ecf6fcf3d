"""Launchers of the Triton attention kernels, one per op of ``library``; shapes and meanings are in its schemas.

Which operands exist is told to a kernel by passing None, which Triton compiles away. No operand is made contiguous
except a gradient of the output whose last dimension is strided, as that of a sum is: it is read once per tile.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import library, philox
from fusewright_kernels.attention import tiles
from fusewright_kernels.attention.tile_lists import lists_of, tiles_in_window, visited_tiles
from fusewright_kernels.attention.triton_launch import alibi_strides, limit, row_numbers
from fusewright_kernels.matrix_tiles import Tile, architecture_of, launch_options
from fusewright_kernels.triton_support import INTERPRETED, ceil_div, launching_on, strides
from fusewright_kernels.triton_support import refuse as refuse


@dataclass(frozen=True)
class _Problem:
    """The arguments that forward and backward have in common, in the order of the schema."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    block_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    block_size: int
    scale: float
    softcap: float
    dropout_p: float
    window_left: int
    window_right: int
    bottom_right: bool

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def additive(self) -> bool:
        return self.mask is not None and self.mask.dtype is not torch.bool

    @property
    def has_dropout(self) -> bool:
        return self.seed is not None and self.dropout_p > 0.0

    @property
    def unit(self) -> float:
        """What one natural unit of a logit is in the kernels', see ``triton_primitives``."""
        return 1.0 if self.additive else math.log2(math.e)

    def tile(self, table: Any) -> Tile:
        widths = self.query.shape[3], self.value.shape[3]
        of_kind = functools.partial(table, self.query.itemsize, *widths, architecture_of(self.query.device))
        tile = of_kind(by_pair=self.mask is not None or self.has_dropout)
        return tile if self._blocks_hold(tile) else of_kind(by_pair=True)

    def _blocks_hold(self, tile: Tile) -> bool:
        """Whether no tile has pairs of several blocks of the block mask, so that it needs no look-up by pair."""
        if self.block_mask is None:
            return True
        return self.block_size % tile.block_m == 0 and self.block_size % tile.block_n == 0

    def operands(self) -> dict[str, Any]:
        """Tensors, sizes and scalars that every kernel takes under one name."""
        query, key, value, sequences = self.query, self.key, self.value, self.cu_seqlens_q
        n_sequences = 0 if sequences is None else sequences.numel() - 1
        return {
            "p_query": query,
            "p_key": key,
            "p_value": value,
            "p_seed": self.seed if self.has_dropout else None,
            "p_cu_seqlens_q": self.cu_seqlens_q,
            "p_cu_seqlens_k": self.cu_seqlens_k,
            "p_alibi_slopes": self.alibi_slopes,
            **strides("query", query, "bht"),
            **strides("key", key, "bhs"),
            **strides("value", value, "bhs"),
            **self._mask_operands(),
            **alibi_strides(self.alibi_slopes, query),
            "H": query.shape[1],
            "T": query.shape[2],
            "S": key.shape[2],
            "D": query.shape[3],
            "DV": value.shape[3],
            "GROUP": self.group,
            "n_sequences": n_sequences,
            "n_steps": n_sequences.bit_length(),
            "before": limit(self.window_left),
            "after": limit(self.window_right),
            "scale": self.scale / self.softcap if self.softcap > 0.0 else self.scale * self.unit,
            "softcap": self.softcap * self.unit,
            "keep_threshold": philox.keep_threshold(self.dropout_p),
            "keep_scale": philox.keep_scale(self.dropout_p) if self.has_dropout else 1.0,
            "SOFTCAP": self.softcap > 0.0,
            "BOTTOM_RIGHT": self.bottom_right,
        }

    def _mask_operands(self) -> dict[str, Any]:
        if self.mask is None:
            return {"p_mask": None, **dict.fromkeys((f"stride_mask_{axis}" for axis in "bhts"), 0)}
        mask = self.mask if self.additive else self.mask.view(torch.uint8)
        return {"p_mask": mask, **strides("mask", mask.expand(*self.query.shape[:3], self.key.shape[2]), "bhts")}

    def sweep_operands(self, tile: Tile, *, keys_own: bool) -> dict[str, Any]:
        """What the kernels take that sweep over the other side's tiles; ``keys_own``: each program owns keys."""
        limited = self.window_left >= 0 or self.window_right >= 0 or self.cu_seqlens_q is not None
        always_masked = self.mask is not None or self.block_mask is not None
        return {
            **self._block_mask_operands(tile, keys_own),
            "ADDITIVE": self.additive,
            "ALWAYS_MASKED": always_masked,
            "UNEVEN": always_masked or limited,
        }

    def _block_mask_operands(self, tile: Tile, keys_own: bool) -> dict[str, Any]:
        if self.block_mask is None:
            absent = dict.fromkeys(("p_block_mask", "p_tile_counts", "p_tile_lists"))
            return {**absent, "block_size": 1, "n_block_columns": 0, "n_tile_rows": 0, "stride_block_h": 0,
                    "stride_list_h": 0}  # fmt: skip
        lengths = (self.query.shape[2], self.key.shape[2])
        visited = visited_tiles(self.block_mask, self.block_size, lengths, (tile.block_m, tile.block_n))
        if self.cu_seqlens_q is None:
            shift = lengths[1] - lengths[0] if self.bottom_right else 0
            visited = visited & tiles_in_window(
                lengths, (tile.block_m, tile.block_n), shift, limit(self.window_left), limit(self.window_right),
                self.query.device,
            )  # fmt: skip
        counts, lists = lists_of(visited.mT if keys_own else visited)
        return {
            **self.element_block_mask(),
            **({"p_block_mask": None} if self._blocks_hold(tile) else {}),
            "p_tile_counts": counts,
            "p_tile_lists": lists,
            "n_tile_rows": lists.shape[2],
            "stride_list_h": lists.shape[1] if self.block_mask.shape[0] > 1 else 0,
        }

    def element_block_mask(self) -> dict[str, Any]:
        if self.block_mask is None:
            return {"p_block_mask": None, "block_size": 1, "n_block_columns": 0, "stride_block_h": 0}
        blocks = self.block_mask.contiguous()
        return {
            "p_block_mask": blocks.view(torch.uint8),
            "block_size": self.block_size,
            "n_block_columns": blocks.shape[2],
            "stride_block_h": blocks.stride(0) if blocks.shape[0] > 1 else 0,
        }


def attention_forward(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    problem = _Problem(query, key, value, *arguments)
    batch, heads, length, _ = query.shape
    output = library.in_layout_of(query, (batch, heads, length, value.shape[3]))
    statistics = query.new_empty((2, batch, heads, length), dtype=torch.float32)
    if statistics.numel() == 0:
        return output, statistics
    from fusewright_kernels.attention import triton_kernels_forward as kernels

    tile = problem.tile(tiles.forward_tile)
    # Few queries would leave most rows of a block empty: then the heads that share a key head fill them.
    packs = problem.group > 1 and length < tile.block_m and problem.block_mask is None
    packed_heads = problem.group if packs else 1
    row_blocks = ceil_div(length * packed_heads, tile.block_m)
    chunks = max(ceil_div(value.shape[3], tile.block_dv), 1)
    sinks = problem.sinks
    with launching_on(query):
        kernels.attention_forward_kernel[(batch * (heads // packed_heads) * row_blocks * chunks,)](
            **problem.operands(),
            **problem.sweep_operands(tile, keys_own=False),
            p_sinks=sinks,
            p_output=output,
            p_statistics=statistics,
            n_row_blocks=row_blocks,
            **strides("output", output, "bht"),
            stride_sinks=0 if sinks is None else sinks.stride(0),
            stride_statistics=statistics.stride(0),
            PACKED_HEADS=packed_heads,
            **launch_options(tile),
        )
    return output, statistics


def attention_backward(
    grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, statistics: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *arguments, need_query, need_key, need_value, need_mask, need_sinks = arguments  # type: ignore[assignment]
    problem = _Problem(*arguments)
    query, mask, sinks = problem.query, problem.mask, problem.sinks
    wanted = (need_query, need_key, need_value, need_mask and mask is not None, need_sinks and sinks is not None)
    inputs = (query, problem.key, problem.value, mask, sinks)
    gradients = [
        _empty_gradient(input, in_layout=index < 3) if want and input is not None else query.new_empty((0,))
        for index, (input, want) in enumerate(zip(inputs, wanted, strict=True))
    ]
    if statistics.numel() == 0:
        return tuple(gradient.zero_() for gradient in gradients)
    grad_output = grad_output if grad_output.stride(3) == 1 else grad_output.contiguous()
    with launching_on(query):
        rows = row_numbers(grad_output, grad_lse, output, statistics, natural=problem.additive)
        shared = {
            **problem.operands(),
            "p_rows": rows,
            "p_grad_output": grad_output,
            **strides("grad", grad_output, "bht"),
            "stride_rows": rows.stride(0),
        }
        if need_key or need_value:
            _launch_key(problem, shared, *(gradients[index] if wanted[index] else None for index in (1, 2)))
        if need_query:
            _launch_query(problem, shared, gradients[0])
        if wanted[3]:
            _launch_mask(problem, shared, gradients[3])
        if wanted[4]:
            gradients[4].copy_(_sinks_gradient(problem, rows))
    return tuple(gradients)


def _empty_gradient(input: Tensor, in_layout: bool) -> Tensor:
    return library.in_layout_of(input, input.shape) if in_layout else input.new_empty(input.shape)


def _launch_key(problem: _Problem, shared: dict[str, Any], grad_key: Tensor | None, grad_value: Tensor | None) -> None:
    from fusewright_kernels.attention import triton_kernels_backward as kernels

    batch, key_heads, length, _ = problem.key.shape
    tile = problem.tile(tiles.backward_key_tile)
    blocks = ceil_div(length, tile.block_n)
    chunks = max(ceil_div(problem.key.shape[3], tile.block_d), ceil_div(problem.value.shape[3], tile.block_dv))
    programs = batch * key_heads * blocks * chunks
    if programs == 0:
        return
    kernels.attention_backward_key_kernel[(programs,)](
        **shared,
        **problem.sweep_operands(tile, keys_own=True),
        p_grad_key=grad_key,
        p_grad_value=grad_value,
        n_own_blocks=blocks,
        **strides("grad_key", problem.key if grad_key is None else grad_key, "bhs"),
        **strides("grad_value", problem.value if grad_value is None else grad_value, "bhs"),
        key_scale=problem.scale,
        **launch_options(tile),
    )


def _launch_query(problem: _Problem, shared: dict[str, Any], grad_query: Tensor) -> None:
    from fusewright_kernels.attention import triton_kernels_backward_query as kernels

    batch, heads, length, width = problem.query.shape
    tile = problem.tile(tiles.backward_query_tile)
    blocks = ceil_div(length, tile.block_m)
    kernels.attention_backward_query_kernel[(batch * heads * blocks * ceil_div(width, tile.block_d),)](
        **shared,
        **problem.sweep_operands(tile, keys_own=False),
        p_grad_query=grad_query,
        n_own_blocks=blocks,
        **strides("grad_query", grad_query, "bht"),
        key_scale=problem.scale,
        **launch_options(tile),
    )


def _launch_mask(problem: _Problem, shared: dict[str, Any], grad_mask: Tensor) -> None:
    from fusewright_kernels.attention import triton_kernels_backward_query as kernels

    mask_b, mask_h, mask_t, mask_s = grad_mask.shape
    tile = problem.tile(tiles.backward_query_tile)
    programs = mask_b * mask_h * ceil_div(mask_t, tile.block_m) * ceil_div(mask_s, tile.block_n)
    if programs == 0:
        return
    kernels.attention_backward_mask_kernel[(programs,)](
        **shared,
        **problem.element_block_mask(),
        p_grad_mask=grad_mask,
        B=problem.query.shape[0],
        mask_b=mask_b,
        mask_h=mask_h,
        ONE_QUERY=mask_t == 1,
        ONE_KEY=mask_s == 1,
        **launch_options(tile),
    )


def _sinks_gradient(problem: _Problem, rows: Tensor) -> Tensor:
    """-sum over rows of p_sink * delta; elementwise on three numbers a row, so a kernel would gain nothing."""
    assert problem.sinks is not None
    reference, inverse, delta = rows
    exponent = problem.sinks.float()[:, None] * problem.unit - reference
    weights = torch.exp(exponent) if problem.additive else torch.exp2(exponent)
    return -(weights * inverse * delta).sum((0, 2))


for _op in (attention_forward, attention_backward):
    library.attach_triton(_op.__name__, _op, interpreted=INTERPRETED)
