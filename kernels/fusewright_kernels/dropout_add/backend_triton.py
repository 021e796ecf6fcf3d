"""Launcher of the Triton kernel of dropout with a residual addition; shapes and dtypes are in the schema."""

from torch import Tensor

from fusewright_kernels import library, philox
from fusewright_kernels.element_wise import launch_element_wise
from fusewright_kernels.triton_support import INTERPRETED, element_wise_tile
from fusewright_kernels.triton_support import refuse as refuse


def dropout_add(input: Tensor, residual: Tensor | None, seed: Tensor | None, dropout_p: float) -> Tensor:
    output = input.new_empty(input.shape)
    if output.numel() == 0:
        return output
    from fusewright_kernels.dropout_add import triton_kernels as kernels

    launch_element_wise(
        kernels.dropout_add_kernel,
        element_wise_tile(input.shape[-1]),
        {"input": input, "residual": residual, "output": output},
        p_seed=None if dropout_p == 0.0 else seed,
        keep_threshold=philox.keep_threshold(dropout_p),
        keep_scale=1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
    )
    return output


library.attach_triton("dropout_add", dropout_add, interpreted=INTERPRETED)
