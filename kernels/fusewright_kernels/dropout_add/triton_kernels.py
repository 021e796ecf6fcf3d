"""Triton kernel of dropout with a residual addition. Imports only where Triton is installed."""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_primitives import dropout_keep, row_offsets, to_dtype


@triton.jit(do_not_specialize=["M", "keep_threshold"])
def dropout_add_kernel(
    p_input,
    p_residual,  # None without a residual
    p_output,
    p_seed,  # int64, one element; None without dropout
    M, N, size_1, size_2,
    stride_input_0, stride_input_1, stride_input_2, stride_input_n,
    stride_residual_0, stride_residual_1, stride_residual_2, stride_residual_n,
    stride_output_0, stride_output_1, stride_output_2, stride_output_n,
    keep_threshold, keep_scale,
    ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M rows and BLOCK_N columns."""
    n_column_tiles = tl.cdiv(N, BLOCK_N)
    i_n = (tl.program_id(0) % n_column_tiles) * BLOCK_N
    o_m = (tl.program_id(0) // n_column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
    m_tile = (o_m < M)[:, None] & (o_n < N)[None, :]
    o_input = row_offsets(o_m, M, size_1, size_2, stride_input_0, stride_input_1, stride_input_2, ROW_DIMS)
    o_output = row_offsets(o_m, M, size_1, size_2, stride_output_0, stride_output_1, stride_output_2, ROW_DIMS)
    b_x = tl.load(p_input + o_input[:, None] + o_n[None, :] * stride_input_n, mask=m_tile, other=0.0).to(tl.float32)
    if p_seed is not None:
        b_x = tl.where(dropout_keep(p_seed, o_m, i_n, N, keep_threshold, BLOCK_N), b_x * keep_scale, 0.0)
    if p_residual is not None:
        o_residual = row_offsets(
            o_m, M, size_1, size_2, stride_residual_0, stride_residual_1, stride_residual_2, ROW_DIMS
        )
        p_added = p_residual + o_residual[:, None] + o_n[None, :] * stride_residual_n
        b_x += tl.load(p_added, mask=m_tile, other=0.0).to(tl.float32)
    p_y = p_output + o_output[:, None] + o_n[None, :] * stride_output_n
    tl.store(p_y, to_dtype(b_x, p_output.dtype.element_ty), mask=m_tile)
