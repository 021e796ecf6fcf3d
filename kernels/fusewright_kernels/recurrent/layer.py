"""The parameters of a recurrent layer, and a layer of two directions as two of one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """What one direction of a layer learns, sizes as in the op's schema."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    weight_hr: Tensor | None = None

    @classmethod
    def listed(cls, tensors: Sequence[Tensor], projected: bool = False) -> "Weights":
        """Of a list in the order of torch's modules, which leaves out what a layer has not."""
        *others, last = tensors
        return cls(*others, **{"weight_hr": last}) if projected else cls(*tensors)


COUNT = len(Weights._fields)


def inputs_of(input: Tensor, h0: Tensor, c0: Tensor | None, *arguments: Any) -> list[tuple[Any, ...]]:
    """The inputs of ``bidirectional_forward`` but the last as those of ``recurrent_forward``, for each direction."""
    others = arguments[2 * COUNT :]
    return [
        (input, h0[d], None if c0 is None else c0[d], *arguments[d * COUNT : (d + 1) * COUNT], *others, d == 1)
        for d in range(2)
    ]


def backward_inputs_of(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    *arguments: Any,
) -> list[tuple[Any, ...]]:
    """The inputs of ``bidirectional_backward`` as those of ``recurrent_backward``, for each direction."""
    *inputs, need_input, need_states, need_weights = arguments

    def half(tensor: Tensor | None, d: int) -> Tensor | None:
        return None if tensor is None else tensor.chunk(2, -1)[d]

    def part(tensor: Tensor | None, d: int) -> Tensor | None:
        return tensor if tensor is None or tensor.ndim == 1 else tensor[d]

    return [
        (
            half(grad_output, d), part(grad_h_n, d), part(grad_c_n, d), half(output, d), part(gates, d), part(cells, d),
            *own, need_input, need_states, need_weights,
        )
        for d, own in enumerate(inputs_of(*inputs))
    ]  # fmt: skip


def joined(forward: Sequence[Tensor], reverse: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of ``bidirectional_forward`` from those of ``recurrent_forward`` for each direction."""
    return torch.cat((forward[0], reverse[0]), -1), *map(_stacked, forward[1:], reverse[1:])


def joined_gradients(forward: Sequence[Tensor], reverse: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of ``bidirectional_backward`` from those of ``recurrent_backward`` for each direction."""
    return forward[0] + reverse[0], *map(_stacked, forward[1:3], reverse[1:3]), *forward[3:], *reverse[3:]


def _stacked(forward: Tensor, reverse: Tensor) -> Tensor:
    """Both, or nothing where an op returned nothing, which has one dimension."""
    return forward if forward.ndim == 1 else torch.stack((forward, reverse))
