"""What ``triton_compile_check`` compiles of LSH attention: every tile, with the features that fill registers.

Imports only where Triton is installed.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fusewright_kernels.lsh_attention import tiles
from fusewright_kernels.lsh_attention import triton_kernels_backward as backward
from fusewright_kernels.lsh_attention import triton_kernels_forward as forward
from fusewright_kernels.lsh_attention import triton_kernels_hash as hashing
from fusewright_kernels.lsh_attention import triton_kernels_rows as rows
from fusewright_kernels.matrix_tiles import SHARED_MEMORY, Tile, block_sizes, compile_options
from fusewright_kernels.triton_compilation import Compilation, source_of

_POINTERS = {
    "p_order": "*i32",
    "p_buckets": "*i64",
    "p_sorted_buckets": "*i32",
    "p_keys": "*i32",
    "p_factors": "*fp32",
    "p_bucket_of": "*i64",
    "p_padding": "*u8",
    "p_chunk_of": "*i32",
    "p_seed": "*i64",
    "p_norms": "*fp32",
    "p_running": "*fp32",
    "p_sums": "*fp32",
    "p_value_sums": "*fp32",
    "p_rows": "*fp32",
    "p_statistics": "*fp32",
    "p_grad_lse": "*fp32",
    "p_rotations": "*fp32",
    "p_source": "*i32",
    "p_counts": "*i32",
    "p_ends": "*i32",
    "p_target": "*i32",
}
_BY_PAIR = ("p_seed", "p_chunk_of", "p_bucket_of")
_OPTIONAL = ("p_sorted_buckets", "p_running", "p_sums", "p_value_sums", *_BY_PAIR)


class Features(NamedTuple):
    """Which optional operands are there; ``name`` is for the report."""

    name: str
    absent: tuple[str, ...] = ()
    causal: bool = False
    wraps: bool = False
    aligned: bool = True

    @property
    def by_pair(self) -> bool:
        return any(name not in self.absent for name in _BY_PAIR)


PLAIN = Features("one round", _OPTIONAL)
CAUSAL = Features("causal", ("p_sorted_buckets", *_BY_PAIR), causal=True)
LIGHT = Features("all but counts and dropout", _BY_PAIR)
EVERYTHING = Features("everything", wraps=True)
UNALIGNED = Features("everything, odd chunks", wraps=True, aligned=False)

_COVERAGE = (
    ("fp32", (64, 64), (CAUSAL, LIGHT, EVERYTHING)),
    ("bf16", (512, 512), (EVERYTHING,)),
    ("bf16", (256, 256), (LIGHT, EVERYTHING)),
    ("bf16", (16, 128), (CAUSAL, LIGHT, EVERYTHING)),
    ("bf16", (64, 64), (PLAIN, CAUSAL, LIGHT, EVERYTHING, UNALIGNED)),
    ("bf16", (16, 16), (LIGHT, EVERYTHING)),
    ("fp16", (64, 64), (CAUSAL,)),
)
# A short chunk has smaller tiles.
_LONG_CHUNK, _SHORT_CHUNK = 256, 16


def _type_of(dtype: str) -> Callable[[str], str]:
    def type_of(name: str) -> str:
        if name.startswith("p_"):
            return _POINTERS.get(name, f"*{dtype}")
        if name in ("scale", "inverse_scale", "keep_scale"):
            return "fp32"
        return "i64" if name in ("keep_threshold", "place_value", "padding_bucket") else "i32"

    return type_of


def _compilation(
    kernel: Any, architecture: int, tile: Tile, dtype: str, what: str, constants: dict[str, Any]
) -> Compilation:
    source = source_of(
        kernel,
        {**block_sizes(tile), **constants},
        _type_of(dtype),
        lambda name: name.startswith("stride_") and not name.startswith(("stride_lse", "stride_rotations")),
    )
    name = kernel.__name__
    return Compilation(
        name, f"{name} {dtype} {what} {tile}", source, architecture, compile_options(tile), SHARED_MEMORY[architecture]
    )


def _attention(architecture: int) -> Iterator[Compilation]:
    for dtype, widths, every_features in _COVERAGE:
        for features in every_features:
            yield from _both_directions(architecture, dtype, widths, features, _LONG_CHUNK)
    yield from _both_directions(architecture, "bf16", (64, 64), EVERYTHING, _SHORT_CHUNK)


def _both_directions(
    architecture: int, dtype: str, widths: tuple[int, int], features: Features, chunk: int
) -> Iterator[Compilation]:
    constants = {
        **dict.fromkeys(features.absent),
        "D": widths[0],
        "DV": widths[1],
        "CAUSAL": features.causal,
        "WRAPS": features.wraps,
        "ALIGNED": features.aligned,
    }
    for kernel, tile_of in (
        (forward.lsh_attention_forward_kernel, tiles.forward_tile),
        (backward.lsh_attention_backward_kernel, tiles.backward_tile),
    ):
        tile = tile_of(4 if dtype == "fp32" else 2, *widths, architecture, features.by_pair, chunk)
        what = f"{widths[0]}x{widths[1]} {features.name}"
        yield _compilation(kernel, architecture, tile, dtype, what, constants)


def compilations(architecture: int) -> Iterator[Compilation]:
    yield from _attention(architecture)
    for dtype in ("fp32", "bf16"):
        for width in (64, 257):
            constants = {"D": width, "DV": width}
            yield _compilation(rows.lsh_attention_rows_kernel, architecture, tiles.ROWS, dtype, f"{width}", constants)
            for first in (True, False):
                constants = {"D": width, "FIRST_DIGIT": first, "stride_rotations_n": 1}
                yield _compilation(hashing.lsh_hash_kernel, architecture, tiles.HASH, dtype, f"{width}", constants)
    sort = tiles.ROWS._replace(num_warps=tiles.SORT_WARPS)
    for bins in (2, 2**tiles.SORT_BITS):
        constants = {"N_BINS": bins, "BLOCK": tiles.SORT_BLOCK}
        for kernel in (hashing.lsh_sort_count_kernel, hashing.lsh_sort_place_kernel):
            yield _compilation(kernel, architecture, sort, "i64", f"{bins} bins", constants)
