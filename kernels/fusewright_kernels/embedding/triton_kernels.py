"""Triton kernels of the embedding with positions. Imports only where Triton is installed."""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_primitives import to_dtype


@triton.jit(do_not_specialize=["M"])
def embedding_forward_kernel(
    p_tokens,  # int64 (M,)
    p_weight,  # (V, N)
    p_table,  # (P, N) or None
    p_rows,  # int64 (M,), or None: m modulo period
    p_output,  # (M, N)
    M, N, V, P, period, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < M, o_n < N
    b_token = tl.load(p_tokens + o_m, mask=m_m, other=0)
    m_known = m_m & (b_token >= 0) & (b_token < V)
    b_output = tl.load(
        p_weight + b_token[:, None] * N + o_n[None, :], mask=m_known[:, None] & m_n[None, :], other=float("nan")
    ).to(tl.float32)
    b_output = b_output * scale
    if p_table is not None:
        b_row = o_m % period
        if p_rows is not None:
            b_row = tl.load(p_rows + o_m, mask=m_m, other=0)
        m_known = m_m & (b_row >= 0) & (b_row < P)
        b_output += tl.load(
            p_table + b_row[:, None] * N + o_n[None, :], mask=m_known[:, None] & m_n[None, :], other=float("nan")
        ).to(tl.float32)
    b_output = to_dtype(b_output, p_output.dtype.element_ty)
    tl.store(p_output + o_m[:, None] * N + o_n[None, :], b_output, mask=m_m[:, None] & m_n[None, :])


@triton.jit
def embedding_backward_kernel(
    p_grad,  # (M, N)
    p_order,  # int64 (M,): places in the order of their index
    p_begins,  # int64 (rows + 1,): where the places of each row begin
    p_gradient,  # (rows, N)
    N, scale, skipped,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row of the gradient, BLOCK_N columns."""
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    begin, end = tl.load(p_begins + i_row), tl.load(p_begins + i_row + 1)
    end = tl.where(i_row == skipped, begin, end)
    b_sum = tl.zeros((BLOCK_N,), tl.float32)
    for i_place in range(begin, end, BLOCK_M):
        o_place = i_place + tl.arange(0, BLOCK_M)
        m_place = o_place < end
        b_place = tl.load(p_order + o_place, mask=m_place, other=0)
        b_grad = tl.load(p_grad + b_place[:, None] * N + o_n[None, :], mask=m_place[:, None] & m_n[None, :], other=0.0)
        b_sum += tl.sum(b_grad.to(tl.float32), axis=0)
    b_gradient = to_dtype(b_sum * scale, p_gradient.dtype.element_ty)
    tl.store(p_gradient + i_row * N + o_n, b_gradient, mask=m_n)
