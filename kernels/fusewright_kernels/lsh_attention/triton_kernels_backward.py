"""Triton kernel of LSH attention, backward: one round, every position once as query and once as key of its chunk.

With x the vectors, k = x / |x|, p the weights over all rounds, keep dropout's factor, dO the gradient of the output:

    delta = rowsum(dO * O) - grad_lse,  dlogits = p * (keep * dO value^T - delta)
    grad_value = (keep * p)^T dO
    grad_x = scale * dlogits k + (g - k (k . g)) / |x|,  g = scale * dlogits^T x

where k . g is the sum over a key's column of dlogits * logits, so that the columns of a wide g can be made apart. Each
program writes its own rows, round after round: no atomics, the same bits at every call. Imports only where Triton is
installed.
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
    LN_2,
    LOG2_E,
    any_nan,
    dot_rows,
    dot_visible,
    load_tile,
)
from fusewright_kernels.triton_primitives import to_dtype

# Sizes that no code improves on: specialising would only recompile.
_NOT_SPECIALIZED = [
    "H", "T", "R", "C", "width", "value_width", "i_round", "n_chunks", "n_row_blocks", "ring", "before", "window",
    "stride_rows", "keep_threshold",
]  # fmt: skip


@triton.jit
def row_numbers(p_rows, stride_rows, i_place, rest, BLOCK: tl.constexpr):
    """Base-2 reference, 1 / sum and delta of the rows; see lsh_attention_rows_kernel."""
    b_reference = load_places(p_rows, i_place, rest, BLOCK)
    stride = stride_rows.to(tl.int64)
    b_inverse = load_places(p_rows + stride, i_place, rest, BLOCK)
    return b_reference, b_inverse, load_places(p_rows + 2 * stride, i_place, rest, BLOCK)


@triton.jit
def lsh_attention_backward_pairs(
    b_dots, b_grad_p, b_factor, b_query, b_key, m_visible, m_keep, b_reference, b_inverse, b_delta,
    p_chunk_of, p_bucket_of, T, R, ring, before, window, keep_scale, DROPOUT: tl.constexpr, WRAPS: tl.constexpr,
):  # fmt: skip
    """Kept weights, gradients of the logits and base-2 scores of one tile, whichever way it lies."""
    b_scores = b_dots * b_factor
    b_logits = logits_of(
        b_scores, b_query, b_key, m_visible, p_chunk_of, p_bucket_of, T, R, ring, before, window, WRAPS
    )
    # A row of NaN statistics must not reach the keys it does not meet.
    b_p = tl.where(m_visible, tl.exp2(b_logits - b_reference) * b_inverse, 0.0)
    b_kept = b_p
    if DROPOUT:
        b_kept = tl.where(m_keep, b_p, 0.0)
        b_grad_p = tl.where(m_keep, b_grad_p * keep_scale, 0.0)
    b_grad = tl.where(m_visible, b_p * (b_grad_p - b_delta), 0.0)
    return b_kept, b_grad, b_scores


@triton.jit
def lsh_attention_backward_as_queries(
    b_rows, b_grad_rows, b_query, b_bucket, b_reference, b_inverse, b_delta, i_head, i_ring, i_chunk,
    p_query_key, p_value, p_grad_output, p_keys, p_factors, p_sorted_buckets, p_chunk_of, p_bucket_of, p_seed,
    T, R, C, width, value_width, i_round, n_chunks, ring, before, window, stride_query_key_t, stride_value_t,
    stride_grad_t, keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, WRAPS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of the program's rows as queries: scale * dlogits k, columns of piece ``i_chunk``."""
    DTYPE: tl.constexpr = p_query_key.dtype.element_ty
    IS_FLOAT16: tl.constexpr = p_query_key.dtype.element_ty == tl.float16
    o_query = b_query.to(tl.int64)
    b_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    blocks_per_chunk = tl.cdiv(C, BLOCK_N)
    for i_step in range(0, window * blocks_per_chunk):
        i_place = i_step // blocks_per_chunk
        i_first_key = i_step % blocks_per_chunk * BLOCK_N
        i_key_ring = (i_ring + i_place + ring - before) % ring
        i_other, rest = chunk_place(i_key_ring, i_first_key, n_chunks, C, T)
        b_key = load_places(p_keys, i_other, rest, BLOCK_N)
        m_key = (tl.arange(0, BLOCK_N) < rest) & (b_key >= 0)
        o_key = b_key.to(tl.int64)
        b_dots, b_keys = dot_rows(
            b_rows, p_query_key, o_query * stride_query_key_t, p_query_key, o_key * stride_query_key_t, m_key, i_chunk,
            D, BLOCK_D, BLOCK_M, BLOCK_N, True, width,
        )  # fmt: skip
        b_grad_p, _ = dot_rows(
            b_grad_rows, p_grad_output, o_query * stride_grad_t, p_value, o_key * stride_value_t, m_key, 0,
            DV, BLOCK_DV, BLOCK_M, BLOCK_N, True, value_width,
        )  # fmt: skip
        b_factor = load_places(p_factors, i_other, rest, BLOCK_N)
        b_query_bucket = p_sorted_buckets
        b_key_bucket = p_sorted_buckets
        if p_sorted_buckets is not None:
            b_query_bucket = b_bucket[:, None]
            b_key_bucket = load_places(p_sorted_buckets, i_other, rest, BLOCK_N)[None, :]
        m_visible = visible_pairs(
            b_query[:, None], b_key[None, :], m_key[None, :], b_query_bucket, b_key_bucket, i_round,
            i_key_ring // n_chunks, CAUSAL,
        )  # fmt: skip
        m_keep = m_visible
        if p_seed is not None:
            m_keep = kept(
                p_seed, (i_head * R + i_round) * T + o_query, i_place * C + i_first_key, window * C, keep_threshold,
                BLOCK_N, ALIGNED,
            )  # fmt: skip
        _, b_grad, _ = lsh_attention_backward_pairs(
            b_dots, b_grad_p, (b_factor * LOG2_E)[None, :], b_query[:, None], b_key[None, :], m_visible, m_keep,
            b_reference[:, None], b_inverse[:, None], b_delta[:, None], p_chunk_of, p_bucket_of, T, R, ring, before,
            window, keep_scale, p_seed is not None, WRAPS,
        )  # fmt: skip
        if IS_FLOAT16:
            # One over the length of a short key would pass its range.
            b_keys = to_dtype(b_keys.to(tl.float32) * b_factor[:, None], DTYPE)
        else:
            # The factor of a key that is not met may be NaN.
            b_grad = tl.where(m_visible, b_grad * b_factor[None, :], 0.0)
        b_sum = dot_visible(to_dtype(b_grad, DTYPE), b_keys, b_sum, m_visible, EXACT)
    return b_sum


@triton.jit
def lsh_attention_backward_as_keys(
    b_rows, b_value_rows, b_key, o_key, m_key, b_bucket, b_factor, i_first, i_head, i_ring, i_chunk,
    p_query_key, p_value, p_grad_output, p_order, p_sorted_buckets, p_chunk_of, p_bucket_of, p_seed, p_rows,
    T, R, C, width, value_width, i_round, n_chunks, ring, before, window, stride_rows, stride_query_key_t,
    stride_value_t, stride_grad_t, keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, WRAPS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The program's rows as keys: dlogits^T x and (keep p)^T dO, columns of piece ``i_chunk``; k . g. Tiles lie as
    (keys, queries)."""
    DTYPE: tl.constexpr = p_query_key.dtype.element_ty
    b_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_sum_value = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_along = tl.zeros([BLOCK_M], tl.float32)
    blocks_per_chunk = tl.cdiv(C, BLOCK_N)
    for i_step in range(0, window * blocks_per_chunk):
        # The chunk in whose window the program's is at this place.
        i_place = i_step // blocks_per_chunk
        i_query_ring = ((i_ring - i_place + before) % ring + ring) % ring
        i_other, rest = chunk_place(i_query_ring, i_step % blocks_per_chunk * BLOCK_N, n_chunks, C, T)
        b_query = load_places(p_order, i_other, rest, BLOCK_N)
        m_query = tl.arange(0, BLOCK_N) < rest
        i_query_round = i_query_ring // n_chunks
        o_query = b_query.to(tl.int64)
        b_dots, b_queries = dot_rows(
            b_rows, p_query_key, o_key * stride_query_key_t, p_query_key, o_query * stride_query_key_t, m_query,
            i_chunk, D, BLOCK_D, BLOCK_M, BLOCK_N, True, width,
        )  # fmt: skip
        b_grad_p, b_grad_output = dot_rows(
            b_value_rows, p_value, o_key * stride_value_t, p_grad_output, o_query * stride_grad_t, m_query, i_chunk,
            DV, BLOCK_DV, BLOCK_M, BLOCK_N, True, value_width,
        )  # fmt: skip
        b_reference, b_inverse, b_delta = row_numbers(p_rows, stride_rows, i_other, rest, BLOCK_N)
        b_query_bucket = p_sorted_buckets
        b_key_bucket = p_sorted_buckets
        if p_sorted_buckets is not None:
            b_query_bucket = load_places(p_sorted_buckets, i_other, rest, BLOCK_N)[None, :]
            b_key_bucket = b_bucket[:, None]
        m_visible = visible_pairs(
            b_query[None, :], b_key[:, None], m_key[:, None] & m_query[None, :], b_query_bucket, b_key_bucket,
            i_query_round, i_round, CAUSAL,
        )  # fmt: skip
        m_keep = m_visible
        if p_seed is not None:
            m_keep = tl.trans(
                kept(
                    p_seed, (i_head * R + i_query_round) * T + o_query, i_place * C + i_first, window * C,
                    keep_threshold, BLOCK_M, ALIGNED,
                )
            )  # fmt: skip
        b_kept, b_grad, b_scores = lsh_attention_backward_pairs(
            b_dots, b_grad_p, b_factor[:, None], b_query[None, :], b_key[:, None], m_visible, m_keep,
            b_reference[None, :], b_inverse[None, :], b_delta[None, :], p_chunk_of, p_bucket_of, T, R, ring, before,
            window, keep_scale, p_seed is not None, WRAPS,
        )  # fmt: skip
        b_along += tl.sum(tl.where(m_visible, b_grad * b_scores, 0.0), axis=1)
        b_sum_value = dot_visible(to_dtype(b_kept, DTYPE), b_grad_output, b_sum_value, m_visible, EXACT)
        b_sum = dot_visible(to_dtype(b_grad, DTYPE), b_queries, b_sum, m_visible, EXACT)
    return b_sum, b_sum_value * keep_scale, b_along * LN_2


@triton.jit
def lsh_attention_backward_rows(
    i_first, i_head, i_ring, i_chunk, p_query_key, p_value, p_grad_output, p_order, p_keys, p_factors, p_sorted_buckets,
    p_chunk_of, p_bucket_of, p_seed, p_rows, p_sums, p_value_sums, p_grad_query_key, p_grad_value,
    T, R, C, width, value_width, i_round, n_chunks, ring, before, window, stride_rows, stride_query_key_t,
    stride_value_t, stride_grad_t, inverse_scale, keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, WRAPS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The rows of a chunk from ``i_first`` on; whether a NaN came up, which is left to a second call with EXACT."""
    i_own, rest = chunk_place(i_ring, i_first, n_chunks, C, T)
    b_own = load_places(p_order, i_own, rest, BLOCK_M)
    m_rows = tl.arange(0, BLOCK_M) < rest
    o_own = b_own.to(tl.int64)
    b_rows = load_tile(p_query_key, o_own * stride_query_key_t, m_rows, 0, D, BLOCK_D, False)
    b_grad_rows = load_tile(p_grad_output, o_own * stride_grad_t, m_rows, 0, DV, BLOCK_DV, False)
    b_bucket = load_places(p_sorted_buckets, i_own, rest, BLOCK_M)
    b_reference, b_inverse, b_delta = row_numbers(p_rows, stride_rows, i_own, rest, BLOCK_M)
    b_sum = lsh_attention_backward_as_queries(
        b_rows, b_grad_rows, b_own, b_bucket, b_reference, b_inverse, b_delta, i_head, i_ring, i_chunk,
        p_query_key, p_value, p_grad_output, p_keys, p_factors, p_sorted_buckets, p_chunk_of, p_bucket_of, p_seed,
        T, R, C, width, value_width, i_round, n_chunks, ring, before, window, stride_query_key_t, stride_value_t,
        stride_grad_t, keep_threshold, keep_scale,
        D, DV, CAUSAL, WRAPS, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, EXACT,
    )  # fmt: skip
    b_key = load_places(p_keys, i_own, rest, BLOCK_M)
    b_factor = load_places(p_factors, i_own, rest, BLOCK_M)
    b_value_rows = load_tile(p_value, o_own * stride_value_t, m_rows, 0, DV, BLOCK_DV, False)
    b_key_sum, b_value_sum, b_along = lsh_attention_backward_as_keys(
        b_rows, b_value_rows, b_key, o_own, m_rows & (b_key >= 0), b_bucket, b_factor * LOG2_E, i_first, i_head,
        i_ring, i_chunk, p_query_key, p_value, p_grad_output, p_order, p_sorted_buckets, p_chunk_of, p_bucket_of,
        p_seed, p_rows, T, R, C, width, value_width, i_round, n_chunks, ring, before, window, stride_rows,
        stride_query_key_t, stride_value_t, stride_grad_t, keep_threshold, keep_scale,
        D, DV, CAUSAL, WRAPS, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, EXACT,
    )  # fmt: skip

    redo = False
    if not EXACT:
        redo = any_nan(b_sum) | any_nan(b_key_sum) | any_nan(b_value_sum)
        m_rows = only_if(redo == 0, m_rows)
    # A row that sees itself alone has its value as output and scale * |x| as log-sum-exp.
    m_alone = only_if(i_round == R - 1, b_inverse == 0.0)
    b_inverse_norm = b_factor * inverse_scale
    b_own_share = tl.where(m_alone, -b_delta * b_factor, 0.0) - b_along * b_inverse_norm * b_inverse_norm
    o_columns = i_chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    m_columns = m_rows[:, None] & (o_columns < D)[None, :]
    b_piece = tl.load(
        p_query_key + (o_own * stride_query_key_t)[:, None] + o_columns[None, :], mask=m_columns, other=0.0
    )
    b_sum += b_key_sum * b_factor[:, None] + b_piece.to(tl.float32) * b_own_share[:, None]
    o_sums = ((i_head * T + o_own) * D)[:, None] + o_columns[None, :]
    add_round(b_sum, p_sums, p_grad_query_key, o_sums, m_columns, i_round, R)

    o_columns = i_chunk * BLOCK_DV + tl.arange(0, BLOCK_DV)
    m_columns = m_rows[:, None] & (o_columns < DV)[None, :]
    p_piece = p_grad_output + (o_own * stride_grad_t)[:, None] + o_columns[None, :]
    b_value_sum += tl.load(p_piece, mask=m_columns & m_alone[:, None], other=0.0).to(tl.float32)
    o_sums = ((i_head * T + o_own) * DV)[:, None] + o_columns[None, :]
    add_round(b_value_sum, p_value_sums, p_grad_value, o_sums, m_columns, i_round, R)
    return redo


@triton.jit
def add_round(b_sum, p_sums, p_gradient, o_sums, m_sums, i_round, R):
    """A round's part added to that of the rounds before; the last one's stored as the gradient."""
    if p_sums is not None:
        b_sum += tl.load(p_sums + o_sums, mask=only_if(i_round > 0, m_sums), other=0.0)
        tl.store(p_sums + o_sums, b_sum, mask=only_if(i_round < R - 1, m_sums))
    tl.store(p_gradient + o_sums, to_dtype(b_sum, p_gradient.dtype.element_ty), mask=only_if(i_round == R - 1, m_sums))


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def lsh_attention_backward_kernel(
    p_query_key,
    p_value,
    p_grad_output,
    p_order, p_keys, p_factors, p_sorted_buckets, p_chunk_of, p_bucket_of, p_seed, # see lsh_attention_forward_kernel
    p_rows,  # float32 (3, B, H, R, T): numbers of lsh_attention_rows_kernel in sorted order
    p_sums, p_value_sums,  # float32 (B, H, T, D) and (B, H, T, DV): gradients so far; None if there is one round
    p_grad_query_key,
    p_grad_value,
    H, T, R, C, width, value_width, i_round, n_chunks, n_row_blocks, ring, before, window, stride_rows,
    stride_query_key_b, stride_query_key_h, stride_query_key_t, stride_value_b, stride_value_h, stride_value_t,
    stride_grad_b, stride_grad_h, stride_grad_t, inverse_scale, keep_threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, WRAPS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one chunk of round ``i_round``, and of each gradient one piece of columns, a program."""
    KEY_CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    VALUE_CHUNKS: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV
    N_CHUNKS: tl.constexpr = KEY_CHUNKS if KEY_CHUNKS > VALUE_CHUNKS else VALUE_CHUNKS
    i_chunk = tl.program_id(0) % N_CHUNKS
    i_program = tl.program_id(0) // N_CHUNKS
    i_first = i_program % n_row_blocks * BLOCK_M
    i_ring = i_round * n_chunks + i_program // n_row_blocks % n_chunks
    i_head = (i_program // n_row_blocks // n_chunks).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H

    p_query_key += i_b * stride_query_key_b + i_h * stride_query_key_h
    p_value += i_b * stride_value_b + i_h * stride_value_h
    p_grad_output += i_b * stride_grad_b + i_h * stride_grad_h
    p_order += i_head * R * T
    p_keys += i_head * R * T
    p_factors += i_head * R * T
    p_rows += i_head * R * T
    p_head_buckets = of_head(p_sorted_buckets, i_head * R * T)
    p_head_chunk_of = of_head(p_chunk_of, i_head * R * T)
    p_head_bucket_of = of_head(p_bucket_of, i_head * R * T)
    redo = lsh_attention_backward_rows(
        i_first, i_head, i_ring, i_chunk, p_query_key, p_value, p_grad_output, p_order, p_keys, p_factors,
        p_head_buckets, p_head_chunk_of, p_head_bucket_of, p_seed, p_rows, p_sums, p_value_sums, p_grad_query_key,
        p_grad_value,
        T, R, C, width, value_width, i_round, n_chunks, ring, before, window, stride_rows, stride_query_key_t,
        stride_value_t, stride_grad_t, inverse_scale, keep_threshold, keep_scale,
        D, DV, CAUSAL, WRAPS, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False,
    )  # fmt: skip
    # A NaN may have come from a row that is not met.
    if redo:
        for i_part in range(0, BLOCK_M, CAREFUL_ROWS):
            lsh_attention_backward_rows(
                i_first + i_part, i_head, i_ring, i_chunk, p_query_key, p_value, p_grad_output, p_order, p_keys,
                p_factors, p_head_buckets, p_head_chunk_of, p_head_bucket_of, p_seed, p_rows, p_sums, p_value_sums,
                p_grad_query_key, p_grad_value, T, R, C, width, value_width, i_round, n_chunks, ring, before, window,
                stride_rows, stride_query_key_t, stride_value_t, stride_grad_t, inverse_scale, keep_threshold,
                keep_scale, D, DV, CAUSAL, WRAPS, ALIGNED, CAREFUL_ROWS, BLOCK_N, BLOCK_D, BLOCK_DV, True,
            )  # fmt: skip
