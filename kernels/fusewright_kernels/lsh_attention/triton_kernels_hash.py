"""Triton kernels of LSH attention: hashing, and one pass of the stable counting sort.

Imports only where Triton is installed.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_matrix_primitives import INFINITY, load_tile


@triton.jit(do_not_specialize=["H", "T", "R", "n_columns", "n_blocks", "place_value", "padding_bucket"])
def lsh_hash_kernel(
    p_vectors,
    p_rotations,  # float32 (H, D, R, columns)
    p_padding,  # uint8 (B, T)
    p_buckets,  # int64 (B, H, R, T)
    H, T, R, n_columns, n_blocks, place_value, padding_bucket,
    stride_vectors_b, stride_vectors_h, stride_vectors_t, stride_rotations_h, stride_rotations_d, stride_rotations_r,
    stride_rotations_n,
    D: tl.constexpr, FIRST_DIGIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One digit of the buckets of BLOCK_M vectors in one round a program; rotated vectors stay in registers.

    Among equals the first coordinate wins, and a coordinate before a negative. A NaN is never the largest.
    """
    # Rounds of the same vectors go together, which then come from the cache.
    i_round = tl.program_id(0) % R
    i_program = tl.program_id(0) // R
    o_t = i_program % n_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    m_t = o_t < T
    i_head = (i_program // n_blocks).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    p_vectors += i_b * stride_vectors_b + i_h * stride_vectors_h
    p_rotations += i_h * stride_rotations_h + i_round * stride_rotations_r
    o_vectors = o_t.to(tl.int64) * stride_vectors_t

    b_largest = tl.full([BLOCK_M], -INFINITY, tl.float32)
    b_digit = tl.zeros([BLOCK_M], tl.int32)
    for i_column in range(0, n_columns, BLOCK_N):
        o_n = i_column + tl.arange(0, BLOCK_N)
        m_n = o_n < n_columns
        b_rotated = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i_d in range(0, D, BLOCK_D):
            o_d = i_d + tl.arange(0, BLOCK_D)
            b_vectors = load_tile(p_vectors, o_vectors, m_t, i_d, D, BLOCK_D, True).to(tl.float32)
            p_tile = p_rotations + (o_d * stride_rotations_d)[:, None] + (o_n * stride_rotations_n)[None, :]
            b_rotations = tl.load(p_tile, mask=(o_d < D)[:, None] & m_n[None, :], other=0.0)
            # Three products of tf32 parts: as exact as float32, on matrix instructions.
            b_rotated = tl.dot(b_vectors, b_rotations, b_rotated, input_precision="tf32x3")
        b_size = tl.where((b_rotated == b_rotated) & m_n[None, :], tl.abs(b_rotated), -INFINITY)
        b_tile_largest = tl.max(b_size, axis=1)
        b_number = tl.where(b_rotated >= 0.0, o_n[None, :], n_columns + o_n[None, :])
        b_number = tl.where(b_size == b_tile_largest[:, None], b_number, 2 * n_columns)
        b_tile_digit = tl.min(b_number, axis=1)
        m_larger = b_tile_largest > b_largest
        m_equal = b_tile_largest == b_largest
        b_digit = tl.where(m_larger, b_tile_digit, tl.where(m_equal, tl.minimum(b_digit, b_tile_digit), b_digit))
        b_largest = tl.maximum(b_largest, b_tile_largest)

    o_buckets = (i_head * R + i_round) * T + o_t
    b_bucket = b_digit.to(tl.int64) * place_value
    if not FIRST_DIGIT:
        b_bucket += tl.load(p_buckets + o_buckets, mask=m_t, other=0)
    if p_padding is not None:
        b_bucket = tl.where(tl.load(p_padding + i_b * T + o_t, mask=m_t, other=0) != 0, padding_bucket, b_bucket)
    tl.store(p_buckets + o_buckets, b_bucket, mask=m_t)


@triton.jit
def sorted_digits(p_buckets, p_source, i_row, i_block, T, shift, N_BINS: tl.constexpr, BLOCK: tl.constexpr):
    """This pass's digit of BLOCK buckets in the order of the passes before, N_BINS behind the last; their positions."""
    o_places = i_block * BLOCK + tl.arange(0, BLOCK)
    m_places = o_places < T
    o_row = i_row.to(tl.int64) * T
    b_position = o_places
    if p_source is not None:
        b_position = tl.load(p_source + o_row + o_places, mask=m_places, other=0)
    b_bucket = tl.load(p_buckets + o_row + b_position, mask=m_places, other=0)
    b_digit = ((b_bucket >> shift) & (N_BINS - 1)).to(tl.int32)
    return tl.where(m_places, b_digit, N_BINS), b_position


@triton.jit(do_not_specialize=["T", "n_blocks", "shift"])
def lsh_sort_count_kernel(
    p_buckets,  # int64 (rows, T)
    p_source,  # int32 (rows, T): positions as the passes before left them, None in the first
    p_counts,  # int32 (rows, N_BINS, blocks)
    T, n_blocks, shift,
    N_BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many of a block's buckets have each digit; one block a program."""
    i_row = tl.program_id(0) // n_blocks
    i_block = tl.program_id(0) % n_blocks
    b_digit, _ = sorted_digits(p_buckets, p_source, i_row, i_block, T, shift, N_BINS, BLOCK)
    # Twice as many bins, as those behind the last count what is no bucket.
    b_counts = tl.histogram(b_digit, 2 * N_BINS)
    o_bins = tl.arange(0, 2 * N_BINS)
    o_counts = (i_row.to(tl.int64) * N_BINS + o_bins) * n_blocks + i_block
    tl.store(p_counts + o_counts, b_counts, mask=o_bins < N_BINS)


@triton.jit(do_not_specialize=["T", "n_blocks", "shift"])
def lsh_sort_place_kernel(
    p_buckets, p_source,  # see lsh_sort_count_kernel
    p_ends,  # int32 (rows, N_BINS, blocks): running sum of the counts of a row
    p_target,  # int32 (rows, T)
    T, n_blocks, shift,
    N_BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Positions of one block to where the running sum puts their digits; equal digits keep their order."""
    i_row = tl.program_id(0) // n_blocks
    i_block = tl.program_id(0) % n_blocks
    b_digit, b_position = sorted_digits(p_buckets, p_source, i_row, i_block, T, shift, N_BINS, BLOCK)
    o_block = tl.arange(0, BLOCK)
    # How many of the block go before each: those of lower digits and those of its own at earlier places.
    b_sorted = tl.sort(b_digit * BLOCK + o_block)
    b_place = b_sorted % BLOCK
    b_sorted_digit = b_sorted // BLOCK
    b_counts = tl.histogram(b_digit, 2 * N_BINS)
    b_starts = tl.cumsum(b_counts, axis=0) - b_counts
    b_start = tl.gather(b_starts, b_sorted_digit, axis=0)
    m_exists = b_sorted_digit < N_BINS
    o_first = i_row.to(tl.int64) * N_BINS * n_blocks
    o_before = b_sorted_digit.to(tl.int64) * n_blocks + i_block - 1
    b_before = tl.load(p_ends + o_first + o_before, mask=m_exists & (o_before >= 0), other=0)
    b_moved = tl.gather(b_position, b_place, axis=0)
    o_target = i_row.to(tl.int64) * T + b_before + o_block - b_start
    tl.store(p_target + o_target, b_moved, mask=m_exists)
