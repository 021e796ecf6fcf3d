"""What the launchers of the Triton attention kernels share."""

from torch import Tensor

from fusewright_kernels.attention import tiles
from fusewright_kernels.triton_support import LAUNCH_OPTIONS, ceil_div, strides

# Farther than any two positions lie apart, and twice it still fits 32 bits.
_NO_LIMIT = 2**30


def limit(window: int) -> int:
    return _NO_LIMIT if window < 0 else min(window, _NO_LIMIT)


def alibi_strides(alibi_slopes: Tensor | None, query: Tensor) -> dict[str, int]:
    if alibi_slopes is None:
        return {"stride_alibi_b": 0, "stride_alibi_h": 0}
    return strides("alibi", alibi_slopes.expand(query.shape[0], -1), "bh")


def row_numbers(
    grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, statistics: Tensor, natural: bool
) -> Tensor:
    """float32 (3, B, H, T): the logits' reference in the kernels' unit, 1 / sum, delta."""
    from fusewright_kernels.attention import triton_kernels_backward as kernels

    _, heads, length, width = output.shape
    rows = statistics.new_empty((3, *statistics.shape[1:]))
    output = output if output.stride(3) == 1 else output.contiguous()
    n_rows = rows[0].numel()
    kernels.attention_backward_rows_kernel[(ceil_div(n_rows, tiles.ROWS.block_m),)](
        p_grad_output=grad_output,
        p_output=output,
        p_statistics=statistics.contiguous(),
        p_grad_lse=grad_lse,
        p_rows=rows,
        H=heads,
        T=length,
        n_rows=n_rows,
        **strides("grad", grad_output, "bht"),
        **strides("output", output, "bht"),
        **(dict.fromkeys(("stride_lse_b", "stride_lse_h", "stride_lse_t"), 0) if grad_lse is None
           else strides("lse", grad_lse, "bht")),
        DV=width,
        ADDITIVE=natural,
        BLOCK_M=tiles.ROWS.block_m,
        BLOCK_DV=tiles.ROWS.block_dv,
        num_warps=tiles.ROWS.num_warps,
        **LAUNCH_OPTIONS,
    )  # fmt: skip
    return rows
