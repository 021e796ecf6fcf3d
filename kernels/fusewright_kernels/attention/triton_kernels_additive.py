"""Triton kernels of additive attention: scores scale * sum_d w[d] tanh(query[d] + key[d]), a column at a time.

The sums of query and key live in registers only, one column of one tile at a time. A tanh for every pair and column is
nearly all of the work, so that every tile takes the masks and every product the care that other kernels leave to a
second attempt. Logits are natural. Imports only where Triton is installed.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.attention.triton_primitives import kept, logits_of, plan_tiles, visible_interval
from fusewright_kernels.triton_matrix_primitives import (
    INFINITY,
    dot_rows,
    dot_visible,
    exponential,
    load_tile,
    natural_statistics,
    soften,
)
from fusewright_kernels.triton_primitives import tanh, to_dtype

# Sizes that no code improves on: specialising would only recompile.
_NOT_SPECIALIZED = ["H", "T", "S", "n_own_blocks", "before", "after", "keep_threshold"]


@triton.jit
def visible_columns(o_rows, n_rows, n_columns, before, after, BOTTOM_RIGHT: tl.constexpr):
    b_low, b_high, _ = visible_interval(o_rows, n_rows, n_columns, None, None, 0, 0, before, after, BOTTOM_RIGHT)
    return b_low, b_high


@triton.jit
def tiles_to_visit(b_low, b_high, BLOCK: tl.constexpr):
    first, _, _, end = plan_tiles(b_low, b_high, None, BLOCK, True)
    return first, end


@triton.jit
def column_of_sums(p_own, o_own, p_other, o_other, i_d):
    """tanh(own + other) of column ``i_d``, [own, other]."""
    b_own = tl.load(p_own + o_own + i_d).to(tl.float32)
    b_other = tl.load(p_other + o_other + i_d).to(tl.float32)
    return tanh(b_own[:, None] + b_other[None, :])


@triton.jit
def additive_logits(
    p_own, o_own, p_other, o_other, p_weight, o_columns, b_low, b_high, p_mask, o_mask, scale,
    D: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Logits of a tile, -inf where not visible, and what is visible; the tile lies as (own, other)."""
    b_scores = tl.zeros([OWN, OTHER], tl.float32)
    for i_d in range(0, D):
        b_scores += tl.load(p_weight + i_d) * column_of_sums(p_own, o_own, p_other, o_other, i_d)
    b_logits, _, m_visible = logits_of(
        b_scores, o_columns[None, :], b_low[:, None], b_high[:, None], b_low[:, None], None, p_mask, o_mask, None, 0,
        scale, 0.0, False, False, True,
    )  # fmt: skip
    return b_logits, m_visible


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def additive_attention_forward_kernel(
    p_query,
    p_key,
    p_value,
    p_weight,  # float32 (H, D)
    p_mask,  # bool as uint8
    p_seed,
    p_output,
    p_statistics,  # float32 (2, B, H, T)
    H, T, S, n_own_blocks,
    stride_query_b, stride_query_h, stride_query_t, stride_key_b, stride_key_h, stride_key_s,
    stride_value_b, stride_value_h, stride_value_s, stride_weight_h,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_output_b, stride_output_h, stride_output_t,
    stride_statistics, before, after, scale, keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head, and of the output BLOCK_DV columns, a program."""
    N_CHUNKS: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV if DV > 0 else 1
    i_chunk = tl.program_id(0) % N_CHUNKS
    i_program = tl.program_id(0) // N_CHUNKS
    # From the last block: under a causal mask it has the most keys, and what starts last should be short.
    i_block = n_own_blocks - 1 - i_program % n_own_blocks
    i_head = (i_program // n_own_blocks).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    p_query += i_b * stride_query_b + i_h * stride_query_h
    p_key += i_b * stride_key_b + i_h // GROUP * stride_key_h
    p_value += i_b * stride_value_b + i_h // GROUP * stride_value_h
    o_rows = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows behind the last repeat it and are not stored.
    m_rows = o_rows < T
    o_t = tl.minimum(o_rows, T - 1)
    o_t64 = o_t.to(tl.int64)
    o_mask_rows = i_b * stride_mask_b + i_h * stride_mask_h + o_t64 * stride_mask_t
    b_low, b_high = visible_columns(o_t, T, S, before, after, BOTTOM_RIGHT)
    first, end = tiles_to_visit(b_low, b_high, BLOCK_N)
    b_maximum = tl.full([BLOCK_M], -INFINITY, tl.float32)
    b_total = tl.zeros([BLOCK_M], tl.float32)
    b_sum = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i_tile in range(first, end):
        o_s = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        m_s = o_s < S
        o_s64 = tl.minimum(o_s, S - 1).to(tl.int64)
        b_logits, m_visible = additive_logits(
            p_query, o_t64 * stride_query_t, p_key, o_s64 * stride_key_s, p_weight + i_h * stride_weight_h, o_s, b_low,
            b_high, p_mask, o_mask_rows[:, None] + o_s64[None, :] * stride_mask_s, scale, D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        b_weights, b_rescale, b_maximum, b_total = soften(b_logits, b_maximum, b_total, True, True)
        if p_seed is not None:
            m_keep = kept(p_seed, i_head * T + o_t64, i_tile * BLOCK_N, S, keep_threshold, BLOCK_N)
            b_weights = tl.where(m_keep, b_weights, 0.0)
        b_value = load_tile(p_value, o_s64 * stride_value_s, m_s, i_chunk * BLOCK_DV, DV, BLOCK_DV, True)
        b_sum = dot_visible(
            to_dtype(b_weights, p_value.dtype.element_ty), b_value, b_sum * b_rescale[:, None], m_visible, True
        )
    b_scale = keep_scale / tl.where(b_total == 0.0, 1.0, b_total)
    o_d = i_chunk * BLOCK_DV + tl.arange(0, BLOCK_DV)
    o_output = i_b * stride_output_b + i_h * stride_output_h + o_t64 * stride_output_t
    tl.store(
        p_output + o_output[:, None] + o_d[None, :],
        to_dtype(b_sum * b_scale[:, None], p_output.dtype.element_ty),
        mask=m_rows[:, None] & (o_d < DV)[None, :],
    )
    if i_chunk == 0:
        b_natural, b_total = natural_statistics(b_maximum, b_total, True)
        tl.store(p_statistics + i_head * T + o_t64, b_natural, mask=m_rows)
        tl.store(p_statistics + stride_statistics + i_head * T + o_t64, b_total, mask=m_rows)


@triton.jit
def additive_pairs(
    b_logits, b_grad_p, m_visible, m_keep, b_reference, b_inverse, b_delta, keep_scale, DROPOUT: tl.constexpr
):  # fmt: skip
    """Kept weights and gradients of the logits of one tile, whichever way it lies."""
    b_p = tl.where(m_visible, exponential(b_logits - b_reference, True) * b_inverse, 0.0)
    b_kept = b_p
    if DROPOUT:
        b_kept = tl.where(m_keep, b_p, 0.0)
        b_grad_p = tl.where(m_keep, b_grad_p * keep_scale, 0.0)
    return b_kept, tl.where(m_visible, b_p * (b_grad_p - b_delta), 0.0)


@triton.jit
def sums_over_others(
    b_sum, b_weight_sum, b_grad, p_own, o_own, p_other, o_other, p_weight, i_chunk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NEED_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Adds, for each column of piece ``i_chunk``, the sums of grad * w * tanh' and of grad * tanh over a tile."""
    o_columns = i_chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    for i_d in range(i_chunk * BLOCK_D, tl.minimum((i_chunk + 1) * BLOCK_D, D)):
        b_tanh = column_of_sums(p_own, o_own, p_other, o_other, i_d)
        # What takes no part leaves no trace, whatever it holds.
        b_slope = tl.where(b_grad == 0.0, 0.0, b_grad * (1.0 - b_tanh * b_tanh))
        b_column = tl.sum(b_slope, axis=1) * tl.load(p_weight + i_d)
        m_column = (o_columns == i_d)[None, :]
        b_sum += tl.where(m_column, b_column[:, None], 0.0)
        if NEED_WEIGHT:
            b_column = tl.sum(tl.where(b_grad == 0.0, 0.0, b_grad * b_tanh), axis=1)
            b_weight_sum += tl.where(m_column, b_column[:, None], 0.0)
    return b_sum, b_weight_sum


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def additive_attention_backward_query_kernel(
    p_query, p_key, p_value,
    p_weight,  # float32 (H, D)
    p_mask,  # bool as uint8
    p_seed,
    p_grad_output,
    p_rows,  # see attention_backward_rows_kernel
    p_grad_query,
    p_grad_weight,  # float32 (B, H, blocks, D)
    H, T, S, n_own_blocks,
    stride_query_b, stride_query_h, stride_query_t, stride_key_b, stride_key_h, stride_key_s,
    stride_value_b, stride_value_h, stride_value_s, stride_weight_h,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_grad_b, stride_grad_h, stride_grad_t,
    stride_grad_query_b, stride_grad_query_h, stride_grad_query_t, stride_rows,
    before, after, scale, keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head, and BLOCK_D columns, a program."""
    N_CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    NEED_WEIGHT: tl.constexpr = p_grad_weight is not None
    i_chunk = tl.program_id(0) % N_CHUNKS
    i_program = tl.program_id(0) // N_CHUNKS
    i_block = n_own_blocks - 1 - i_program % n_own_blocks
    i_head = (i_program // n_own_blocks).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    p_query += i_b * stride_query_b + i_h * stride_query_h
    p_key += i_b * stride_key_b + i_h // GROUP * stride_key_h
    p_value += i_b * stride_value_b + i_h // GROUP * stride_value_h
    p_grad_output += i_b * stride_grad_b + i_h * stride_grad_h
    p_weight += i_h * stride_weight_h
    o_rows = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = o_rows < T
    o_t = tl.minimum(o_rows, T - 1)
    o_t64 = o_t.to(tl.int64)
    o_mask_rows = i_b * stride_mask_b + i_h * stride_mask_h + o_t64 * stride_mask_t
    b_low, b_high = visible_columns(o_t, T, S, before, after, BOTTOM_RIGHT)
    # The last row, which those behind it repeat, counts once in the sums over rows.
    b_high = tl.where(m_rows, b_high, 0)
    first, end = tiles_to_visit(b_low, b_high, BLOCK_N)
    o_grad_rows = o_t64 * stride_grad_t
    b_grad_rows = load_tile(p_grad_output, o_grad_rows, m_rows, 0, DV, BLOCK_DV, True)
    b_reference = tl.load(p_rows + i_head * T + o_t64)[:, None]
    b_inverse = tl.load(p_rows + stride_rows + i_head * T + o_t64)[:, None]
    b_delta = tl.load(p_rows + 2 * stride_rows + i_head * T + o_t64)[:, None]
    b_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_weight_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_tile in range(first, end):
        o_s = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        m_s = o_s < S
        o_s64 = tl.minimum(o_s, S - 1).to(tl.int64)
        b_logits, m_visible = additive_logits(
            p_query, o_t64 * stride_query_t, p_key, o_s64 * stride_key_s, p_weight, o_s, b_low, b_high, p_mask,
            o_mask_rows[:, None] + o_s64[None, :] * stride_mask_s, scale, D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        b_grad_p, _ = dot_rows(
            b_grad_rows, p_grad_output, o_grad_rows, p_value, o_s64 * stride_value_s, m_s, 0,
            DV, BLOCK_DV, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
        m_keep = m_visible
        if p_seed is not None:
            m_keep = kept(p_seed, i_head * T + o_t64, i_tile * BLOCK_N, S, keep_threshold, BLOCK_N)
        _, b_grad = additive_pairs(
            b_logits, b_grad_p, m_visible, m_keep, b_reference, b_inverse, b_delta, keep_scale, p_seed is not None
        )
        b_sum, b_weight_sum = sums_over_others(
            b_sum, b_weight_sum, b_grad, p_query, o_t64 * stride_query_t, p_key, o_s64 * stride_key_s, p_weight,
            i_chunk, D, BLOCK_D, NEED_WEIGHT,
        )  # fmt: skip
    o_d = i_chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    if p_grad_query is not None:
        o_grad = i_b * stride_grad_query_b + i_h * stride_grad_query_h + o_t64 * stride_grad_query_t
        tl.store(
            p_grad_query + o_grad[:, None] + o_d[None, :],
            to_dtype(b_sum * scale, p_grad_query.dtype.element_ty),
            mask=m_rows[:, None] & (o_d < D)[None, :],
        )
    if NEED_WEIGHT:
        p_own = p_grad_weight + (i_head * n_own_blocks + i_block) * D + o_d
        tl.store(p_own, tl.sum(b_weight_sum, axis=0) * scale, mask=o_d < D)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def additive_attention_backward_key_kernel(
    p_query, p_key, p_value, p_weight, p_mask, p_seed, p_grad_output, p_rows,  # as for the query's
    p_grad_key,
    p_grad_value,
    H, T, S, n_own_blocks,
    stride_query_b, stride_query_h, stride_query_t, stride_key_b, stride_key_h, stride_key_s,
    stride_value_b, stride_value_h, stride_value_s, stride_weight_h,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_grad_b, stride_grad_h, stride_grad_t,
    stride_grad_key_b, stride_grad_key_h, stride_grad_key_s,
    stride_grad_value_b, stride_grad_value_h, stride_grad_value_s, stride_rows,
    before, after, scale, keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one key head, and one piece of columns of each gradient, a program.

    Tiles lie as (keys, queries).
    """
    KEY_CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    VALUE_CHUNKS: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV
    N_CHUNKS: tl.constexpr = KEY_CHUNKS if KEY_CHUNKS > VALUE_CHUNKS else VALUE_CHUNKS
    i_chunk = tl.program_id(0) % N_CHUNKS
    i_program = tl.program_id(0) // N_CHUNKS
    i_block = i_program % n_own_blocks
    i_head = (i_program // n_own_blocks).to(tl.int64)
    n_key_heads = H // GROUP
    i_b, i_key_head = i_head // n_key_heads, i_head % n_key_heads
    p_key += i_b * stride_key_b + i_key_head * stride_key_h
    p_value += i_b * stride_value_b + i_key_head * stride_value_h
    o_rows = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    m_rows = o_rows < S
    o_s = tl.minimum(o_rows, S - 1)
    o_s64 = o_s.to(tl.int64)
    b_low, b_high = visible_columns(o_s, S, T, after, before, BOTTOM_RIGHT)
    first, end = tiles_to_visit(b_low, b_high, BLOCK_M)
    b_value_rows = load_tile(p_value, o_s64 * stride_value_s, m_rows, 0, DV, BLOCK_DV, True)
    b_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_value_sum = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for i_member in range(GROUP):
        i_h = i_key_head * GROUP + i_member
        i_query_head = i_b * H + i_h
        p_query_head = p_query + i_b * stride_query_b + i_h * stride_query_h
        p_grad_head = p_grad_output + i_b * stride_grad_b + i_h * stride_grad_h
        p_weight_head = p_weight + i_h * stride_weight_h
        o_mask_columns = i_b * stride_mask_b + i_h * stride_mask_h + o_s64 * stride_mask_s
        for i_tile in range(first, end):
            o_t = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
            m_t = o_t < T
            o_t64 = tl.minimum(o_t, T - 1).to(tl.int64)
            b_logits, m_visible = additive_logits(
                p_key, o_s64 * stride_key_s, p_query_head, o_t64 * stride_query_t, p_weight_head, o_t, b_low, b_high,
                p_mask, o_mask_columns[:, None] + o_t64[None, :] * stride_mask_t, scale, D, BLOCK_N, BLOCK_M,
            )  # fmt: skip
            b_grad_p, b_grad_output = dot_rows(
                b_value_rows, p_value, o_s64 * stride_value_s, p_grad_head, o_t64 * stride_grad_t, m_t, i_chunk,
                DV, BLOCK_DV, BLOCK_N, BLOCK_M, True,
            )  # fmt: skip
            o_numbers = i_query_head * T + o_t64
            b_reference = tl.load(p_rows + o_numbers)[None, :]
            b_inverse = tl.load(p_rows + stride_rows + o_numbers)[None, :]
            b_delta = tl.load(p_rows + 2 * stride_rows + o_numbers)[None, :]
            m_keep = m_visible
            if p_seed is not None:
                m_keep = tl.trans(kept(p_seed, o_numbers, i_block * BLOCK_N, S, keep_threshold, BLOCK_N))
            b_kept, b_grad = additive_pairs(
                b_logits, b_grad_p, m_visible, m_keep, b_reference, b_inverse, b_delta, keep_scale, p_seed is not None
            )
            b_kept = to_dtype(b_kept, p_value.dtype.element_ty)
            b_value_sum = dot_visible(b_kept, b_grad_output, b_value_sum, m_visible, True)
            if p_grad_key is not None:
                b_sum, _ = sums_over_others(
                    b_sum, b_sum, b_grad, p_key, o_s64 * stride_key_s, p_query_head, o_t64 * stride_query_t,
                    p_weight_head, i_chunk, D, BLOCK_D, False,
                )  # fmt: skip
    if p_grad_key is not None:
        o_d = i_chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        o_grad = i_b * stride_grad_key_b + i_key_head * stride_grad_key_h + o_s64 * stride_grad_key_s
        tl.store(
            p_grad_key + o_grad[:, None] + o_d[None, :],
            to_dtype(b_sum * scale, p_grad_key.dtype.element_ty),
            mask=m_rows[:, None] & (o_d < D)[None, :],
        )
    if p_grad_value is not None:
        o_d = i_chunk * BLOCK_DV + tl.arange(0, BLOCK_DV)
        o_grad = i_b * stride_grad_value_b + i_key_head * stride_grad_value_h + o_s64 * stride_grad_value_s
        tl.store(
            p_grad_value + o_grad[:, None] + o_d[None, :],
            to_dtype(b_value_sum * keep_scale, p_grad_value.dtype.element_ty),
            mask=m_rows[:, None] & (o_d < DV)[None, :],
        )
