"""Compiles the Triton kernels ahead of time, with no GPU, and fails on a register spill.

It fails as well where a program needs more registers than the GPU has, and for attention more shared memory, and where
its common 16-bit cases do not run on Hopper's warp-group matrix instructions.

    python -m fusewright_kernels.triton_compile_check

Every kernel is compiled for sm_80 and sm_90 in every tile that its launcher can choose, with all of its optional
operands, since those are what fills the registers, and once without. The wheel's own cuobjdump reads the result.
"""

import functools
import importlib.util
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fusewright_kernels import triton_compilation
from fusewright_kernels.activation import tiles as activation_tiles
from fusewright_kernels.cross_entropy import tiles as cross_entropy_tiles
from fusewright_kernels.embedding import tiles as embedding_tiles
from fusewright_kernels.normalization import tiles as norm_tiles
from fusewright_kernels.rotary import tiles as rotary_tiles
from fusewright_kernels.softmax import tiles as softmax_tiles
from fusewright_kernels.triton_compilation import Compilation
from fusewright_kernels.triton_support import INTERPRETED, LAUNCH_OPTIONS, Tile, element_wise_tile

ARCHITECTURES = (80, 90)
LONGEST_COLUMNS = 131072
REGISTERS = 65536  # of a multiprocessor

# How a call's operands lie in memory, as a launch would specialise for it: rows of adjacent elements, or a view with
# three row dimensions and strided columns.
CONTIGUOUS, STRIDED = "contiguous", "strided"


class Case(NamedTuple):
    """One compilation. ``dtype`` is that of activations; parameters are float32, the widest that mixes with it."""

    kernel: Any
    tile: Tile
    dtype: str
    layout: str
    flags: dict[str, bool]
    absent: tuple[str, ...] = ()


class Usage(NamedTuple):
    registers: int
    stack: int
    local: int
    shared: int  # bytes that a launch asks for
    warp_groups: bool  # whether warp-group matrix instructions occur


_FLOAT32_POINTERS = (
    "p_weight", "p_bias", "p_statistics", "p_weight_partial", "p_bias_partial", "p_partial", "p_losses",
    "p_grad_losses", "p_cells", "p_cos", "p_sin",
)  # fmt: skip
_INT64_POINTERS = ("p_seed", "p_target", "p_positions", "p_tokens", "p_rows", "p_order", "p_begins")
_FLOAT32_NUMBERS = (
    "eps", "weight_offset", "keep_scale", "keep", "uniform", "z_loss", "softcap", "direction", "scale",
)  # fmt: skip

# Optional operands that a launch may leave out, each set compiled once: what remains holds less but is other code.
_ABSENT: dict[str, list[tuple[str, ...]]] = {
    "norm_forward": [("p_residual", "p_weight", "p_bias", "p_seed", "p_new_residual", "p_statistics")],
    "norm_backward_row": [
        ("p_grad_new_residual", "p_weight", "p_seed", "p_grad_residual", "p_weight_partial", "p_bias_partial"),
        ("p_grad_new_residual", "p_seed", "p_grad_input", "p_grad_residual"),
    ],
    "norm_backward_loop": [("p_grad_new_residual", "p_weight", "p_seed", "p_grad_residual")],
    "norm_backward_parameter": [("p_weight_partial",), ("p_bias_partial",)],
    "cross_entropy_forward": [("p_probabilities", "p_weight"), ("p_target",)],
    "cross_entropy_backward": [("p_probabilities", "p_weight", "p_grad_target"), ("p_target",)],
    "rotary_forward": [("p_positions",)],
    "bias_gelu_forward": [("p_bias",)],
    "bias_gelu_backward": [("p_bias", "p_bias_partial")],
    "dropout_add": [("p_residual",), ("p_seed",)],
    "embedding_forward": [("p_table", "p_rows"), ("p_rows",)],
    "lstm_step_forward": [("p_bias_ih", "p_bias_hh", "p_gates", "p_cells")],
    "lstm_step_backward": [("p_grad_output", "p_grad_h"), ("p_grad_output", "p_grad_c")],
    "gru_step_forward": [("p_bias_ih", "p_bias_hh", "p_gates")],
    "rnn_step_forward": [("p_bias_ih", "p_bias_hh")],
}


def cases() -> Iterator[Case]:
    from fusewright_kernels.normalization import triton_kernels_backward, triton_kernels_forward
    from fusewright_kernels.softmax import triton_kernels as softmax_kernels

    center = {"CENTER": True}
    for layout in (CONTIGUOUS, STRIDED):
        unit_columns = layout == CONTIGUOUS
        for module, name, tile_of in (
            (triton_kernels_forward, "norm_forward", norm_tiles.forward_tile),
            (triton_kernels_backward, "norm_backward", norm_tiles.backward_tile),
        ):
            tiles = _every_tile(functools.partial(tile_of, unit_columns=unit_columns))
            yield from _cases_of(module, name, tiles, layout, center)
        yield from _in_every_form(
            triton_kernels_backward.norm_backward_parameter_kernel, norm_tiles.PARAMETER, layout, center
        )
        for last_dim in (True, False) if layout == STRIDED else (True,):
            tiles = _every_tile(functools.partial(softmax_tiles.tile, last_dim=last_dim, unit_columns=unit_columns))
            for name in ("softmax_forward", "softmax_backward"):
                yield from _cases_of(softmax_kernels, name, tiles, layout, {})
        yield from _block_cases(layout)
    column_sum = Tile(1, norm_tiles.COLUMN_SUM_BLOCK_N, norm_tiles.COLUMN_SUM_WARPS, whole_rows=False)
    yield from _in_every_form(triton_kernels_backward.norm_backward_column_sum_kernel, column_sum, CONTIGUOUS, {})


def _block_cases(layout: str) -> Iterator[Case]:
    """What stands between a block's products, and the loss; the tile that holds most in every form."""
    from fusewright_kernels.activation import triton_kernels as activations
    from fusewright_kernels.cross_entropy import triton_kernels as cross_entropy
    from fusewright_kernels.dropout_add.triton_kernels import dropout_add_kernel
    from fusewright_kernels.embedding import triton_kernels as embedding
    from fusewright_kernels.recurrent import triton_kernels as recurrent
    from fusewright_kernels.rotary.triton_kernels import rotary_forward_kernel

    widest = LONGEST_COLUMNS
    loss_tile = cross_entropy_tiles.tile(widest, last_dim=layout == CONTIGUOUS)
    yield from _in_every_form(
        cross_entropy.cross_entropy_forward_kernel, loss_tile, layout, {"CAPPED": True, "SPREAD": True}
    )
    yield from _in_every_form(cross_entropy.cross_entropy_backward_kernel, loss_tile, layout, {"CAPPED": True})
    for pairs in (16, widest):
        flags = {"INTERLEAVED": layout == CONTIGUOUS, "COPY_REST": True}
        yield from _in_every_form(rotary_forward_kernel, rotary_tiles.tile(pairs), layout, flags)
    tile = element_wise_tile(widest)
    for kernel in (activations.swiglu_forward_kernel, activations.swiglu_backward_kernel, dropout_add_kernel):
        yield from _in_every_form(kernel, tile, layout, {})
    if layout == CONTIGUOUS:
        for kernel in (embedding.embedding_forward_kernel, embedding.embedding_backward_kernel):
            yield from _in_every_form(kernel, embedding_tiles.tile(widest), layout, {})
        for cell, forms in (("lstm", [{}]), ("gru", [{}]), ("rnn", [{"RELU": False}, {"RELU": True}])):
            for direction, flags in itertools.product(("forward", "backward"), forms):
                yield from _in_every_form(getattr(recurrent, f"{cell}_step_{direction}_kernel"), tile, layout, flags)
    for flags in ({"TANH": True}, {"TANH": False}):
        yield from _in_every_form(activations.bias_gelu_forward_kernel, tile, layout, flags)
        yield from _in_every_form(activations.bias_gelu_backward_kernel, activation_tiles.BIAS_GRADIENT, layout, flags)


def _every_tile(tile_of: Callable[[int], Tile]) -> list[Tile]:
    """Every tile that rows of up to LONGEST_COLUMNS columns can get, each once, the loop's last."""
    return list(dict.fromkeys(tile_of(1 << exponent) for exponent in range(LONGEST_COLUMNS.bit_length())))


def _cases_of(module: Any, name: str, tiles: list[Tile], layout: str, flags: dict[str, bool]) -> Iterator[Case]:
    """Every tile in bf16; the two that hold most, the longest whole rows and the loop, in every form."""
    row_kernel, loop_kernel = getattr(module, f"{name}_row_kernel"), getattr(module, f"{name}_loop_kernel")
    *whole_rows, loop = tiles
    for tile in whole_rows[:-1]:
        yield Case(row_kernel, tile, "bf16", layout, flags)
    yield from _in_every_form(row_kernel, whole_rows[-1], layout, flags)
    yield from _in_every_form(loop_kernel, loop, layout, flags)


def _in_every_form(kernel: Any, tile: Tile, layout: str, flags: dict[str, bool]) -> Iterator[Case]:
    """In every dtype with all operands, and without the optional ones."""
    for dtype in ("bf16", "fp16", "fp32"):
        yield Case(kernel, tile, dtype, layout, flags)
    for prefix, sets in _ABSENT.items():
        if layout == CONTIGUOUS and kernel.__name__.startswith(prefix):
            for absent in sets:
                yield Case(kernel, tile, "bf16", layout, dict.fromkeys(flags, False), absent)


def source_of(case: Case) -> Any:
    """The kernel with its arguments typed and specialised as a launch would."""
    constants: dict[str, Any] = {
        "BLOCK_M": case.tile.block_m,
        "BLOCK_N": case.tile.block_n,
        "ROW_DIMS": 1 if case.layout == CONTIGUOUS else 3,
        "GROUP": norm_tiles.COLUMN_SUM_GROUP,
        "BLOCK_P": norm_tiles.COLUMN_SUM_BLOCK_P,
        **case.flags,
        **dict.fromkeys(case.absent),
    }
    contiguous = case.layout == CONTIGUOUS
    unit_strides = [name for name in case.kernel.arg_names if contiguous and _is_unit_stride(name)]
    return triton_compilation.source_of(
        case.kernel,
        {**dict.fromkeys(unit_strides, 1), **constants},
        lambda name: _argument_type(name, case.dtype),
        lambda name: name == "N" or (contiguous and name.startswith("stride_")),
    )


def _is_unit_stride(name: str) -> bool:
    return name.startswith("stride_") and (name.endswith("_n") or name in ("stride_weight", "stride_bias"))


def _argument_type(name: str, dtype: str) -> str:
    if name in _INT64_POINTERS:
        return "*i64"
    if name.startswith("p_"):
        return "*fp32" if name in _FLOAT32_POINTERS else f"*{dtype}"
    if name in _FLOAT32_NUMBERS:
        return "fp32"
    return "i64" if name in ("keep_threshold", "ignore_index") else "i32"


def compilations() -> Iterator[Compilation]:
    from fusewright_kernels.attention import compile_cases as attention
    from fusewright_kernels.linear_attention import compile_cases as linear_attention
    from fusewright_kernels.lsh_attention import compile_cases as lsh_attention

    # The slow ones first, so that at the end no process waits long for another.
    for architecture in ARCHITECTURES:
        for op in (attention, lsh_attention, linear_attention):
            yield from op.compilations(architecture)
    for architecture in ARCHITECTURES:
        for case in cases():
            name, options = case.kernel.__name__, {"num_warps": case.tile.num_warps}
            description = f"{name} {case.tile} {case.dtype} {case.layout}"
            yield Compilation(name, description, source_of(case), architecture, options)


def usage_of(compilation: Compilation) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(
        compilation.source,
        target=GPUTarget("cuda", compilation.architecture, 32),
        options={**compilation.options, **LAUNCH_OPTIONS},
    )
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def dump(what: str) -> str:
        return subprocess.run([str(cuobjdump), what, file.name], check=True, capture_output=True, text=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = dump("--dump-resource-usage")
        warp_groups = compilation.wants_warp_groups and "HGMMA" in dump("--dump-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump's report names no registers: {report}")
    registers, stack, local = map(int, found.groups())
    return Usage(registers, stack, local, compiled.metadata.shared, warp_groups)


def faults_of(compilation: Compilation, usage: Usage) -> Iterator[str]:
    if usage.stack or usage.local:
        yield "SPILL"
    # Handed out to a thread by eights, and a launch that asks for more than there are fails.
    if -(-usage.registers // 8) * 8 * 32 * compilation.options["num_warps"] > REGISTERS:
        yield "REGISTERS"
    if compilation.shared_limit is not None and usage.shared > compilation.shared_limit:
        yield "SHARED MEMORY"
    if compilation.wants_warp_groups and not usage.warp_groups:
        yield "NO WARP GROUPS"


@functools.cache
def _every_compilation() -> list[Compilation]:
    return list(compilations())


def _usage_of_number(number: int) -> Usage:
    """Of one of ``_every_compilation``: sources hold modules and cannot be sent to a process."""
    return usage_of(_every_compilation()[number])


def _usages() -> Iterator[tuple[Compilation, Usage]]:
    """Every compilation, in order, by as many processes as there are cores. They are new ones: torch has threads."""
    every = _every_compilation()
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        yield from zip(every, pool.imap(_usage_of_number, range(len(every))), strict=True)


def main() -> int:
    if INTERPRETED:
        print("TRITON_INTERPRET is set: kernels are plain Python and cannot be compiled. Unset it.", file=sys.stderr)
        return 2
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: there is nothing to compile with.", file=sys.stderr)
        return 2
    started = time.perf_counter()
    counts: Counter[str] = Counter()
    most_registers: Counter[str] = Counter()
    spills = others = on_warp_groups = 0
    for compilation, usage in _usages():
        name = compilation.kernel_name
        counts[name] += 1
        most_registers[name] = max(most_registers[name], usage.registers)
        on_warp_groups += usage.warp_groups
        for fault in faults_of(compilation, usage):
            spills += fault == "SPILL"
            others += fault != "SPILL"
            print(f"{fault} sm_{compilation.architecture} {compilation.description} {usage}", flush=True)
    print(f"{'kernel':34} {'compilations':>12} {'most registers':>14}")
    for name, count in counts.items():
        print(f"{name:34} {count:12} {most_registers[name]:14}")
    seconds = time.perf_counter() - started
    print(f"{counts.total()} compilations for sm_80 and sm_90 in {seconds:.0f} s, {spills} with a spill")
    print(f"{on_warp_groups} attention kernels on warp-group matrix instructions, {others} other faults")
    return 1 if spills or others else 0


if __name__ == "__main__":
    sys.exit(main())
