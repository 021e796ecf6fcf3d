"""Tile sizes of the Triton kernels: functions of the row length and of whether columns are adjacent in memory.

They are never functions of the number of rows, so that a row's bits do not depend on its batch.
No autotuning: these kernels are limited by memory, where what counts is enough bytes in flight and no spill, and the
compile check (``triton_compile_check``) reads the spills of every tile named here.
"""

from fusewright_kernels.triton_support import Tile, ceil_div, next_power_of_2

# The longest row whose float32 values stay in registers. Forward keeps one value an element, backward up to six; where
# columns are not adjacent, each element has a 64-bit address of its own besides.
FORWARD_ROW_LIMIT, FORWARD_STRIDED_ROW_LIMIT = 16384, 4096
BACKWARD_ROW_LIMIT, BACKWARD_STRIDED_ROW_LIMIT = 8192, 2048

SHORTEST_BLOCK_N = 16

# Short rows share a program: 4 warps with up to 16 elements, two 16-byte loads of bf16, a thread.
_FEWEST_THREADS = 128
_FEWEST_ELEMENTS = 16

FORWARD_LOOP = Tile(1, 4096, 8, whole_rows=False)
FORWARD_STRIDED_LOOP = Tile(1, 1024, 8, whole_rows=False)
BACKWARD_LOOP = Tile(1, 2048, 8, whole_rows=False)
# 256 adjacent columns are 512 bytes of bf16: full cache lines whatever the row stride.
PARAMETER = Tile(16, 256, 8, whole_rows=False)

COLUMN_SUM_BLOCK_P = 32
COLUMN_SUM_BLOCK_N = 64
COLUMN_SUM_WARPS = 4

# The most terms that one running float32 sum takes. Rounding errors of a long run can all have one sign; 64 terms keep
# them under 32 u even then, and far under it on data that is not made to hurt.
MAX_RUN = 64
COLUMN_SUM_GROUP = MAX_RUN // 2 * COLUMN_SUM_BLOCK_P

# Warps over which rows are spread before a program takes more than one block: 16 on each of 132 multiprocessors. A
# constant and not the device's count, so that the same sums are formed on every GPU; more would only add partials.
_SPREAD_WARPS = 2112


def forward_tile(columns: int, unit_columns: bool) -> Tile:
    if unit_columns:
        return _tile(columns, FORWARD_ROW_LIMIT, 32, FORWARD_LOOP)
    return _tile(columns, FORWARD_STRIDED_ROW_LIMIT, 8, FORWARD_STRIDED_LOOP)


def backward_tile(columns: int, unit_columns: bool) -> Tile:
    # 16 elements a thread: with 6 values an element that fills the 128 registers which 16 warps leave to a thread.
    if unit_columns:
        return _tile(columns, BACKWARD_ROW_LIMIT, 16, BACKWARD_LOOP)
    return _tile(columns, BACKWARD_STRIDED_ROW_LIMIT, 8, BACKWARD_LOOP)


def _tile(columns: int, row_limit: int, elements_per_thread: int, loop: Tile) -> Tile:
    block_n = max(next_power_of_2(columns), SHORTEST_BLOCK_N)
    if block_n > row_limit:
        return loop
    block_m = max(_FEWEST_THREADS * min(elements_per_thread, _FEWEST_ELEMENTS) // block_n, 1)
    return Tile(block_m, block_n, max(4, block_m * block_n // (32 * elements_per_thread)), whole_rows=True)


def blocks_per_program(rows: int, tile: Tile, column_tiles: int = 1) -> int:
    """How many blocks of rows one program of a parameter gradient sums, see ``MAX_RUN``."""
    programs = ceil_div(_SPREAD_WARPS // tile.num_warps, column_tiles)
    return min(ceil_div(ceil_div(rows, tile.block_m), programs), MAX_RUN)
