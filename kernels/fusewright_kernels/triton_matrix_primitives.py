"""Device functions of Triton kernels that multiply tiles and take a softmax. Imports only where Triton is installed.

Logits are kept in a unit that the launcher folds into the scale: base-2 logarithms, so that a weight is one exp2, or
natural ones (NATURAL) where something is added to them that base 2 would round once more: a mask of -1e9 by up to 64,
between the statistics that forward stores and the logits that backward recomputes.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_primitives import to_dtype
from fusewright_kernels.triton_support import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
# Rows that a program does again with care at a time: as few as a matrix instruction takes, so that the rare path needs
# no more registers than the common one.
CAREFUL_ROWS = tl.constexpr(16)


@triton.jit
def rounded_to_tf32(b_x):
    """float32 ``b_x`` to the 11 significant bits that matrix instructions read; they themselves would cut it off."""
    b_bits = b_x.to(tl.uint32, bitcast=True)
    b_rounded = ((b_bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.where(b_x != b_x, b_x, b_rounded)


@triton.jit
def dot(b_a, b_b, b_sum, PRECISION: tl.constexpr = "ieee"):
    """``b_sum + b_a b_b`` in float32. PRECISION of float32 operands: ``ieee`` as they are, ``tf32`` rounded to that,
    ``tf32x3`` in three products of their parts, nearly as exact as the first."""
    if PRECISION == "tf32":
        b_a, b_b = rounded_to_tf32(b_a), rounded_to_tf32(b_b)
    if _INTERPRETED:
        # The interpreter multiplies the bit patterns of bfloat16.
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_sum, input_precision=PRECISION)
    else:
        return tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)


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
    width=None,
):  # fmt: skip
    """Products of all rows, float32 [OWN, OTHER], and chunk ``i_chunk`` of the other tensor's columns.

    ``b_own`` [OWN, BLOCK] holds a program's own rows where one block holds the width; wider ones are read again, in a
    loop that is unrolled, with the registers of all blocks, unless ``width`` gives its end at run time.
    """
    b_dots = tl.zeros([OWN, OTHER], tl.float32)
    if WIDTH <= BLOCK:
        b_other = load_tile(p_other, o_other, m_other, 0, WIDTH, BLOCK, MASKED)
        b_dots = dot(b_own, tl.trans(b_other), b_dots)
    else:
        for i_column in range(0, WIDTH if width is None else width, BLOCK):
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
