"""Tiles of the Triton kernels of LSH attention; see ``matrix_tiles``. A short chunk takes a smaller one."""

from fusewright_kernels.matrix_tiles import Shape, Shapes, Tile, padded, shape_of

# Widest rows held whole, by itemsize; wider ones are cut. The backward multiplies seven times.
_WIDEST = {2: 256, 4: 64}
_WIDEST_BACKWARD = {2: 128, 4: 32}

# By (architecture, itemsize), then by the wider of D and DV. The second table is for calls with random words or counts
# of every pair, which take registers. Each shape is the largest tried without a spill.
_FORWARD: tuple[Shapes, Shapes] = (
    {
        (80, 2): {64: Shape(64, 64, 4, 2), 128: Shape(64, 32, 8, 2), 256: Shape(32, 32, 8, 1)},
        (90, 2): {64: Shape(64, 32, 4, 2), 128: Shape(64, 32, 8, 2), 256: Shape(32, 32, 8, 1)},
        (80, 4): {64: Shape(32, 32, 8, 1)},
    },
    {
        (80, 2): {64: Shape(32, 32, 4, 1), 128: Shape(32, 16, 8, 1), 256: Shape(16, 16, 8, 1)},
        (80, 4): {64: Shape(32, 32, 8, 1)},
    },
)
_BACKWARD: tuple[Shapes, Shapes] = (
    {
        (80, 2): {64: Shape(32, 32, 4, 1), 128: Shape(32, 16, 8, 1)},
        (90, 2): {64: Shape(32, 32, 4, 1), 128: Shape(16, 16, 8, 1)},
        (80, 4): {32: Shape(16, 16, 4, 1)},
    },
    {
        (80, 2): {64: Shape(32, 16, 4, 1), 128: Shape(16, 16, 8, 1)},
        (80, 4): {32: Shape(16, 16, 4, 1)},
    },
)

ROWS = Tile(32, 16, 128, 128, 4, 1)
HASH = Tile(64, 64, 32, 16, 4, 1)

# Positions that one program sorts, and bits that one pass sorts by: its counts are few beside the positions.
SORT_BLOCK = 1024
SORT_BITS = 8
SORT_WARPS = 4


def _tile(
    table: tuple[Shapes, Shapes],
    widest: dict[int, int],
    itemsize: int,
    d: int,
    dv: int,
    architecture: int,
    by_pair: bool,
    chunk: int,
) -> Tile:
    wider = min(padded(max(d, dv)), widest[itemsize])
    # Narrower rows are padded, since the products of a tile of 16 by 128 columns spill.
    narrowest = 128 if wider > 128 else wider
    block_d, block_dv = (min(max(padded(width), narrowest), wider) for width in (d, dv))
    shape = shape_of(table[by_pair], itemsize, wider, architecture)
    longest = padded(chunk)
    block_m, block_n = min(shape.block_m, longest), min(shape.block_n, longest)
    return Tile(block_m, block_n, block_d, block_dv, shape.num_warps, shape.num_stages)


def forward_tile(itemsize: int, d: int, dv: int, architecture: int, by_pair: bool, chunk: int) -> Tile:
    """``by_pair``: there is something to draw or to count for every pair; ``chunk``: its length."""
    return _tile(_FORWARD, _WIDEST, itemsize, d, dv, architecture, by_pair, chunk)


def backward_tile(itemsize: int, d: int, dv: int, architecture: int, by_pair: bool, chunk: int) -> Tile:
    if itemsize == 2 and max(d, dv) > _WIDEST_BACKWARD[2]:
        # Rows in several pieces.
        rows = min(32, padded(chunk))
        return Tile(rows, rows, 64, 64, 8, 1)
    return _tile(_BACKWARD, _WIDEST_BACKWARD, itemsize, d, dv, architecture, by_pair, chunk)
