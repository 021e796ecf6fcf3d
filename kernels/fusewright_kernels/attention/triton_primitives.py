"""Device functions that the attention kernels share. Imports only where Triton is installed.

Logits are kept in a unit that the launcher folds into the scale: base-2 logarithms, so that a weight is one exp2, or
natural ones where there is an additive mask. In base 2 a mask of -1e9 would be rounded once more, by up to 64, between
the statistics that forward stores and the logits that backward recomputes.

Every pair (query, key) that may meet by position is described from either side by one interval: query i meets the keys
[low_i, high_i), key j the queries [low_j, high_j). Causality, windows, packed sequences and the end of a tensor are all
this interval, and tiles that lie in the intervals of all their rows need no element masks.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_primitives import dropout_keep, tanh, to_dtype
from fusewright_kernels.triton_support import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
# Rows that a program does again with care at a time: as few as a matrix instruction takes, so that the rare path needs
# no more registers than the common one.
CAREFUL_ROWS = tl.constexpr(16)


@triton.jit
def dot(b_a, b_b, b_sum):
    """``b_sum + b_a b_b`` in float32; float32 operands are not rounded to TF32."""
    if _INTERPRETED:
        # The interpreter multiplies the bit patterns of bfloat16.
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_sum, input_precision="ieee")
    else:
        return tl.dot(b_a, b_b, b_sum, input_precision="ieee")


@triton.jit
def dot_visible(b_weights, b_rows, b_sum, m_visible, EXACT: tl.constexpr):
    """``b_sum + b_weights b_rows``, weights being 0 where not visible.

    If EXACT, what is not finite in ``b_rows`` reaches only where it is visible: 0 * NaN is NaN.
    """
    if EXACT:
        m_special = ~(tl.abs(b_rows.to(tl.float32)) < INFINITY)
        b_ones = to_dtype(m_special.to(tl.float32), b_rows.dtype)
        b_reached = dot(to_dtype(m_visible.to(tl.float32), b_rows.dtype), b_ones, tl.zeros_like(b_sum))
        b_sum = tl.where(b_reached > 0.0, float("nan"), b_sum)
        b_rows = tl.where(m_special, tl.zeros_like(b_rows), b_rows)
    return dot(b_weights, b_rows, b_sum)


@triton.jit
def any_nan(b_x):
    return tl.max(tl.max((b_x != b_x).to(tl.int32), axis=1), axis=0) > 0


@triton.jit
def load_tile(p_tensor, o_rows, m_rows, i_column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK] from column ``i_column``; 0 past WIDTH, and if MASKED where not ``m_rows``."""
    o_columns = i_column + tl.arange(0, BLOCK)
    p_tile = p_tensor + o_rows[:, None] + o_columns[None, :]
    if MASKED and WIDTH != BLOCK:
        return tl.load(p_tile, mask=m_rows[:, None] & (o_columns < WIDTH)[None, :], other=0.0)
    elif MASKED:
        return tl.load(p_tile, mask=m_rows[:, None], other=0.0)
    elif WIDTH != BLOCK:
        return tl.load(p_tile, mask=(o_columns < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def dot_rows(
    b_own, p_own, o_own, p_other, o_other, m_other, i_chunk,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Products of all rows, float32 [OWN, OTHER], and chunk ``i_chunk`` of the other tensor's columns.

    ``b_own`` [OWN, BLOCK] holds a program's own rows where one block holds the width; wider ones are read again.
    """
    b_dots = tl.zeros([OWN, OTHER], tl.float32)
    if WIDTH <= BLOCK:
        b_other = load_tile(p_other, o_other, m_other, 0, WIDTH, BLOCK, MASKED)
        b_dots = dot(b_own, tl.trans(b_other), b_dots)
    else:
        for i_column in range(0, WIDTH, BLOCK):
            b_left = load_tile(p_own, o_own, m_other, i_column, WIDTH, BLOCK, False)
            b_right = load_tile(p_other, o_other, m_other, i_column, WIDTH, BLOCK, MASKED)
            b_dots = dot(b_left, tl.trans(b_right), b_dots)
        b_other = load_tile(p_other, o_other, m_other, i_chunk * BLOCK, WIDTH, BLOCK, MASKED)
    return b_dots, b_other


@triton.jit
def exponential(b_x, NATURAL: tl.constexpr):
    """exp of a difference of logits in their unit."""
    if NATURAL:
        return tl.exp2(b_x * LOG2_E)
    else:
        return tl.exp2(b_x)


@triton.jit
def in_unit(b_natural, NATURAL: tl.constexpr):
    """A row statistic in the unit of the logits, rounded the same in every kernel: a division is never fused."""
    if NATURAL:
        return b_natural
    else:
        return tl.div_rn(b_natural, tl.zeros_like(b_natural) + LN_2)


@triton.jit
def soften(b_logits, b_maximum, b_total, NATURAL: tl.constexpr, MASKED: tl.constexpr):
    """Weights of one more tile [rows, columns] of logits, and the factor that takes what is summed so far to them.

    Then the new maximum and the new sum of weights of each row. A row without any key so far has maximum -inf.
    """
    b_new_maximum = tl.maximum(b_maximum, tl.max(b_logits, axis=1))
    b_reference = b_new_maximum
    if MASKED:
        b_reference = tl.where(b_new_maximum == -INFINITY, 0.0, b_new_maximum)
    b_weights = exponential(b_logits - b_reference[:, None], NATURAL)
    b_rescale = exponential(b_maximum - b_reference, NATURAL)
    return b_weights, b_rescale, b_new_maximum, b_total * b_rescale + tl.sum(b_weights, axis=1)


@triton.jit
def natural_statistics(b_maximum, b_total, NATURAL: tl.constexpr):
    """The statistics of rows as they are stored: the sum is made to fit the maximum as backward will read it."""
    b_natural = b_maximum
    if not NATURAL:
        b_natural = b_maximum * LN_2
        b_total *= tl.exp2(tl.where(b_maximum == -INFINITY, 0.0, b_maximum - in_unit(b_natural, NATURAL)))
    return b_natural, b_total


@triton.jit
def sequence_of(o_rows, p_cu_seqlens, n_sequences, n_steps):
    """Number of the packed sequence of each row, ``n_sequences`` behind the last: how many sequences end before it."""
    b_low = tl.zeros_like(o_rows)
    b_high = b_low + n_sequences
    for _ in range(n_steps):
        b_middle = (b_low + b_high) // 2
        m_open = b_low < b_high
        b_end = tl.load(p_cu_seqlens + 1 + b_middle, mask=m_open, other=0).to(tl.int32)
        m_ended = b_end <= o_rows
        b_low = tl.where(m_open & m_ended, b_middle + 1, b_low)
        b_high = tl.where(m_open & ~m_ended, b_middle, b_high)
    return b_low


@triton.jit
def visible_interval(
    o_rows, n_rows, n_columns, p_cu_rows, p_cu_columns, n_sequences, n_steps, before, after, BOTTOM_RIGHT: tl.constexpr
):
    """The interval of columns that each row may meet, (n_columns, 0) if none, and the column aligned with the row.

    ``before`` and ``after`` are how far a column may lie from the aligned one. Queries and keys are rows and columns
    or columns and rows, since all of it is symmetric.
    """
    if p_cu_rows is None:
        b_start = tl.zeros_like(o_rows)
        b_end = b_start + n_columns
        b_aligned = o_rows
        if BOTTOM_RIGHT:
            b_aligned += n_columns - n_rows
    else:
        b_sequence = sequence_of(o_rows, p_cu_rows, n_sequences, n_steps)
        m_used = b_sequence < n_sequences
        b_row_start = tl.load(p_cu_rows + b_sequence, mask=m_used, other=0).to(tl.int32)
        b_row_end = tl.load(p_cu_rows + b_sequence + 1, mask=m_used, other=0).to(tl.int32)
        b_start = tl.load(p_cu_columns + b_sequence, mask=m_used, other=0).to(tl.int32)
        b_end = tl.load(p_cu_columns + b_sequence + 1, mask=m_used, other=0).to(tl.int32)
        b_aligned = b_start + o_rows - b_row_start
        if BOTTOM_RIGHT:
            b_aligned += (b_end - b_start) - (b_row_end - b_row_start)
    b_low = tl.maximum(b_start, b_aligned - before)
    b_high = tl.minimum(b_end, b_aligned + after + 1)
    m_any = b_low < b_high
    return tl.where(m_any, b_low, n_columns), tl.where(m_any, b_high, 0), b_aligned


@triton.jit
def plan_tiles(b_low, b_high, p_tile_count, BLOCK: tl.constexpr, ALWAYS_MASKED: tl.constexpr):
    """(first, first_full, end_full, end) in tiles of BLOCK columns; those of [first_full, end_full) need no mask.

    With a list of tiles (block masks) the numbers count its entries.
    """
    if p_tile_count is not None:
        end = tl.load(p_tile_count)
        return end * 0, end, end, end
    else:
        first = tl.min(b_low, axis=0) // BLOCK
        end = tl.cdiv(tl.max(b_high, axis=0), BLOCK)
        first = tl.minimum(first, end)
        if ALWAYS_MASKED:
            return first, end, end, end
        else:
            first_full = tl.minimum(tl.cdiv(tl.max(b_low, axis=0), BLOCK), end)
            end_full = tl.maximum(tl.min(b_high, axis=0) // BLOCK, first_full)
            return first, first_full, end_full, end


@triton.jit
def masked_tile(i_step, first, first_full, end_full, p_tile_list):
    """Tile of step ``i_step`` of the loop over the tiles before and behind those that need no mask."""
    if p_tile_list is not None:
        return tl.load(p_tile_list + i_step)
    else:
        n_before = first_full - first
        return tl.where(i_step < n_before, first + i_step, end_full + i_step - n_before)


@triton.jit
def logits_of(
    b_dots, o_columns, b_low, b_high, b_aligned, b_slope, p_mask, o_mask, p_block_mask, o_blocks, scale, softcap,
    SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Logits in their unit, -inf where not visible; the derivative of the cap; what is visible.

    Row vectors and column vectors come in shapes that broadcast to that of ``b_dots``, whichever way it lies; offsets
    into the masks come whole. ``scale`` is divided by the cap if there is one.
    """
    b_logits = b_dots * scale
    b_cap_derivative = b_logits
    if SOFTCAP:
        b_tanh = tanh(b_logits)
        b_cap_derivative = 1.0 - b_tanh * b_tanh
        b_logits = b_tanh * softcap
    if b_slope is not None:
        b_logits -= b_slope * tl.abs(o_columns - b_aligned).to(tl.float32)
    m_visible = b_dots == b_dots
    if MASKED:
        m_visible = (o_columns >= b_low) & (o_columns < b_high)
        if p_block_mask is not None:
            m_visible = m_visible & (tl.load(p_block_mask + o_blocks, mask=m_visible, other=0) != 0)
        if p_mask is not None:
            if ADDITIVE:
                b_mask = tl.load(p_mask + o_mask, mask=m_visible, other=-INFINITY).to(tl.float32)
                m_visible = m_visible & (b_mask != -INFINITY)
                b_logits += b_mask
            else:
                m_visible = m_visible & (tl.load(p_mask + o_mask, mask=m_visible, other=0) != 0)
        b_logits = tl.where(m_visible, b_logits, -INFINITY)
    return b_logits, b_cap_derivative, m_visible


@triton.jit
def kept(p_seed, o_rows, i_column, S, keep_threshold, BLOCK: tl.constexpr):
    """Dropout's keep mask [rows, BLOCK] of the columns from ``i_column``."""
    return dropout_keep(p_seed, o_rows, i_column, S, keep_threshold, BLOCK)
