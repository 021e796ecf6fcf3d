"""Argument checks of LSH attention."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusewright_kernels.checks import floating_tensor, same_device, type_error, value_error

# Positions, places and buckets are 32-bit numbers in the kernels.
LONGEST = 2**31 - 1


def operand(name: str, tensor: object, other_name: str = "", other: Tensor | None = None) -> None:
    """``tensor`` is (B, H, T, D) and, but for its last size, like ``other``."""
    floating_tensor(name, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.ndim != 4:
        raise value_error(f"{name}.ndim", tensor.ndim, "4: (B, H, T, D)")
    if tensor.shape[2] > LONGEST:
        raise value_error(f"{name}.shape[2]", tensor.shape[2], f"at most {LONGEST} positions")
    if other is None:
        return
    if tensor.dtype is not other.dtype:
        raise type_error(f"{name}.dtype", tensor.dtype, f"{other.dtype}, the dtype of {other_name}")
    same_device(name, tensor, other_name, other)
    if tensor.shape[:3] != other.shape[:3]:
        raise value_error(f"{name}.shape", tuple(tensor.shape), f"{(*other.shape[:3], 'DV')}, like {other_name}")


def integer(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise type_error(name, f"a {type(value).__name__}", "an int")
    if value < least:
        raise value_error(name, value, f"an int >= {least}")
    return value


def bucket_factors(n_buckets: int | Sequence[int]) -> tuple[int, ...]:
    """The even factors of a number of buckets."""
    factors = (n_buckets,) if isinstance(n_buckets, int) else tuple(n_buckets)
    if not factors:
        raise value_error("n_buckets", n_buckets, "an even number of buckets or a sequence of even factors")
    for factor in factors:
        integer("n_buckets", factor, 2)
        if factor % 2 != 0:
            raise value_error("n_buckets", n_buckets, "even: half of the buckets are the others' opposites")
    if math.prod(factors) >= LONGEST:
        raise value_error("n_buckets", n_buckets, f"fewer than {LONGEST} buckets in all")
    return factors


def rotations(given: Tensor | Sequence[Tensor], vectors: Tensor, n_hashes: int | None = None) -> list[Tensor]:
    """The factors (H, D, R, NB_f / 2) of the rotations for ``vectors`` (B, H, T, D)."""
    factors = [given] if isinstance(given, Tensor) else list(given)
    if not factors:
        raise value_error("rotations", "empty", "a tensor (H, D, R, NB / 2) or a sequence of them")
    _, heads, _, width = vectors.shape
    for factor in factors:
        floating_tensor("rotations", factor)
        same_device("rotations", factor, "the vectors", vectors)
        rounds = (factors[0].shape[2] if factors[0].ndim == 4 else "R") if n_hashes is None else n_hashes
        expected = f"({heads}, {width}, {rounds}, NB / 2)"
        if factor.ndim != 4 or factor.shape[:2] != (heads, width) or factor.shape[2] != rounds or factor.shape[3] < 1:
            raise value_error("rotations.shape", tuple(factor.shape), expected)
    if math.prod(2 * factor.shape[3] for factor in factors) >= LONGEST:
        raise value_error("rotations", "a product of factors", f"fewer than {LONGEST} buckets in all")
    return factors


def key_padding_mask(mask: Tensor | None, vectors: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise type_error("key_padding_mask", f"a {type(mask).__name__}", "a torch.Tensor or None")
    if mask.dtype is not torch.bool:
        raise type_error("key_padding_mask.dtype", mask.dtype, "torch.bool, True where a key is padding")
    same_device("key_padding_mask", mask, "query_key", vectors)
    expected = (vectors.shape[0], vectors.shape[2])
    if tuple(mask.shape) != expected:
        raise value_error("key_padding_mask.shape", tuple(mask.shape), f"{expected}, (B, T)")
    return mask


def buckets(given: Tensor, vectors: Tensor, most: int) -> None:
    """``given`` is (B, H, R, T), from 0 to ``most``, the bucket of padding."""
    if not isinstance(given, Tensor):
        raise type_error("buckets", f"a {type(given).__name__}", "a torch.Tensor or None")
    if given.dtype is not torch.int64:
        raise type_error("buckets.dtype", given.dtype, "torch.int64")
    same_device("buckets", given, "query_key", vectors)
    batch, heads, length, _ = vectors.shape
    if given.ndim != 4 or given.shape[:2] != (batch, heads) or given.shape[3] != length or given.shape[2] < 1:
        raise value_error("buckets.shape", tuple(given.shape), f"({batch}, {heads}, R, {length})")
    # Inside vmap no value can be looked at; the sort on a CPU refuses one out of range.
    if given.numel() == 0 or torch._C._are_functorch_transforms_active():
        return
    # On a GPU, and in a trace, the values are checked there, without waiting: a breach is a device-side assertion.
    if torch.compiler.is_compiling() or given.is_cuda:
        torch._assert_async(((given >= 0) & (given <= most)).all(), f"buckets must be from 0 to {most}")
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(given))
    if smallest < 0 or largest > most:
        raise value_error("buckets", f"from {smallest} to {largest}", f"from 0 to {most}")


def scale(value: float) -> float:
    value = float(value)
    # Not math.isfinite: a trace may hold a symbol here, which can be compared.
    if not -math.inf < value < math.inf:
        raise value_error("scale", value, "a finite number")
    return value
