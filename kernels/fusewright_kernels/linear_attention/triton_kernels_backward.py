"""Triton kernels of linear attention, backward. With d = [grad_output, gradient of the normalizer] / normalizer:

    grad f(query[i]) = d[i] S[i]^T,  U[j] = grad_final_state + sum_{i >= j} f(query[i])^T d[i]
    grad f(key[j]) = [value[j], 1] U[j]^T,  grad_value[j] = f(key[j]) U[j]

S and U come from the kernels of states; a block of positions meets itself as matrices. No atomics. Imports only where
Triton is installed.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.linear_attention.triton_primitives import (
    dot_features,
    dot_gradients,
    dot_seen,
    feature_slopes,
    key_mask,
    load_features,
    load_last_column,
    load_numbers,
    load_scaled,
    load_state,
)
from fusewright_kernels.triton_matrix_primitives import dot, load_tile
from fusewright_kernels.triton_primitives import to_dtype


@triton.jit
def store_slopes(
    b_sum, p_source, o_source, m_source, p_gradient, o_gradient, m_rows, i_column,
    D: tl.constexpr, ELU: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of features times the slope of the feature map, 0 where a row is not in ``m_source``."""
    b_x = load_tile(p_source, o_source, m_source, i_column, D, BLOCK_D, True).to(tl.float32)
    b_gradient = tl.where(m_source[:, None], b_sum * feature_slopes(b_x, ELU), 0.0)
    store_columns(b_gradient, p_gradient, o_gradient, m_rows, i_column, D, BLOCK_D)


@triton.jit
def store_columns(b_rows, p_rows, o_rows, m_rows, i_column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    o_columns = i_column + tl.arange(0, BLOCK)
    m_columns = m_rows[:, None] & (o_columns < WIDTH)[None, :]
    tl.store(p_rows + o_rows[:, None] + o_columns[None, :], to_dtype(b_rows, p_rows.dtype.element_ty), mask=m_columns)


@triton.jit(do_not_specialize=["H", "T", "L", "n_tiles", "n_states", "n_rows"])
def linear_attention_backward_query_kernel(
    p_grad_output,
    p_numbers,  # float32 (2, B, H, T): see linear_attention_numbers_kernel
    p_query,
    p_key,
    p_value,
    p_padding,  # uint8 (B, T)
    p_states,  # float32 (B, H, states, D, DV + 1): as the forward's
    p_grad_query,
    H, T, L, n_tiles, n_states, n_rows,
    stride_grad_b, stride_grad_h, stride_grad_t, stride_query_b, stride_query_h, stride_query_t,
    stride_key_b, stride_key_h, stride_key_t, stride_value_b, stride_value_h, stride_value_t,
    stride_grad_query_b, stride_grad_query_h, stride_grad_query_t,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, ELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_T queries and BLOCK_D columns of their gradient a program."""
    N_PIECES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i_d = tl.program_id(0) % N_PIECES * BLOCK_D
    i_program = tl.program_id(0) // N_PIECES
    i_first = i_program % n_tiles * BLOCK_T
    i_head = (i_program // n_tiles).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    p_grad_output += i_b * stride_grad_b + i_h * stride_grad_h
    p_query += i_b * stride_query_b + i_h * stride_query_h
    p_key += i_b * stride_key_b + i_h * stride_key_h
    p_value += i_b * stride_value_b + i_h * stride_value_h
    p_grad_query += i_b * stride_grad_query_b + i_h * stride_grad_query_h
    p_states += (i_head * n_states + (i_first // L if CAUSAL else 0)) * (D * (DV + 1))

    o_t = i_first + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    b_inverse, b_last = load_numbers(p_numbers, i_head * T + o_t, m_t, n_rows)
    o_grad = o_t.to(tl.int64) * stride_grad_t
    b_sum = b_last[:, None] * load_last_column(p_states, i_d, D, DV, BLOCK_D)[None, :]
    for i_dv in range(0, DV, BLOCK_DV):
        b_grad = load_scaled(p_grad_output, o_grad, m_t, b_inverse, i_dv, DV, BLOCK_DV)
        b_state = load_state(p_states, i_d, i_dv, D, DV, BLOCK_D, BLOCK_DV)
        b_sum = dot(b_grad, tl.trans(b_state), b_sum, PRECISION)
    if CAUSAL:
        for i_key in range(i_first // L * L, i_first + 1, BLOCK_T):
            o_s = i_key + tl.arange(0, BLOCK_T)
            m_keys = key_mask(p_padding, i_b, o_s, T)
            m_seen = (o_s[None, :] <= o_t[:, None]) & m_keys[None, :]
            o_s = o_s.to(tl.int64)
            b_pairs = dot_gradients(
                p_grad_output, o_grad, m_t, b_inverse, p_value, o_s * stride_value_t, m_keys, None,
                DV, PRECISION, BLOCK_T, BLOCK_DV,
            )  # fmt: skip
            b_pairs = tl.where(m_seen, b_pairs + b_last[:, None], 0.0)
            b_features = load_features(p_key, o_s * stride_key_t, m_keys, i_d, D, BLOCK_D, ELU)
            b_sum = dot_seen(b_pairs, b_features, b_sum, i_key == i_first, False, PRECISION)

    o_t = o_t.to(tl.int64)
    store_slopes(
        b_sum, p_query, o_t * stride_query_t, m_t, p_grad_query, o_t * stride_grad_query_t, m_t, i_d, D, ELU, BLOCK_D
    )


@triton.jit(do_not_specialize=["H", "T", "L", "n_tiles", "n_states", "n_rows"])
def linear_attention_backward_key_kernel(
    p_grad_output, p_numbers, p_query, p_key, p_value, p_padding,  # see linear_attention_backward_query_kernel
    p_states,  # float32 (B, H, states, D, DV + 1): U behind each block, or one of all queries
    p_grad_key,  # None where nobody asks, as p_grad_value
    p_grad_value,
    H, T, L, n_tiles, n_states, n_rows,
    stride_grad_b, stride_grad_h, stride_grad_t, stride_query_b, stride_query_h, stride_query_t,
    stride_key_b, stride_key_h, stride_key_t, stride_value_b, stride_value_h, stride_value_t,
    stride_grad_key_b, stride_grad_key_h, stride_grad_key_t,
    stride_grad_value_b, stride_grad_value_h, stride_grad_value_t,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, ELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_T keys, and of both of their gradients one piece of columns, a program. Matrices lie as (keys, queries)."""
    KEY_PIECES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    VALUE_PIECES: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV
    N_PIECES: tl.constexpr = KEY_PIECES if KEY_PIECES > VALUE_PIECES else VALUE_PIECES
    i_piece = tl.program_id(0) % N_PIECES
    i_own_d, i_own_dv = i_piece * BLOCK_D, i_piece * BLOCK_DV
    i_program = tl.program_id(0) // N_PIECES
    i_first = i_program % n_tiles * BLOCK_T
    i_head = (i_program // n_tiles).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    p_grad_output += i_b * stride_grad_b + i_h * stride_grad_h
    p_query += i_b * stride_query_b + i_h * stride_query_h
    p_key += i_b * stride_key_b + i_h * stride_key_h
    p_value += i_b * stride_value_b + i_h * stride_value_h
    p_states += (i_head * n_states + (i_first // L if CAUSAL else 0)) * (D * (DV + 1))

    o_s = i_first + tl.arange(0, BLOCK_T)
    m_s = o_s < T
    m_keys = key_mask(p_padding, i_b, o_s, T)
    o_key = o_s.to(tl.int64) * stride_key_t
    o_value = o_s.to(tl.int64) * stride_value_t
    b_key_sum = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    b_key_sum += load_last_column(p_states, i_own_d, D, DV, BLOCK_D)[None, :]
    for i_dv in range(0, DV, BLOCK_DV):
        b_value = load_scaled(p_value, o_value, m_keys, None, i_dv, DV, BLOCK_DV)
        b_state = load_state(p_states, i_own_d, i_dv, D, DV, BLOCK_D, BLOCK_DV)
        b_key_sum = dot(b_value, tl.trans(b_state), b_key_sum, PRECISION)
    b_value_sum = tl.zeros([BLOCK_T, BLOCK_DV], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        b_features = load_features(p_key, o_key, m_keys, i_d, D, BLOCK_D, ELU)
        b_state = load_state(p_states, i_d, i_own_dv, D, DV, BLOCK_D, BLOCK_DV)
        b_value_sum = dot(b_features, b_state, b_value_sum, PRECISION)
    if CAUSAL:
        for i_query in range(i_first, tl.minimum(i_first // L * L + L, T), BLOCK_T):
            o_t = i_query + tl.arange(0, BLOCK_T)
            m_t = o_t < T
            b_inverse, b_last = load_numbers(p_numbers, i_head * T + o_t, m_t, n_rows)
            m_seen = (o_s[:, None] <= o_t[None, :]) & m_keys[:, None] & m_t[None, :]
            o_t = o_t.to(tl.int64)
            o_query, o_grad = o_t * stride_query_t, o_t * stride_grad_t
            b_pairs = dot_gradients(
                p_value, o_value, m_keys, None, p_grad_output, o_grad, m_t, b_inverse,
                DV, PRECISION, BLOCK_T, BLOCK_DV,
            )  # fmt: skip
            b_pairs = tl.where(m_seen, b_pairs + b_last[None, :], 0.0)
            b_features = load_features(p_query, o_query, m_t, i_own_d, D, BLOCK_D, ELU)
            b_key_sum = dot_seen(b_pairs, b_features, b_key_sum, i_query == i_first, True, PRECISION)
            b_weights = dot_features(
                p_key, o_key, m_keys, p_query, o_query, m_t, D, ELU, PRECISION, BLOCK_T, BLOCK_D
            )  # fmt: skip
            b_weights = tl.where(m_seen, b_weights, 0.0)
            b_grad = load_scaled(p_grad_output, o_grad, m_t, b_inverse, i_own_dv, DV, BLOCK_DV)
            b_value_sum = dot_seen(b_weights, b_grad, b_value_sum, i_query == i_first, True, PRECISION)

    if p_grad_key is not None:
        p_grad_key += i_b * stride_grad_key_b + i_h * stride_grad_key_h
        o_grad_key = o_s.to(tl.int64) * stride_grad_key_t
        store_slopes(b_key_sum, p_key, o_key, m_keys, p_grad_key, o_grad_key, m_s, i_own_d, D, ELU, BLOCK_D)
    if p_grad_value is not None:
        p_grad_value += i_b * stride_grad_value_b + i_h * stride_grad_value_h
        o_grad_value = o_s.to(tl.int64) * stride_grad_value_t
        b_value_sum = tl.where(m_keys[:, None], b_value_sum, 0.0)
        store_columns(b_value_sum, p_grad_value, o_grad_value, m_s, i_own_dv, DV, BLOCK_DV)
