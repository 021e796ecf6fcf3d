"""Launcher of the Triton kernels of attention over a cache; shapes and meanings are in the schema in ``library``."""

import math
from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.attention import tiles
from fusewright_kernels.attention.triton_launch import alibi_strides, limit
from fusewright_kernels.matrix_tiles import architecture_of, launch_options
from fusewright_kernels.triton_support import INTERPRETED, LAUNCH_OPTIONS, ceil_div, launching_on, strides
from fusewright_kernels.triton_support import refuse as refuse


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    window_left: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, width = query.shape
    value_width = value_cache.shape[3]
    output = library.in_layout_of(query, (batch, heads, length, value_width))
    statistics = query.new_empty((2, batch, heads, length), dtype=torch.float32)
    if statistics.numel() == 0:
        return output, statistics
    from fusewright_kernels.attention import triton_kernels_decode as kernels

    group = heads // key_cache.shape[1]
    capacity = key_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    tile = tiles.decode_tile(query.itemsize, width, value_width, architecture_of(query.device), length * group)
    n_splits = _splits(capacity, length, window_left)
    split_sums, split_statistics = None, None
    if n_splits > 1:
        split_sums = statistics.new_empty((batch, heads, length, n_splits, value_width))
        split_statistics = statistics.new_empty((2, batch, heads, length, n_splits))
    row_blocks = ceil_div(length * group, tile.block_m)
    unit = math.log2(math.e)  # of logits, see ``triton_primitives``
    shared: dict[str, Any] = {
        "p_lengths": lengths.contiguous(),
        "p_sinks": sinks,
        "p_output": output,
        "p_statistics": statistics,
        "p_split_sums": split_sums,
        "p_split_statistics": split_statistics,
        "H": heads,
        "T": length,
        "S": capacity,
        "n_splits": n_splits,
        **strides("output", output, "bht"),
        "stride_sinks": 0 if sinks is None else sinks.stride(0),
        "stride_statistics": statistics.stride(0),
        "stride_split_statistics": 0 if split_statistics is None else split_statistics.stride(0),
        "before": limit(window_left),
        "DV": value_width,
        "SPLIT": tiles.SPLIT_LENGTH,
    }
    programs = batch * key_cache.shape[1] * row_blocks * n_splits * _chunks(value_width, tile.block_dv)
    with launching_on(query):
        kernels.attention_decode_kernel[(programs,)](
            **shared,
            p_query=query,
            p_key=key_cache,
            p_value=value_cache,
            p_block_table=None if block_table is None else block_table.contiguous(),
            p_alibi_slopes=alibi_slopes,
            n_row_blocks=row_blocks,
            n_pages=0 if block_table is None else block_table.shape[1],
            page_size=key_cache.shape[2],
            **strides("query", query, "bht"),
            **strides("key", key_cache, "bhs"),
            **strides("value", value_cache, "bhs"),
            **alibi_strides(alibi_slopes, query),
            scale=scale / softcap if softcap > 0.0 else scale * unit,
            softcap=softcap * unit,
            D=width,
            GROUP=group,
            SOFTCAP=softcap > 0.0,
            ONE_QUERY=length == 1,
            **launch_options(tile),
        )
        if split_sums is not None:
            rows = batch * heads * length
            joined = tiles.JOINED
            kernels.attention_decode_join_kernel[(rows * _chunks(value_width, joined.block_dv),)](
                **shared, BLOCK_N=joined.block_n, BLOCK_DV=joined.block_dv, num_warps=joined.num_warps, **LAUNCH_OPTIONS
            )
    return output, statistics


def _splits(capacity: int, queries: int, window_left: int) -> int:
    """How many splits a row can have at most. Lengths are known to the device alone, what a window leaves is not."""
    every = max(ceil_div(capacity, tiles.SPLIT_LENGTH), 1)
    if window_left < 0:
        return every
    # Keys that some query sees, wherever they start within a split.
    return min(every, ceil_div(window_left + queries, tiles.SPLIT_LENGTH) + 1)


def _chunks(width: int, block: int) -> int:
    return max(ceil_div(width, block), 1)


library.attach_triton("attention_decode", attention_decode, interpreted=INTERPRETED)
