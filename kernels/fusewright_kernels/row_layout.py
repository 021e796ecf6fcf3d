"""Strided tensors seen as rows and columns, for Triton launches: the counterpart of ``RowView`` in csrc.

The operands of a launch have one shape, so their dimensions are merged jointly: two neighbours become one where that
is possible for every operand. A kernel then splits a row number once for all operands, by up to three outer sizes,
and walks each operand's columns by a single stride.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

MAX_ROW_DIMS = 3


class Operand(NamedTuple):
    """One tensor of a launch; strides in elements."""

    tensor: Tensor
    row_strides: tuple[int, int, int]
    column_stride: int


def operand_arguments(name: str, operand: Operand | None) -> dict[str, Any]:
    """Kernel arguments ``p_<name>`` and ``stride_<name>_{0,1,2,n}``; those of an absent operand are never read."""
    tensor, row_strides, column_stride = (None, (0, 0, 0), 1) if operand is None else operand
    strides = zip((0, 1, 2, "n"), (*row_strides, column_stride), strict=True)
    return {f"p_{name}": tensor, **{f"stride_{name}_{dim}": stride for dim, stride in strides}}


class RowLayout(NamedTuple):
    """Row r has the index (r // (sizes[0] * sizes[1]), r // sizes[1] % sizes[0], r % sizes[1]) in three row dimensions;
    sizes[1] is unused with two, both are with one.
    """

    row_dims: int
    sizes: tuple[int, int]
    operands: tuple[Operand | None, ...]

    @property
    def unit_columns(self) -> bool:
        """Whether the columns of every operand are adjacent in memory."""
        return all(operand is None or operand.column_stride == 1 for operand in self.operands)


def trailing_rows(tensors: Sequence[Tensor | None], column_ndim: int) -> RowLayout:
    """Rows of ``column_ndim`` trailing dimensions. Absent operands stay None; the first must be present."""
    return _fit(tensors, column_ndim, lambda tensor: tensor)


def rows_along(tensors: Sequence[Tensor], dim: int) -> RowLayout:
    """Rows along ``dim``; the remaining dimensions number the rows in their order."""
    return _fit(tensors, 1, lambda tensor: tensor.movedim(dim, -1))


def vector_operand(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """A parameter of the normalised shape as (tensor, stride of its elements in order)."""
    if tensor is None:
        return None, 1
    (operand,) = trailing_rows([tensor], tensor.ndim).operands
    assert operand is not None
    return operand.tensor, operand.column_stride


def _fit(tensors: Sequence[Tensor | None], column_ndim: int, orient: Callable[[Tensor], Tensor]) -> RowLayout:
    """The layout of ``tensors``, each turned by ``orient`` so that its columns come last.

    This is the one place where an operand is copied. Dispatch refuses by rank and dtype only, never by strides, so a
    layout that a kernel's integer arguments cannot express has to be served here: columns of more than one stride
    (a transposed pair of normalised dimensions), or rows that need more than three dimensions after merging (rank 5 and
    above). Both are rare, and a copy costs less than a general index computation in every kernel would.
    """
    expressible = [
        tensor
        if tensor is None or len(_merged(*_column_dims(orient(tensor), column_ndim))) <= 1
        else tensor.contiguous()
        for tensor in tensors
    ]
    layout = _layout(expressible, column_ndim, orient)
    if layout is None:
        layout = _layout([tensor if tensor is None else tensor.contiguous() for tensor in tensors], column_ndim, orient)
    assert layout is not None, "contiguous operands have one column stride and at most two row dimensions"
    return layout


def _layout(tensors: Sequence[Tensor | None], column_ndim: int, orient: Callable[[Tensor], Tensor]) -> RowLayout | None:
    """None if the rows of ``tensors`` need more than three dimensions."""
    oriented = [orient(tensor) for tensor in tensors if tensor is not None]
    row_ndim = oriented[0].ndim - column_ndim
    sizes = oriented[0].shape[:row_ndim]
    merged = _merged(sizes, [tensor.stride()[:row_ndim] for tensor in oriented])
    if len(merged) > MAX_ROW_DIMS:
        return None
    views = iter(range(len(oriented)))
    operands: list[Operand | None] = []
    for tensor in tensors:
        if tensor is None:
            operands.append(None)
            continue
        position = next(views)
        row_strides = [strides[position] for _, strides in merged] + [0] * (MAX_ROW_DIMS - len(merged))
        columns = _merged(*_column_dims(oriented[position], column_ndim))
        column_stride = columns[0][1][0] if columns else 1
        operands.append(Operand(tensor, (row_strides[0], row_strides[1], row_strides[2]), column_stride))
    inner_sizes = [size for size, _ in merged[1:]] + [1] * MAX_ROW_DIMS
    return RowLayout(max(len(merged), 1), (inner_sizes[0], inner_sizes[1]), tuple(operands))


def _column_dims(tensor: Tensor, column_ndim: int) -> tuple[Sequence[int], list[Sequence[int]]]:
    first = tensor.ndim - column_ndim
    return tensor.shape[first:], [tensor.stride()[first:]]


def _merged(sizes: Sequence[int], strides_of_operands: Sequence[Sequence[int]]) -> list[tuple[int, tuple[int, ...]]]:
    """(size, stride in each operand) of the dimensions, outermost first; neighbours merge where all strides allow.

    Dimensions of size 1 vanish: their strides say nothing.
    """
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, *strides in zip(sizes, *strides_of_operands, strict=True):
        if size == 1:
            continue
        if merged and all(outer == inner * size for outer, inner in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, tuple(strides))
        else:
            merged.append((size, tuple(strides)))
    return merged
