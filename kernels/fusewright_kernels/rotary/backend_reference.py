"""The default overload of each op: the plain formula in the shape of the op's schema."""

from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.rotary import reference


def rotary_forward(
    input: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    output = library.in_layout_of(input, input.shape)
    return output.copy_(reference.rotate(input, cos, sin, positions, interleaved, inverse))


def rotary_in_place(
    input: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> None:
    input.copy_(reference.rotate(input, cos, sin, positions, interleaved, inverse))


def attach() -> None:
    for op in (rotary_forward, rotary_in_place):
        library.attach_reference(op.__name__, op)
