"""Layers of a recurrent network, one fused op each: what modules and torch's own functions share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusewright_kernels.recurrent.op import Weights, bidirectional, recurrent

# A layer by its number: (input, its states (directions, B, ...)) -> its output, directions next to each other, and its
# last states.
Layer = Callable[[int, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]

# A layer and direction by its number: (input, its states (B, ...), whether it runs in reverse) -> the same of it.
Direction = Callable[[int, Tensor, tuple[Tensor, ...], bool], tuple[Tensor, ...]]


def fused_layer(
    cell: str,
    weights: Sequence[Sequence[Tensor]],
    projected: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> Layer:
    """The op of ``cell`` with weights as torch's modules name them, for each layer and direction."""

    def layer(number: int, input: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        directions = len(states[0])
        own = [Weights.listed(weights[number * directions + d], projected) for d in range(directions)]
        if directions == 2:
            h0, c0 = states if len(states) == 2 else (states[0], None)
            results = bidirectional(cell, input, h0, c0, own[0], own[1], lengths, resets)
            return results[: 1 + len(states)]
        first = [state[0] for state in states]
        h0, c0 = first if len(first) == 2 else (first[0], None)
        output, *last = recurrent(cell, input, h0, c0, own[0], lengths, resets, False, None)
        return output, *(state.unsqueeze(0) for state in last[: len(states)])

    return layer


def one_by_one(direction: Direction) -> Layer:
    """A layer whose directions take a call each."""

    def layer(number: int, input: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        directions = len(states[0])
        results = [
            direction(number * directions + d, input, tuple(state[d] for state in states), d == 1)
            for d in range(directions)
        ]
        outputs, *last = zip(*results, strict=True)
        return torch.cat(outputs, -1), *(torch.stack(parts) for parts in last)

    return layer


def run_layers(
    layer: Layer,
    input: Tensor,
    states: tuple[Tensor, ...],
    num_layers: int,
    bidirectional: bool,
    dropout: float,
    training: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All layers on (T, B, I): the output and the last states, each stacked over layers and directions."""
    if num_layers == 1:
        output, *after = layer(0, input, states)
        return output, tuple(after)
    directions = 2 if bidirectional else 1
    output = input
    last: list[tuple[Tensor, ...]] = []
    for number in range(num_layers):
        if number > 0 and dropout > 0.0:
            output = torch.nn.functional.dropout(output, dropout, training)
        own = tuple(state[number * directions : (number + 1) * directions] for state in states)
        output, *after = layer(number, output, own)
        last.append(tuple(after))
    return output, tuple(torch.cat(parts) for parts in zip(*last, strict=True))
