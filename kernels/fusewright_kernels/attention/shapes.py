"""The shapes that attention's ops work on, from those that torch's functions take."""

import torch
from torch import Tensor

from fusewright_kernels.checks import value_error


def broadcast(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """(B, H, T, D) tensors whose leading dimensions are broadcast, and query's leading sizes.

    With ``enable_gqa`` the heads dimension is left as it is.
    """
    tensors = (query, key, value)
    kept = 3 if enable_gqa and query.ndim > 2 else 2
    try:
        leading = torch.broadcast_shapes(*(tensor.shape[:-kept] for tensor in tensors))
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise value_error("the shapes of query, key and value", shapes, "leading sizes that broadcast") from error
    expanded = [tensor.expand(*leading, *tensor.shape[-kept:]) for tensor in tensors]
    results = [_four_dimensional(tensor) for tensor in expanded]
    return results[0], results[1], results[2], expanded[0].shape[:-2]


def _four_dimensional(tensor: Tensor) -> Tensor:
    """(B, H, T, D): leading dimensions before the heads merged, or missing ones of size 1."""
    if tensor.ndim < 4:
        return tensor.reshape((1,) * (4 - tensor.ndim) + tensor.shape)
    return tensor.flatten(0, -4)


def four_dimensional_mask(mask: Tensor, leading: torch.Size, query: Tensor, keys: int) -> Tensor:
    """The mask with sizes 1 or those of (B, H, T, S); a view unless more than two leading sizes must be merged."""
    full = (*leading, query.shape[2], keys)
    padded = (1,) * (len(full) - mask.ndim) + tuple(mask.shape)
    if mask.ndim > len(full) or any(size not in (1, expected) for size, expected in zip(padded, full, strict=True)):
        raise value_error("attn_mask.shape", tuple(mask.shape), f"a shape that broadcasts to {full}")
    mask = mask.reshape(padded)
    if len(full) <= 4:
        return mask.reshape((1,) * (4 - len(full)) + padded)
    if all(size == 1 for size in padded[:-3]):
        return mask.reshape((1, *padded[-3:]))
    return mask.expand(*leading[:-1], *padded[-3:]).flatten(0, -4)
