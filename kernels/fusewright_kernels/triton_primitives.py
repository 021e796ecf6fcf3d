"""Device functions that the row-wise Triton kernels share. Imports only where Triton is installed."""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_support import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def row_offsets(o_m, M, size_1, size_2, stride_0, stride_1, stride_2, ROW_DIMS: tl.constexpr):
    """Offset of each row's first element; ``o_m`` int64 [BLOCK_M]. See ``row_layout.RowLayout``."""
    if ROW_DIMS == 1:
        return o_m * stride_0
    else:
        # Row numbers fit the type of M, almost always int32: a 64-bit division is a function call on a GPU.
        o_row = o_m.to(M.dtype)
        if ROW_DIMS == 2:
            return (o_row // size_1).to(tl.int64) * stride_0 + (o_row % size_1).to(tl.int64) * stride_1
        else:
            o_rest = o_row // size_2
            o_2 = (o_row % size_2).to(tl.int64)
            o_1 = (o_rest % size_1).to(tl.int64)
            o_0 = (o_rest // size_1).to(tl.int64)
            return o_0 * stride_0 + o_1 * stride_1 + o_2 * stride_2


@triton.jit
def divide_by_count(b_sum, count):
    """``b_sum / count`` correctly rounded. The plain operator is 2 ulp off on a GPU, which a mean of 1e4 would show."""
    return tl.div_rn(b_sum, tl.zeros_like(b_sum) + count)


@triton.jit
def round_to(b_x, dtype: tl.constexpr):
    """float32 ``b_x`` as it comes back after being stored as ``dtype``."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # The interpreter truncates where the hardware rounds, and widens a bfloat16 zero to 1.1e-38.
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_rounded = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(b_x != b_x, b_bits, b_rounded).to(tl.float32, bitcast=True)
    else:
        return b_x.to(dtype).to(tl.float32)


@triton.jit
def to_dtype(b_x, dtype: tl.constexpr):
    """float32 ``b_x`` rounded to nearest even in ``dtype``."""
    if _INTERPRETED and dtype == tl.bfloat16:
        b_x = round_to(b_x, dtype)
    return b_x.to(dtype)


@triton.jit
def dropout_keep(p_seed, o_m, i_n, N, keep_threshold, BLOCK_N: tl.constexpr):
    """Keep mask [BLOCK_M, BLOCK_N] of rows ``o_m`` and the columns from ``i_n``, a multiple of 4.

    Bit for bit ``philox.keep_mask``: element i of row r is word i % 4 of block r * ceil(N / 4) + i // 4.
    """
    o_block = i_n // 4 + tl.arange(0, BLOCK_N // 4)
    o_counter = o_m[:, None] * ((N + 3) // 4) + o_block[None, :]
    b_word_0, b_word_1, b_word_2, b_word_3 = tl.randint4x(tl.load(p_seed), o_counter)
    b_words = tl.interleave(tl.interleave(b_word_0, b_word_2), tl.interleave(b_word_1, b_word_3))
    # In 64 bits, as the threshold that keeps nothing is 2^32.
    return b_words.to(tl.int64) >= keep_threshold


@triton.jit
def sigmoid(b_x):
    """Value and derivative, in which nothing cancels."""
    b_e = tl.exp(-tl.abs(b_x))
    b_of_magnitude = 1.0 / (1.0 + b_e)
    b_of_opposite = b_e * b_of_magnitude
    return tl.where(b_x < 0.0, b_of_opposite, b_of_magnitude), b_of_opposite * b_of_magnitude


@triton.jit
def tanh(b_x):
    """Within 3 ulp: by exp where 1 - 2 / (exp(2x) + 1) loses no digits, else by a polynomial of minimax kind."""
    b_square = b_x * b_x
    b_series = b_square * -0.00636492 + 0.02113316
    b_series = b_square * b_series - 0.05386651
    b_series = b_square * b_series + 0.13332713
    b_series = b_square * b_series - 0.33333321
    b_magnitude = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(b_x)) + 1.0)
    return tl.where(tl.abs(b_x) < 0.55, b_x + b_x * b_square * b_series, tl.where(b_x < 0.0, -b_magnitude, b_magnitude))
