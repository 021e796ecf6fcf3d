"""Tiles of the Triton attention kernels; see ``matrix_tiles``."""

from fusewright_kernels.matrix_tiles import NARROWEST as NARROWEST
from fusewright_kernels.matrix_tiles import Shape, Shapes, Tile, padded, shape_of

# Widest rows held whole. Wider ones are cut: products are summed over pieces, and each program makes one piece of its
# result, so that logits are computed once per piece. float32 products are not rounded to TF32 and so run without matrix
# instructions, on operands in registers: with three products the gradient of query holds fewer columns of value, which
# only their sum runs over.
WIDEST = {2: 256, 4: 64}
WIDEST_VALUE_OF_QUERY_GRADIENT = {2: 256, 4: 32}

# By (architecture, itemsize), then by the wider of D and DV. The second table is for calls with an operand of every
# pair: a mask or dropout, whose addresses or random words take registers. Each shape is the largest tried without a
# spill; on sm_90 blocks of 64 rows or more run on warp-group matrix instructions.
_FORWARD = (
    {
        (80, 2): {64: Shape(128, 64, 8, 2), 128: Shape(128, 32, 8, 2), 256: Shape(64, 32, 8, 1)},
        (90, 2): {
            32: Shape(128, 64, 8, 3),
            64: Shape(128, 128, 8, 3),
            128: Shape(128, 64, 8, 3),
            256: Shape(64, 32, 8, 2),
        },
        (80, 4): {64: Shape(32, 32, 8, 1)},
    },
    {
        (80, 2): {
            32: Shape(64, 32, 8, 2),
            64: Shape(64, 64, 8, 2),
            128: Shape(64, 32, 8, 2),
            256: Shape(32, 32, 8, 1),
        },
        (90, 2): {
            32: Shape(64, 32, 8, 2),
            64: Shape(128, 64, 8, 2),
            128: Shape(64, 32, 8, 2),
            256: Shape(32, 32, 8, 1),
        },
        (80, 4): {64: Shape(32, 32, 8, 1)},
    },
)
_BACKWARD_KEY = (
    {
        (80, 2): {64: Shape(32, 64, 4, 2), 128: Shape(32, 64, 8, 2), 256: Shape(16, 32, 8, 1)},
        (90, 2): {
            32: Shape(32, 64, 8, 2),
            64: Shape(64, 128, 8, 2),
            128: Shape(32, 128, 8, 2),
            256: Shape(32, 32, 8, 1),
        },
        (80, 4): {64: Shape(16, 16, 8, 1)},
    },
    {
        (80, 2): {64: Shape(16, 64, 8, 1), 128: Shape(16, 32, 8, 1), 256: Shape(16, 16, 8, 1)},
        (90, 2): {
            32: Shape(16, 64, 8, 1),
            64: Shape(32, 64, 8, 2),
            128: Shape(32, 32, 8, 1),
            256: Shape(16, 16, 8, 1),
        },
        (80, 4): {64: Shape(16, 16, 8, 1)},
    },
)
_BACKWARD_QUERY = (
    {
        (80, 2): {64: Shape(64, 64, 8, 2), 128: Shape(64, 64, 8, 1), 256: Shape(64, 16, 8, 1)},
        (90, 2): {64: Shape(128, 64, 8, 2), 128: Shape(128, 64, 8, 2), 256: Shape(32, 32, 8, 1)},
        (80, 4): {64: Shape(32, 32, 8, 1)},
    },
    {
        (80, 2): {64: Shape(64, 16, 8, 1), 128: Shape(64, 16, 8, 1), 256: Shape(32, 16, 8, 1)},
        (90, 2): {
            32: Shape(64, 32, 8, 2),
            64: Shape(64, 64, 8, 2),
            128: Shape(64, 32, 8, 2),
            256: Shape(32, 16, 8, 1),
        },
        (80, 4): {64: Shape(32, 32, 8, 1)},
    },
)
_Table = tuple[Shapes, Shapes]

# Over a cache, for at most 16 rows (queries of the heads that share a key head) and for more.
_DECODE = (
    {
        (80, 2): {64: Shape(16, 64, 4, 3), 128: Shape(16, 64, 8, 2), 256: Shape(16, 32, 8, 2)},
        (90, 2): {64: Shape(16, 64, 4, 4), 128: Shape(16, 64, 8, 3), 256: Shape(16, 32, 8, 3)},
        (80, 4): {64: Shape(16, 32, 8, 2)},
    },
    {
        (80, 2): {64: Shape(32, 64, 4, 3), 128: Shape(32, 64, 8, 2), 256: Shape(32, 32, 8, 2)},
        (90, 2): {64: Shape(32, 64, 8, 4), 128: Shape(32, 64, 8, 3), 256: Shape(32, 32, 8, 2)},
        (80, 4): {64: Shape(32, 32, 8, 1)},
    },
)

# Keys that one program of decoding sums. Fixed, as the order of a row's sums follows from it: long enough that its
# float32 sums are few bytes beside the keys, short enough that one sequence of some thousand keys fills a GPU.
SPLIT_LENGTH = 512
# Splits that the joining program holds at a time, and columns of their sums.
JOINED = Tile(16, 16, 128, 128, 4, 1)

# By itemsize: queries and keys of a tile of additive attention, whose work is elementwise, and the columns of a result
# that a program makes, each piece of which repeats all scores; and warps.
_ADDITIVE_FORWARD = {2: (32, 128, 8), 4: (16, 64, 4)}
_ADDITIVE_BACKWARD = {2: (16, 64, 4), 4: (16, 32, 4)}

# For what backward needs of each row: a sweep over memory.
ROWS = Tile(32, 16, 128, 128, 4, 1)


def _tile(
    tables: _Table, itemsize: int, d: int, dv: int, architecture: int, second: bool, widest_dv: int | None = None
) -> Tile:
    wider = min(padded(max(d, dv)), WIDEST[itemsize])
    # Narrower rows are padded, since the products of a tile of 16 by 128 columns spill.
    narrowest = 128 if wider > 128 else wider
    block_d = min(max(padded(d), narrowest), wider)
    block_dv = min(max(padded(dv), narrowest), widest_dv or wider)
    shape = shape_of(tables[second], itemsize, max(block_d, block_dv), architecture)
    return Tile(shape.block_m, shape.block_n, block_d, block_dv, shape.num_warps, shape.num_stages)


def forward_tile(itemsize: int, d: int, dv: int, architecture: int, by_pair: bool) -> Tile:
    """``by_pair``: there is an operand of every pair of query and key."""
    return _tile(_FORWARD, itemsize, d, dv, architecture, by_pair)


def decode_tile(itemsize: int, d: int, dv: int, architecture: int, rows: int) -> Tile:
    """``rows``: queries times the heads that share a key head."""
    return _tile(_DECODE, itemsize, d, dv, architecture, rows > _DECODE[0][80, itemsize][64].block_m)


def backward_key_tile(itemsize: int, d: int, dv: int, architecture: int, by_pair: bool) -> Tile:
    """For the gradients of key and value, whose programs own keys."""
    return _tile(_BACKWARD_KEY, itemsize, d, dv, architecture, by_pair)


def backward_query_tile(itemsize: int, d: int, dv: int, architecture: int, by_pair: bool) -> Tile:
    """For the gradients of query and mask, whose programs own queries."""
    widest_dv = WIDEST_VALUE_OF_QUERY_GRADIENT[itemsize]
    return _tile(_BACKWARD_QUERY, itemsize, d, dv, architecture, by_pair, widest_dv)


def additive_forward_tile(itemsize: int, d: int, dv: int) -> Tile:
    return _additive_tile(_ADDITIVE_FORWARD[itemsize], d, dv)


def additive_backward_tile(itemsize: int, d: int, dv: int) -> Tile:
    return _additive_tile(_ADDITIVE_BACKWARD[itemsize], d, dv)


def _additive_tile(sizes: tuple[int, int, int], d: int, dv: int) -> Tile:
    square, widest, warps = sizes
    return Tile(square, square, min(padded(d), widest), min(padded(dv), widest), warps, 1)
