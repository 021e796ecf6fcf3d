"""Embedding with positions: checks, dispatch, autograd."""

import torch
from torch import Tensor

from fusewright_kernels import autograd, dispatch, library, row_kernels
from fusewright_kernels.checks import (
    ArgumentIndexError,
    floating_tensor,
    has_values,
    same_device,
    type_error,
    value_error,
)
from fusewright_kernels.embedding import backend_reference, backend_triton, reference
from fusewright_kernels.embedding.function import Embedding

backend_reference.attach()
dispatch.register("embedding", {"triton": backend_triton.refuse, "cpu": row_kernels.refuse_cpu})


def embedding(
    tokens: Tensor,
    weight: Tensor,
    table: Tensor | None,
    positions: Tensor | None,
    scale: float,
    padding_idx: int | None,
    backend: str | None,
) -> Tensor:
    """See :func:`fusewright.functional.embedding`."""
    _check_matrix("weight", weight)
    tokens = _checked_indices("tokens", tokens, "weight", weight)
    rows = None
    if table is not None:
        _check_matrix("table", table)
        same_device("table", table, "weight", weight)
        if table.shape[1] != weight.shape[1]:
            raise value_error("table.shape", tuple(table.shape), f"(P, {weight.shape[1]}), of weight's width")
        if table.dtype not in (weight.dtype, torch.float32):
            raise type_error("table.dtype", table.dtype, f"float32 or {weight.dtype}, the dtype of weight")
        rows = _rows_of(tokens, table, positions)
    elif positions is not None:
        raise value_error("positions", "given", "None without a table")
    padding = -1 if padding_idx is None else _padding_row(padding_idx, weight.shape[0])
    dtypes = (weight.dtype,) if table is None else (weight.dtype, table.dtype)
    chosen = dispatch.choose("embedding", dispatch.device_type(weight), dtypes, weight.ndim, backend)
    if autograd.derivative_possible(weight, table):
        return autograd.apply(Embedding, tokens, weight, table, rows, float(scale), padding, chosen)
    if chosen == "reference":
        return reference.embedding(tokens, weight, table, rows, float(scale))
    return library.overload("embedding_forward", chosen)(tokens, weight, table, rows, float(scale))


def _check_matrix(name: str, matrix: Tensor) -> None:
    floating_tensor(name, matrix)
    if matrix.ndim != 2:
        raise value_error(f"{name}.shape", tuple(matrix.shape), "two dimensions: a row for each index")


def _rows_of(tokens: Tensor, table: Tensor, positions: Tensor | None) -> Tensor | None:
    """A row of ``table`` for every token; None for 0, 1, 2, ... along the last dimension."""
    if positions is None:
        length = tokens.shape[-1] if tokens.ndim else 1
        if length > table.shape[0]:
            raise value_error("table.shape", tuple(table.shape), f"a row for each of {length} positions")
        return None
    positions = _checked_indices("positions", positions, "table", table)
    try:
        return positions.expand(tokens.shape)
    except RuntimeError:
        expected = f"one that expands to tokens' shape {tuple(tokens.shape)}"
        raise value_error("positions.shape", tuple(positions.shape), expected) from None


def _checked_indices(name: str, indices: Tensor, other: str, matrix: Tensor) -> Tensor:
    """int64."""
    if not isinstance(indices, Tensor):
        raise type_error(name, f"a {type(indices).__name__}", "a torch.Tensor")
    if indices.dtype not in (torch.int64, torch.int32):
        raise type_error(f"{name}.dtype", indices.dtype, "int64 or int32")
    same_device(name, indices, other, matrix)
    # Where the values cannot be seen, an index out of range gives NaN.
    if indices.numel() > 0 and has_values(indices):
        smallest, largest = (bound.item() for bound in torch.aminmax(indices))
        if smallest < 0 or largest >= matrix.shape[0]:
            wrong = smallest if smallest < 0 else largest
            raise ArgumentIndexError(f"{name} holds {wrong}, expected a row of {other} in [0, {matrix.shape[0] - 1}]")
    return indices.long()


def _padding_row(index: int, count: int) -> int:
    if isinstance(index, bool) or not isinstance(index, int):
        raise type_error("padding_idx", f"a {type(index).__name__}", "an int or None")
    if not -count <= index < count:
        raise value_error("padding_idx", index, f"a row of weight in [{-count}, {count - 1}]")
    return index % count
