"""Triton kernels of SwiGLU and of GELU with a bias over M rows of N features, every operand in its own strides.

Imports only where Triton is installed.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_primitives import row_offsets, sigmoid, to_dtype

_NOT_SPECIALIZED = ["M"]

_INVERSE_ROOT_TWO = tl.constexpr(0.7071067811865476)
_INVERSE_ROOT_TWO_PI = tl.constexpr(0.3989422804014327)
# Hendrycks and Gimpel's approximation is z * sigmoid(SCALE * (z + CUBE * z^3)).
_TANH_SCALE = tl.constexpr(1.5957691216057308)
_TANH_CUBE = tl.constexpr(0.044715)


@triton.jit
def gelu_parts(b_z, TANH: tl.constexpr):
    """The factor of z, and its derivative."""
    if TANH:
        b_square = b_z * b_z
        b_below, b_slope = sigmoid(b_z * (1.0 + _TANH_CUBE * b_square) * _TANH_SCALE)
        return b_below, b_slope * (1.0 + 3.0 * _TANH_CUBE * b_square) * _TANH_SCALE
    else:
        b_below = 0.5 + 0.5 * tl.erf(b_z * _INVERSE_ROOT_TWO)
        return b_below, tl.exp(-0.5 * b_z * b_z) * _INVERSE_ROOT_TWO_PI


@triton.jit
def tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of this program, and which of them there are."""
    n_column_tiles = tl.cdiv(N, BLOCK_N)
    o_m = (tl.program_id(0) // n_column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (tl.program_id(0) % n_column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return o_m, o_n, (o_m < M)[:, None] & (o_n < N)[None, :]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def swiglu_forward_kernel(
    p_gate, p_up, p_output,
    M, N, size_1, size_2,
    stride_gate_0, stride_gate_1, stride_gate_2, stride_gate_n,
    stride_up_0, stride_up_1, stride_up_2, stride_up_n,
    stride_output_0, stride_output_1, stride_output_2, stride_output_n,
    ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_m, o_n, m_tile = tile_of(M, N, BLOCK_M, BLOCK_N)
    o_gate = row_offsets(o_m, M, size_1, size_2, stride_gate_0, stride_gate_1, stride_gate_2, ROW_DIMS)
    o_up = row_offsets(o_m, M, size_1, size_2, stride_up_0, stride_up_1, stride_up_2, ROW_DIMS)
    o_output = row_offsets(o_m, M, size_1, size_2, stride_output_0, stride_output_1, stride_output_2, ROW_DIMS)
    b_gate = tl.load(p_gate + o_gate[:, None] + o_n[None, :] * stride_gate_n, mask=m_tile, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o_up[:, None] + o_n[None, :] * stride_up_n, mask=m_tile, other=0.0).to(tl.float32)
    b_sigmoid, _ = sigmoid(b_gate)
    b_output = to_dtype(b_gate * b_sigmoid * b_up, p_output.dtype.element_ty)
    tl.store(p_output + o_output[:, None] + o_n[None, :] * stride_output_n, b_output, mask=m_tile)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def swiglu_backward_kernel(
    p_grad_output, p_gate, p_up, p_grad_gate, p_grad_up,
    M, N, size_1, size_2,
    stride_grad_output_0, stride_grad_output_1, stride_grad_output_2, stride_grad_output_n,
    stride_gate_0, stride_gate_1, stride_gate_2, stride_gate_n,
    stride_up_0, stride_up_1, stride_up_2, stride_up_n,
    stride_grad_gate_0, stride_grad_gate_1, stride_grad_gate_2, stride_grad_gate_n,
    stride_grad_up_0, stride_grad_up_1, stride_grad_up_2, stride_grad_up_n,
    ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_gate = grad * up * (s + gate * s'), grad_up = grad * gate * s, s = sigmoid(gate)."""
    o_m, o_n, m_tile = tile_of(M, N, BLOCK_M, BLOCK_N)
    o_grad = row_offsets(
        o_m, M, size_1, size_2, stride_grad_output_0, stride_grad_output_1, stride_grad_output_2, ROW_DIMS
    )
    o_gate = row_offsets(o_m, M, size_1, size_2, stride_gate_0, stride_gate_1, stride_gate_2, ROW_DIMS)
    o_up = row_offsets(o_m, M, size_1, size_2, stride_up_0, stride_up_1, stride_up_2, ROW_DIMS)
    p_grad = p_grad_output + o_grad[:, None] + o_n[None, :] * stride_grad_output_n
    b_grad = tl.load(p_grad, mask=m_tile, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + o_gate[:, None] + o_n[None, :] * stride_gate_n, mask=m_tile, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o_up[:, None] + o_n[None, :] * stride_up_n, mask=m_tile, other=0.0).to(tl.float32)
    b_sigmoid, b_slope = sigmoid(b_gate)
    o_grad_gate = row_offsets(
        o_m, M, size_1, size_2, stride_grad_gate_0, stride_grad_gate_1, stride_grad_gate_2, ROW_DIMS
    )
    o_grad_up = row_offsets(o_m, M, size_1, size_2, stride_grad_up_0, stride_grad_up_1, stride_grad_up_2, ROW_DIMS)
    b_grad_gate = to_dtype(b_grad * b_up * (b_sigmoid + b_gate * b_slope), p_grad_gate.dtype.element_ty)
    tl.store(p_grad_gate + o_grad_gate[:, None] + o_n[None, :] * stride_grad_gate_n, b_grad_gate, mask=m_tile)
    b_grad_up = to_dtype(b_grad * b_gate * b_sigmoid, p_grad_up.dtype.element_ty)
    tl.store(p_grad_up + o_grad_up[:, None] + o_n[None, :] * stride_grad_up_n, b_grad_up, mask=m_tile)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def bias_gelu_forward_kernel(
    p_input,
    p_bias,  # [N] or None
    p_output,
    M, N, size_1, size_2,
    stride_input_0, stride_input_1, stride_input_2, stride_input_n,
    stride_output_0, stride_output_1, stride_output_2, stride_output_n,
    stride_bias,
    TANH: tl.constexpr,
    ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_m, o_n, m_tile = tile_of(M, N, BLOCK_M, BLOCK_N)
    o_input = row_offsets(o_m, M, size_1, size_2, stride_input_0, stride_input_1, stride_input_2, ROW_DIMS)
    o_output = row_offsets(o_m, M, size_1, size_2, stride_output_0, stride_output_1, stride_output_2, ROW_DIMS)
    b_z = tl.load(p_input + o_input[:, None] + o_n[None, :] * stride_input_n, mask=m_tile, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_z += tl.load(p_bias + o_n * stride_bias, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    b_below, _ = gelu_parts(b_z, TANH)
    b_output = to_dtype(b_z * b_below, p_output.dtype.element_ty)
    tl.store(p_output + o_output[:, None] + o_n[None, :] * stride_output_n, b_output, mask=m_tile)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def bias_gelu_backward_kernel(
    p_grad_output, p_input,
    p_bias,
    p_grad_input,
    p_bias_partial,  # float32 (ceil(M / BLOCK_M), N), None without a bias
    M, N, size_1, size_2,
    stride_grad_output_0, stride_grad_output_1, stride_grad_output_2, stride_grad_output_n,
    stride_input_0, stride_input_1, stride_input_2, stride_input_n,
    stride_grad_input_0, stride_grad_input_1, stride_grad_input_2, stride_grad_input_n,
    stride_bias,
    TANH: tl.constexpr,
    ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_m, o_n, m_tile = tile_of(M, N, BLOCK_M, BLOCK_N)
    o_grad = row_offsets(
        o_m, M, size_1, size_2, stride_grad_output_0, stride_grad_output_1, stride_grad_output_2, ROW_DIMS
    )
    o_input = row_offsets(o_m, M, size_1, size_2, stride_input_0, stride_input_1, stride_input_2, ROW_DIMS)
    o_grad_input = row_offsets(
        o_m, M, size_1, size_2, stride_grad_input_0, stride_grad_input_1, stride_grad_input_2, ROW_DIMS
    )
    p_grad = p_grad_output + o_grad[:, None] + o_n[None, :] * stride_grad_output_n
    b_grad = tl.load(p_grad, mask=m_tile, other=0.0).to(tl.float32)
    b_z = tl.load(p_input + o_input[:, None] + o_n[None, :] * stride_input_n, mask=m_tile, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_z += tl.load(p_bias + o_n * stride_bias, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    b_below, b_slope = gelu_parts(b_z, TANH)
    b_gradient = b_grad * (b_below + b_z * b_slope)
    p_dx = p_grad_input + o_grad_input[:, None] + o_n[None, :] * stride_grad_input_n
    tl.store(p_dx, to_dtype(b_gradient, p_grad_input.dtype.element_ty), mask=m_tile)
    if p_bias_partial is not None:
        i_block = (tl.program_id(0) // tl.cdiv(N, BLOCK_N)).to(tl.int64)
        # Rows behind the last have gradient 0.
        tl.store(p_bias_partial + i_block * N + o_n, tl.sum(b_gradient, axis=0), mask=o_n < N)
