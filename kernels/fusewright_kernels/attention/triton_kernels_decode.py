"""Triton kernels of attention over a cache: one program per split of the keys, then the splits of each row joined.

A split is a fixed number of keys, so that the sums of a row are taken in the same order on every device and in every
batch. Lengths are read on the device. Pointers that are None are absent operands. Imports only where Triton is
installed.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.attention.triton_primitives import logits_of, masked_tile, plan_tiles
from fusewright_kernels.triton_matrix_primitives import (
    INFINITY,
    LOG2_E,
    dot_rows,
    dot_visible,
    load_tile,
    natural_statistics,
    soften,
)
from fusewright_kernels.triton_primitives import to_dtype

# Sizes that no code improves on: specialising would only recompile.
_NOT_SPECIALIZED = ["H", "T", "S", "n_row_blocks", "n_splits", "n_pages", "page_size", "before"]


@triton.jit
def first_split(length, T, before, SPLIT: tl.constexpr):
    """Number of the first split that any query meets: a window leaves out those before it."""
    return tl.maximum(length - T - before, 0) // SPLIT


@triton.jit
def store_rows(
    b_sum, b_maximum, b_total, o_h, o_output, o_statistics, m_rows, i_chunk, p_sinks, p_output, p_statistics,
    stride_sinks, stride_statistics, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Output and statistics of rows whose keys are all summed; the sink comes last, with one split or several."""
    if p_sinks is not None:
        b_sink = tl.load(p_sinks + o_h * stride_sinks).to(tl.float32) * LOG2_E
        _, b_rescale, b_maximum, b_total = soften(b_sink[:, None], b_maximum, b_total, False, True)
        b_sum *= b_rescale[:, None]
    o_d = i_chunk * BLOCK_DV + tl.arange(0, BLOCK_DV)
    b_mean = b_sum * (1.0 / tl.where(b_total == 0.0, 1.0, b_total))[:, None]
    tl.store(
        p_output + o_output[:, None] + o_d[None, :],
        to_dtype(b_mean, p_output.dtype.element_ty),
        mask=m_rows[:, None] & (o_d < DV)[None, :],
    )
    if i_chunk == 0:
        b_natural, b_total = natural_statistics(b_maximum, b_total, False)
        tl.store(p_statistics + o_statistics, b_natural, mask=m_rows)
        tl.store(p_statistics + stride_statistics + o_statistics, b_total, mask=m_rows)


@triton.jit
def attention_decode_tile(
    b_sum, b_maximum, b_total, b_query, i_tile, i_chunk, length, b_low, b_high, b_position, b_slope,
    p_query, p_key, p_value, p_pages, o_query_rows, page_size, stride_key_b, stride_key_s, stride_value_b,
    stride_value_s, scale, softcap, D: tl.constexpr, DV: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of keys added to the weighted sum of values, the maximum and the sum of weights of each row."""
    o_s = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_s = o_s < length
    if MASKED and not EXACT:
        # All rows see the same keys: none is read that they do not see.
        m_s = (o_s >= tl.min(b_low, axis=0)) & (o_s < tl.max(b_high, axis=0))
    o_row = o_s.to(tl.int64)
    o_key = o_row * stride_key_s
    o_value = o_row * stride_value_s
    if p_pages is not None:
        o_page = tl.load(p_pages + o_s // page_size, mask=m_s, other=0)
        o_row = (o_s % page_size).to(tl.int64)
        o_key = o_page * stride_key_b + o_row * stride_key_s
        o_value = o_page * stride_value_b + o_row * stride_value_s
    b_dots, _ = dot_rows(
        b_query, p_query, o_query_rows, p_key, o_key, m_s, 0, D, BLOCK_D, BLOCK_M, BLOCK_N, MASKED
    )  # fmt: skip
    b_logits, _, m_visible = logits_of(
        b_dots, o_s[None, :], b_low[:, None], b_high[:, None], b_position[:, None], b_slope,
        None, None, None, None, scale, softcap, SOFTCAP, False, MASKED,
    )  # fmt: skip
    b_weights, b_rescale, b_maximum, b_total = soften(b_logits, b_maximum, b_total, False, MASKED)
    b_value = load_tile(p_value, o_value, m_s, i_chunk * BLOCK_DV, DV, BLOCK_DV, MASKED)
    b_sum = dot_visible(
        to_dtype(b_weights, p_value.dtype.element_ty), b_value, b_sum * b_rescale[:, None], m_visible, EXACT
    )
    return b_sum, b_maximum, b_total


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def attention_decode_kernel(
    p_query,
    p_key,
    p_value,
    p_lengths,  # int64 (B,)
    p_block_table,  # int64 (B, n_pages); the first dimension of the caches then counts pages
    p_alibi_slopes,  # float32
    p_sinks,  # (H,)
    p_output,
    p_statistics,  # float32 (2, B, H, T)
    p_split_sums,  # float32 (B, H, T, n_splits, DV), not divided by the sums of weights
    p_split_statistics,  # float32 (2, B, H, T, n_splits): maximum in the kernels' unit, sum of weights
    H, T, S, n_row_blocks, n_splits, n_pages, page_size,
    stride_query_b, stride_query_h, stride_query_t, stride_key_b, stride_key_h, stride_key_s,
    stride_value_b, stride_value_h, stride_value_s, stride_output_b, stride_output_h, stride_output_t,
    stride_alibi_b, stride_alibi_h, stride_sinks, stride_statistics, stride_split_statistics,
    before, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr, ONE_QUERY: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one key head, SPLIT keys, and of the output BLOCK_DV columns, a program.

    The heads of a group take turns along the rows. Without ``p_split_sums`` there is one split, which ends the work.
    """
    N_CHUNKS: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV if DV > 0 else 1
    i_chunk = tl.program_id(0) % N_CHUNKS
    i_program = tl.program_id(0) // N_CHUNKS
    i_split = i_program % n_splits
    i_block = i_program // n_splits % n_row_blocks
    i_pack = i_program // n_splits // n_row_blocks
    i_b = (i_pack // (H // GROUP)).to(tl.int64)
    i_key_head = (i_pack % (H // GROUP)).to(tl.int64)
    length = tl.minimum(tl.load(p_lengths + i_b).to(tl.int32), S)
    i_first = (first_split(length, T, before, SPLIT) + i_split) * SPLIT
    # Splits behind the end are neither written nor joined. The first is, that output is stored even without keys.
    if (i_first < length) | (i_split == 0):
        o_rows = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
        # Rows behind the last repeat it and are not stored.
        m_rows = o_rows < T * GROUP
        o_t = tl.minimum(o_rows // GROUP, T - 1)
        o_t64 = o_t.to(tl.int64)
        o_h = i_key_head * GROUP + o_rows % GROUP
        b_position = length - T + o_t
        b_low = tl.maximum(tl.maximum(b_position - before, 0), i_first)
        b_high = tl.minimum(b_position + 1, i_first + SPLIT)
        m_any = b_low < b_high
        b_low = tl.where(m_any, b_low, S)
        b_high = tl.where(m_any, b_high, 0)
        first, first_full, end_full, end = plan_tiles(b_low, b_high, None, BLOCK_N, False)
        b_slope = p_alibi_slopes
        if p_alibi_slopes is not None:
            b_slope = (tl.load(p_alibi_slopes + i_b * stride_alibi_b + o_h * stride_alibi_h) * LOG2_E)[:, None]
        p_query += i_b * stride_query_b
        p_key += i_key_head * stride_key_h
        p_value += i_key_head * stride_value_h
        p_pages = p_block_table
        if p_block_table is None:
            p_key += i_b * stride_key_b
            p_value += i_b * stride_value_b
        else:
            p_pages += i_b * n_pages
        o_query_rows = o_h * stride_query_h + o_t64 * stride_query_t
        b_query = load_tile(p_query, o_query_rows, m_rows, 0, D, BLOCK_D, False)
        b_maximum = tl.full([BLOCK_M], -INFINITY, tl.float32)
        b_total = tl.zeros([BLOCK_M], tl.float32)
        b_sum = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        for i_tile in range(first_full, end_full):
            b_sum, b_maximum, b_total = attention_decode_tile(
                b_sum, b_maximum, b_total, b_query, i_tile, i_chunk, length, b_low, b_high, b_position, b_slope,
                p_query, p_key, p_value, p_pages, o_query_rows, page_size, stride_key_b, stride_key_s,
                stride_value_b, stride_value_s, scale, softcap, D, DV, SOFTCAP,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, False,
            )  # fmt: skip
        # Several queries end at different keys: what one sees and another does not must not reach the other.
        for i_step in range(0, first_full - first + end - end_full):
            i_tile = masked_tile(i_step, first, first_full, end_full, None)
            b_sum, b_maximum, b_total = attention_decode_tile(
                b_sum, b_maximum, b_total, b_query, i_tile, i_chunk, length, b_low, b_high, b_position, b_slope,
                p_query, p_key, p_value, p_pages, o_query_rows, page_size, stride_key_b, stride_key_s,
                stride_value_b, stride_value_s, scale, softcap, D, DV, SOFTCAP,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, not ONE_QUERY,
            )  # fmt: skip
        o_statistics = (i_b * H + o_h) * T + o_t64
        if p_split_sums is None:
            o_output = i_b * stride_output_b + o_h * stride_output_h + o_t64 * stride_output_t
            store_rows(
                b_sum, b_maximum, b_total, o_h, o_output, o_statistics, m_rows, i_chunk, p_sinks, p_output,
                p_statistics, stride_sinks, stride_statistics, DV, BLOCK_DV,
            )  # fmt: skip
        else:
            o_split = o_statistics * n_splits + i_split
            o_d = i_chunk * BLOCK_DV + tl.arange(0, BLOCK_DV)
            m_sums = m_rows[:, None] & (o_d < DV)[None, :]
            tl.store(p_split_sums + (o_split * DV)[:, None] + o_d[None, :], b_sum, mask=m_sums)
            if i_chunk == 0:
                tl.store(p_split_statistics + o_split, b_maximum, mask=m_rows)
                tl.store(p_split_statistics + stride_split_statistics + o_split, b_total, mask=m_rows)


@triton.jit(do_not_specialize=["H", "T", "S", "n_splits", "before"])
def attention_decode_join_kernel(
    p_lengths,
    p_sinks,
    p_output,
    p_statistics,
    p_split_sums,
    p_split_statistics,
    H, T, S, n_splits, stride_output_b, stride_output_h, stride_output_t, stride_sinks, stride_statistics,
    stride_split_statistics, before,
    DV: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One row, and of the output BLOCK_DV columns, a program: its splits, BLOCK_N at a time, weighted and summed."""
    N_CHUNKS: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV if DV > 0 else 1
    i_chunk = tl.program_id(0) % N_CHUNKS
    o_row = (tl.program_id(0) // N_CHUNKS).to(tl.int64) + tl.arange(0, 1)
    o_h = o_row // T % H
    o_b = o_row // T // H
    i_b = (tl.program_id(0) // N_CHUNKS // T // H).to(tl.int64)
    length = tl.minimum(tl.load(p_lengths + i_b).to(tl.int32), S)
    end = tl.cdiv(length, SPLIT) - first_split(length, T, before, SPLIT)
    o_d = i_chunk * BLOCK_DV + tl.arange(0, BLOCK_DV)
    b_maximum = tl.full([1], -INFINITY, tl.float32)
    b_total = tl.zeros([1], tl.float32)
    b_sum = tl.zeros([1, BLOCK_DV], tl.float32)
    for i_first in range(0, end, BLOCK_N):
        o_n = i_first + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        o_split = o_row * n_splits + o_n
        b_maxima = tl.load(p_split_statistics + o_split, mask=m_n, other=-INFINITY)
        b_totals = tl.load(p_split_statistics + stride_split_statistics + o_split, mask=m_n, other=0.0)
        m_sums = m_n[:, None] & (o_d < DV)[None, :]
        b_sums = tl.load(p_split_sums + (o_split * DV)[:, None] + o_d[None, :], mask=m_sums, other=0.0)
        b_weights, b_rescale, b_maximum, _ = soften(b_maxima[None, :], b_maximum, b_total, False, True)
        b_total = b_total * b_rescale + tl.sum(b_weights * b_totals[None, :], axis=1)
        b_joined = tl.sum(tl.trans(b_weights) * b_sums, axis=0)
        b_sum = b_sum * b_rescale[:, None] + b_joined[None, :]
    o_output = o_b * stride_output_b + o_h * stride_output_h + o_row % T * stride_output_t
    store_rows(
        b_sum, b_maximum, b_total, o_h, o_output, o_row, o_row >= 0, i_chunk, p_sinks, p_output, p_statistics,
        stride_sinks, stride_statistics, DV, BLOCK_DV,
    )  # fmt: skip
