"""What a decoder with LSH attention has seen so far."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusewright import functional
from fusewright_kernels.checks import type_error, value_error
from fusewright_kernels.lsh_attention.op import default_buckets, draw_rotations
from fusewright_kernels.philox import seed_tensor


class LSHCache:
    """Vectors, values and buckets of B sequences of one length in memory set aside once.

    The rotations are drawn here, once: positions hashed at different steps must be comparable.

    Args:
        batch_size: B.
        num_heads: H.
        capacity: how many positions each sequence has room for.
        head_dim: D, of vectors and values.
        n_hashes: rounds R.
        chunk_length: of the attention; decides the number of buckets if ``n_buckets`` is None.
        n_buckets: even, or even factors of it; None is about 2 capacity / chunk_length.
        seed: of the rotations; None draws one from torch's default generator.
        device, dtype: of ``query_key`` and ``value``, as in torch.empty.

    Attributes:
        length: how many positions are filled.
    """

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        capacity: int,
        head_dim: int,
        *,
        n_hashes: int = 4,
        chunk_length: int = 64,
        n_buckets: int | Sequence[int] | None = None,
        seed: int | Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (batch_size, num_heads, capacity, head_dim)
        self._query_key = torch.zeros(shape, device=device, dtype=dtype)
        self._value = torch.zeros(shape, device=device, dtype=dtype)
        self._buckets = torch.zeros(
            (batch_size, num_heads, n_hashes, capacity), device=self._value.device, dtype=torch.int64
        )
        factors = default_buckets(capacity, chunk_length) if n_buckets is None else n_buckets
        factors = (factors,) if isinstance(factors, int) else tuple(factors)
        self.rotations = draw_rotations(seed_tensor(seed, self._value.device), num_heads, head_dim, n_hashes, factors)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self._value.shape[2]

    def append(self, query_key: Tensor, value: Tensor) -> None:
        """Hash and write query_key and value (B, H, T, D) behind what is there.

        Raises:
            ValueError: a shape does not fit, there is no room, or a gradient is wanted: the cache has none.
            TypeError: another dtype than the cache's.
        """
        batch, heads, _, width = self._value.shape
        for name, rows in (("query_key", query_key), ("value", value)):
            added = query_key.shape[2] if query_key.ndim == 4 else "T"
            if tuple(rows.shape) != (batch, heads, added, width):
                raise value_error(f"{name}.shape", tuple(rows.shape), str((batch, heads, added, width)))
            if rows.dtype is not self._value.dtype:
                raise type_error(f"{name}.dtype", rows.dtype, f"{self._value.dtype}, the dtype of the cache")
            if rows.requires_grad and torch.is_grad_enabled():
                raise value_error(f"{name}.requires_grad", True, "False: a cache has no gradient; use torch.no_grad()")
        end = self.length + query_key.shape[2]
        if end > self.capacity:
            raise value_error("the cache's length", end, f"at most its capacity {self.capacity}")
        new = slice(self.length, end)
        self._query_key[:, :, new], self._value[:, :, new] = query_key, value
        self._buckets[..., new] = functional.lsh_hash(query_key, self.rotations)
        self.length = end

    def filled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors and values (B, H, T, D) and buckets (B, H, R, T) of the positions so far."""
        vectors, values = (tensor[:, :, : self.length] for tensor in (self._query_key, self._value))
        return vectors, values, self._buckets[..., : self.length]

    def select(self, rows: Tensor) -> None:
        """Go on with sequences ``rows`` (n,), each as often as it is named, as a beam search does."""
        self._query_key, self._value, self._buckets = (
            tensor[rows] for tensor in (self._query_key, self._value, self._buckets)
        )

    def reset(self) -> None:
        self.length = 0
