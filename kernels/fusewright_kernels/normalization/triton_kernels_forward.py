"""Triton kernels of normalisation, forward: y = (x - mean) * rstd * (weight + weight_offset) + bias.

x is the input, or dropout(input) + residual where there is a residual. M rows of N columns; pointers that are None are
absent operands and cost nothing. Imports only where Triton is installed.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_primitives import divide_by_count, dropout_keep, round_to, row_offsets, to_dtype

# Run-time values that no code improves on: specialising would only recompile.
_NOT_SPECIALIZED = ["M", "size_1", "size_2", "keep_threshold"]


@triton.jit
def norm_forward_stream(
    p_input, p_residual, p_new_residual, p_seed,
    o_m, i_n, o_n, m_tile, N, stride_input_n, stride_residual_n, keep_threshold, keep_scale,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tile to normalise, float32 [BLOCK_M, BLOCK_N]; the pointers are to the rows' starts, [BLOCK_M, 1]."""
    o_n = o_n.to(tl.int64)
    b_x = tl.load(p_input + o_n[None, :] * stride_input_n, mask=m_tile, other=0.0).to(tl.float32)
    if p_seed is not None:
        m_keep = dropout_keep(p_seed, o_m, i_n, N, keep_threshold, BLOCK_N)
        b_x = tl.where(m_keep, b_x * keep_scale, 0.0)
    if p_residual is not None:
        b_x += tl.load(p_residual + o_n[None, :] * stride_residual_n, mask=m_tile, other=0.0).to(tl.float32)
        # What is normalised is what is stored and what a backward will read.
        b_x = round_to(b_x, p_new_residual.dtype.element_ty)
    return b_x


@triton.jit
def norm_forward_affine(b_x, p_weight, p_bias, o_n, m_n, stride_weight, stride_bias, weight_offset):
    """Normalised [BLOCK_M, BLOCK_N] times weight plus bias, where present."""
    o_n = o_n.to(tl.int64)
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_n * stride_weight, mask=m_n, other=0.0).to(tl.float32) + weight_offset
        b_x *= b_weight[None, :]
    if p_bias is not None:
        b_x += tl.load(p_bias + o_n * stride_bias, mask=m_n, other=0.0).to(tl.float32)[None, :]
    return b_x


@triton.jit
def centered(b_x, m_n, count):
    """b_x minus its mean over ``count`` columns (0 where masked), the mean, the sum of squares about it.

    The first mean is off by a rounding error that grows with it. What the centred values still sum to is that error:
    taking it out makes both results good to a few units whatever the mean, and constant rows exactly 0.
    """
    b_mean = divide_by_count(tl.sum(b_x, axis=1), count)
    b_x = tl.where(m_n[None, :], b_x - b_mean[:, None], 0.0)
    b_error = divide_by_count(tl.sum(b_x, axis=1), count)
    b_squares = tl.sum(b_x * b_x, axis=1) - b_error * b_error * count
    # Rounding can leave less than 0, whose root would be NaN with eps = 0; a NaN of the data stays.
    b_squares = tl.maximum(b_squares, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(m_n[None, :], b_x - b_error[:, None], 0.0), b_mean + b_error, b_squares


@triton.jit
def reciprocal_root(b_x):
    """1 / sqrt(b_x), correctly rounded twice; the hardware's rsqrt is off by 2 ulp."""
    return tl.div_rn(tl.zeros_like(b_x) + 1.0, tl.sqrt_rn(b_x))


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def norm_forward_row_kernel(
    p_input,
    p_residual,
    p_weight,
    p_bias,
    p_seed,
    p_output,  # (M, N) contiguous
    p_new_residual,  # (M, N) contiguous
    p_statistics,  # float32 (1 or 2, M): rstd, mean if CENTER
    M, N, size_1, size_2,
    stride_input_0, stride_input_1, stride_input_2, stride_input_n,
    stride_residual_0, stride_residual_1, stride_residual_2, stride_residual_n,
    stride_weight, stride_bias,
    eps, weight_offset, keep_threshold, keep_scale,
    CENTER: tl.constexpr, ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows in registers: one pass over memory, variance from the centred row."""
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_n = o_n < N
    m_tile = m_m[:, None] & m_n[None, :]

    o_input = row_offsets(o_m, M, size_1, size_2, stride_input_0, stride_input_1, stride_input_2, ROW_DIMS)
    p_input_rows = p_input + o_input[:, None]
    p_residual_rows = p_residual
    if p_residual is not None:
        o_residual = row_offsets(
            o_m, M, size_1, size_2, stride_residual_0, stride_residual_1, stride_residual_2, ROW_DIMS
        )
        p_residual_rows = p_residual + o_residual[:, None]
    o_tile = (o_m * N)[:, None] + o_n[None, :]

    b_x = norm_forward_stream(
        p_input_rows, p_residual_rows, p_new_residual, p_seed,
        o_m, 0, o_n, m_tile, N, stride_input_n, stride_residual_n, keep_threshold, keep_scale, BLOCK_N,
    )  # fmt: skip
    if p_new_residual is not None:
        tl.store(p_new_residual + o_tile, to_dtype(b_x, p_new_residual.dtype.element_ty), mask=m_tile)
    if CENTER:
        b_x, b_mean, b_squares = centered(b_x, m_n, N)
        if p_statistics is not None:
            tl.store(p_statistics + M + o_m, b_mean, mask=m_m)
    else:
        b_squares = tl.sum(b_x * b_x, axis=1)
    b_rstd = reciprocal_root(divide_by_count(b_squares, N) + eps)
    if p_statistics is not None:
        tl.store(p_statistics + o_m, b_rstd, mask=m_m)

    b_y = norm_forward_affine(
        b_x * b_rstd[:, None], p_weight, p_bias, o_n, m_n, stride_weight, stride_bias, weight_offset
    )
    tl.store(p_output + o_tile, to_dtype(b_y, p_output.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def norm_forward_loop_kernel(
    p_input,
    p_residual,
    p_weight,
    p_bias,
    p_seed,
    p_output,  # (M, N) contiguous
    p_new_residual,  # (M, N) contiguous
    p_statistics,  # float32 (1 or 2, M): rstd, mean if CENTER
    M, N, size_1, size_2,
    stride_input_0, stride_input_1, stride_input_2, stride_input_n,
    stride_residual_0, stride_residual_1, stride_residual_2, stride_residual_n,
    stride_weight, stride_bias,
    eps, weight_offset, keep_threshold, keep_scale,
    CENTER: tl.constexpr, ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows too long for registers, BLOCK_N columns at a time: once for the statistics, once for the output.

    Each tile's mean and centred sum of squares are merged by Chan's formula ("Updating formulae and a pairwise
    algorithm for computing sample variances", 1979). The first tile's mean is taken off all values, so that the means
    which the formula subtracts from each other are small and a large mean costs no digits.
    """
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M

    o_input = row_offsets(o_m, M, size_1, size_2, stride_input_0, stride_input_1, stride_input_2, ROW_DIMS)
    p_input_rows = p_input + o_input[:, None]
    p_residual_rows = p_residual
    if p_residual is not None:
        o_residual = row_offsets(
            o_m, M, size_1, size_2, stride_residual_0, stride_residual_1, stride_residual_2, ROW_DIMS
        )
        p_residual_rows = p_residual + o_residual[:, None]

    b_pivot = tl.zeros([BLOCK_M], tl.float32)
    b_mean = tl.zeros([BLOCK_M], tl.float32)  # less the pivot
    b_squares = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        m_tile = m_m[:, None] & m_n[None, :]
        b_x = norm_forward_stream(
            p_input_rows, p_residual_rows, p_new_residual, p_seed,
            o_m, i_n, o_n, m_tile, N, stride_input_n, stride_residual_n, keep_threshold, keep_scale, BLOCK_N,
        )  # fmt: skip
        if p_new_residual is not None:
            o_tile = (o_m * N)[:, None] + o_n[None, :]
            tl.store(p_new_residual + o_tile, to_dtype(b_x, p_new_residual.dtype.element_ty), mask=m_tile)
        if CENTER:
            n_tile = tl.minimum(N - i_n, BLOCK_N)
            n_seen = i_n + n_tile
            if i_n == 0:
                b_pivot = divide_by_count(tl.sum(b_x, axis=1), n_tile)
            b_x = tl.where(m_n[None, :], b_x - b_pivot[:, None], 0.0)
            b_x, b_tile_mean, b_tile_squares = centered(b_x, m_n, n_tile)
            b_step = b_tile_mean - b_mean
            b_share = divide_by_count(tl.zeros([BLOCK_M], tl.float32) + n_tile, n_seen)
            b_mean += b_step * b_share
            b_squares += b_tile_squares + b_step * b_step * b_share * i_n
        else:
            b_squares += tl.sum(b_x * b_x, axis=1)
    b_rstd = reciprocal_root(divide_by_count(b_squares, N) + eps)
    if p_statistics is not None:
        tl.store(p_statistics + o_m, b_rstd, mask=m_m)
        if CENTER:
            tl.store(p_statistics + M + o_m, b_pivot + b_mean, mask=m_m)

    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        m_tile = m_m[:, None] & m_n[None, :]
        # Recomputed and not read back: another thread may have stored it.
        b_x = norm_forward_stream(
            p_input_rows, p_residual_rows, p_new_residual, p_seed,
            o_m, i_n, o_n, m_tile, N, stride_input_n, stride_residual_n, keep_threshold, keep_scale, BLOCK_N,
        )  # fmt: skip
        b_y = norm_forward_affine(
            (b_x - b_pivot[:, None] - b_mean[:, None]) * b_rstd[:, None],
            p_weight, p_bias, o_n, m_n, stride_weight, stride_bias, weight_offset,
        )  # fmt: skip
        o_tile = (o_m * N)[:, None] + o_n[None, :]
        tl.store(p_output + o_tile, to_dtype(b_y, p_output.dtype.element_ty), mask=m_tile)
