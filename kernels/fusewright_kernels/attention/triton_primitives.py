"""Device functions that the attention kernels share. Imports only where Triton is installed.

Logits have natural units where there is an additive mask, else base-2 ones: see ``triton_matrix_primitives``.

Every pair (query, key) that may meet by position is described from either side by one interval: query i meets the keys
[low_i, high_i), key j the queries [low_j, high_j). Causality, windows, packed sequences and the end of a tensor are all
this interval, and tiles that lie in the intervals of all their rows need no element masks.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_matrix_primitives import INFINITY
from fusewright_kernels.triton_primitives import dropout_keep, tanh


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
