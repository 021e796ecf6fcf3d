"""What the models remember while they generate; see :class:`fusewright.generation.DecodingState`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusewright.nn import KeyValueCache, LSHCache, RollingKeyValueCache
from fusewright_kernels.checks import value_error


class CachedState:
    """A cache for each layer of a Transformer.

    Attributes:
        caches: of equal lengths.
        memory: (B, S, E) an encoded source, or None.
        memory_padding: (B, S) bool, True for padding, or None.
        projected_memory: its keys and values for each layer, or None.
    """

    def __init__(
        self,
        caches: Sequence[KeyValueCache],
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
        projected_memory: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.caches, self.memory, self.memory_padding = list(caches), memory, memory_padding
        self.projected_memory = projected_memory

    @property
    def positions(self) -> Tensor:
        """(B,) int64: the position of the next token."""
        return self.caches[0].positions

    @property
    def longest_step(self) -> int | None:
        cache = self.caches[0]
        return cache.capacity - cache.window if isinstance(cache, RollingKeyValueCache) else None

    def select(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.select(rows)
        self.memory = None if self.memory is None else self.memory[rows]
        self.memory_padding = None if self.memory_padding is None else self.memory_padding[rows]
        if self.projected_memory is not None:
            self.projected_memory = [(key[rows], value[rows]) for key, value in self.projected_memory]

    def drop_padding(self, added: int, lengths: Tensor | None) -> None:
        """Of the ``added`` newest positions keep the first ``lengths[b]``, all by default."""
        if lengths is None:
            return
        for cache in self.caches:
            cache.reset(cache.lengths - (added - lengths))


class RecurrentState:
    """The states of recurrent layers, and an encoded source.

    Attributes:
        states: each (layers, B, N).
        memory: (B, S, N).
        memory_padding: (B, S) bool, True for padding, or None.
    """

    longest_step: int | None = None

    def __init__(self, states: tuple[Tensor, ...], memory: Tensor, memory_padding: Tensor | None) -> None:
        self.states, self.memory, self.memory_padding = states, memory, memory_padding

    def select(self, rows: Tensor) -> None:
        self.states = tuple(state[:, rows] for state in self.states)
        self.memory = self.memory[rows]
        self.memory_padding = None if self.memory_padding is None else self.memory_padding[rows]


class HashedState:
    """A cache for each layer of LSH attention, for sequences of one length, and the tokens, for others.

    Attributes:
        tokens: (B, capacity) int64, what lies behind a sequence is padding.
        lengths: (B,) int64.
        caches: None once lengths have differed: the tokens are read again then.
    """

    longest_step: int | None = None

    def __init__(self, batch_size: int, capacity: int, caches: Sequence[LSHCache], device: torch.device) -> None:
        self.tokens = torch.zeros(batch_size, capacity, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.caches: list[LSHCache] | None = list(caches)

    def append(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """Add the first ``lengths[b]`` of ``tokens`` (B, T), all by default; returns their places (B, T)."""
        places = positions_of(tokens, self.lengths)
        if int(places.max()) >= self.tokens.shape[1]:
            raise value_error("the text's length", int(places.max()) + 1, f"at most {self.tokens.shape[1]}")
        self.tokens.scatter_(1, places, tokens.long())
        self.lengths = self.lengths + (tokens.shape[1] if lengths is None else lengths)
        if lengths is not None and bool((lengths != tokens.shape[1]).any()):
            self.caches = None
        return places

    def select(self, rows: Tensor) -> None:
        self.tokens, self.lengths = self.tokens[rows], self.lengths[rows]
        for cache in self.caches or ():
            cache.select(rows)


def positions_of(tokens: Tensor, first: Tensor | int) -> Tensor:
    """(B, T) or (T,): the positions of ``tokens`` (B, T) whose first column stands at ``first``."""
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    return first[:, None] + steps if isinstance(first, Tensor) else first + steps
