"""Triton kernels of normalisation, backward.

With x the normalised tensor (input or new_residual), x_hat = (x - mean) * rstd and g = grad_output * (weight + offset):

    grad_stream   = rstd * (g - mean(g * x_hat) * x_hat - mean(g)) + grad_new_residual     (mean(g) only if CENTER)
    grad_residual = grad_stream,  grad_input = dropout(grad_stream)
    grad_weight   = sum over rows of grad_output * x_hat,  grad_bias = sum over rows of grad_output

Parameter gradients are float32 partial sums, one row per program, which a last kernel adds up. Which rows a program
takes depends on the shape alone, so the bits repeat; no sum runs over more than ``tiles.MAX_RUN`` terms before it is
put aside, so they stay accurate for millions of rows. Pointers that are None are absent operands or gradients not
asked for. Imports only where Triton is installed.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_primitives import divide_by_count, dropout_keep, row_offsets, to_dtype

# Run-time values that no code improves on: specialising would only recompile.
_NOT_SPECIALIZED = ["M", "n_blocks", "size_1", "size_2", "keep_threshold"]


@triton.jit
def load_weight(p_weight, o_n, m_n, stride_weight, weight_offset):
    """weight + weight_offset, float32 [1, BLOCK_N]; 1 where there is no weight."""
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_n.to(tl.int64) * stride_weight, mask=m_n, other=0.0).to(tl.float32)
        return (b_weight + weight_offset)[None, :]
    else:
        return tl.full([1, o_n.shape[0]], 1.0, tl.float32)


@triton.jit
def load_normalized(p_stream_rows, o_n, m_tile, stride_stream_n, b_mean, b_rstd, CENTER: tl.constexpr):
    """x_hat, float32 [BLOCK_M, BLOCK_N]; outside the mask of no meaning."""
    b_x = tl.load(p_stream_rows + o_n[None, :].to(tl.int64) * stride_stream_n, mask=m_tile, other=0.0).to(tl.float32)
    if CENTER:
        b_x -= b_mean[:, None]
    return b_x * b_rstd[:, None]


@triton.jit
def store_stream_gradient(
    b_grad, p_grad_new_residual_rows, p_seed, p_grad_input, p_grad_residual,
    o_m, i_n, o_n, m_tile, N, stride_grad_new_residual_n, keep_threshold, keep_scale, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From the norm's gradient [BLOCK_M, BLOCK_N] to those of residual and input; both (M, N) contiguous."""
    o_tile = (o_m * N)[:, None] + o_n[None, :]
    if p_grad_new_residual_rows is not None:
        p_incoming = p_grad_new_residual_rows + o_n[None, :].to(tl.int64) * stride_grad_new_residual_n
        b_grad += tl.load(p_incoming, mask=m_tile, other=0.0).to(tl.float32)
    if p_grad_residual is not None:
        tl.store(p_grad_residual + o_tile, to_dtype(b_grad, p_grad_residual.dtype.element_ty), mask=m_tile)
    if p_grad_input is not None:
        if p_seed is not None:
            m_keep = dropout_keep(p_seed, o_m, i_n, N, keep_threshold, BLOCK_N)
            b_grad = tl.where(m_keep, b_grad * keep_scale, 0.0)
        tl.store(p_grad_input + o_tile, to_dtype(b_grad, p_grad_input.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def norm_backward_row_kernel(
    p_grad_output,
    p_grad_new_residual,
    p_stream,
    p_statistics,  # float32 (1 or 2, M): rstd, mean if CENTER
    p_weight,
    p_seed,
    p_grad_input,  # (M, N) contiguous
    p_grad_residual,  # (M, N) contiguous
    p_weight_partial,  # float32 (programs, N)
    p_bias_partial,  # float32 (programs, N)
    M, N, n_blocks, size_1, size_2,
    stride_grad_output_0, stride_grad_output_1, stride_grad_output_2, stride_grad_output_n,
    stride_grad_new_residual_0, stride_grad_new_residual_1, stride_grad_new_residual_2, stride_grad_new_residual_n,
    stride_stream_0, stride_stream_1, stride_stream_2, stride_stream_n,
    stride_weight, weight_offset, keep_threshold, keep_scale,
    CENTER: tl.constexpr, ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whole rows in registers: ``n_blocks`` blocks of BLOCK_M rows a program, all gradients in one pass over memory."""
    i_program = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_weight = load_weight(p_weight, o_n, m_n, stride_weight, weight_offset)
    b_weight_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_bias_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    for i_block in range(0, n_blocks):
        o_m = (i_program * n_blocks + i_block) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        m_tile = m_m[:, None] & m_n[None, :]
        o_grad_output = row_offsets(
            o_m, M, size_1, size_2, stride_grad_output_0, stride_grad_output_1, stride_grad_output_2, ROW_DIMS
        )
        o_stream = row_offsets(o_m, M, size_1, size_2, stride_stream_0, stride_stream_1, stride_stream_2, ROW_DIMS)
        p_grad_new_residual_rows = p_grad_new_residual
        if p_grad_new_residual is not None:
            o_grad_new_residual = row_offsets(
                o_m, M, size_1, size_2,
                stride_grad_new_residual_0, stride_grad_new_residual_1, stride_grad_new_residual_2, ROW_DIMS,
            )  # fmt: skip
            p_grad_new_residual_rows = p_grad_new_residual + o_grad_new_residual[:, None]

        p_dy = p_grad_output + o_grad_output[:, None] + o_n[None, :].to(tl.int64) * stride_grad_output_n
        b_dy = tl.load(p_dy, mask=m_tile, other=0.0).to(tl.float32)
        b_rstd = tl.load(p_statistics + o_m, mask=m_m, other=0.0)
        b_mean = b_rstd
        if CENTER:
            b_mean = tl.load(p_statistics + M + o_m, mask=m_m, other=0.0)
        b_x_hat = load_normalized(p_stream + o_stream[:, None], o_n, m_tile, stride_stream_n, b_mean, b_rstd, CENTER)

        if p_weight_partial is not None:
            b_weight_sum += b_dy * b_x_hat
        if p_bias_partial is not None:
            b_bias_sum += b_dy
        if p_grad_input is not None or p_grad_residual is not None:
            b_grad = b_dy * b_weight
            b_projection = divide_by_count(tl.sum(b_grad * b_x_hat, axis=1), N)
            b_dx = b_grad - b_x_hat * b_projection[:, None]
            if CENTER:
                b_dx -= divide_by_count(tl.sum(b_grad, axis=1), N)[:, None]
            store_stream_gradient(
                b_dx * b_rstd[:, None], p_grad_new_residual_rows, p_seed, p_grad_input, p_grad_residual,
                o_m, 0, o_n, m_tile, N, stride_grad_new_residual_n, keep_threshold, keep_scale, BLOCK_N,
            )  # fmt: skip

    if p_weight_partial is not None:
        tl.store(p_weight_partial + i_program * N + o_n, tl.sum(b_weight_sum, axis=0), mask=m_n)
    if p_bias_partial is not None:
        tl.store(p_bias_partial + i_program * N + o_n, tl.sum(b_bias_sum, axis=0), mask=m_n)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def norm_backward_loop_kernel(
    p_grad_output,
    p_grad_new_residual,
    p_stream,
    p_statistics,  # float32 (1 or 2, M): rstd, mean if CENTER
    p_weight,
    p_seed,
    p_grad_input,  # (M, N) contiguous
    p_grad_residual,  # (M, N) contiguous
    M, N, size_1, size_2,
    stride_grad_output_0, stride_grad_output_1, stride_grad_output_2, stride_grad_output_n,
    stride_grad_new_residual_0, stride_grad_new_residual_1, stride_grad_new_residual_2, stride_grad_new_residual_n,
    stride_stream_0, stride_stream_1, stride_stream_2, stride_stream_n,
    stride_weight, weight_offset, keep_threshold, keep_scale,
    CENTER: tl.constexpr, ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows too long for registers, BLOCK_N columns at a time: once for the two sums, once for the gradients."""
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M

    o_grad_output = row_offsets(
        o_m, M, size_1, size_2, stride_grad_output_0, stride_grad_output_1, stride_grad_output_2, ROW_DIMS
    )
    o_stream = row_offsets(o_m, M, size_1, size_2, stride_stream_0, stride_stream_1, stride_stream_2, ROW_DIMS)
    p_grad_output_rows = p_grad_output + o_grad_output[:, None]
    p_stream_rows = p_stream + o_stream[:, None]
    p_grad_new_residual_rows = p_grad_new_residual
    if p_grad_new_residual is not None:
        o_grad_new_residual = row_offsets(
            o_m, M, size_1, size_2,
            stride_grad_new_residual_0, stride_grad_new_residual_1, stride_grad_new_residual_2, ROW_DIMS,
        )  # fmt: skip
        p_grad_new_residual_rows = p_grad_new_residual + o_grad_new_residual[:, None]

    b_rstd = tl.load(p_statistics + o_m, mask=m_m, other=0.0)
    b_mean = b_rstd
    if CENTER:
        b_mean = tl.load(p_statistics + M + o_m, mask=m_m, other=0.0)

    b_projection_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_grad_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        m_tile = m_m[:, None] & m_n[None, :]
        p_dy = p_grad_output_rows + o_n[None, :].to(tl.int64) * stride_grad_output_n
        b_grad = tl.load(p_dy, mask=m_tile, other=0.0).to(tl.float32)
        b_grad *= load_weight(p_weight, o_n, m_n, stride_weight, weight_offset)
        b_projection_sum += b_grad * load_normalized(
            p_stream_rows, o_n, m_tile, stride_stream_n, b_mean, b_rstd, CENTER
        )
        if CENTER:
            b_grad_sum += b_grad
    b_projection = divide_by_count(tl.sum(b_projection_sum, axis=1), N)
    b_grad_mean = divide_by_count(tl.sum(b_grad_sum, axis=1), N)

    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        m_tile = m_m[:, None] & m_n[None, :]
        p_dy = p_grad_output_rows + o_n[None, :].to(tl.int64) * stride_grad_output_n
        b_grad = tl.load(p_dy, mask=m_tile, other=0.0).to(tl.float32)
        b_grad *= load_weight(p_weight, o_n, m_n, stride_weight, weight_offset)
        b_x_hat = load_normalized(p_stream_rows, o_n, m_tile, stride_stream_n, b_mean, b_rstd, CENTER)
        b_dx = (b_grad - b_x_hat * b_projection[:, None] - b_grad_mean[:, None]) * b_rstd[:, None]
        store_stream_gradient(
            b_dx, p_grad_new_residual_rows, p_seed, p_grad_input, p_grad_residual,
            o_m, i_n, o_n, m_tile, N, stride_grad_new_residual_n, keep_threshold, keep_scale, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def norm_backward_parameter_kernel(
    p_grad_output,
    p_stream,
    p_statistics,  # float32 (1 or 2, M): rstd, mean if CENTER
    p_weight_partial,  # float32 (programs per column tile, N)
    p_bias_partial,  # float32 (programs per column tile, N)
    M, N, n_blocks, size_1, size_2,
    stride_grad_output_0, stride_grad_output_1, stride_grad_output_2, stride_grad_output_n,
    stride_stream_0, stride_stream_1, stride_stream_2, stride_stream_n,
    CENTER: tl.constexpr, ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Parameter gradients of long rows: BLOCK_N columns and ``n_blocks`` blocks of BLOCK_M rows a program."""
    # One grid axis, as the others end at 65535.
    n_column_tiles = tl.cdiv(N, BLOCK_N)
    i_program = (tl.program_id(0) // n_column_tiles).to(tl.int64)
    o_n = (tl.program_id(0) % n_column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_weight_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_bias_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    for i_block in range(0, n_blocks):
        o_m = (i_program * n_blocks + i_block) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        m_tile = m_m[:, None] & m_n[None, :]
        o_grad_output = row_offsets(
            o_m, M, size_1, size_2, stride_grad_output_0, stride_grad_output_1, stride_grad_output_2, ROW_DIMS
        )
        p_dy = p_grad_output + o_grad_output[:, None] + o_n[None, :] * stride_grad_output_n
        b_dy = tl.load(p_dy, mask=m_tile, other=0.0).to(tl.float32)
        if p_weight_partial is not None:
            o_stream = row_offsets(o_m, M, size_1, size_2, stride_stream_0, stride_stream_1, stride_stream_2, ROW_DIMS)
            b_rstd = tl.load(p_statistics + o_m, mask=m_m, other=0.0)
            b_mean = b_rstd
            if CENTER:
                b_mean = tl.load(p_statistics + M + o_m, mask=m_m, other=0.0)
            b_weight_sum += b_dy * load_normalized(
                p_stream + o_stream[:, None], o_n, m_tile, stride_stream_n, b_mean, b_rstd, CENTER
            )
        if p_bias_partial is not None:
            b_bias_sum += b_dy

    if p_weight_partial is not None:
        tl.store(p_weight_partial + i_program * N + o_n, tl.sum(b_weight_sum, axis=0), mask=m_n)
    if p_bias_partial is not None:
        tl.store(p_bias_partial + i_program * N + o_n, tl.sum(b_bias_sum, axis=0), mask=m_n)


@triton.jit(do_not_specialize=["P"])
def norm_backward_column_sum_kernel(
    p_partial,  # float32 (P, N)
    p_sum,  # (ceil(P / GROUP), N), any dtype
    P, N,
    GROUP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds each GROUP rows of partial sums to one, in a fixed order."""
    n_column_tiles = tl.cdiv(N, BLOCK_N)
    i_group = (tl.program_id(0) // n_column_tiles).to(tl.int64)
    o_n = (tl.program_id(0) % n_column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_sum = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for i_p in range(0, tl.minimum(P - i_group * GROUP, GROUP), BLOCK_P):
        o_p = i_group * GROUP + i_p + tl.arange(0, BLOCK_P)
        m_tile = (o_p < P)[:, None] & m_n[None, :]
        b_sum += tl.load(p_partial + (o_p * N)[:, None] + o_n[None, :], mask=m_tile, other=0.0)
    tl.store(p_sum + i_group * N + o_n, to_dtype(tl.sum(b_sum, axis=0), p_sum.dtype.element_ty), mask=m_n)
