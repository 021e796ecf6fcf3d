"""A cache in pages: sequences take memory as they grow, and share what they have in common."""

from typing import Any

import torch
from torch import Tensor

from fusewright.nn.kv_cache import KeyValueCache
from fusewright_kernels.checks import value_error


class PagedKeyValueCache(KeyValueCache):
    """Keys and values in pages of a pool; :meth:`select` copies no page, a shared one is copied when it is written.

    Args:
        capacity: how many positions a sequence can have at most.
        page_size: positions of one page.
        num_pages: pages of the pool, None is a pool that grows with what is appended.
        Others: as :class:`KeyValueCache`.

    Attributes:
        key, value: (pages, HK, page size, D) and (pages, HK, page size, value_dim).
        block_table: (B, pages of a sequence) int64, as in :func:`fusewright.functional.decode_attention`.

    Source: Kwon et al., "Efficient memory management for large language model serving with PagedAttention", 2023.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        page_size: int = 64,
        num_pages: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if page_size < 1:
            raise value_error("page_size", page_size, "an int >= 1")
        most = -(-capacity // page_size)
        super().__init__(
            batch_size if num_pages is None else num_pages, num_kv_heads, page_size, head_dim, value_dim,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(batch_size, most, dtype=torch.int64, device=device)
        self._capacity, self._grows = capacity, num_pages is None
        self._filled = [0] * batch_size
        self._pages: list[list[int]] = [[] for _ in range(batch_size)]
        self._uses = [0] * self.key.shape[0]
        self._free = list(range(self.key.shape[0]))[::-1]

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def append(self, key: Tensor, value: Tensor) -> None:
        self._check_rows(key, value)
        added, size = key.shape[2], self.key.shape[2]
        longest = max(self._filled, default=0) + added
        if longest > self.capacity:
            raise value_error("the cache's length", longest, f"at most its capacity {self.capacity}")
        self._make_room(added)
        positions = self.lengths[:, None] + torch.arange(added, device=self.lengths.device)
        pages = self.block_table.gather(1, positions // size)
        self.key[pages, :, positions % size] = key.transpose(1, 2)
        self.value[pages, :, positions % size] = value.transpose(1, 2)
        self.lengths += added
        self._filled = [filled + added for filled in self._filled]
        self._longest = longest

    def attend(self, query: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        if bias is not None:
            raise value_error("bias", "given", "None where the cache is paged")
        return super().attend(query, block_table=self.block_table, **options)

    def reset(self, lengths: Tensor | None = None) -> None:
        super().reset(lengths)
        self._filled = self.lengths.tolist()
        size = self.key.shape[2]
        for pages, filled in zip(self._pages, self._filled, strict=True):
            while len(pages) > -(-filled // size):
                self._release(pages.pop())

    def select(self, rows: Tensor) -> None:
        chosen = rows.tolist()
        before = self._pages
        self._pages = [list(before[row]) for row in chosen]
        for pages in self._pages:
            for page in pages:
                self._uses[page] += 1
        for pages in before:
            for page in pages:
                self._release(page)
        self._filled = [self._filled[row] for row in chosen]
        self.lengths, self.block_table = self.lengths[rows], self.block_table[rows]

    def _make_room(self, added: int) -> None:
        """Pages of its own for every position that each sequence is about to write."""
        size, changed = self.key.shape[2], False
        wanted = sum(self._wanted(row, added) for row in range(len(self._pages)))
        if wanted > len(self._free) and self._grows:
            self._grow(wanted - len(self._free))
        if wanted > len(self._free):
            raise value_error("the pages wanted", wanted, f"at most the {len(self._free)} free ones of the pool")
        for row, pages in enumerate(self._pages):
            filled = self._filled[row]
            if filled % size != 0 and added > 0 and self._uses[pages[-1]] > 1:
                shared = pages.pop()
                pages.append(self._take())
                self.key[pages[-1]], self.value[pages[-1]] = self.key[shared], self.value[shared]
                self._release(shared)
                changed = True
            while len(pages) * size < filled + added:
                pages.append(self._take())
                changed = True
        if changed:
            most = self.block_table.shape[1]
            padded = [pages + [0] * (most - len(pages)) for pages in self._pages]
            self.block_table = torch.tensor(padded, dtype=torch.int64, device=self.lengths.device).view(-1, most)

    def _wanted(self, row: int, added: int) -> int:
        size, filled, pages = self.key.shape[2], self._filled[row], self._pages[row]
        own_copy = filled % size != 0 and added > 0 and self._uses[pages[-1]] > 1
        return -(-(filled + added) // size) - len(pages) + own_copy

    def _grow(self, missing: int) -> None:
        """More pages, at least as many again as there are, so that each is moved once on average."""
        count = self.key.shape[0]
        more = max(missing, count)
        self.key = torch.cat([self.key, self.key.new_zeros(more, *self.key.shape[1:])])
        self.value = torch.cat([self.value, self.value.new_zeros(more, *self.value.shape[1:])])
        self._uses += [0] * more
        self._free += range(count + more - 1, count - 1, -1)

    def _take(self) -> int:
        page = self._free.pop()
        self._uses[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._uses[page] -= 1
        if self._uses[page] == 0:
            self._free.append(page)
