"""Triton kernels of softmax over M rows of N columns, every operand in its own strides.

Forward y = exp(x - max(x)) / sum(exp(x - max(x))), backward dx = y * (dy - sum(y * dy)). Imports only where Triton is
installed.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_primitives import row_offsets, to_dtype

# The row count is not specialised; sizes and strides are, for the contiguity that vector loads need.
_NOT_SPECIALIZED = ["M"]


@triton.jit
def finite_pivot(b_max):
    """The maximum to subtract; 0 for a row (so far) of -inf alone, as -inf - (-inf) would be NaN."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def reciprocal(b_sum):
    """1 / b_sum correctly rounded; NaN for the sum 0 of a row of -inf alone, as in torch."""
    return tl.div_rn(tl.zeros_like(b_sum) + 1.0, tl.where(b_sum == 0.0, float("nan"), b_sum))


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def softmax_forward_row_kernel(
    p_input,
    p_output,
    M, N, size_1, size_2,
    stride_input_0, stride_input_1, stride_input_2, stride_input_n,
    stride_output_0, stride_output_1, stride_output_2, stride_output_n,
    ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows in registers: one pass over memory."""
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    m_tile = (o_m < M)[:, None] & (o_n < N)[None, :]

    o_input = row_offsets(o_m, M, size_1, size_2, stride_input_0, stride_input_1, stride_input_2, ROW_DIMS)
    o_output = row_offsets(o_m, M, size_1, size_2, stride_output_0, stride_output_1, stride_output_2, ROW_DIMS)
    p_x = p_input + o_input[:, None] + o_n[None, :] * stride_input_n
    p_y = p_output + o_output[:, None] + o_n[None, :] * stride_output_n

    b_x = tl.load(p_x, mask=m_tile, other=float("-inf")).to(tl.float32)
    b_exp = tl.exp(b_x - finite_pivot(tl.max(b_x, axis=1))[:, None])
    b_y = b_exp * reciprocal(tl.sum(b_exp, axis=1))[:, None]
    tl.store(p_y, to_dtype(b_y, p_output.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def softmax_forward_loop_kernel(
    p_input,
    p_output,
    M, N, size_1, size_2,
    stride_input_0, stride_input_1, stride_input_2, stride_input_n,
    stride_output_0, stride_output_1, stride_output_2, stride_output_n,
    ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows too long for registers, BLOCK_N columns at a time: once for maximum and sum, once for the output.

    The running sum is rescaled when the maximum grows (Milakov and Gimelshein, "Online normalizer calculation for
    softmax", 2018), which saves a pass.
    """
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M

    o_input = row_offsets(o_m, M, size_1, size_2, stride_input_0, stride_input_1, stride_input_2, ROW_DIMS)
    o_output = row_offsets(o_m, M, size_1, size_2, stride_output_0, stride_output_1, stride_output_2, ROW_DIMS)

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
        m_tile = m_m[:, None] & (o_n < N)[None, :]
        p_x = p_input + o_input[:, None] + o_n[None, :] * stride_input_n
        b_x = tl.load(p_x, mask=m_tile, other=float("-inf")).to(tl.float32)
        b_new_max = tl.maximum(b_max, tl.max(b_x, axis=1))
        b_pivot = finite_pivot(b_new_max)
        b_sum = b_sum * tl.exp(b_max - b_pivot) + tl.sum(tl.exp(b_x - b_pivot[:, None]), axis=1)
        b_max = b_new_max

    b_pivot = finite_pivot(b_max)
    b_scale = reciprocal(b_sum)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
        m_tile = m_m[:, None] & (o_n < N)[None, :]
        p_x = p_input + o_input[:, None] + o_n[None, :] * stride_input_n
        p_y = p_output + o_output[:, None] + o_n[None, :] * stride_output_n
        b_x = tl.load(p_x, mask=m_tile, other=float("-inf")).to(tl.float32)
        b_y = tl.exp(b_x - b_pivot[:, None]) * b_scale[:, None]
        tl.store(p_y, to_dtype(b_y, p_output.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def softmax_backward_row_kernel(
    p_grad_output,
    p_output,
    p_grad_input,
    M, N, size_1, size_2,
    stride_grad_output_0, stride_grad_output_1, stride_grad_output_2, stride_grad_output_n,
    stride_output_0, stride_output_1, stride_output_2, stride_output_n,
    stride_grad_input_0, stride_grad_input_1, stride_grad_input_2, stride_grad_input_n,
    ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows in registers: one pass over memory."""
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    m_tile = (o_m < M)[:, None] & (o_n < N)[None, :]

    o_dy = row_offsets(
        o_m, M, size_1, size_2, stride_grad_output_0, stride_grad_output_1, stride_grad_output_2, ROW_DIMS
    )
    o_y = row_offsets(o_m, M, size_1, size_2, stride_output_0, stride_output_1, stride_output_2, ROW_DIMS)
    o_dx = row_offsets(o_m, M, size_1, size_2, stride_grad_input_0, stride_grad_input_1, stride_grad_input_2, ROW_DIMS)
    p_dy = p_grad_output + o_dy[:, None] + o_n[None, :] * stride_grad_output_n
    p_y = p_output + o_y[:, None] + o_n[None, :] * stride_output_n
    p_dx = p_grad_input + o_dx[:, None] + o_n[None, :] * stride_grad_input_n

    b_dy = tl.load(p_dy, mask=m_tile, other=0.0).to(tl.float32)
    b_y = tl.load(p_y, mask=m_tile, other=0.0).to(tl.float32)
    b_dx = b_y * (b_dy - tl.sum(b_y * b_dy, axis=1)[:, None])
    tl.store(p_dx, to_dtype(b_dx, p_grad_input.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def softmax_backward_loop_kernel(
    p_grad_output,
    p_output,
    p_grad_input,
    M, N, size_1, size_2,
    stride_grad_output_0, stride_grad_output_1, stride_grad_output_2, stride_grad_output_n,
    stride_output_0, stride_output_1, stride_output_2, stride_output_n,
    stride_grad_input_0, stride_grad_input_1, stride_grad_input_2, stride_grad_input_n,
    ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows too long for registers, BLOCK_N columns at a time: once for the sum, once for the gradient."""
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M

    o_dy = row_offsets(
        o_m, M, size_1, size_2, stride_grad_output_0, stride_grad_output_1, stride_grad_output_2, ROW_DIMS
    )
    o_y = row_offsets(o_m, M, size_1, size_2, stride_output_0, stride_output_1, stride_output_2, ROW_DIMS)
    o_dx = row_offsets(o_m, M, size_1, size_2, stride_grad_input_0, stride_grad_input_1, stride_grad_input_2, ROW_DIMS)

    # One sum a column of the tile: runs stay short, and the threads meet once, after the loop.
    b_products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
        m_tile = m_m[:, None] & (o_n < N)[None, :]
        p_dy = p_grad_output + o_dy[:, None] + o_n[None, :] * stride_grad_output_n
        p_y = p_output + o_y[:, None] + o_n[None, :] * stride_output_n
        b_dy = tl.load(p_dy, mask=m_tile, other=0.0).to(tl.float32)
        b_products += tl.load(p_y, mask=m_tile, other=0.0).to(tl.float32) * b_dy
    b_sum = tl.sum(b_products, axis=1)

    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
        m_tile = m_m[:, None] & (o_n < N)[None, :]
        p_dy = p_grad_output + o_dy[:, None] + o_n[None, :] * stride_grad_output_n
        p_y = p_output + o_y[:, None] + o_n[None, :] * stride_output_n
        p_dx = p_grad_input + o_dx[:, None] + o_n[None, :] * stride_grad_input_n
        b_dy = tl.load(p_dy, mask=m_tile, other=0.0).to(tl.float32)
        b_y = tl.load(p_y, mask=m_tile, other=0.0).to(tl.float32)
        b_dx = b_y * (b_dy - b_sum[:, None])
        tl.store(p_dx, to_dtype(b_dx, p_grad_input.dtype.element_ty), mask=m_tile)
