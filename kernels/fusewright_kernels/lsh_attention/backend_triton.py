"""Launchers of the Triton kernels of LSH attention, one per op of ``library``; shapes and meanings are in its schemas.

Rounds are launched one after the other; which operands exist is told to a kernel by passing None.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import library, philox
from fusewright_kernels.library.lsh_attention import ANY_BUCKETS
from fusewright_kernels.lsh_attention import tiles
from fusewright_kernels.lsh_attention.reference import chunk_of_positions
from fusewright_kernels.matrix_tiles import Tile, architecture_of, launch_options
from fusewright_kernels.triton_support import INTERPRETED, LAUNCH_OPTIONS, ceil_div, launching_on, strides
from fusewright_kernels.triton_support import refuse as refuse


def lsh_hash(vectors: Tensor, rotations: Sequence[Tensor], key_padding_mask: Tensor | None) -> Tensor:
    batch, heads, length, width = vectors.shape
    rounds = rotations[0].shape[2]
    buckets = vectors.new_empty((batch, heads, rounds, length), dtype=torch.int64)
    if buckets.numel() == 0:
        return buckets
    from fusewright_kernels.lsh_attention import triton_kernels_hash as kernels

    tile = tiles.HASH
    blocks = ceil_div(length, tile.block_m)
    place_value = 1
    with launching_on(vectors):
        for number, factor in enumerate(rotations):
            columns = factor.shape[3]
            is_last = number == len(rotations) - 1
            kernels.lsh_hash_kernel[(batch * heads * blocks * rounds,)](
                p_vectors=vectors,
                p_rotations=factor,
                p_padding=_bytes(key_padding_mask) if is_last else None,
                p_buckets=buckets,
                H=heads,
                T=length,
                R=rounds,
                n_columns=columns,
                n_blocks=blocks,
                place_value=place_value,
                padding_bucket=place_value * 2 * columns,
                **strides("vectors", vectors, "bht"),
                **strides("rotations", factor, "hdrn"),
                D=width,
                FIRST_DIGIT=number == 0,
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                BLOCK_D=tile.block_d,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                **LAUNCH_OPTIONS,
            )
            place_value *= 2 * columns
    return buckets


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def lsh_sort(buckets: Tensor, n_buckets: int = ANY_BUCKETS) -> Tensor:
    """A counting sort by some bits after the other, the lowest first."""
    buckets = buckets.contiguous()
    length = buckets.shape[3]
    orders = [torch.empty_like(buckets, dtype=torch.int32)]
    if buckets.numel() == 0:
        return orders[0]
    from fusewright_kernels.lsh_attention import triton_kernels_hash as kernels

    bits = max(1, (n_buckets - 1).bit_length())
    passes = ceil_div(bits, tiles.SORT_BITS)
    bits_per_pass = ceil_div(bits, passes)
    if passes > 1:
        orders.append(torch.empty_like(orders[0]))
    rows, blocks = buckets.numel() // length, ceil_div(length, tiles.SORT_BLOCK)
    counts = buckets.new_empty((rows, 2**bits_per_pass, blocks), dtype=torch.int32)
    source = None
    for number in range(passes):
        target = orders[number % 2]
        shared = {
            "p_buckets": buckets,
            "p_source": source,
            "T": length,
            "n_blocks": blocks,
            "shift": number * bits_per_pass,
            "N_BINS": 2**bits_per_pass,
            "BLOCK": tiles.SORT_BLOCK,
            "num_warps": tiles.SORT_WARPS,
            **LAUNCH_OPTIONS,
        }
        with launching_on(buckets):
            kernels.lsh_sort_count_kernel[(rows * blocks,)](p_counts=counts, **shared)
            ends = counts.flatten(1).cumsum(1, dtype=torch.int32)
            kernels.lsh_sort_place_kernel[(rows * blocks,)](p_ends=ends, p_target=target, **shared)
        source = target
    return target


@dataclass(frozen=True)
class _Problem:
    """The arguments that forward and backward have in common, in the order of the schema."""

    query_key: Tensor
    value: Tensor
    order: Tensor
    buckets: Tensor | None
    key_padding_mask: Tensor | None
    seed: Tensor | None
    chunk_length: int
    chunks_before: int
    chunks_after: int
    is_causal: bool
    scale: float
    allow_duplicates: bool
    dropout_p: float

    @property
    def rounds(self) -> int:
        return self.order.shape[2]

    @property
    def has_dropout(self) -> bool:
        return self.seed is not None and self.dropout_p > 0.0

    def tile(self, table: Callable[..., Tile]) -> Tile:
        widths = self.query_key.shape[3], self.value.shape[3]
        by_pair = self.has_dropout or not self.allow_duplicates
        architecture = architecture_of(self.query_key.device)
        return table(self.query_key.itemsize, *widths, architecture, by_pair, self.chunk_length)

    def operands(self, norms: Tensor) -> dict[str, Any]:
        """Tensors, sizes and scalars that the kernels take under one name."""
        query_key, value = self.query_key, self.value
        length, chunks = query_key.shape[2], ceil_div(query_key.shape[2], self.chunk_length)
        ring, window = self.rounds * chunks, self.chunks_before + 1 + self.chunks_after
        buckets = self.buckets
        return {
            "p_query_key": query_key,
            "p_value": value,
            **self._sorted_tables(norms),
            "p_chunk_of": self._chunk_of(),
            "p_bucket_of": None if self.allow_duplicates or buckets is None else buckets.contiguous(),
            "p_seed": self.seed if self.has_dropout else None,
            "H": query_key.shape[1],
            "T": length,
            "R": self.rounds,
            "C": self.chunk_length,
            "n_chunks": chunks,
            "ring": ring,
            "before": self.chunks_before % ring,
            "window": window,
            **strides("query_key", query_key, "bht"),
            **strides("value", value, "bht"),
            "keep_threshold": philox.keep_threshold(self.dropout_p),
            "keep_scale": philox.keep_scale(self.dropout_p) if self.has_dropout else 1.0,
            "D": query_key.shape[3],
            "DV": value.shape[3],
            "CAUSAL": self.is_causal,
            "WRAPS": window > ring,
            "ALIGNED": self.chunk_length % 4 == 0,
        }

    def in_sorted_order(self, table: Tensor) -> Tensor:
        """Numbers of the positions (..., B, H, T) as (..., B, H, R, T)."""
        places = self.order.flatten(2).to(torch.int64)
        return table.gather(-1, places.expand(*table.shape[:-1], -1)).unflatten(-1, self.order.shape[2:])

    def _sorted_tables(self, norms: Tensor) -> dict[str, Tensor | None]:
        order = self.order.contiguous()
        keys, buckets = order, None
        if self.key_padding_mask is not None:
            padded = self.key_padding_mask[:, None].expand(norms.shape)
            keys = order.masked_fill(self.in_sorted_order(padded), -1)
        if self.buckets is not None:
            buckets = self.buckets.gather(-1, order.to(torch.int64)).to(torch.int32)
        factors = torch.where(norms == 0.0, 0.0, self.scale / norms)
        return {
            "p_order": order,
            "p_keys": keys,
            "p_factors": self.in_sorted_order(factors),
            "p_sorted_buckets": buckets,
        }

    def _chunk_of(self) -> Tensor | None:
        if self.allow_duplicates:
            return None
        return chunk_of_positions(self.order, self.chunk_length).to(torch.int32)

    def launch_rounds(self, kernel: Any, tile: Tile, pieces: int, arguments: dict[str, Any]) -> None:
        batch, heads, length, _ = self.query_key.shape
        row_blocks = ceil_div(self.chunk_length, tile.block_m)
        programs = batch * heads * ceil_div(length, self.chunk_length) * row_blocks * pieces
        for round_number in range(self.rounds):
            kernel[(programs,)](
                **arguments, i_round=round_number, n_row_blocks=row_blocks, **launch_options(tile)
            )  # fmt: skip

    def float_rows(self, *sizes: int) -> Tensor | None:
        """Scratch that later rounds read; None if there is one round."""
        return self.query_key.new_empty(sizes, dtype=torch.float32) if self.rounds > 1 else None

    def rows(
        self, grad_output: Tensor | None, grad_lse: Tensor | None, output: Tensor | None, statistics: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``p_norms`` and ``p_rows`` of ``lsh_attention_rows_kernel``; the forward needs the norms alone."""
        from fusewright_kernels.lsh_attention import triton_kernels_rows as kernels

        batch, heads, length, width = self.query_key.shape
        norms = self.query_key.new_empty((batch, heads, length), dtype=torch.float32)
        rows = None if statistics is None else norms.new_empty((3, *norms.shape))
        # Absent operands have no strides that matter.
        like = self.query_key
        kernels.lsh_attention_rows_kernel[(ceil_div(norms.numel(), tiles.ROWS.block_m),)](
            p_query_key=self.query_key,
            p_norms=norms,
            p_grad_output=grad_output,
            p_output=output,
            p_statistics=None if statistics is None else statistics.contiguous(),
            p_grad_lse=grad_lse,
            p_rows=rows,
            H=heads,
            T=length,
            n_rows=norms.numel(),
            **strides("query_key", self.query_key, "bht"),
            **strides("grad", like if grad_output is None else grad_output, "bht"),
            **strides("output", like if output is None else output, "bht"),
            **strides("lse", like if grad_lse is None else grad_lse, "bht"),
            D=width,
            DV=self.value.shape[3],
            BLOCK_M=tiles.ROWS.block_m,
            BLOCK_D=tiles.ROWS.block_d,
            BLOCK_DV=tiles.ROWS.block_dv,
            num_warps=tiles.ROWS.num_warps,
            **LAUNCH_OPTIONS,
        )
        return norms, rows


def lsh_attention_forward(query_key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    problem = _Problem(query_key, value, *arguments)
    output = value.new_empty(value.shape)
    statistics = query_key.new_empty((2, *query_key.shape[:3]), dtype=torch.float32)
    if statistics.numel() == 0:
        return output, statistics
    from fusewright_kernels.lsh_attention import triton_kernels_forward as kernels

    tile = problem.tile(tiles.forward_tile)
    with launching_on(query_key):
        norms, _ = problem.rows(None, None, None, None)
        given = {
            **problem.operands(norms),
            "p_norms": norms,
            "n_rows": norms.numel(),
            "scale": problem.scale,
            "p_running": problem.float_rows(2, *statistics.shape),
            "p_sums": problem.float_rows(*value.shape),
            "p_output": output,
            "p_statistics": statistics,
        }
        pieces = max(ceil_div(value.shape[3], tile.block_dv), 1)
        problem.launch_rounds(kernels.lsh_attention_forward_kernel, tile, pieces, given)
    return output, statistics


def lsh_attention_backward(
    grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, statistics: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    problem = _Problem(*arguments)
    query_key, value = problem.query_key, problem.value
    grad_query_key, grad_value = query_key.new_empty(query_key.shape), value.new_empty(value.shape)
    if grad_query_key.numel() == grad_value.numel() == 0:
        return grad_query_key, grad_value
    from fusewright_kernels.lsh_attention import triton_kernels_backward as kernels

    tile = problem.tile(tiles.backward_tile)
    grad_output = grad_output if grad_output.stride(3) == 1 else grad_output.contiguous()
    output = output if output.stride(3) == 1 else output.contiguous()
    with launching_on(query_key):
        norms, rows = problem.rows(grad_output, grad_lse, output, statistics)
        assert rows is not None
        given = {
            **problem.operands(norms),
            "p_grad_output": grad_output,
            **strides("grad", grad_output, "bht"),
            "p_rows": problem.in_sorted_order(rows),
            "stride_rows": problem.order.numel(),
            "width": query_key.shape[3],
            "value_width": value.shape[3],
            "inverse_scale": 0.0 if problem.scale == 0.0 else 1.0 / problem.scale,
            "p_sums": problem.float_rows(*query_key.shape),
            "p_value_sums": problem.float_rows(*value.shape),
            "p_grad_query_key": grad_query_key,
            "p_grad_value": grad_value,
        }
        pieces = max(ceil_div(query_key.shape[3], tile.block_d), ceil_div(value.shape[3], tile.block_dv))
        problem.launch_rounds(kernels.lsh_attention_backward_kernel, tile, pieces, given)
    return grad_query_key, grad_value


for _op in (lsh_hash, lsh_sort, lsh_attention_forward, lsh_attention_backward):
    library.attach_triton(_op.__name__, _op, interpreted=INTERPRETED)
