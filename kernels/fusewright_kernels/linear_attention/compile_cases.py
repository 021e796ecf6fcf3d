"""What ``triton_compile_check`` compiles of linear attention. Imports only where Triton is installed."""

from collections.abc import Iterator
from typing import Any

from fusewright_kernels.linear_attention import tiles
from fusewright_kernels.linear_attention import triton_kernels_backward as backward
from fusewright_kernels.linear_attention import triton_kernels_forward as forward
from fusewright_kernels.linear_attention import triton_kernels_state as state
from fusewright_kernels.matrix_tiles import REGISTER_OPTIONS, SHARED_MEMORY
from fusewright_kernels.triton_compilation import Compilation, source_of

_FLOAT32_POINTERS = ("p_states", "p_sums", "p_initial", "p_final", "p_numbers", "p_normalizer")

# Rows that fill a tile, narrower ones and wider ones in several pieces, by dtype.
_WIDTHS = {"fp32": ((64, 64), (16, 40), (130, 70)), "bf16": ((64, 64), (16, 40), (130, 70)), "fp16": ((64, 64),)}


def compilations(architecture: int) -> Iterator[Compilation]:
    for dtype, every_widths in _WIDTHS.items():
        for widths in every_widths:
            for causal in (False, True):
                yield from _of_widths(architecture, dtype, widths, causal)
        yield _compilation(
            state.linear_attention_numbers_kernel, architecture, dtype,
            {"DV": 70, "BLOCK_M": tiles.NUMBER_ROWS, "BLOCK_DV": tiles.NUMBER_COLUMNS}, tiles.SMALL_WARPS,
        )  # fmt: skip
    for flag in (False, True):
        yield _compilation(
            state.linear_attention_scan_kernel, architecture, "fp32",
            {"BACKWARDS": flag, "REPLACE": flag, "BLOCK": tiles.SCAN_BLOCK}, tiles.SMALL_WARPS,
        )  # fmt: skip


def _of_widths(architecture: int, dtype: str, widths: tuple[int, int], causal: bool) -> Iterator[Compilation]:
    """Causal with padding and features, else without."""
    tile = tiles.tile(4 if dtype == "fp32" else 2, *widths, causal)
    sizes: dict[str, Any] = {"D": widths[0], "DV": widths[1], "BLOCK_T": tile.block_t, "BLOCK_D": tile.block_d}
    constants = {**sizes, "BLOCK_DV": tile.block_dv, "ELU": causal}
    if not causal:
        constants["p_padding"] = None
    for absent in ("p_padding", "p_numbers"):
        yield _compilation(
            state.linear_attention_sums_kernel, architecture, dtype, {**constants, absent: None}, tile.num_warps
        )  # fmt: skip
    constants |= {"CAUSAL": causal, "PRECISION": "tf32x3" if dtype == "fp32" else "tf32"}
    for kernel in (
        forward.linear_attention_forward_kernel,
        backward.linear_attention_backward_query_kernel,
        backward.linear_attention_backward_key_kernel,
    ):
        yield _compilation(kernel, architecture, dtype, constants, tile.num_warps)


def _compilation(kernel: Any, architecture: int, dtype: str, constants: dict[str, Any], num_warps: int) -> Compilation:
    def type_of(name: str) -> str:
        if name == "p_padding":
            return "*u8"
        if name.startswith("p_"):
            return "*fp32" if name in _FLOAT32_POINTERS else f"*{dtype}"
        return "fp32" if name == "eps" else "i32"

    source = source_of(kernel, constants, type_of, lambda name: name.startswith("stride_"))
    name = kernel.__name__
    options = {"num_warps": num_warps, "num_stages": 1, **REGISTER_OPTIONS}
    return Compilation(name, f"{name} {dtype} {constants}", source, architecture, options, SHARED_MEMORY[architecture])
