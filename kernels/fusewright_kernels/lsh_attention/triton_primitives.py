"""Device functions that the LSH attention kernels share. Imports only where Triton is installed.

The chunks of all rounds are numbered round the ring. What a kernel needs of a position it reads from tables in sorted
order (R, T) of each head, where a chunk lies together: addresses that each depend on a position take most registers.
"""

# Kernel arguments are typed by the launch.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from fusewright_kernels.triton_matrix_primitives import INFINITY
from fusewright_kernels.triton_primitives import dropout_keep


@triton.jit
def chunk_place(i_ring, i_first, n_chunks, C, T):
    """Where place ``i_first`` of a chunk lies in a head's tables, and how many places of the chunk follow from it."""
    i_start = (i_ring % n_chunks).to(tl.int64) * C
    rest = tl.minimum(T - i_start, C).to(tl.int32) - i_first
    return (i_ring // n_chunks).to(tl.int64) * T + i_start + i_first, rest


@triton.jit
def load_places(p_table, i_place, rest, BLOCK: tl.constexpr):
    """[BLOCK] of a table from ``i_place`` on, 0 behind the chunk's end; None for a table that is absent."""
    if p_table is not None:
        o_places = tl.arange(0, BLOCK)
        return tl.load(p_table + i_place + o_places, mask=o_places < rest, other=0)
    else:
        return None


@triton.jit
def of_head(p_table, o_head):
    """The part of an optional table that belongs to a head."""
    if p_table is not None:
        return p_table + o_head
    else:
        return None


@triton.jit
def only_if(condition, m_rows):
    """``m_rows`` where the scalar ``condition`` holds, else none; a conjunction of the two fails in the interpreter."""
    return tl.where(condition, m_rows, m_rows != m_rows)


@triton.jit
def visible_pairs(
    b_query, b_key, m_key, b_query_bucket, b_key_bucket, i_query_round, i_key_round, CAUSAL: tl.constexpr
):  # fmt: skip
    """Which pairs meet; what is given of each position broadcasts to the tile, whichever way it lies."""
    m_visible = (b_key < b_query if CAUSAL else b_key != b_query) & m_key
    if b_query_bucket is not None:
        m_visible = only_if(i_query_round == i_key_round, m_visible & (b_query_bucket == b_key_bucket))
    return m_visible


@triton.jit
def copies(p_chunk_of, p_bucket_of, b_query, b_key, m_visible, T, R, ring, before, window, WRAPS: tl.constexpr):
    """In how many places of all rounds each pair meets. WRAPS: a window may hold a chunk twice."""
    b_count = tl.zeros(m_visible.shape, tl.int32)
    # A padded key is met by nobody, but is no position to read at.
    b_key = tl.maximum(b_key, 0)
    for i_query_round in range(R):
        o_query_round = i_query_round * T.to(tl.int64)
        b_query_chunk = tl.load(p_chunk_of + o_query_round + b_query)
        # A bucket belongs to its round, so between rounds only chunks can meet.
        if p_bucket_of is None:
            for i_key_round in range(R):
                b_key_chunk = tl.load(p_chunk_of + i_key_round * T.to(tl.int64) + b_key)
                b_count += places_in_window(b_query_chunk, b_key_chunk, ring, before, window, WRAPS)
        else:
            b_key_chunk = tl.load(p_chunk_of + o_query_round + b_key)
            m_same = tl.load(p_bucket_of + o_query_round + b_query) == tl.load(p_bucket_of + o_query_round + b_key)
            b_places = places_in_window(b_query_chunk, b_key_chunk, ring, before, window, WRAPS)
            b_count += tl.where(m_same, b_places, 0)
    return b_count


@triton.jit
def places_in_window(b_query_chunk, b_key_chunk, ring, before, window, WRAPS: tl.constexpr):
    """How often the window of each query's chunk holds the key's; ``before`` is less than the ring."""
    b_place = b_key_chunk - b_query_chunk + before
    b_place = tl.where(b_place < 0, b_place + ring, tl.where(b_place >= ring, b_place - ring, b_place))
    if WRAPS:
        return tl.where(b_place < window, (window - 1 - b_place) // ring + 1, 0)
    else:
        return (b_place < window).to(tl.int32)


@triton.jit
def logits_of(
    b_scores, b_query, b_key, m_visible, p_chunk_of, p_bucket_of, T, R, ring, before, window, WRAPS: tl.constexpr
):
    """Base-2 logits, -inf where not visible; with ``p_chunk_of`` each key counts once."""
    if p_chunk_of is not None:
        b_count = copies(p_chunk_of, p_bucket_of, b_query, b_key, m_visible, T, R, ring, before, window, WRAPS)
        b_scores -= tl.log2(tl.maximum(b_count, 1).to(tl.float32))
    return tl.where(m_visible, b_scores, -INFINITY)


@triton.jit
def kept(p_seed, o_rows, i_place, n_places, keep_threshold, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Dropout's keep mask [rows, BLOCK] of the places of a window from ``i_place`` on; ALIGNED: a multiple of 4."""
    if ALIGNED:
        return dropout_keep(p_seed, o_rows, i_place, n_places, keep_threshold, BLOCK)
    else:
        o_places = (i_place + tl.arange(0, BLOCK))[None, :]
        o_counter = o_rows[:, None] * ((n_places + 3) // 4) + o_places // 4
        b_word_0, b_word_1, b_word_2, b_word_3 = tl.randint4x(tl.load(p_seed), o_counter)
        b_low = tl.where(o_places % 2 == 0, b_word_0, b_word_1)
        b_high = tl.where(o_places % 2 == 0, b_word_2, b_word_3)
        return tl.where(o_places % 4 < 2, b_low, b_high).to(tl.int64) >= keep_threshold
