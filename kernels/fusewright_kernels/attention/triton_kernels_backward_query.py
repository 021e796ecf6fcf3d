"""Triton kernels of exact attention, backward, whose programs own queries: gradients of query and of an additive mask.

See ``triton_kernels_backward`` for the formulas. Imports only where Triton is installed.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.attention.triton_kernels_backward import (
    _NOT_SPECIALIZED,
    logit_gradients_of,
    probabilities_of,
)
from fusewright_kernels.attention.triton_primitives import kept, logits_of, masked_tile, plan_tiles, visible_interval
from fusewright_kernels.triton_matrix_primitives import (
    CAREFUL_ROWS,
    LOG2_E,
    any_nan,
    dot_rows,
    dot_visible,
    load_tile,
)
from fusewright_kernels.triton_primitives import to_dtype


@triton.jit
def attention_backward_query_tile(
    b_query, b_grad_output, i_tile, i_chunk, b_low, b_high, b_aligned, b_slope, b_reference, b_inverse, b_delta,
    p_query, p_key, p_value, p_grad_output, p_mask, p_block_mask, p_seed,
    o_query_rows, o_grad_rows, o_mask_rows, o_block_rows, o_dropout_rows, S,
    stride_key_s, stride_value_s, stride_mask_s, block_size, scale, softcap, keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr, OF_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile's logits, before the biases or if OF_MASK behind them; the keys; what is visible."""
    o_s = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_s = o_s < S
    o_s64 = o_s.to(tl.int64)
    b_dots, b_key = dot_rows(
        b_query, p_query, o_query_rows, p_key, o_s64 * stride_key_s, m_s, i_chunk,
        D, BLOCK_D, BLOCK_M, BLOCK_N, MASKED,
    )  # fmt: skip
    b_logits, b_cap_derivative, m_visible = logits_of(
        b_dots, o_s[None, :], b_low[:, None], b_high[:, None], b_aligned[:, None], b_slope,
        p_mask, o_mask_rows[:, None] + o_s64[None, :] * stride_mask_s,
        p_block_mask, o_block_rows[:, None] + o_s[None, :] // block_size,
        scale, softcap, SOFTCAP, ADDITIVE, MASKED,
    )  # fmt: skip
    b_p = probabilities_of(b_logits, b_reference[:, None], b_inverse[:, None], m_visible, ADDITIVE, MASKED)
    m_keep = m_visible
    if p_seed is not None:
        m_keep = kept(p_seed, o_dropout_rows, i_tile * BLOCK_N, S, keep_threshold, BLOCK_N)
    b_grad_p, _ = dot_rows(
        b_grad_output, p_grad_output, o_grad_rows, p_value, o_s64 * stride_value_s, m_s, 0,
        DV, BLOCK_DV, BLOCK_M, BLOCK_N, MASKED,
    )  # fmt: skip
    if OF_MASK or not SOFTCAP:
        b_cap_derivative = None
    b_grad = logit_gradients_of(
        b_p, b_grad_p, b_delta[:, None], b_cap_derivative, m_keep, m_visible, keep_scale, p_seed is not None, MASKED
    )
    return b_grad, b_key, m_visible


@triton.jit
def attention_backward_query_rows(
    i_first_row, i_b, i_h, i_chunk, p_query, p_key, p_value, p_grad_output, p_mask, p_block_mask,
    p_tile_count, p_tile_list, p_alibi_slopes, p_seed, p_cu_seqlens_q, p_cu_seqlens_k, p_rows, p_grad_query,
    H, T, S, n_block_columns, n_sequences, n_steps, block_size,
    stride_query_t, stride_key_s, stride_value_s, stride_grad_t, stride_grad_query_t,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_block_h, stride_alibi_b, stride_alibi_h,
    stride_rows, before, after, scale, key_scale, softcap, keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, ALWAYS_MASKED: tl.constexpr, UNEVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The queries from ``i_first_row`` on; whether a NaN came up, which UNEVEN leaves to a second call with EXACT."""
    DTYPE: tl.constexpr = p_query.dtype.element_ty
    o_rows = i_first_row + tl.arange(0, BLOCK_M)
    # Queries behind the last repeat it and are not stored.
    m_rows = o_rows < T
    o_t = tl.minimum(o_rows, T - 1)
    o_t64 = o_t.to(tl.int64)
    o_query_rows = o_t64 * stride_query_t
    o_grad_rows = o_t64 * stride_grad_t
    o_mask_rows = i_b * stride_mask_b + i_h * stride_mask_h + o_t64 * stride_mask_t
    o_block_rows = i_h * stride_block_h + (o_t // block_size).to(tl.int64) * n_block_columns
    o_dropout_rows = (i_b * H + i_h) * T + o_t64
    b_slope = p_alibi_slopes
    if p_alibi_slopes is not None:
        b_slope = tl.load(p_alibi_slopes + i_b * stride_alibi_b + i_h * stride_alibi_h)
        b_slope *= 1.0 if ADDITIVE else LOG2_E
    b_low, b_high, b_aligned = visible_interval(
        o_t, T, S, p_cu_seqlens_q, p_cu_seqlens_k, n_sequences, n_steps, before, after, BOTTOM_RIGHT
    )
    first, first_full, end_full, end = plan_tiles(b_low, b_high, p_tile_count, BLOCK_N, ALWAYS_MASKED or EXACT)
    b_query = load_tile(p_query, o_query_rows, m_rows, 0, D, BLOCK_D, False)
    b_grad_output = load_tile(p_grad_output, o_grad_rows, m_rows, 0, DV, BLOCK_DV, False)
    b_reference = tl.load(p_rows + o_dropout_rows)
    b_inverse = tl.load(p_rows + stride_rows + o_dropout_rows)
    b_delta = tl.load(p_rows + 2 * stride_rows + o_dropout_rows)
    b_grad_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if not (ALWAYS_MASKED or EXACT):
        for i_tile in range(first_full, end_full):
            b_grad, b_key, m_visible = attention_backward_query_tile(
                b_query, b_grad_output, i_tile, i_chunk, b_low, b_high, b_aligned, b_slope,
                b_reference, b_inverse, b_delta, p_query, p_key, p_value, p_grad_output, p_mask, p_block_mask, p_seed,
                o_query_rows, o_grad_rows, o_mask_rows, o_block_rows, o_dropout_rows, S,
                stride_key_s, stride_value_s, stride_mask_s, block_size, scale, softcap, keep_threshold, keep_scale,
                D, DV, SOFTCAP, ADDITIVE, False, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False,
            )  # fmt: skip
            b_grad_query = dot_visible(to_dtype(b_grad, DTYPE), b_key, b_grad_query, m_visible, False)
    for i_step in range(0, first_full - first + end - end_full):
        i_tile = masked_tile(i_step, first, first_full, end_full, p_tile_list)
        b_grad, b_key, m_visible = attention_backward_query_tile(
            b_query, b_grad_output, i_tile, i_chunk, b_low, b_high, b_aligned, b_slope,
            b_reference, b_inverse, b_delta, p_query, p_key, p_value, p_grad_output, p_mask, p_block_mask, p_seed,
            o_query_rows, o_grad_rows, o_mask_rows, o_block_rows, o_dropout_rows, S,
            stride_key_s, stride_value_s, stride_mask_s, block_size, scale, softcap, keep_threshold, keep_scale,
            D, DV, SOFTCAP, ADDITIVE, False, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True,
        )  # fmt: skip
        b_grad_query = dot_visible(to_dtype(b_grad, DTYPE), b_key, b_grad_query, m_visible, EXACT)

    redo = False
    if UNEVEN and not EXACT:
        redo = any_nan(b_grad_query)
        m_rows = o_rows < tl.where(redo, 0, T)
    o_d = i_chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(
        p_grad_query + (o_t64 * stride_grad_query_t)[:, None] + o_d[None, :],
        to_dtype(b_grad_query * key_scale, p_grad_query.dtype.element_ty),
        mask=m_rows[:, None] & (o_d < D)[None, :],
    )
    return redo


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def attention_backward_query_kernel(
    p_query,
    p_key,
    p_value,
    p_grad_output,
    p_mask,  # bool as uint8, or additive
    p_block_mask,  # uint8 (heads, blocks of queries, blocks of keys), where tiles are no part of one block
    p_tile_counts,  # int32 (heads, query blocks): tiles of keys to visit, where there is a block mask
    p_tile_lists,  # int32 (heads, query blocks, tiles): which
    p_alibi_slopes,  # float32
    p_seed,
    p_cu_seqlens_q, p_cu_seqlens_k,
    p_rows,  # see attention_backward_rows_kernel
    p_grad_query,
    H, T, S, n_own_blocks, n_tile_rows, n_block_columns, n_sequences, n_steps, block_size,
    stride_query_b, stride_query_h, stride_query_t, stride_key_b, stride_key_h, stride_key_s,
    stride_value_b, stride_value_h, stride_value_s, stride_grad_b, stride_grad_h, stride_grad_t,
    stride_grad_query_b, stride_grad_query_h, stride_grad_query_t,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_block_h, stride_list_h,
    stride_alibi_b, stride_alibi_h, stride_rows,
    before, after, scale, key_scale, softcap, keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, ALWAYS_MASKED: tl.constexpr, UNEVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head, and of the result BLOCK_D columns, a program."""
    N_CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i_chunk = tl.program_id(0) % N_CHUNKS
    i_program = tl.program_id(0) // N_CHUNKS
    # From the last block, as in forward.
    i_block = n_own_blocks - 1 - i_program % n_own_blocks
    i_b = (i_program // n_own_blocks // H).to(tl.int64)
    i_h = (i_program // n_own_blocks % H).to(tl.int64)
    p_query += i_b * stride_query_b + i_h * stride_query_h
    p_key += i_b * stride_key_b + i_h // GROUP * stride_key_h
    p_value += i_b * stride_value_b + i_h // GROUP * stride_value_h
    p_grad_output += i_b * stride_grad_b + i_h * stride_grad_h
    p_grad_query += i_b * stride_grad_query_b + i_h * stride_grad_query_h
    p_tile_count = p_tile_counts
    p_tile_list = p_tile_lists
    if p_tile_counts is not None:
        p_tile_count += i_h * stride_list_h + i_block
        p_tile_list += (i_h * stride_list_h + i_block) * n_tile_rows
    redo = attention_backward_query_rows(
        i_block * BLOCK_M, i_b, i_h, i_chunk, p_query, p_key, p_value, p_grad_output, p_mask,
        p_block_mask, p_tile_count, p_tile_list, p_alibi_slopes, p_seed, p_cu_seqlens_q, p_cu_seqlens_k,
        p_rows, p_grad_query, H, T, S, n_block_columns, n_sequences, n_steps, block_size,
        stride_query_t, stride_key_s, stride_value_s, stride_grad_t, stride_grad_query_t,
        stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_block_h, stride_alibi_b,
        stride_alibi_h, stride_rows, before, after, scale, key_scale, softcap, keep_threshold, keep_scale,
        D, DV, SOFTCAP, ADDITIVE, BOTTOM_RIGHT, ALWAYS_MASKED, UNEVEN,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False,
    )  # fmt: skip
    if UNEVEN:  # noqa: SIM102 - known when compiled, which the other condition is not
        # As in forward: a NaN may have come from a key that its row does not see.
        if redo:
            for i_part in range(0, BLOCK_M, CAREFUL_ROWS):
                attention_backward_query_rows(
                    i_block * BLOCK_M + i_part, i_b, i_h, i_chunk, p_query, p_key, p_value, p_grad_output, p_mask,
                    p_block_mask, p_tile_count, p_tile_list, p_alibi_slopes, p_seed, p_cu_seqlens_q, p_cu_seqlens_k,
                    p_rows, p_grad_query, H, T, S, n_block_columns, n_sequences, n_steps, block_size,
                    stride_query_t, stride_key_s, stride_value_s, stride_grad_t, stride_grad_query_t,
                    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_block_h, stride_alibi_b,
                    stride_alibi_h, stride_rows, before, after, scale, key_scale, softcap, keep_threshold, keep_scale,
                    D, DV, SOFTCAP, ADDITIVE, BOTTOM_RIGHT, ALWAYS_MASKED, UNEVEN,
                    CAREFUL_ROWS, BLOCK_N, BLOCK_D, BLOCK_DV, True,
                )  # fmt: skip


@triton.jit(do_not_specialize=[*_NOT_SPECIALIZED, "mask_b", "mask_h"])
def attention_backward_mask_kernel(
    p_query,
    p_key,
    p_value,
    p_grad_output,
    p_mask,  # additive
    p_block_mask,  # uint8 (heads, blocks of queries, blocks of keys)
    p_alibi_slopes,  # float32
    p_seed,
    p_cu_seqlens_q, p_cu_seqlens_k,
    p_rows,  # see attention_backward_rows_kernel
    p_grad_mask,  # contiguous (mask_b, mask_h, 1 or T, 1 or S)
    B, H, T, S, mask_b, mask_h, n_block_columns, n_sequences, n_steps, block_size,
    stride_query_b, stride_query_h, stride_query_t, stride_key_b, stride_key_h, stride_key_s,
    stride_value_b, stride_value_h, stride_value_s, stride_grad_b, stride_grad_h, stride_grad_t,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_block_h,
    stride_alibi_b, stride_alibi_h, stride_rows,
    before, after, scale, softcap, keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    ONE_QUERY: tl.constexpr, ONE_KEY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One tile of the mask's gradient a program: the sum of the tiles that it is broadcast to, in a fixed order.

    ONE_QUERY, ONE_KEY: the mask has size 1 there, and the sum runs over all queries or keys.
    """
    n_t = tl.cdiv(T, BLOCK_M)
    n_s = tl.cdiv(S, BLOCK_N)
    own_t = 1 if ONE_QUERY else n_t
    own_s = 1 if ONE_KEY else n_s
    i_own_s = tl.program_id(0) % own_s
    i_own_t = tl.program_id(0) // own_s % own_t
    i_own_head = tl.program_id(0) // own_s // own_t
    n_b = B // mask_b
    n_h = H // mask_h
    n_inner_t = n_t if ONE_QUERY else 1
    n_inner_s = n_s if ONE_KEY else 1
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_term in range(0, n_b * n_h * n_inner_t * n_inner_s):
        i_s = i_term % n_inner_s if ONE_KEY else i_own_s
        i_t = i_term // n_inner_s % n_inner_t if ONE_QUERY else i_own_t
        i_rest = i_term // (n_inner_s * n_inner_t)
        # One of the two factors is 1: a mask's size is 1 or full.
        i_h = (i_rest % n_h + i_own_head % mask_h).to(tl.int64)
        i_b = (i_rest // n_h + i_own_head // mask_h).to(tl.int64)
        o_rows = i_t * BLOCK_M + tl.arange(0, BLOCK_M)
        m_rows = o_rows < T
        o_t = tl.minimum(o_rows, T - 1)
        o_t64 = o_t.to(tl.int64)
        b_low, b_high, b_aligned = visible_interval(
            o_t, T, S, p_cu_seqlens_q, p_cu_seqlens_k, n_sequences, n_steps, before, after, BOTTOM_RIGHT
        )
        b_high = tl.where(m_rows, b_high, 0)
        if (tl.max(b_high, axis=0) > i_s * BLOCK_N) & (tl.min(b_low, axis=0) < (i_s + 1) * BLOCK_N):
            o_query_rows = i_b * stride_query_b + i_h * stride_query_h + o_t64 * stride_query_t
            o_grad_rows = i_b * stride_grad_b + i_h * stride_grad_h + o_t64 * stride_grad_t
            i_key_head = i_h // GROUP
            o_dropout_rows = (i_b * H + i_h) * T + o_t64
            b_slope = p_alibi_slopes
            if p_alibi_slopes is not None:
                b_slope = tl.load(p_alibi_slopes + i_b * stride_alibi_b + i_h * stride_alibi_h)
            b_grad, _, _ = attention_backward_query_tile(
                load_tile(p_query, o_query_rows, m_rows, 0, D, BLOCK_D, False),
                load_tile(p_grad_output, o_grad_rows, m_rows, 0, DV, BLOCK_DV, False),
                i_s, 0, b_low, b_high, b_aligned, b_slope, tl.load(p_rows + o_dropout_rows),
                tl.load(p_rows + stride_rows + o_dropout_rows), tl.load(p_rows + 2 * stride_rows + o_dropout_rows),
                p_query, p_key + i_b * stride_key_b + i_key_head * stride_key_h,
                p_value + i_b * stride_value_b + i_key_head * stride_value_h, p_grad_output, p_mask, p_block_mask,
                p_seed, o_query_rows, o_grad_rows, i_b * stride_mask_b + i_h * stride_mask_h + o_t64 * stride_mask_t,
                i_h * stride_block_h + (o_t // block_size).to(tl.int64) * n_block_columns, o_dropout_rows, S,
                stride_key_s, stride_value_s, stride_mask_s, block_size, scale, softcap, keep_threshold, keep_scale,
                D, DV, SOFTCAP, True, True, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True,
            )  # fmt: skip
            b_sum += b_grad

    DTYPE: tl.constexpr = p_grad_mask.dtype.element_ty
    o_t = i_own_t * BLOCK_M + tl.arange(0, BLOCK_M)
    o_s = i_own_s * BLOCK_N + tl.arange(0, BLOCK_N)
    i_own = i_own_head.to(tl.int64)
    if ONE_QUERY and ONE_KEY:
        tl.store(p_grad_mask + i_own, to_dtype(tl.sum(b_sum), DTYPE))
    elif ONE_QUERY:
        tl.store(p_grad_mask + i_own * S + o_s, to_dtype(tl.sum(b_sum, axis=0), DTYPE), mask=o_s < S)
    elif ONE_KEY:
        tl.store(p_grad_mask + i_own * T + o_t, to_dtype(tl.sum(b_sum, axis=1), DTYPE), mask=o_t < T)
    else:
        o_tile = (i_own * T + o_t.to(tl.int64))[:, None] * S + o_s[None, :]
        tl.store(p_grad_mask + o_tile, to_dtype(b_sum, DTYPE), mask=(o_t < T)[:, None] & (o_s < S)[None, :])
