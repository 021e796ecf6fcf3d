"""Launchers of the Triton kernels of the embedding; shapes and dtypes are in the schemas of ``library``."""

import torch
from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.embedding import tiles
from fusewright_kernels.triton_support import INTERPRETED, LAUNCH_OPTIONS, ceil_div, launching_on
from fusewright_kernels.triton_support import refuse as refuse


def embedding_forward(
    tokens: Tensor, weight: Tensor, table: Tensor | None, rows: Tensor | None, scale: float
) -> Tensor:
    from fusewright_kernels.embedding import triton_kernels as kernels

    output = weight.new_empty((*tokens.shape, weight.shape[1]))
    if output.numel() == 0:
        return output
    weight = weight.contiguous()
    table = None if table is None else table.contiguous()
    columns, chosen = weight.shape[1], tiles.tile(weight.shape[1])
    with launching_on(weight):
        kernels.embedding_forward_kernel[(ceil_div(tokens.numel(), chosen.block_m), ceil_div(columns, chosen.block_n))](
            p_tokens=tokens.contiguous(),
            p_weight=weight,
            p_table=table,
            p_rows=None if rows is None else rows.contiguous(),
            p_output=output,
            M=tokens.numel(),
            N=columns,
            V=weight.shape[0],
            P=0 if table is None else table.shape[0],
            period=tokens.shape[-1] if tokens.ndim else 1,
            scale=scale,
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            num_warps=chosen.num_warps,
            **LAUNCH_OPTIONS,
        )
    return output


def embedding_backward(
    grad_output: Tensor, indices: Tensor, count: int, scale: float, skipped: int, dtype: torch.dtype
) -> Tensor:
    from fusewright_kernels.embedding import triton_kernels as kernels

    columns = grad_output.shape[-1]
    gradient = grad_output.new_empty((count, columns), dtype=dtype)
    if gradient.numel() == 0:
        return gradient
    # The places of each row's index, in their order: sums are the same in every run.
    ordered, order = indices.flatten().sort(stable=True)
    begins = torch.searchsorted(ordered, torch.arange(count + 1, device=indices.device))
    chosen = tiles.tile(columns)
    with launching_on(grad_output):
        kernels.embedding_backward_kernel[(count, ceil_div(columns, chosen.block_n))](
            p_grad=grad_output.contiguous(),
            p_order=order,
            p_begins=begins,
            p_gradient=gradient,
            N=columns,
            scale=scale,
            skipped=skipped,
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            num_warps=chosen.num_warps,
            **LAUNCH_OPTIONS,
        )
    return gradient


for _op in (embedding_forward, embedding_backward):
    library.attach_triton(_op.__name__, _op, interpreted=INTERPRETED)
