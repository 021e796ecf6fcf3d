"""Device functions that the Triton kernels of linear attention share. Imports only where Triton is installed.

A state is (D, DV + 1) in float32: sums of features times values, and in the last column sums of the features.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_matrix_primitives import INFINITY, dot, load_tile


@triton.jit
def load_features(
    p_rows, o_rows, m_rows, i_column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ELU: tl.constexpr
):  # fmt: skip
    """float32 [rows, BLOCK]: features from column ``i_column`` on, 0 past WIDTH and where not ``m_rows``."""
    b_x = load_tile(p_rows, o_rows, m_rows, i_column, WIDTH, BLOCK, True).to(tl.float32)
    if ELU:
        m_features = m_rows[:, None] & (i_column + tl.arange(0, BLOCK) < WIDTH)[None, :]
        b_x = tl.where(m_features, tl.where(b_x > 0.0, b_x + 1.0, tl.exp(b_x)), 0.0)
    return b_x


@triton.jit
def feature_slopes(b_x, ELU: tl.constexpr):
    if ELU:
        return tl.where(b_x > 0.0, 1.0, tl.exp(b_x))
    else:
        return tl.full(b_x.shape, 1.0, tl.float32)


@triton.jit
def load_state(
    p_state, i_row, i_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """[BLOCK_D, BLOCK_DV] of a state from (``i_row``, ``i_column``) on without its last column; 0 past its end."""
    o_rows = i_row + tl.arange(0, BLOCK_D)
    o_columns = i_column + tl.arange(0, BLOCK_DV)
    m_state = (o_rows < ROWS)[:, None] & (o_columns < COLUMNS)[None, :]
    return tl.load(p_state + (o_rows * (COLUMNS + 1))[:, None] + o_columns[None, :], mask=m_state, other=0.0)


@triton.jit
def load_last_column(p_state, i_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr):
    o_rows = i_row + tl.arange(0, BLOCK_D)
    return tl.load(p_state + o_rows * (COLUMNS + 1) + COLUMNS, mask=o_rows < ROWS, other=0.0)


@triton.jit
def key_mask(p_padding, i_b, o_t, T):
    """Which positions take part as keys."""
    m_keys = o_t < T
    if p_padding is not None:
        m_keys = m_keys & (tl.load(p_padding + i_b * T + o_t, mask=m_keys, other=1) == 0)
    return m_keys


@triton.jit
def load_numbers(p_numbers, o_rows, m_rows, n_rows):
    """1 / normalizer and the normalizer's gradient; see linear_attention_numbers_kernel."""
    b_inverse = tl.load(p_numbers + o_rows, mask=m_rows, other=0.0)
    return b_inverse, tl.load(p_numbers + n_rows.to(tl.int64) + o_rows, mask=m_rows, other=0.0)


@triton.jit
def load_scaled(
    p_rows, o_rows, m_rows, b_factor, i_column, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """float32 [rows, BLOCK] from column ``i_column`` on, each row times its factor; None leaves rows as they are."""
    b_rows = load_tile(p_rows, o_rows, m_rows, i_column, WIDTH, BLOCK, True).to(tl.float32)
    if b_factor is not None:
        b_rows = b_rows * b_factor[:, None]
    return b_rows


@triton.jit
def dot_features(
    p_left, o_left, m_left, p_right, o_right, m_right, D: tl.constexpr, ELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products [left, right] of the features of two tiles of rows."""
    b_products = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        b_left = load_features(p_left, o_left, m_left, i_d, D, BLOCK_D, ELU)
        b_right = load_features(p_right, o_right, m_right, i_d, D, BLOCK_D, ELU)
        b_products = dot(b_left, tl.trans(b_right), b_products, PRECISION)
    return b_products


@triton.jit
def dot_gradients(
    p_left, o_left, m_left, b_left_factor, p_right, o_right, m_right, b_right_factor, DV: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Products [left, right] of two tiles of rows of DV columns, each times its factor or None."""
    b_products = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for i_dv in range(0, DV, BLOCK_DV):
        b_left = load_scaled(p_left, o_left, m_left, b_left_factor, i_dv, DV, BLOCK_DV)
        b_right = load_scaled(p_right, o_right, m_right, b_right_factor, i_dv, DV, BLOCK_DV)
        b_products = dot(b_left, tl.trans(b_right), b_products, PRECISION)
    return b_products


@triton.jit
def dot_seen(b_weights, b_rows, b_sum, is_diagonal, FROM_BEHIND: tl.constexpr, PRECISION: tl.constexpr):
    """``b_sum + b_weights b_rows``, weights being 0 where not seen; what is not finite in a row makes NaN where seen.

    On the diagonal a row is seen by itself and those behind it, FROM_BEHIND by itself and those before it; else by all.
    """
    m_special = ~(tl.abs(b_rows) < INFINITY)
    b_sum = dot(b_weights, tl.where(m_special, 0.0, b_rows), b_sum, PRECISION)
    if tl.max(tl.max(m_special.to(tl.int32), axis=1), axis=0) > 0:
        b_reached = tl.cumsum(m_special.to(tl.int32), axis=0, reverse=FROM_BEHIND)
        b_all = tl.sum(m_special.to(tl.int32), axis=0)[None, :]
        b_sum = tl.where(tl.where(is_diagonal, b_reached, b_all) > 0, float("nan"), b_sum)
    return b_sum
