"""Triton kernel of LSH attention, forward: one round, every position once as query of its chunk.

Rounds are launched one after the other and carry the running softmax of each position in memory, so that partial
results of rounds never exist and no two programs touch one row. Pointers that are None are absent operands, which
Triton compiles away. Imports only where Triton is installed.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.lsh_attention.triton_primitives import (
    chunk_place,
    kept,
    load_places,
    logits_of,
    of_head,
    only_if,
    visible_pairs,
)
from fusewright_kernels.triton_matrix_primitives import (
    CAREFUL_ROWS,
    INFINITY,
    LOG2_E,
    any_nan,
    dot_rows,
    dot_visible,
    load_tile,
    natural_statistics,
    soften,
)
from fusewright_kernels.triton_primitives import to_dtype

# Sizes that no code improves on: specialising would only recompile.
_NOT_SPECIALIZED = [
    "H", "T", "R", "C", "i_round", "n_chunks", "n_row_blocks", "ring", "before", "window", "n_rows",
    "keep_threshold",
]  # fmt: skip


@triton.jit
def lsh_attention_forward_rows(
    i_first, i_head, i_ring, i_chunk, p_query_key, p_value, p_order, p_keys, p_factors, p_sorted_buckets, p_chunk_of,
    p_bucket_of, p_seed, p_norms, p_running, p_sums, p_output, p_statistics,
    T, R, C, i_round, n_chunks, ring, before, window, n_rows, stride_query_key_t, stride_value_t, scale,
    keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, WRAPS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The rows of a chunk from ``i_first`` on; whether a NaN came up, which is left to a second call with EXACT."""
    i_own, rest_own = chunk_place(i_ring, i_first, n_chunks, C, T)
    b_query = load_places(p_order, i_own, rest_own, BLOCK_M)
    m_rows = tl.arange(0, BLOCK_M) < rest_own
    o_query = b_query.to(tl.int64)
    o_query_rows = o_query * stride_query_key_t
    b_rows = load_tile(p_query_key, o_query_rows, m_rows, 0, D, BLOCK_D, False)
    o_d = i_chunk * BLOCK_DV + tl.arange(0, BLOCK_DV)
    o_rows = i_head * T + o_query
    o_sums = (o_rows * DV)[:, None] + o_d[None, :]
    m_sums = m_rows[:, None] & (o_d < DV)[None, :]
    is_last = i_round == R - 1
    stride_statistics = n_rows.to(tl.int64)

    b_maximum = tl.full([BLOCK_M], -INFINITY, tl.float32)
    b_total = tl.zeros([BLOCK_M], tl.float32)
    b_sum = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if p_running is not None:
        # Written by the round before; programs of other columns write this round's beside it.
        p_earlier = p_running + (i_round + 1) % 2 * (2 * stride_statistics)
        m_earlier = only_if(i_round > 0, m_rows)
        b_maximum = tl.load(p_earlier + o_rows, mask=m_earlier, other=-INFINITY)
        b_total = tl.load(p_earlier + stride_statistics + o_rows, mask=m_earlier, other=0.0)
        b_sum = tl.load(p_sums + o_sums, mask=only_if(i_round > 0, m_sums), other=0.0)

    blocks_per_chunk = tl.cdiv(C, BLOCK_N)
    for i_step in range(0, window * blocks_per_chunk):
        i_place = i_step // blocks_per_chunk
        i_first_key = i_step % blocks_per_chunk * BLOCK_N
        i_key_ring = (i_ring + i_place + ring - before) % ring
        i_other, rest = chunk_place(i_key_ring, i_first_key, n_chunks, C, T)
        b_key = load_places(p_keys, i_other, rest, BLOCK_N)
        m_key = (tl.arange(0, BLOCK_N) < rest) & (b_key >= 0)
        o_key = b_key.to(tl.int64)
        b_dots, _ = dot_rows(
            b_rows, p_query_key, o_query_rows, p_query_key, o_key * stride_query_key_t, m_key, 0,
            D, BLOCK_D, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
        b_query_bucket = p_sorted_buckets
        b_key_bucket = p_sorted_buckets
        if p_sorted_buckets is not None:
            b_query_bucket = load_places(p_sorted_buckets, i_own, rest_own, BLOCK_M)[:, None]
            b_key_bucket = load_places(p_sorted_buckets, i_other, rest, BLOCK_N)[None, :]
        m_visible = visible_pairs(
            b_query[:, None], b_key[None, :], m_key[None, :], b_query_bucket, b_key_bucket, i_round,
            i_key_ring // n_chunks, CAUSAL,
        )  # fmt: skip
        b_logits = logits_of(
            b_dots * (load_places(p_factors, i_other, rest, BLOCK_N) * LOG2_E)[None, :], b_query[:, None],
            b_key[None, :], m_visible, p_chunk_of, p_bucket_of, T, R, ring, before, window, WRAPS,
        )  # fmt: skip
        b_weights, b_rescale, b_maximum, b_total = soften(b_logits, b_maximum, b_total, False, True)
        if p_seed is not None:
            m_keep = kept(
                p_seed, (i_head * R + i_round) * T + o_query, i_place * C + i_first_key, window * C, keep_threshold,
                BLOCK_N, ALIGNED,
            )  # fmt: skip
            b_weights = tl.where(m_keep, b_weights, 0.0)
        b_value = load_tile(p_value, o_key * stride_value_t, m_key, i_chunk * BLOCK_DV, DV, BLOCK_DV, True)
        b_sum = dot_visible(
            to_dtype(b_weights, p_value.dtype.element_ty), b_value, b_sum * b_rescale[:, None], m_visible, EXACT
        )

    redo = False
    if not EXACT:
        redo = any_nan(b_sum)
        m_rows = only_if(redo == 0, m_rows)
        m_sums = only_if(redo == 0, m_sums)
    m_alone = b_total == 0.0
    b_own = tl.load(
        p_value + (o_query * stride_value_t)[:, None] + o_d[None, :],
        mask=only_if(is_last, m_sums & m_alone[:, None]),
        other=0.0,
    )
    b_output = b_sum * (keep_scale / tl.where(m_alone, 1.0, b_total))[:, None]
    b_output = tl.where(m_alone[:, None], b_own.to(tl.float32), b_output)
    tl.store(p_output + o_sums, to_dtype(b_output, p_output.dtype.element_ty), mask=only_if(is_last, m_sums))
    if p_running is not None:
        tl.store(p_sums + o_sums, b_sum, mask=only_if(i_round < R - 1, m_sums))
    if i_chunk == 0:
        if p_running is not None:
            p_present = p_running + i_round % 2 * (2 * stride_statistics)
            tl.store(p_present + o_rows, b_maximum, mask=m_rows)
            tl.store(p_present + stride_statistics + o_rows, b_total, mask=m_rows)
        b_natural, b_total = natural_statistics(b_maximum, b_total, False)
        b_natural = tl.where(m_alone, scale * tl.load(p_norms + b_query), b_natural)
        tl.store(p_statistics + o_rows, b_natural, mask=only_if(is_last, m_rows))
        tl.store(p_statistics + stride_statistics + o_rows, b_total, mask=only_if(is_last, m_rows))
    return redo


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def lsh_attention_forward_kernel(
    p_query_key,
    p_value,
    p_order,  # int32 (B, H, R, T), as the next three in sorted order: positions
    p_keys,  # int32: positions as keys, -1 where nobody meets them
    p_factors,  # float32: scale over the length of the key, 0 without a direction
    p_sorted_buckets,  # int32, where only pairs of one bucket meet
    p_chunk_of,  # int32 (B, H, R, T): chunk in the ring of each position, where each key counts once
    p_bucket_of,  # int64 (B, H, R, T): bucket of each position, where both hold
    p_seed,
    p_norms,  # float32 (B, H, T)
    p_running,  # float32 (2, 2, B, H, T): maximum and sum so far, of even and of odd rounds; None if there is one round
    p_sums,  # float32 (B, H, T, DV): weighted sum of values so far, likewise
    p_output,
    p_statistics,  # float32 (2, B, H, T)
    H, T, R, C, i_round, n_chunks, n_row_blocks, ring, before, window, n_rows,
    stride_query_key_b, stride_query_key_h, stride_query_key_t, stride_value_b, stride_value_h, stride_value_t,
    scale, keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, WRAPS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one chunk of round ``i_round``, and of the output BLOCK_DV columns, a program."""
    N_CHUNKS: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV if DV > 0 else 1
    i_chunk = tl.program_id(0) % N_CHUNKS
    i_program = tl.program_id(0) // N_CHUNKS
    i_first = i_program % n_row_blocks * BLOCK_M
    i_ring = i_round * n_chunks + i_program // n_row_blocks % n_chunks
    i_head = (i_program // n_row_blocks // n_chunks).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H

    p_query_key += i_b * stride_query_key_b + i_h * stride_query_key_h
    p_value += i_b * stride_value_b + i_h * stride_value_h
    p_order += i_head * R * T
    p_keys += i_head * R * T
    p_factors += i_head * R * T
    p_norms += i_head * T
    p_head_buckets = of_head(p_sorted_buckets, i_head * R * T)
    p_head_chunk_of = of_head(p_chunk_of, i_head * R * T)
    p_head_bucket_of = of_head(p_bucket_of, i_head * R * T)
    redo = lsh_attention_forward_rows(
        i_first, i_head, i_ring, i_chunk, p_query_key, p_value, p_order, p_keys, p_factors, p_head_buckets,
        p_head_chunk_of, p_head_bucket_of, p_seed, p_norms, p_running, p_sums, p_output, p_statistics,
        T, R, C, i_round, n_chunks, ring, before, window, n_rows, stride_query_key_t, stride_value_t, scale,
        keep_threshold, keep_scale,
        D, DV, CAUSAL, WRAPS, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False,
    )  # fmt: skip
    # A NaN may have come from a value that its row does not meet.
    if redo:
        for i_part in range(0, BLOCK_M, CAREFUL_ROWS):
            lsh_attention_forward_rows(
                i_first + i_part, i_head, i_ring, i_chunk, p_query_key, p_value, p_order, p_keys, p_factors,
                p_head_buckets, p_head_chunk_of, p_head_bucket_of, p_seed, p_norms, p_running, p_sums, p_output,
                p_statistics, T, R, C, i_round, n_chunks, ring, before, window, n_rows, stride_query_key_t,
                stride_value_t, scale,
                keep_threshold, keep_scale,
                D, DV, CAUSAL, WRAPS, ALIGNED, CAREFUL_ROWS, BLOCK_N, BLOCK_D, BLOCK_DV, True,
            )  # fmt: skip
