"""Triton kernel of exact attention, forward: online softmax over the tiles of keys that a block of queries may meet.

Pointers that are None are absent operands, which Triton compiles away. Imports only where Triton is installed.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.attention.triton_primitives import kept, logits_of, masked_tile, plan_tiles, visible_interval
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
    "H", "T", "S", "n_row_blocks", "n_tile_rows", "n_block_columns", "n_sequences", "n_steps", "block_size",
    "before", "after", "keep_threshold",
]  # fmt: skip


@triton.jit
def attention_forward_tile(
    b_sum, b_maximum, b_total, b_query, i_tile, i_chunk, b_low, b_high, b_aligned, b_slope,
    p_query, p_key, p_value, p_mask, p_block_mask, p_seed, o_query_rows, o_mask_rows, o_block_rows, o_dropout_rows, S,
    stride_key_s, stride_value_s, stride_mask_s, block_size, scale, softcap, keep_threshold,
    D: tl.constexpr, DV: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of keys added to the weighted sum of values, the maximum and the sum of weights of each query."""
    o_s = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    o_s64 = o_s.to(tl.int64)
    m_s = o_s < S
    b_dots, _ = dot_rows(
        b_query, p_query, o_query_rows, p_key, o_s64 * stride_key_s, m_s, 0,
        D, BLOCK_D, BLOCK_M, BLOCK_N, MASKED,
    )  # fmt: skip
    b_logits, _, m_visible = logits_of(
        b_dots, o_s[None, :], b_low[:, None], b_high[:, None], b_aligned[:, None], b_slope,
        p_mask, o_mask_rows[:, None] + o_s64[None, :] * stride_mask_s,
        p_block_mask, o_block_rows[:, None] + o_s[None, :] // block_size,
        scale, softcap, SOFTCAP, ADDITIVE, MASKED,
    )  # fmt: skip
    b_weights, b_rescale, b_new_maximum, b_total = soften(b_logits, b_maximum, b_total, ADDITIVE, MASKED)
    if p_seed is not None:
        m_keep = kept(p_seed, o_dropout_rows, i_tile * BLOCK_N, S, keep_threshold, BLOCK_N)
        b_weights = tl.where(m_keep, b_weights, 0.0)
    b_value = load_tile(p_value, o_s64 * stride_value_s, m_s, i_chunk * BLOCK_DV, DV, BLOCK_DV, MASKED)
    b_sum = dot_visible(
        to_dtype(b_weights, p_value.dtype.element_ty), b_value, b_sum * b_rescale[:, None], m_visible, EXACT
    )
    return b_sum, b_new_maximum, b_total


@triton.jit
def attention_forward_rows(
    i_first_row, i_b, i_first_head, i_chunk, p_query, p_key, p_value, p_mask, p_block_mask, p_tile_count, p_tile_list,
    p_alibi_slopes, p_sinks, p_seed, p_cu_seqlens_q, p_cu_seqlens_k, p_output, p_statistics,
    H, T, S, n_block_columns, n_sequences, n_steps, block_size,
    stride_query_h, stride_query_t, stride_key_s, stride_value_s, stride_output_b, stride_output_h, stride_output_t,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_block_h, stride_alibi_b, stride_alibi_h,
    stride_sinks, stride_statistics, before, after, scale, softcap, keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, PACKED_HEADS: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, ALWAYS_MASKED: tl.constexpr, UNEVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The rows from ``i_first_row`` on; whether a NaN came up, which UNEVEN leaves to a second call with EXACT."""
    o_rows = i_first_row + tl.arange(0, BLOCK_M)
    # Rows behind the last repeat it and are not stored.
    m_rows = o_rows < T * PACKED_HEADS
    o_t = tl.minimum(o_rows // PACKED_HEADS, T - 1)
    o_h = (i_first_head + o_rows % PACKED_HEADS).to(tl.int64)
    o_t64 = o_t.to(tl.int64)
    o_query_rows = o_h * stride_query_h + o_t64 * stride_query_t
    o_mask_rows = i_b * stride_mask_b + o_h * stride_mask_h + o_t64 * stride_mask_t
    o_block_rows = o_h * stride_block_h + (o_t // block_size).to(tl.int64) * n_block_columns
    o_statistics = (i_b * H + o_h) * T + o_t64
    b_low, b_high, b_aligned = visible_interval(
        o_t, T, S, p_cu_seqlens_q, p_cu_seqlens_k, n_sequences, n_steps, before, after, BOTTOM_RIGHT
    )
    first, first_full, end_full, end = plan_tiles(b_low, b_high, p_tile_count, BLOCK_N, ALWAYS_MASKED or EXACT)
    UNIT: tl.constexpr = 1.0 if ADDITIVE else LOG2_E
    b_slope = p_alibi_slopes
    if p_alibi_slopes is not None:
        b_slope = (tl.load(p_alibi_slopes + i_b * stride_alibi_b + o_h * stride_alibi_h) * UNIT)[:, None]
    b_maximum = tl.full([BLOCK_M], -INFINITY, tl.float32)
    if p_sinks is not None:
        b_maximum = tl.load(p_sinks + o_h * stride_sinks).to(tl.float32) * UNIT
    b_total = tl.where(b_maximum == -INFINITY, 0.0, 1.0)
    b_sum = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_query = load_tile(p_query, o_query_rows, m_rows, 0, D, BLOCK_D, False)

    if not (ALWAYS_MASKED or EXACT):
        for i_tile in range(first_full, end_full):
            b_sum, b_maximum, b_total = attention_forward_tile(
                b_sum, b_maximum, b_total, b_query, i_tile, i_chunk, b_low, b_high, b_aligned, b_slope,
                p_query, p_key, p_value, p_mask, p_block_mask, p_seed,
                o_query_rows, o_mask_rows, o_block_rows, o_statistics, S,
                stride_key_s, stride_value_s, stride_mask_s, block_size, scale, softcap, keep_threshold,
                D, DV, SOFTCAP, ADDITIVE, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, False,
            )  # fmt: skip
    for i_step in range(0, first_full - first + end - end_full):
        i_tile = masked_tile(i_step, first, first_full, end_full, p_tile_list)
        b_sum, b_maximum, b_total = attention_forward_tile(
            b_sum, b_maximum, b_total, b_query, i_tile, i_chunk, b_low, b_high, b_aligned, b_slope,
            p_query, p_key, p_value, p_mask, p_block_mask, p_seed,
            o_query_rows, o_mask_rows, o_block_rows, o_statistics, S,
            stride_key_s, stride_value_s, stride_mask_s, block_size, scale, softcap, keep_threshold,
            D, DV, SOFTCAP, ADDITIVE, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, EXACT,
        )  # fmt: skip

    redo = False
    if UNEVEN and not EXACT:
        redo = any_nan(b_sum)
        m_rows = o_rows < tl.where(redo, 0, T * PACKED_HEADS)
    b_scale = keep_scale / tl.where(b_total == 0.0, 1.0, b_total)
    o_d = i_chunk * BLOCK_DV + tl.arange(0, BLOCK_DV)
    o_output = i_b * stride_output_b + o_h * stride_output_h + o_t64 * stride_output_t
    tl.store(
        p_output + o_output[:, None] + o_d[None, :],
        to_dtype(b_sum * b_scale[:, None], p_output.dtype.element_ty),
        mask=m_rows[:, None] & (o_d < DV)[None, :],
    )
    if i_chunk == 0:
        b_natural, b_total = natural_statistics(b_maximum, b_total, ADDITIVE)
        tl.store(p_statistics + o_statistics, b_natural, mask=m_rows)
        tl.store(p_statistics + stride_statistics + o_statistics, b_total, mask=m_rows)
    return redo


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def attention_forward_kernel(
    p_query,
    p_key,
    p_value,
    p_mask,  # bool as uint8, or additive
    p_block_mask,  # uint8 (heads, blocks of queries, blocks of keys), where tiles are no part of one block
    p_tile_counts,  # int32 (heads, row blocks): tiles of keys to visit, where there is a block mask
    p_tile_lists,  # int32 (heads, row blocks, tiles): which
    p_alibi_slopes,  # float32
    p_sinks,  # (H,)
    p_seed,
    p_cu_seqlens_q, p_cu_seqlens_k,
    p_output,
    p_statistics,  # float32 (2, B, H, T)
    H, T, S, n_row_blocks, n_tile_rows, n_block_columns, n_sequences, n_steps, block_size,
    stride_query_b, stride_query_h, stride_query_t, stride_key_b, stride_key_h, stride_key_s,
    stride_value_b, stride_value_h, stride_value_s, stride_output_b, stride_output_h, stride_output_t,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_block_h, stride_list_h,
    stride_alibi_b, stride_alibi_h, stride_sinks, stride_statistics,
    before, after, scale, softcap, keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, PACKED_HEADS: tl.constexpr, SOFTCAP: tl.constexpr,
    ADDITIVE: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, ALWAYS_MASKED: tl.constexpr, UNEVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows, and of the output BLOCK_DV columns, a program.

    A row is a query of one head; PACKED_HEADS heads, 1 or all GROUP heads of a key head, take turns along the rows.
    UNEVEN: the rows of a tile may see different keys of it.
    """
    N_CHUNKS: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV if DV > 0 else 1
    i_chunk = tl.program_id(0) % N_CHUNKS
    i_program = tl.program_id(0) // N_CHUNKS
    # From the last block: under a causal mask it has the most keys, and what starts last should be short.
    i_block = n_row_blocks - 1 - i_program % n_row_blocks
    i_pack = i_program // n_row_blocks
    n_packs = H // PACKED_HEADS
    i_b = (i_pack // n_packs).to(tl.int64)
    i_first_head = i_pack % n_packs * PACKED_HEADS
    i_key_head = (i_first_head // GROUP).to(tl.int64)

    p_query += i_b * stride_query_b
    p_key += i_b * stride_key_b + i_key_head * stride_key_h
    p_value += i_b * stride_value_b + i_key_head * stride_value_h
    p_tile_count = p_tile_counts
    p_tile_list = p_tile_lists
    if p_tile_counts is not None:
        i_list = i_first_head.to(tl.int64) * stride_list_h + i_block
        p_tile_count += i_list
        p_tile_list += i_list * n_tile_rows
    redo = attention_forward_rows(
        i_block * BLOCK_M, i_b, i_first_head, i_chunk, p_query, p_key, p_value, p_mask, p_block_mask,
        p_tile_count, p_tile_list, p_alibi_slopes, p_sinks, p_seed, p_cu_seqlens_q, p_cu_seqlens_k,
        p_output, p_statistics, H, T, S, n_block_columns, n_sequences, n_steps, block_size,
        stride_query_h, stride_query_t, stride_key_s, stride_value_s, stride_output_b, stride_output_h,
        stride_output_t, stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_block_h,
        stride_alibi_b, stride_alibi_h, stride_sinks, stride_statistics,
        before, after, scale, softcap, keep_threshold, keep_scale,
        D, DV, PACKED_HEADS, SOFTCAP, ADDITIVE, BOTTOM_RIGHT, ALWAYS_MASKED, UNEVEN,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False,
    )  # fmt: skip
    if UNEVEN:  # noqa: SIM102 - known when compiled, which the other condition is not
        # A NaN may have come from a value that its row does not see.
        if redo:
            for i_part in range(0, BLOCK_M, CAREFUL_ROWS):
                attention_forward_rows(
                    i_block * BLOCK_M + i_part, i_b, i_first_head, i_chunk, p_query, p_key, p_value, p_mask,
                    p_block_mask, p_tile_count, p_tile_list, p_alibi_slopes, p_sinks, p_seed,
                    p_cu_seqlens_q, p_cu_seqlens_k, p_output, p_statistics,
                    H, T, S, n_block_columns, n_sequences, n_steps, block_size,
                    stride_query_h, stride_query_t, stride_key_s, stride_value_s, stride_output_b, stride_output_h,
                    stride_output_t, stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_block_h,
                    stride_alibi_b, stride_alibi_h, stride_sinks, stride_statistics,
                    before, after, scale, softcap, keep_threshold, keep_scale,
                    D, DV, PACKED_HEADS, SOFTCAP, ADDITIVE, BOTTOM_RIGHT, ALWAYS_MASKED, UNEVEN,
                    CAREFUL_ROWS, BLOCK_N, BLOCK_D, BLOCK_DV, True,
                )  # fmt: skip
