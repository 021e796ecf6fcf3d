"""Triton kernel of rotary position embedding: (a, b) -> (a cos - b sin, a sin + b cos) for every pair of a row.

Imports only where Triton is installed.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_primitives import row_offsets, to_dtype


@triton.jit(do_not_specialize=["M"])
def rotary_forward_kernel(
    p_input,
    p_output,  # may be p_input
    p_cos, p_sin,  # float32 (B or 1, P, R)
    p_positions,  # int64 (B, T), or None: row t of the tables
    M, N, size_1, size_2,
    stride_input_0, stride_input_1, stride_input_2, stride_input_n,
    stride_output_0, stride_output_1, stride_output_2, stride_output_n,
    heads, length, table_rows, table_stride, direction,
    R, INTERLEAVED: tl.constexpr, COPY_REST: tl.constexpr,
    ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows (b, h, t) of N elements, BLOCK_N pairs at a time."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    o_x = row_offsets(o_m, M, size_1, size_2, stride_input_0, stride_input_1, stride_input_2, ROW_DIMS)
    o_y = row_offsets(o_m, M, size_1, size_2, stride_output_0, stride_output_1, stride_output_2, ROW_DIMS)

    # Row numbers fit the type of M, almost always int32: a 64-bit division is a function call on a GPU.
    o_row = o_m.to(M.dtype)
    o_t = o_row % length
    o_b = (o_row // (heads * length)).to(tl.int64)
    b_position = o_t.to(tl.int64)
    if p_positions is not None:
        b_position = tl.load(p_positions + o_b * length + o_t, mask=m_m, other=0)
    m_known = m_m & (b_position >= 0) & (b_position < table_rows)
    o_angle = o_b * table_stride + b_position * R

    for i_pair in range(0, R, BLOCK_N):
        o_pair = i_pair + tl.arange(0, BLOCK_N)
        m_tile = m_m[:, None] & (o_pair < R)[None, :]
        m_angle = m_known[:, None] & (o_pair < R)[None, :]
        b_cos = tl.load(p_cos + o_angle[:, None] + o_pair[None, :], mask=m_angle, other=float("nan"))
        b_sin = tl.load(p_sin + o_angle[:, None] + o_pair[None, :], mask=m_angle, other=float("nan")) * direction
        if INTERLEAVED:
            o_first, o_second = 2 * o_pair.to(tl.int64), 2 * o_pair.to(tl.int64) + 1
        else:
            o_first, o_second = o_pair.to(tl.int64), o_pair.to(tl.int64) + R
        p_x, p_y = p_input + o_x[:, None], p_output + o_y[:, None]
        b_first = tl.load(p_x + o_first[None, :] * stride_input_n, mask=m_tile, other=0.0).to(tl.float32)
        b_second = tl.load(p_x + o_second[None, :] * stride_input_n, mask=m_tile, other=0.0).to(tl.float32)
        b_turned = to_dtype(b_first * b_cos - b_second * b_sin, p_output.dtype.element_ty)
        tl.store(p_y + o_first[None, :] * stride_output_n, b_turned, mask=m_tile)
        b_turned = to_dtype(b_first * b_sin + b_second * b_cos, p_output.dtype.element_ty)
        tl.store(p_y + o_second[None, :] * stride_output_n, b_turned, mask=m_tile)
    if COPY_REST:
        for i_n in range(2 * R, N, BLOCK_N):
            o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
            m_tile = m_m[:, None] & (o_n < N)[None, :]
            b_x = tl.load(p_input + o_x[:, None] + o_n[None, :] * stride_input_n, mask=m_tile)
            tl.store(p_output + o_y[:, None] + o_n[None, :] * stride_output_n, b_x, mask=m_tile)
