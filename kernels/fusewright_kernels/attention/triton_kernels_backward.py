"""Triton kernels of exact attention, backward: rows' numbers, then gradients of key and value, query, mask.

With p the softmax of the row, keep dropout's factor (0 or 1 / (1 - p)), dO the gradient of the output:

    delta = rowsum(dO * O) - grad_lse
    dlogits = p * (keep * dO value^T - delta)
    grad_value = (keep * p)^T dO,  grad_key = scale * (cap' dlogits)^T query,  grad_query = scale * (cap' dlogits) key

Logits are computed again in every kernel and each result is written by one program, with no atomics: the same bits at
every call. Pointers that are None are absent operands or gradients not asked for. Imports only where Triton is
installed.
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
    exponential,
    in_unit,
    load_tile,
)
from fusewright_kernels.triton_primitives import to_dtype

# Sizes that no code improves on: specialising would only recompile.
_NOT_SPECIALIZED = [
    "B", "H", "T", "S", "n_own_blocks", "n_tile_rows", "n_block_columns", "n_sequences", "n_steps", "block_size",
    "before", "after", "keep_threshold",
]  # fmt: skip


@triton.jit(do_not_specialize=["H", "T", "n_rows"])
def attention_backward_rows_kernel(
    p_grad_output,
    p_output,
    p_statistics,  # float32 (2, B, H, T)
    p_grad_lse,  # float32
    p_rows,  # float32 (3, B, H, T): the logits' reference in their unit, 1 / sum, delta
    H, T, n_rows,
    stride_grad_b, stride_grad_h, stride_grad_t, stride_output_b, stride_output_h, stride_output_t,
    stride_lse_b, stride_lse_h, stride_lse_t,
    DV: tl.constexpr, ADDITIVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """What backward needs of each row; BLOCK_M rows a program."""
    o_rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = o_rows < n_rows
    o_t = o_rows % T
    o_h = o_rows // T % H
    o_b = o_rows // T // H
    o_grad = o_b * stride_grad_b + o_h * stride_grad_h + o_t * stride_grad_t
    o_output = o_b * stride_output_b + o_h * stride_output_h + o_t * stride_output_t
    b_delta = tl.zeros([BLOCK_M], tl.float32)
    for i_column in range(0, DV, BLOCK_DV):
        b_grad = load_tile(p_grad_output, o_grad, m_rows, i_column, DV, BLOCK_DV, True).to(tl.float32)
        b_output = load_tile(p_output, o_output, m_rows, i_column, DV, BLOCK_DV, True).to(tl.float32)
        b_delta += tl.sum(b_grad * b_output, axis=1)
    if p_grad_lse is not None:
        o_lse = o_b * stride_lse_b + o_h * stride_lse_h + o_t * stride_lse_t
        b_delta -= tl.load(p_grad_lse + o_lse, mask=m_rows, other=0.0).to(tl.float32)
    b_maximum = tl.load(p_statistics + o_rows, mask=m_rows, other=0.0)
    b_total = tl.load(p_statistics + n_rows + o_rows, mask=m_rows, other=1.0)
    # A row without any key: exp(-inf - 0) * 0.
    b_reference = in_unit(tl.where(b_maximum == -INFINITY, 0.0, b_maximum), ADDITIVE)
    tl.store(p_rows + o_rows, b_reference, mask=m_rows)
    tl.store(p_rows + n_rows + o_rows, tl.where(b_total == 0.0, 0.0, 1.0 / b_total), mask=m_rows)
    tl.store(p_rows + 2 * n_rows.to(tl.int64) + o_rows, b_delta, mask=m_rows)


@triton.jit
def probabilities_of(b_logits, b_reference, b_inverse, m_visible, ADDITIVE: tl.constexpr, MASKED: tl.constexpr):
    b_p = exponential(b_logits - b_reference, ADDITIVE) * b_inverse
    if MASKED:
        # A row of NaN statistics must not reach the keys it does not see.
        b_p = tl.where(m_visible, b_p, 0.0)
    return b_p


@triton.jit
def logit_gradients_of(
    b_p, b_grad_p, b_delta, b_cap_derivative, m_keep, m_visible, keep_scale, DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits before masks and biases join: with the cap's derivative if it is given."""
    if DROPOUT:
        b_grad_p = tl.where(m_keep, b_grad_p * keep_scale, 0.0)
    b_grad = b_p * (b_grad_p - b_delta)
    if b_cap_derivative is not None:
        b_grad *= b_cap_derivative
    if MASKED:
        b_grad = tl.where(m_visible, b_grad, 0.0)
    return b_grad


@triton.jit
def attention_backward_key_tile(
    b_grad_key, b_grad_value, b_key, b_value, i_tile, i_chunk, b_low, b_high, b_aligned, b_slope,
    p_query, p_key, p_value, p_grad_output, p_mask, p_block_mask, p_seed, p_rows,
    o_key_rows, o_value_rows, o_mask_columns, o_block_columns, i_first_row, i_first_column, T, S, stride_rows,
    stride_query_t, stride_grad_t, stride_mask_t, n_block_columns, block_size, scale, softcap, keep_threshold,
    keep_scale,
    D: tl.constexpr, DV: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr, NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of queries added to the gradients of the program's keys and values; the tile lies as (keys, queries)."""
    DTYPE: tl.constexpr = p_query.dtype.element_ty
    o_t = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_t = o_t < T
    o_t64 = o_t.to(tl.int64)
    b_dots, b_query = dot_rows(
        b_key, p_key, o_key_rows, p_query, o_t64 * stride_query_t, m_t, i_chunk,
        D, BLOCK_D, BLOCK_N, BLOCK_M, MASKED,
    )  # fmt: skip
    b_logits, b_cap_derivative, m_visible = logits_of(
        b_dots, o_t[None, :], b_low[:, None], b_high[:, None], b_aligned[:, None], b_slope,
        p_mask, o_mask_columns[:, None] + o_t64[None, :] * stride_mask_t,
        p_block_mask, o_block_columns[:, None] + (o_t // block_size).to(tl.int64)[None, :] * n_block_columns,
        scale, softcap, SOFTCAP, ADDITIVE, MASKED,
    )  # fmt: skip
    b_reference = tl.load(p_rows + o_t, mask=m_t, other=0.0)
    b_inverse = tl.load(p_rows + stride_rows + o_t, mask=m_t, other=0.0)
    b_p = probabilities_of(b_logits, b_reference[None, :], b_inverse[None, :], m_visible, ADDITIVE, MASKED)
    m_keep = m_visible
    b_dropped = b_p
    if p_seed is not None:
        m_keep = tl.trans(kept(p_seed, i_first_row + o_t64, i_first_column, S, keep_threshold, BLOCK_N))
        b_dropped = tl.where(m_keep, b_p, 0.0)
    if NEED_KEY:
        b_grad_p, b_grad_output = dot_rows(
            b_value, p_value, o_value_rows, p_grad_output, o_t64 * stride_grad_t, m_t, i_chunk,
            DV, BLOCK_DV, BLOCK_N, BLOCK_M, MASKED,
        )  # fmt: skip
    else:
        b_grad_p = b_p
        b_grad_output = load_tile(p_grad_output, o_t64 * stride_grad_t, m_t, i_chunk * BLOCK_DV, DV, BLOCK_DV, MASKED)
    if NEED_VALUE:
        b_grad_value = dot_visible(to_dtype(b_dropped, DTYPE), b_grad_output, b_grad_value, m_visible, EXACT)
    if NEED_KEY:
        b_delta = tl.load(p_rows + 2 * stride_rows + o_t, mask=m_t, other=0.0)
        if not SOFTCAP:
            b_cap_derivative = None
        b_grad = logit_gradients_of(
            b_p, b_grad_p, b_delta[None, :], b_cap_derivative, m_keep, m_visible, keep_scale,
            p_seed is not None, MASKED,
        )  # fmt: skip
        b_grad_key = dot_visible(to_dtype(b_grad, DTYPE), b_query, b_grad_key, m_visible, EXACT)
    return b_grad_key, b_grad_value


@triton.jit
def attention_backward_key_rows(
    i_first_row, i_b, i_key_head, i_chunk, i_block,
    p_query, p_key, p_value, p_grad_output, p_mask, p_block_mask, p_tile_counts, p_tile_lists, p_alibi_slopes, p_seed,
    p_cu_seqlens_q, p_cu_seqlens_k, p_rows, p_grad_key, p_grad_value,
    H, T, S, n_tile_rows, n_block_columns, n_sequences, n_steps, block_size, stride_rows, stride_key_s, stride_value_s,
    stride_grad_key_s, stride_grad_value_s,
    stride_query_b, stride_query_h, stride_query_t, stride_grad_b, stride_grad_h, stride_grad_t,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_block_h, stride_list_h,
    stride_alibi_b, stride_alibi_h, before, after, scale, key_scale, softcap, keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, ALWAYS_MASKED: tl.constexpr, UNEVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The keys from ``i_first_row`` on; whether a NaN came up, which UNEVEN leaves to a second call with EXACT."""
    NEED_KEY: tl.constexpr = p_grad_key is not None
    NEED_VALUE: tl.constexpr = p_grad_value is not None
    o_rows = i_first_row + tl.arange(0, BLOCK_N)
    # Keys behind the last repeat it and are not stored.
    m_rows = o_rows < S
    o_s = tl.minimum(o_rows, S - 1)
    o_s64 = o_s.to(tl.int64)
    o_key_rows = o_s64 * stride_key_s
    o_value_rows = o_s64 * stride_value_s
    b_key = load_tile(p_key, o_key_rows, m_rows, 0, D, BLOCK_D, False)
    b_value = load_tile(p_value, o_value_rows, m_rows, 0, DV, BLOCK_DV, False)
    b_low, b_high, b_aligned = visible_interval(
        o_s, S, T, p_cu_seqlens_k, p_cu_seqlens_q, n_sequences, n_steps, after, before, BOTTOM_RIGHT
    )
    b_grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_grad_value = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for i_member in range(GROUP):
        i_h = i_key_head * GROUP + i_member
        p_query_head = p_query + i_b * stride_query_b + i_h * stride_query_h
        p_grad_head = p_grad_output + i_b * stride_grad_b + i_h * stride_grad_h
        i_statistics = (i_b * H + i_h) * T
        o_mask_columns = i_b * stride_mask_b + i_h * stride_mask_h + o_s64 * stride_mask_s
        o_block_columns = i_h * stride_block_h + (o_s // block_size).to(tl.int64)
        b_slope = p_alibi_slopes
        if p_alibi_slopes is not None:
            b_slope = tl.load(p_alibi_slopes + i_b * stride_alibi_b + i_h * stride_alibi_h)
            b_slope *= 1.0 if ADDITIVE else LOG2_E
        p_tile_count = p_tile_counts
        p_tile_list = p_tile_lists
        if p_tile_counts is not None:
            p_tile_count += i_h * stride_list_h + i_block
            p_tile_list += (i_h * stride_list_h + i_block) * n_tile_rows
        first, first_full, end_full, end = plan_tiles(b_low, b_high, p_tile_count, BLOCK_M, ALWAYS_MASKED or EXACT)
        if not (ALWAYS_MASKED or EXACT):
            for i_tile in range(first_full, end_full):
                b_grad_key, b_grad_value = attention_backward_key_tile(
                    b_grad_key, b_grad_value, b_key, b_value, i_tile, i_chunk, b_low, b_high, b_aligned, b_slope,
                    p_query_head, p_key, p_value, p_grad_head, p_mask, p_block_mask, p_seed, p_rows + i_statistics,
                    o_key_rows, o_value_rows, o_mask_columns, o_block_columns, i_statistics, i_first_row, T, S,
                    stride_rows, stride_query_t, stride_grad_t, stride_mask_t, n_block_columns, block_size, scale,
                    softcap, keep_threshold, keep_scale, D, DV, SOFTCAP, ADDITIVE, NEED_KEY, NEED_VALUE,
                    BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, False,
                )  # fmt: skip
        for i_step in range(0, first_full - first + end - end_full):
            i_tile = masked_tile(i_step, first, first_full, end_full, p_tile_list)
            b_grad_key, b_grad_value = attention_backward_key_tile(
                b_grad_key, b_grad_value, b_key, b_value, i_tile, i_chunk, b_low, b_high, b_aligned, b_slope,
                p_query_head, p_key, p_value, p_grad_head, p_mask, p_block_mask, p_seed, p_rows + i_statistics,
                o_key_rows, o_value_rows, o_mask_columns, o_block_columns, i_statistics, i_first_row, T, S,
                stride_rows, stride_query_t, stride_grad_t, stride_mask_t, n_block_columns, block_size, scale,
                softcap, keep_threshold, keep_scale, D, DV, SOFTCAP, ADDITIVE, NEED_KEY, NEED_VALUE,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, EXACT,
            )  # fmt: skip

    redo = False
    if UNEVEN and not EXACT:
        redo = any_nan(b_grad_key) | any_nan(b_grad_value)
        m_rows = o_rows < tl.where(redo, 0, S)
    if NEED_KEY:
        o_d = i_chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        tl.store(
            p_grad_key + (o_s64 * stride_grad_key_s)[:, None] + o_d[None, :],
            to_dtype(b_grad_key * key_scale, p_grad_key.dtype.element_ty),
            mask=m_rows[:, None] & (o_d < D)[None, :],
        )
    if NEED_VALUE:
        o_d = i_chunk * BLOCK_DV + tl.arange(0, BLOCK_DV)
        tl.store(
            p_grad_value + (o_s64 * stride_grad_value_s)[:, None] + o_d[None, :],
            to_dtype(b_grad_value * keep_scale, p_grad_value.dtype.element_ty),
            mask=m_rows[:, None] & (o_d < DV)[None, :],
        )
    return redo


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def attention_backward_key_kernel(
    p_query,
    p_key,
    p_value,
    p_grad_output,
    p_mask,  # bool as uint8, or additive
    p_block_mask,  # uint8 (heads, blocks of queries, blocks of keys), where tiles are no part of one block
    p_tile_counts,  # int32 (heads, key blocks): tiles of queries to visit, where there is a block mask
    p_tile_lists,  # int32 (heads, key blocks, tiles): which
    p_alibi_slopes,  # float32
    p_seed,
    p_cu_seqlens_q, p_cu_seqlens_k,
    p_rows,  # see attention_backward_rows_kernel
    p_grad_key,
    p_grad_value,
    H, T, S, n_own_blocks, n_tile_rows, n_block_columns, n_sequences, n_steps, block_size,
    stride_query_b, stride_query_h, stride_query_t, stride_key_b, stride_key_h, stride_key_s,
    stride_value_b, stride_value_h, stride_value_s, stride_grad_b, stride_grad_h, stride_grad_t,
    stride_grad_key_b, stride_grad_key_h, stride_grad_key_s,
    stride_grad_value_b, stride_grad_value_h, stride_grad_value_s,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_block_h, stride_list_h,
    stride_alibi_b, stride_alibi_h, stride_rows,
    before, after, scale, key_scale, softcap, keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, ALWAYS_MASKED: tl.constexpr, UNEVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one key head, and of each result one chunk of columns, a program."""
    KEY_CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    VALUE_CHUNKS: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV
    N_CHUNKS: tl.constexpr = KEY_CHUNKS if KEY_CHUNKS > VALUE_CHUNKS else VALUE_CHUNKS
    i_chunk = tl.program_id(0) % N_CHUNKS
    i_program = tl.program_id(0) // N_CHUNKS
    # From the first block: under a causal mask it has the most queries, and what starts last should be short.
    i_block = i_program % n_own_blocks
    i_head = i_program // n_own_blocks
    i_b = (i_head // (H // GROUP)).to(tl.int64)
    i_key_head = (i_head % (H // GROUP)).to(tl.int64)
    p_key += i_b * stride_key_b + i_key_head * stride_key_h
    p_value += i_b * stride_value_b + i_key_head * stride_value_h
    if p_grad_key is not None:
        p_grad_key += i_b * stride_grad_key_b + i_key_head * stride_grad_key_h
    if p_grad_value is not None:
        p_grad_value += i_b * stride_grad_value_b + i_key_head * stride_grad_value_h
    redo = attention_backward_key_rows(
        i_block * BLOCK_N, i_b, i_key_head, i_chunk, i_block, p_query, p_key, p_value, p_grad_output,
        p_mask, p_block_mask, p_tile_counts, p_tile_lists, p_alibi_slopes, p_seed,
        p_cu_seqlens_q, p_cu_seqlens_k, p_rows, p_grad_key, p_grad_value,
        H, T, S, n_tile_rows, n_block_columns, n_sequences, n_steps, block_size, stride_rows,
        stride_key_s, stride_value_s, stride_grad_key_s, stride_grad_value_s,
        stride_query_b, stride_query_h, stride_query_t, stride_grad_b, stride_grad_h, stride_grad_t,
        stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_block_h, stride_list_h,
        stride_alibi_b, stride_alibi_h, before, after, scale, key_scale, softcap, keep_threshold,
        keep_scale, D, DV, GROUP, SOFTCAP, ADDITIVE, BOTTOM_RIGHT, ALWAYS_MASKED, UNEVEN,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False,
    )  # fmt: skip
    if UNEVEN:  # noqa: SIM102 - known when compiled, which the other condition is not
        # As in forward: a NaN may have come from a query that does not see the key.
        if redo:
            for i_part in range(0, BLOCK_N, CAREFUL_ROWS):
                attention_backward_key_rows(
                    i_block * BLOCK_N + i_part, i_b, i_key_head, i_chunk, i_block, p_query, p_key, p_value,
                    p_grad_output, p_mask, p_block_mask, p_tile_counts, p_tile_lists, p_alibi_slopes, p_seed,
                    p_cu_seqlens_q, p_cu_seqlens_k, p_rows, p_grad_key, p_grad_value,
                    H, T, S, n_tile_rows, n_block_columns, n_sequences, n_steps, block_size, stride_rows,
                    stride_key_s, stride_value_s, stride_grad_key_s, stride_grad_value_s,
                    stride_query_b, stride_query_h, stride_query_t, stride_grad_b, stride_grad_h, stride_grad_t,
                    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_block_h, stride_list_h,
                    stride_alibi_b, stride_alibi_h, before, after, scale, key_scale, softcap, keep_threshold,
                    keep_scale, D, DV, GROUP, SOFTCAP, ADDITIVE, BOTTOM_RIGHT, ALWAYS_MASKED, UNEVEN,
                    BLOCK_M, CAREFUL_ROWS, BLOCK_D, BLOCK_DV, True,
                )  # fmt: skip
