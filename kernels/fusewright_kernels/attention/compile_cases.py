"""What ``triton_compile_check`` compiles of the attention kernels: every tile, with the features that fill registers.

Imports only where Triton is installed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from fusewright_kernels.attention import tiles
from fusewright_kernels.attention import triton_kernels_additive as additive
from fusewright_kernels.attention import triton_kernels_backward as backward
from fusewright_kernels.attention import triton_kernels_backward_query as backward_query
from fusewright_kernels.attention import triton_kernels_decode as decode
from fusewright_kernels.attention import triton_kernels_forward as forward
from fusewright_kernels.matrix_tiles import SHARED_MEMORY, Tile, block_sizes, compile_options
from fusewright_kernels.triton_compilation import Compilation, source_of

# Optional operands, which a launch leaves out by passing None.
_OPTIONAL = (
    "p_mask", "p_block_mask", "p_tile_counts", "p_tile_lists", "p_alibi_slopes", "p_sinks", "p_seed",
    "p_cu_seqlens_q", "p_cu_seqlens_k", "p_grad_lse", "p_block_table", "p_split_sums", "p_split_statistics",
)  # fmt: skip
_POINTERS = {
    "p_block_mask": "*u8",
    "p_tile_counts": "*i32",
    "p_tile_lists": "*i32",
    "p_alibi_slopes": "*fp32",
    "p_seed": "*i64",
    "p_cu_seqlens_q": "*i32",
    "p_cu_seqlens_k": "*i32",
    "p_weight": "*fp32",
    "p_grad_weight": "*fp32",
    "p_statistics": "*fp32",
    "p_grad_lse": "*fp32",
    "p_rows": "*fp32",
    "p_lengths": "*i64",
    "p_block_table": "*i64",
    "p_split_sums": "*fp32",
    "p_split_statistics": "*fp32",
}
_FLOATS = ("scale", "key_scale", "softcap", "keep_scale")


class Features(NamedTuple):
    """A combination of optional operands and flags; ``name`` is for the report."""

    name: str
    present: tuple[str, ...] = ()
    softcap: bool = False
    uneven: bool = False


_BY_ELEMENT = ("p_mask", "p_block_mask", "p_seed")

PLAIN = Features("plain")
CAUSAL = Features("causal", uneven=True)
LIGHT = Features(
    "all but masks and dropout", tuple(name for name in _OPTIONAL if name not in _BY_ELEMENT), softcap=True, uneven=True
)
EVERYTHING = Features("everything", _OPTIONAL, softcap=True, uneven=True)
# Of decoding; uneven stands for several queries.
SPLIT = Features("one query in splits", ("p_split_sums", "p_split_statistics"))


class Case(NamedTuple):
    kernel: Any
    tile: Tile
    architecture: int
    dtype: str
    widths: tuple[int, int]
    features: Features
    group: int = 1

    @property
    def description(self) -> str:
        widths = "x".join(map(str, self.widths))
        return f"{self.kernel.__name__} {self.dtype} {widths} {self.features.name} {self.tile}"

    @property
    def wants_warp_groups(self) -> bool:
        """Whether it is one of the cases that must run on Hopper's warp-group matrix instructions."""
        by_pair = any(name in self.features.present for name in _BY_ELEMENT)
        of_tensors = self.architecture == 90 and self.dtype != "fp32" and 64 <= max(self.widths) <= 128
        return of_tensors and not by_pair and self.kernel in [kernel for kernel, _ in _KERNELS]

    def compilation(self) -> Compilation:
        source = source_of(
            self.kernel,
            self._constants(),
            self._type_of,
            lambda name: name.startswith("stride_") and not name.startswith(("stride_mask", "stride_sinks")),
        )
        return Compilation(
            self.kernel.__name__, self.description, source, self.architecture, compile_options(self.tile),
            SHARED_MEMORY[self.architecture], self.wants_warp_groups,
        )  # fmt: skip

    def _constants(self) -> dict[str, Any]:
        absent = [name for name in _OPTIONAL if name not in self.features.present]
        always_masked = "p_mask" in self.features.present or "p_tile_lists" in self.features.present
        return {
            **dict.fromkeys(absent),
            "stride_mask_s": 1,
            "stride_alibi_h": 1,
            "stride_sinks": 1,
            "D": self.widths[0],
            "DV": self.widths[1],
            "GROUP": self.group,
            "PACKED_HEADS": self.group,
            "SOFTCAP": self.features.softcap,
            "ADDITIVE": "p_mask" in self.features.present,
            "BOTTOM_RIGHT": self.features.uneven,
            "ALWAYS_MASKED": always_masked,
            "UNEVEN": self.features.uneven,
            "ONE_QUERY": not self.features.uneven,
            "ONE_KEY": False,
            "SPLIT": tiles.SPLIT_LENGTH,
            **block_sizes(self.tile),
        }

    def _type_of(self, name: str) -> str:
        if name.startswith("p_"):
            return _POINTERS.get(name, f"*{self.dtype}")
        if name in _FLOATS:
            return "fp32"
        return "i64" if name == "keep_threshold" else "i32"


_KERNELS = (
    (forward.attention_forward_kernel, tiles.forward_tile),
    (backward.attention_backward_key_kernel, tiles.backward_key_tile),
    (backward_query.attention_backward_query_kernel, tiles.backward_query_tile),
)

# Every shape of the tables at its widest and, on both sides of a step, narrower, since a narrower one may use more
# registers; padded widths, two that differ, and rows that are cut.
_COVERAGE = (
    ("fp32", (128, 128), (LIGHT, EVERYTHING)),
    ("fp32", (64, 64), (CAUSAL, LIGHT, EVERYTHING)),
    ("fp32", (32, 32), (EVERYTHING,)),
    ("bf16", (512, 512), (LIGHT, EVERYTHING)),
    ("bf16", (256, 256), (LIGHT, EVERYTHING)),
    ("bf16", (192, 128), (CAUSAL,)),
    ("bf16", (256, 16), (LIGHT, EVERYTHING)),
    ("bf16", (16, 256), (LIGHT, EVERYTHING)),
    ("bf16", (128, 128), (CAUSAL, LIGHT, EVERYTHING)),
    ("bf16", (16, 128), (LIGHT, EVERYTHING)),
    ("bf16", (64, 64), (CAUSAL, LIGHT, EVERYTHING)),
    ("bf16", (32, 32), (LIGHT, EVERYTHING)),
    ("bf16", (16, 16), (LIGHT, EVERYTHING)),
    ("fp16", (128, 128), (PLAIN,)),
)
_ADDITIVE_KERNELS = (
    additive.additive_attention_forward_kernel,
    additive.additive_attention_backward_query_kernel,
    additive.additive_attention_backward_key_kernel,
)
_ADDITIVE_COVERAGE = (("fp32", (64, 64)), ("fp32", (257, 257)), ("bf16", (16, 16)), ("bf16", (128, 128)))
_DECODE_COVERAGE = (
    ("fp32", ((16, 16), (64, 64), (128, 128))),
    ("bf16", ((16, 16), (64, 64), (128, 128), (256, 256))),
)


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "fp32" else 2


def _cases(architecture: int) -> Iterator[Case]:
    for dtype, widths, every_features in _COVERAGE:
        for kernel, tile_of in _KERNELS:
            for features in every_features:
                by_pair = any(name in features.present for name in _BY_ELEMENT)
                tile = tile_of(_itemsize(dtype), *widths, architecture, by_pair)
                yield Case(kernel, tile, architecture, dtype, widths, features)
        if EVERYTHING in every_features:
            tile = tiles.backward_query_tile(_itemsize(dtype), *widths, architecture, True)
            kernel = backward_query.attention_backward_mask_kernel
            yield Case(kernel, tile, architecture, dtype, widths, EVERYTHING)
    grouped = tiles.forward_tile(2, 128, 128, architecture, False)
    yield Case(forward.attention_forward_kernel, grouped, architecture, "bf16", (128, 128), CAUSAL, group=4)
    for dtype, widths in _ADDITIVE_COVERAGE:
        for kernel in _ADDITIVE_KERNELS:
            for features in (PLAIN, EVERYTHING):
                yield Case(kernel, tiles.additive_tile(*widths), architecture, dtype, widths, features)
    for dtype, every_widths in _DECODE_COVERAGE:
        for widths in every_widths:
            for features, rows in ((PLAIN, 8), (SPLIT, 8), (EVERYTHING, 8), (EVERYTHING, 64)):
                tile = tiles.decode_tile(_itemsize(dtype), *widths, architecture, rows)
                yield Case(decode.attention_decode_kernel, tile, architecture, dtype, widths, features, group=8)
        yield Case(decode.attention_decode_join_kernel, tiles.JOINED, architecture, dtype, widths, EVERYTHING)
        yield Case(backward.attention_backward_rows_kernel, tiles.ROWS, architecture, dtype, widths, EVERYTHING)


def compilations(architecture: int) -> Iterator[Compilation]:
    for case in _cases(architecture):
        yield case.compilation()
