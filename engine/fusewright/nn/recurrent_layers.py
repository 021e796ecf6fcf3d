"""Layers and directions of a recurrent network, one fused op each: what modules and torch's own functions share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusewright import functional

# A layer and direction by its number: (input, its states, whether it runs in reverse) -> output and last states.
Layer = Callable[[int, Tensor, tuple[Tensor, ...], bool], tuple[Tensor, ...]]


def fused_layer(
    cell: str,
    weights: Sequence[Sequence[Tensor]],
    projected: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> Layer:
    """The op of ``cell`` with weights as torch's modules name them, for each layer and direction."""
    function = getattr(functional, cell)

    def layer(index: int, input: Tensor, states: tuple[Tensor, ...], reverse: bool) -> tuple[Tensor, ...]:
        own = list(weights[index])
        keywords = {"weight_hr": own.pop()} if projected else {}
        return function(input, *states, *own, lengths=lengths, resets=resets, reverse=reverse, **keywords)

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
    directions = 2 if bidirectional else 1
    output = input
    last: list[tuple[Tensor, ...]] = []
    for number in range(num_layers):
        if number > 0 and dropout > 0.0:
            output = torch.nn.functional.dropout(output, dropout, training)
        outputs = []
        for direction in range(directions):
            index = number * directions + direction
            result, *after = layer(index, output, tuple(state[index] for state in states), direction == 1)
            outputs.append(result)
            last.append(tuple(after))
        output = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    return output, tuple(torch.stack(parts) for parts in zip(*last, strict=True))
