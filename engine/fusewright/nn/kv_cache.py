"""The keys and values that a decoder has seen so far."""

from typing import Any

import torch
from torch import Tensor

from fusewright import functional
from fusewright_kernels.checks import type_error, value_error


class KeyValueCache:
    """Keys and values of B sequences in memory set aside once; see :func:`fusewright.functional.decode_attention`.

    Args:
        batch_size: B.
        num_kv_heads: HK, the key/value heads of the attention module.
        capacity: how many positions each sequence has room for.
        head_dim: D.
        value_dim: width of a value head, D if None.
        device, dtype: of ``key`` and ``value``, as in torch.empty.

    Attributes:
        key: (B, HK, capacity, D).
        value: (B, HK, capacity, value_dim).
        lengths: (B,) int64, how many positions of each sequence are filled.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (batch_size, num_kv_heads, capacity)
        self.key = torch.zeros(*shape, head_dim, device=device, dtype=dtype)
        self.value = torch.zeros(*shape, head_dim if value_dim is None else value_dim, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        # An upper bound of lengths on the host: a decoding loop must not wait for the device to learn that it fits.
        self._longest = 0
        # Whether every sequence holds as many positions, so that new ones go to one place.
        self._is_even = True

    @property
    def capacity(self) -> int:
        return self.key.shape[2]

    @property
    def is_empty(self) -> bool:
        """Whether no sequence holds anything yet."""
        return self._longest == 0

    @property
    def positions(self) -> Tensor:
        """(B,) int64: the position of the next key of each sequence."""
        return self.lengths

    def append(self, key: Tensor, value: Tensor) -> None:
        """Write key (B, HK, T, D) and value (B, HK, T, value_dim) behind what each sequence holds.

        Raises:
            ValueError: a shape does not fit, there is no room, or a gradient is wanted: the cache has none.
            TypeError: another dtype than the cache's.
        """
        self._check_rows(key, value)
        added = key.shape[2]
        if self._longest + added > self.capacity:
            raise value_error("the cache's length", self._longest + added, f"at most its capacity {self.capacity}")
        # A compiled step must not depend on the length of its own call.
        if self._is_even and not torch.compiler.is_compiling():
            place = slice(self._longest, self._longest + added)
            self.key[:, :, place] = key
            self.value[:, :, place] = value
        else:
            positions = self.lengths[:, None] + torch.arange(added, device=self.lengths.device)
            batches = torch.arange(key.shape[0], device=self.lengths.device)[:, None]
            self.key[batches, :, positions] = key.transpose(1, 2)
            self.value[batches, :, positions] = value.transpose(1, 2)
        self.lengths += added
        self._longest += added

    def attend(self, query: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        """Causal attention of the newest T positions, appended before, over all.

        Args:
            query: (B, H, T, D).
            bias: broadcasts to (B, H, T, capacity), added to the logits; without options.
            options: of :func:`fusewright.functional.decode_attention`.

        Returns:
            (B, H, T, value_dim).
        """
        if bias is not None:
            length = query.shape[2]
            newest = self.lengths[:, None] - length + torch.arange(length, device=query.device)
            later = torch.arange(self.capacity, device=query.device) > newest[..., None]
            mask = bias.masked_fill(later[:, None], -torch.inf)
            attended = functional.scaled_dot_product_attention(query, self.key, self.value, mask, enable_gqa=True)
            assert isinstance(attended, Tensor)
            return attended
        attended = functional.decode_attention(query, self.key, self.value, self.lengths, **options)
        assert isinstance(attended, Tensor)
        return attended

    def select(self, rows: Tensor) -> None:
        """Let sequence i be what sequence ``rows[i]`` was; ``rows`` (any number,) may repeat and leave out."""
        self.key, self.value, self.lengths = self.key[rows], self.value[rows], self.lengths[rows]

    def _check_rows(self, key: Tensor, value: Tensor) -> None:
        for name, rows, cache in (("key", key, self.key), ("value", value, self.value)):
            expected = (self.lengths.shape[0], cache.shape[1], key.shape[2] if key.ndim == 4 else "T", cache.shape[3])
            if tuple(rows.shape) != expected:
                raise value_error(f"{name}.shape", tuple(rows.shape), str(expected))
            if rows.dtype is not cache.dtype:
                raise type_error(f"{name}.dtype", rows.dtype, f"{cache.dtype}, the dtype of the cache")
            if rows.requires_grad and torch.is_grad_enabled():
                raise value_error(f"{name}.requires_grad", True, "False: a cache has no gradient; use torch.no_grad()")

    def reset(self, lengths: Tensor | None = None) -> None:
        """Keep the first ``lengths[b]`` positions of each sequence, none by default.

        After a batch of prompts of different lengths, padded on the right, this drops the padding.

        Args:
            lengths: (B,) integers, at most what the sequences hold.
        """
        if lengths is None:
            self.lengths.zero_()
            self._longest, self._is_even = 0, True
            return
        if lengths.shape != self.lengths.shape:
            raise value_error("lengths.shape", tuple(lengths.shape), f"{tuple(self.lengths.shape)}")
        kept = lengths.to(self.lengths)
        if not ((kept >= 0) & (kept <= self.lengths)).all():
            raise value_error("lengths", lengths.tolist(), f"at least 0 and at most {self.lengths.tolist()}")
        self.lengths.copy_(kept)
        self._longest = int(kept.max()) if kept.numel() else 0
        self._is_even = bool((kept == self._longest).all())
