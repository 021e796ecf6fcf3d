"""Triton kernels of cross-entropy over M rows of N classes, every operand in its own strides.

With q the distribution that a row wants, smoothed and weighted, and p the softmax of its logits:
loss = sum(q) * lse - sum(q * logits) + z_loss * lse^2, grad_logits = grad * (p * (sum(q) + 2 z_loss lse) - q).
Imports only where Triton is installed.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_primitives import row_offsets, tanh, to_dtype

# The row count and the ignored class are not specialised; sizes and strides are, for the contiguity of vector loads.
_NOT_SPECIALIZED = ["M", "ignore_index"]


@triton.jit
def load_logits(p_x, m_tile, softcap, CAPPED: tl.constexpr):
    """float32 [BLOCK_M, BLOCK_N], -inf where masked out."""
    b_x = tl.load(p_x, mask=m_tile, other=float("-inf")).to(tl.float32)
    if CAPPED:
        b_x = tl.where(m_tile, tanh(b_x / softcap) * softcap, float("-inf"))
    return b_x


@triton.jit
def wanted_of_classes(p_q, p_weight, b_target, o_n, N, m_tile, keep, uniform):
    """What each row wants of each class; ``p_q`` points to probabilities, or is None with target classes."""
    if p_q is not None:
        b_q = tl.load(p_q, mask=m_tile, other=0.0).to(tl.float32) * keep + uniform
    else:
        b_q = tl.where(b_target[:, None] == o_n[None, :], keep, 0.0) + uniform
    if p_weight is not None:
        b_q = b_q * tl.load(p_weight + o_n, mask=o_n < N, other=0.0)[None, :]
    return tl.where(m_tile, b_q, 0.0)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def cross_entropy_forward_kernel(
    p_input,
    p_probabilities,  # None with target classes
    p_target,  # int64 [M], None with probabilities
    p_weight,  # float32 [N] or None
    p_losses,  # float32 [M]
    p_statistics,  # float32 [3, M]: largest logit, log of the sum relative to it, sum(q)
    M, N, size_1, size_2,
    stride_input_0, stride_input_1, stride_input_2, stride_input_n,
    stride_probabilities_0, stride_probabilities_1, stride_probabilities_2, stride_probabilities_n,
    ignore_index, keep, uniform, z_loss, softcap,
    CAPPED: tl.constexpr, SPREAD: tl.constexpr,
    ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows, BLOCK_N classes at a time; SPREAD: rows want more than their target class.

    The running sum is rescaled when the maximum grows (Milakov and Gimelshein, "Online normalizer calculation for
    softmax", 2018).
    """
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    o_input = row_offsets(o_m, M, size_1, size_2, stride_input_0, stride_input_1, stride_input_2, ROW_DIMS)

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
        m_tile = m_m[:, None] & (o_n < N)[None, :]
        b_x = load_logits(p_input + o_input[:, None] + o_n[None, :] * stride_input_n, m_tile, softcap, CAPPED)
        b_new_max = tl.maximum(b_max, tl.max(b_x, axis=1))
        # -inf - (-inf) would be NaN.
        b_pivot = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_sum = b_sum * tl.exp(b_max - b_pivot) + tl.sum(tl.exp(b_x - b_pivot[:, None]), axis=1)
        b_max = b_new_max
    b_pivot = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_log_sum = tl.log(tl.where(m_m, b_sum, 1.0))

    m_counts = m_m
    m_valid = m_m
    b_target = tl.zeros([BLOCK_M], tl.int64)
    if p_target is not None:
        b_target = tl.load(p_target + o_m, mask=m_m, other=0)
        m_counts = m_m & (b_target != ignore_index)
        m_valid = m_counts & (b_target >= 0) & (b_target < N)
    if SPREAD:
        b_mass = tl.zeros([BLOCK_M], tl.float32)
        b_score = tl.zeros([BLOCK_M], tl.float32)
        if p_probabilities is not None:
            o_q = row_offsets(
                o_m, M, size_1, size_2,
                stride_probabilities_0, stride_probabilities_1, stride_probabilities_2, ROW_DIMS,
            )  # fmt: skip
        for i_n in range(0, N, BLOCK_N):
            o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
            m_tile = m_m[:, None] & (o_n < N)[None, :]
            b_x = load_logits(p_input + o_input[:, None] + o_n[None, :] * stride_input_n, m_tile, softcap, CAPPED)
            if p_probabilities is not None:
                p_q = p_probabilities + o_q[:, None] + o_n[None, :] * stride_probabilities_n
                b_q = wanted_of_classes(p_q, p_weight, b_target, o_n, N, m_tile, keep, uniform)
            else:
                b_q = wanted_of_classes(None, p_weight, b_target, o_n, N, m_tile, keep, uniform)
            b_mass += tl.sum(b_q, axis=1)
            b_score += tl.sum(tl.where(m_tile, b_q * (b_x - b_pivot[:, None]), 0.0), axis=1)
        b_loss = b_mass * b_log_sum - b_score
    else:
        p_x = p_input + o_input + b_target * stride_input_n
        b_x = load_logits(p_x, m_valid, softcap, CAPPED)
        b_mass = tl.zeros([BLOCK_M], tl.float32) + 1.0
        if p_weight is not None:
            b_mass = tl.load(p_weight + b_target, mask=m_valid, other=0.0)
        b_loss = b_mass * (b_log_sum - (b_x - b_pivot))
    b_lse = b_pivot + b_log_sum
    b_loss += z_loss * b_lse * b_lse
    b_loss = tl.where(m_valid, b_loss, float("nan"))
    tl.store(p_losses + o_m, tl.where(m_counts, b_loss, 0.0), mask=m_m)
    tl.store(p_statistics + o_m, tl.where(m_counts, b_pivot, 0.0), mask=m_m)
    tl.store(p_statistics + M + o_m, tl.where(m_counts, b_log_sum, 0.0), mask=m_m)
    tl.store(p_statistics + 2 * M + o_m, tl.where(m_counts, b_mass, 0.0), mask=m_m)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def cross_entropy_backward_kernel(
    p_grad_losses,  # float32 [M]
    p_input,
    p_probabilities,
    p_target,
    p_weight,
    p_statistics,
    p_grad_input,  # may be p_input; None if not wanted
    p_grad_target,  # of probabilities; None if not wanted
    M, N, size_1, size_2,
    stride_input_0, stride_input_1, stride_input_2, stride_input_n,
    stride_probabilities_0, stride_probabilities_1, stride_probabilities_2, stride_probabilities_n,
    stride_grad_input_0, stride_grad_input_1, stride_grad_input_2, stride_grad_input_n,
    stride_grad_target_0, stride_grad_target_1, stride_grad_target_2, stride_grad_target_n,
    ignore_index, keep, uniform, z_loss, softcap,
    CAPPED: tl.constexpr,
    ROW_DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M rows and BLOCK_N classes."""
    n_column_tiles = tl.cdiv(N, BLOCK_N)
    o_m = (tl.program_id(0) // n_column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (tl.program_id(0) % n_column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_tile = m_m[:, None] & (o_n < N)[None, :]
    o_input = row_offsets(o_m, M, size_1, size_2, stride_input_0, stride_input_1, stride_input_2, ROW_DIMS)
    b_x = load_logits(p_input + o_input[:, None] + o_n[None, :] * stride_input_n, m_tile, softcap, CAPPED)

    b_grad = tl.load(p_grad_losses + o_m, mask=m_m, other=0.0)
    b_largest = tl.load(p_statistics + o_m, mask=m_m, other=0.0)
    b_log_sum = tl.load(p_statistics + M + o_m, mask=m_m, other=0.0)
    b_total = tl.load(p_statistics + 2 * M + o_m, mask=m_m, other=0.0) + 2.0 * z_loss * (b_largest + b_log_sum)
    m_counts = m_m
    b_target = tl.zeros([BLOCK_M], tl.int64)
    p_q = None
    if p_target is not None:
        b_target = tl.load(p_target + o_m, mask=m_m, other=0)
        m_counts = m_m & (b_target != ignore_index)
        b_grad = tl.where((b_target >= 0) & (b_target < N), b_grad, float("nan"))
    if p_probabilities is not None:
        o_q = row_offsets(
            o_m, M, size_1, size_2, stride_probabilities_0, stride_probabilities_1, stride_probabilities_2, ROW_DIMS
        )
        p_q = p_probabilities + o_q[:, None] + o_n[None, :] * stride_probabilities_n

    b_log_p = b_x - b_largest[:, None] - b_log_sum[:, None]
    if p_grad_input is not None:
        b_q = wanted_of_classes(p_q, p_weight, b_target, o_n, N, m_tile, keep, uniform)
        b_dx = b_grad[:, None] * (tl.exp(b_log_p) * b_total[:, None] - b_q)
        if CAPPED:
            b_share = b_x / softcap
            b_dx *= 1.0 - b_share * b_share
        o_dx = row_offsets(
            o_m, M, size_1, size_2, stride_grad_input_0, stride_grad_input_1, stride_grad_input_2, ROW_DIMS
        )
        p_dx = p_grad_input + o_dx[:, None] + o_n[None, :] * stride_grad_input_n
        b_dx = tl.where(m_counts[:, None], b_dx, 0.0)
        tl.store(p_dx, to_dtype(b_dx, p_grad_input.dtype.element_ty), mask=m_tile)
    if p_grad_target is not None:
        b_dq = -b_log_p * (b_grad * keep)[:, None]
        if p_weight is not None:
            b_dq *= tl.load(p_weight + o_n, mask=o_n < N, other=0.0)[None, :]
        o_dq = row_offsets(
            o_m, M, size_1, size_2, stride_grad_target_0, stride_grad_target_1, stride_grad_target_2, ROW_DIMS
        )
        p_dq = p_grad_target + o_dq[:, None] + o_n[None, :] * stride_grad_target_n
        tl.store(p_dq, to_dtype(b_dq, p_grad_target.dtype.element_ty), mask=m_tile)
