"""Block-sparse attention patterns: which blocks of queries and keys meet.

A pattern says so for square blocks of ``block_size`` queries by ``block_size`` keys; finer limits (a causal mask, a
window in tokens) are separate arguments of attention and act inside the blocks that a pattern leaves. Patterns combine
by ``|``, and :class:`PerHead` gives every head its own.

Sources: Child et al., "Generating long sequences with sparse transformers", 2019 (strided); Beltagy et al.,
"Longformer", 2020 (window, global); Zaheer et al., "Big Bird", 2020 (random blocks).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusewright_kernels.checks import type_error, value_error


class Pattern:
    """Blocks of queries and keys that take part; subclasses implement :meth:`blocks`.

    Args:
        block_size: tokens along each side of a block, at least 1.
    """

    def __init__(self, block_size: int = 64) -> None:
        if isinstance(block_size, bool) or not isinstance(block_size, int):
            raise type_error("block_size", f"a {type(block_size).__name__}", "an int")
        if block_size < 1:
            raise value_error("block_size", block_size, "an int >= 1")
        self.block_size = block_size

    def blocks(self, query_blocks: int, key_blocks: int) -> Tensor:
        """Which blocks take part: bool (1 or heads, query_blocks, key_blocks), on the CPU."""
        raise NotImplementedError

    def __or__(self, other: "Pattern") -> "Union":
        return Union(self, other)

    def block_mask(self, heads: int, queries: int, keys: int, device: torch.device) -> Tensor:
        """The blocks of a call with ``queries`` queries and ``keys`` keys, contiguous on ``device``."""
        blocks = self.blocks(-(-queries // self.block_size), -(-keys // self.block_size))
        if blocks.shape[0] not in (1, heads):
            raise value_error("pattern's number of heads", blocks.shape[0], f"1 or {heads}")
        return blocks.to(device).contiguous()


def _grid(query_blocks: int, key_blocks: int) -> tuple[Tensor, Tensor]:
    return torch.arange(query_blocks)[None, :, None], torch.arange(key_blocks)[None, None, :]


def _at_least(name: str, value: int, least: int) -> int:
    if value < least:
        raise value_error(name, value, f"an int >= {least}")
    return value


class Window(Pattern):
    """Blocks at most ``before`` blocks before and ``after`` blocks behind the query's own."""

    def __init__(self, before: int, after: int, block_size: int = 64) -> None:
        super().__init__(block_size)
        self.before, self.after = _at_least("before", before, 0), _at_least("after", after, 0)

    def blocks(self, query_blocks: int, key_blocks: int) -> Tensor:
        rows, columns = _grid(query_blocks, key_blocks)
        return (columns - rows >= -self.before) & (columns - rows <= self.after)


class Strided(Pattern):
    """Every ``stride``-th block counted back from the query's own, and on behind it."""

    def __init__(self, stride: int, block_size: int = 64) -> None:
        super().__init__(block_size)
        self.stride = _at_least("stride", stride, 1)

    def blocks(self, query_blocks: int, key_blocks: int) -> Tensor:
        rows, columns = _grid(query_blocks, key_blocks)
        return (rows - columns) % self.stride == 0


class Global(Pattern):
    """The first ``count`` blocks of keys for every query, and all keys for the first ``count`` blocks of queries."""

    def __init__(self, count: int, block_size: int = 64) -> None:
        super().__init__(block_size)
        self.count = _at_least("count", count, 0)

    def blocks(self, query_blocks: int, key_blocks: int) -> Tensor:
        rows, columns = _grid(query_blocks, key_blocks)
        return (rows < self.count) | (columns < self.count)


class Random(Pattern):
    """``count`` random blocks of keys for each block of queries, the same for every call with equal sizes and seed."""

    def __init__(self, count: int, seed: int = 0, block_size: int = 64) -> None:
        super().__init__(block_size)
        self.count, self.seed = _at_least("count", count, 0), seed

    def blocks(self, query_blocks: int, key_blocks: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.rand(query_blocks, key_blocks, generator=generator).argsort(dim=1)
        chosen = torch.zeros(query_blocks, key_blocks, dtype=torch.bool)
        return chosen.scatter_(1, order[:, : self.count], True)[None]


class Union(Pattern):
    """Blocks that take part in any of several patterns of one block size."""

    def __init__(self, *patterns: Pattern) -> None:
        _same_block_size(patterns)
        super().__init__(patterns[0].block_size)
        self.patterns = patterns

    def blocks(self, query_blocks: int, key_blocks: int) -> Tensor:
        union = self.patterns[0].blocks(query_blocks, key_blocks)
        for pattern in self.patterns[1:]:
            union = union | pattern.blocks(query_blocks, key_blocks)
        return union


class PerHead(Pattern):
    """One pattern for each query head."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        _same_block_size(patterns)
        super().__init__(patterns[0].block_size)
        self.patterns = tuple(patterns)

    def blocks(self, query_blocks: int, key_blocks: int) -> Tensor:
        return torch.cat([pattern.blocks(query_blocks, key_blocks) for pattern in self.patterns])


def _same_block_size(patterns: Sequence[Pattern]) -> None:
    if not patterns:
        raise value_error("patterns", "empty", "at least one pattern")
    sizes = {pattern.block_size for pattern in patterns}
    if len(sizes) > 1:
        raise value_error("the block sizes of patterns", sorted(sizes), "one size for all")
