"""The default overload of the op: the plain formula in the shape of its schema."""

from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.dropout_add import reference
from fusewright_kernels.dropout_add.function import keep_mask_of


def dropout_add(input: Tensor, residual: Tensor | None, seed: Tensor | None, dropout_p: float) -> Tensor:
    output = reference.dropout_add(input, residual, keep_mask_of(input, seed, dropout_p), dropout_p)
    # Nothing to do is no reason to return what was given.
    return output.clone() if output is input else output.contiguous()


def attach() -> None:
    library.attach_reference("dropout_add", dropout_add)
