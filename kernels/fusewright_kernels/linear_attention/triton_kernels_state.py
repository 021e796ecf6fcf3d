"""Triton kernels of linear attention: the states between blocks of positions, and numbers of rows for the backward.

Blocks are summed side by side, then a scan in float32 carries a state over them, so that even one head fills a GPU.
Imports only where Triton is installed.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.linear_attention.triton_primitives import key_mask, load_features, load_numbers, load_scaled
from fusewright_kernels.triton_matrix_primitives import dot, load_tile


@triton.jit(do_not_specialize=["H", "T", "L", "n_blocks", "n_rows"])
def linear_attention_sums_kernel(
    p_rows,
    p_columns,
    p_numbers,  # float32 (2, B, H, T): see linear_attention_numbers_kernel; None where rows are keys
    p_padding,  # uint8 (B, T), of keys
    p_sums,  # float32 (B, H, blocks, D, DV + 1)
    H, T, L, n_blocks, n_rows,
    stride_rows_b, stride_rows_h, stride_rows_t, stride_columns_b, stride_columns_h, stride_columns_t,
    D: tl.constexpr, DV: tl.constexpr, ELU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """f(row)^T [column, 1] summed over a block of L positions, one piece of the state a program.

    With ``p_numbers`` it is f(row)^T [column / normalizer, gradient of the normalizer].
    """
    N_PIECES: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV if DV > 0 else 1
    N_ROW_PIECES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i_dv = tl.program_id(0) % N_PIECES * BLOCK_DV
    i_d = tl.program_id(0) // N_PIECES % N_ROW_PIECES * BLOCK_D
    i_sum = (tl.program_id(0) // N_PIECES // N_ROW_PIECES).to(tl.int64)
    i_block = (i_sum % n_blocks).to(tl.int32)
    i_head = i_sum // n_blocks
    i_b, i_h = i_head // H, i_head % H
    p_rows += i_b * stride_rows_b + i_h * stride_rows_h
    p_columns += i_b * stride_columns_b + i_h * stride_columns_h

    b_sum = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    b_last_sum = tl.zeros([BLOCK_D], tl.float32)
    for i_t in range(i_block * L, tl.minimum(i_block * L + L, T), BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        m_t = key_mask(p_padding, i_b, o_t, T)
        b_factor = p_numbers
        b_last = m_t.to(tl.float32)
        if p_numbers is not None:
            b_factor, b_last = load_numbers(p_numbers, i_head * T + o_t, m_t, n_rows)
        o_t = o_t.to(tl.int64)
        b_features = load_features(p_rows, o_t * stride_rows_t, m_t, i_d, D, BLOCK_D, ELU)
        b_columns = load_scaled(p_columns, o_t * stride_columns_t, m_t, b_factor, i_dv, DV, BLOCK_DV)
        # A state is a result in float32, whatever the inputs.
        b_sum = dot(tl.trans(b_features), b_columns, b_sum, "tf32x3")
        b_last_sum += tl.sum(b_features * b_last[:, None], axis=0)

    p_sums += i_sum * (D * (DV + 1))
    o_d = i_d + tl.arange(0, BLOCK_D)
    o_dv = i_dv + tl.arange(0, BLOCK_DV)
    m_sums = (o_d < D)[:, None] & (o_dv < DV)[None, :]
    tl.store(p_sums + (o_d * (DV + 1))[:, None] + o_dv[None, :], b_sum, mask=m_sums)
    if i_dv == 0:
        tl.store(p_sums + o_d * (DV + 1) + DV, b_last_sum, mask=o_d < D)


@triton.jit(do_not_specialize=["size", "n_blocks", "n_tiles"])
def linear_attention_scan_kernel(
    p_sums,  # float32 (heads, blocks, size)
    p_initial,  # float32 (heads, size); None for zeros
    p_final,  # float32 (heads, size); None where nobody asks
    size, n_blocks, n_tiles,
    BACKWARDS: tl.constexpr, REPLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The initial state with all sums added; REPLACE puts in place of each block's sum what came before it."""
    i_head = (tl.program_id(0) // n_tiles).to(tl.int64)
    o_state = tl.program_id(0) % n_tiles * BLOCK + tl.arange(0, BLOCK)
    m_state = o_state < size
    b_state = tl.zeros([BLOCK], tl.float32)
    if p_initial is not None:
        b_state = tl.load(p_initial + i_head * size + o_state, mask=m_state, other=0.0)
    for i_step in range(0, n_blocks):
        i_block = n_blocks - 1 - i_step if BACKWARDS else i_step
        p_block = p_sums + (i_head * n_blocks + i_block) * size + o_state
        b_sum = tl.load(p_block, mask=m_state, other=0.0)
        if REPLACE:
            tl.store(p_block, b_state, mask=m_state)
        b_state += b_sum
    if p_final is not None:
        tl.store(p_final + i_head * size + o_state, b_state, mask=m_state)


@triton.jit(do_not_specialize=["H", "T", "n_rows"])
def linear_attention_numbers_kernel(
    p_grad_output,
    p_output,
    p_normalizer,  # float32 (B, H, T)
    p_numbers,  # float32 (2, B, H, T): 1 / normalizer; its gradient, -grad_output output / normalizer
    H, T, n_rows,
    stride_grad_b, stride_grad_h, stride_grad_t, stride_output_b, stride_output_h, stride_output_t,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows a program."""
    o_rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = o_rows < n_rows
    o_t, o_h, o_b = o_rows % T, o_rows // T % H, o_rows // T // H
    o_grad = o_b * stride_grad_b + o_h * stride_grad_h + o_t * stride_grad_t
    o_output = o_b * stride_output_b + o_h * stride_output_h + o_t * stride_output_t
    b_along = tl.zeros([BLOCK_M], tl.float32)
    for i_dv in range(0, DV, BLOCK_DV):
        b_grad = load_tile(p_grad_output, o_grad, m_rows, i_dv, DV, BLOCK_DV, True).to(tl.float32)
        b_output = load_tile(p_output, o_output, m_rows, i_dv, DV, BLOCK_DV, True).to(tl.float32)
        b_along += tl.sum(b_grad * b_output, axis=1)
    b_inverse = 1.0 / tl.load(p_normalizer + o_rows, mask=m_rows, other=1.0)
    tl.store(p_numbers + o_rows, b_inverse, mask=m_rows)
    tl.store(p_numbers + n_rows.to(tl.int64) + o_rows, -b_along * b_inverse, mask=m_rows)
