"""A cache for attention within a window, of a size that does not grow with the text."""

import torch
from torch import Tensor

from fusewright.nn.kv_cache import KeyValueCache
from fusewright_kernels.checks import value_error


class RollingKeyValueCache(KeyValueCache):
    """The last positions of each sequence: when there is no more room, all but ``window`` of them are dropped.

    Up to ``capacity - window`` positions can be appended at a time. Attention over it must have a window of at most
    ``window`` positions before each query.

    Args:
        window: positions that are never dropped.
        Others: as :class:`KeyValueCache`. With twice the window as capacity each position is moved once on average.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        window: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 <= window < capacity:
            raise value_error("window", window, f"an int in [0, {capacity - 1}], less than the capacity")
        super().__init__(batch_size, num_kv_heads, capacity, head_dim, value_dim, device=device, dtype=dtype)
        self.window = window
        self._dropped = torch.zeros_like(self.lengths)

    @property
    def positions(self) -> Tensor:
        return self.lengths + self._dropped

    def append(self, key: Tensor, value: Tensor) -> None:
        added, most = key.shape[2] if key.ndim == 4 else 0, self.capacity - self.window
        if added > most:
            raise value_error("key.shape[2]", added, f"at most {most}, the capacity less the window")
        if self._longest + added > self.capacity:
            self._roll()
        super().append(key, value)

    def reset(self, lengths: Tensor | None = None) -> None:
        super().reset(lengths)
        if lengths is None:
            self._dropped.zero_()

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self._dropped = self._dropped[rows]

    def _roll(self) -> None:
        """Move the last ``window`` positions of each sequence to its front."""
        surplus = (self.lengths - self.window).clamp(min=0)
        sources = surplus[:, None] + torch.arange(self.window, device=surplus.device)
        batches = torch.arange(surplus.shape[0], device=surplus.device)[:, None]
        self.key[:, :, : self.window] = self.key[batches, :, sources].transpose(1, 2)
        self.value[:, :, : self.window] = self.value[batches, :, sources].transpose(1, 2)
        self.lengths -= surplus
        self._dropped += surplus
        self._longest = min(self._longest, self.window)
