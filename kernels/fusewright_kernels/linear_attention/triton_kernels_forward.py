"""Triton kernel of linear attention, forward: a tile of queries meets the state before its block and, if causal, the
keys of its block as a matrix. Imports only where Triton is installed.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.linear_attention.triton_primitives import (
    dot_features,
    dot_seen,
    key_mask,
    load_features,
    load_last_column,
    load_state,
)
from fusewright_kernels.triton_matrix_primitives import dot, load_tile
from fusewright_kernels.triton_primitives import to_dtype


@triton.jit(do_not_specialize=["H", "T", "L", "n_tiles", "n_states"])
def linear_attention_forward_kernel(
    p_query,
    p_key,
    p_value,
    p_padding,  # uint8 (B, T)
    p_states,  # float32 (B, H, states, D, DV + 1): before each block, or one after all keys
    p_output,
    p_normalizer,  # float32 (B, H, T)
    H, T, L, n_tiles, n_states, eps,
    stride_query_b, stride_query_h, stride_query_t, stride_key_b, stride_key_h, stride_key_t,
    stride_value_b, stride_value_h, stride_value_t, stride_output_b, stride_output_h, stride_output_t,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, ELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_T queries and BLOCK_DV columns of their output a program."""
    N_PIECES: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV if DV > 0 else 1
    i_dv = tl.program_id(0) % N_PIECES * BLOCK_DV
    i_program = tl.program_id(0) // N_PIECES
    i_first = i_program % n_tiles * BLOCK_T
    i_head = (i_program // n_tiles).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    p_query += i_b * stride_query_b + i_h * stride_query_h
    p_key += i_b * stride_key_b + i_h * stride_key_h
    p_value += i_b * stride_value_b + i_h * stride_value_h
    p_output += i_b * stride_output_b + i_h * stride_output_h
    p_states += (i_head * n_states + (i_first // L if CAUSAL else 0)) * (D * (DV + 1))

    o_t = i_first + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    o_query = o_t.to(tl.int64) * stride_query_t
    b_sum = tl.zeros([BLOCK_T, BLOCK_DV], tl.float32)
    b_total = tl.zeros([BLOCK_T], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        b_query = load_features(p_query, o_query, m_t, i_d, D, BLOCK_D, ELU)
        b_sum = dot(b_query, load_state(p_states, i_d, i_dv, D, DV, BLOCK_D, BLOCK_DV), b_sum, PRECISION)
        b_total += tl.sum(b_query * load_last_column(p_states, i_d, D, DV, BLOCK_D)[None, :], axis=1)
    if CAUSAL:
        for i_key in range(i_first // L * L, i_first + 1, BLOCK_T):
            o_s = i_key + tl.arange(0, BLOCK_T)
            m_keys = key_mask(p_padding, i_b, o_s, T)
            m_seen = (o_s[None, :] <= o_t[:, None]) & m_keys[None, :]
            o_s = o_s.to(tl.int64)
            b_weights = dot_features(
                p_query, o_query, m_t, p_key, o_s * stride_key_t, m_keys, D, ELU, PRECISION, BLOCK_T, BLOCK_D
            )
            b_weights = tl.where(m_seen, b_weights, 0.0)
            b_value = load_tile(p_value, o_s * stride_value_t, m_keys, i_dv, DV, BLOCK_DV, True).to(tl.float32)
            b_sum = dot_seen(b_weights, b_value, b_sum, i_key == i_first, False, PRECISION)
            b_total += tl.sum(b_weights, axis=1)

    b_normalizer = b_total + eps
    o_dv = i_dv + tl.arange(0, BLOCK_DV)
    p_tile = p_output + (o_t.to(tl.int64) * stride_output_t)[:, None] + o_dv[None, :]
    b_output = to_dtype(b_sum / b_normalizer[:, None], p_output.dtype.element_ty)
    tl.store(p_tile, b_output, mask=m_t[:, None] & (o_dv < DV)[None, :])
    if i_dv == 0:
        tl.store(p_normalizer + i_head * T + o_t, b_normalizer, mask=m_t)
