"""Triton kernel of LSH attention: what the others need of each row. Imports only where Triton is installed."""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_matrix_primitives import in_unit, load_tile

# A vector shorter than this has no direction.
SHORTEST = tl.constexpr(1e-12)


@triton.jit(do_not_specialize=["H", "T", "n_rows"])
def lsh_attention_rows_kernel(
    p_query_key,
    p_norms,  # float32 (B, H, T): length, 0 without a direction
    p_grad_output,
    p_output,
    p_statistics,  # float32 (2, B, H, T)
    p_grad_lse,  # float32
    p_rows,  # float32 (3, B, H, T): base-2 reference, 1 / sum, delta; None in the forward, as are the four before
    H, T, n_rows,
    stride_query_key_b, stride_query_key_h, stride_query_key_t, stride_grad_b, stride_grad_h, stride_grad_t,
    stride_output_b, stride_output_h, stride_output_t, stride_lse_b, stride_lse_h, stride_lse_t,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows a program. A row that sees itself alone has 1 / sum 0 and delta -grad_lse."""
    o_rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = o_rows < n_rows
    o_t = o_rows % T
    o_h = o_rows // T % H
    o_b = o_rows // T // H
    b_square = tl.zeros([BLOCK_M], tl.float32)
    o_query_key = o_b * stride_query_key_b + o_h * stride_query_key_h + o_t * stride_query_key_t
    for i_column in range(0, D, BLOCK_D):
        b_x = load_tile(p_query_key, o_query_key, m_rows, i_column, D, BLOCK_D, True).to(tl.float32)
        b_square += tl.sum(b_x * b_x, axis=1)
    b_norm = tl.sqrt_rn(b_square)
    # Written so that a NaN stays one.
    tl.store(p_norms + o_rows, tl.where(b_norm <= SHORTEST, 0.0, b_norm), mask=m_rows)
    if p_rows is not None:
        o_grad = o_b * stride_grad_b + o_h * stride_grad_h + o_t * stride_grad_t
        o_output = o_b * stride_output_b + o_h * stride_output_h + o_t * stride_output_t
        b_delta = tl.zeros([BLOCK_M], tl.float32)
        for i_column in range(0, DV, BLOCK_DV):
            b_grad = load_tile(p_grad_output, o_grad, m_rows, i_column, DV, BLOCK_DV, True).to(tl.float32)
            b_output = load_tile(p_output, o_output, m_rows, i_column, DV, BLOCK_DV, True).to(tl.float32)
            b_delta += tl.sum(b_grad * b_output, axis=1)
        b_reference = tl.load(p_statistics + o_rows, mask=m_rows, other=0.0)
        b_total = tl.load(p_statistics + n_rows.to(tl.int64) + o_rows, mask=m_rows, other=1.0)
        m_alone = b_total == 0.0
        b_delta = tl.where(m_alone, 0.0, b_delta)
        if p_grad_lse is not None:
            o_lse = o_b * stride_lse_b + o_h * stride_lse_h + o_t * stride_lse_t
            b_delta -= tl.load(p_grad_lse + o_lse, mask=m_rows, other=0.0).to(tl.float32)
        tl.store(p_rows + o_rows, in_unit(b_reference, False), mask=m_rows)
        tl.store(p_rows + n_rows.to(tl.int64) + o_rows, tl.where(m_alone, 0.0, 1.0 / b_total), mask=m_rows)
        tl.store(p_rows + 2 * n_rows.to(tl.int64) + o_rows, b_delta, mask=m_rows)
