"""Hashing and sorting of LSH attention in CUDA C++, in the emulator: against the formula under many schedules, and with
faults put into them.
"""

import ctypes
import shutil
from pathlib import Path

import emulation_support
import pytest
import torch
from torch import Tensor

from fusewright import functional
from fusewright_kernels import library, toolchain
from fusewright_kernels.lsh_attention import reference

NATIVE = Path(__file__).parent / "native"
LAUNCH_FAILURE = 719
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INFINITY = float("nan"), float("inf")

pytestmark = emulation_support.needs_emulator


def vectors_and_rotations(
    length: int, width: int, columns: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """(2, 2, T, D) in memory as (B, T, H, D), and rotations of two rounds, each factor a part of one tensor."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, length, 2, width, generator=generator).to(dtype).transpose(1, 2)
    drawn = torch.randn(2, width, 2, sum(columns), generator=generator)
    return vectors, list(drawn.split(columns, dim=-1))


@pytest.mark.parametrize("sizes", [(70, 40, (70,)), (5, 3, (1,)), (64, 130, (2, 5))], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hash(dtype: torch.dtype, sizes: tuple[int, int, tuple[int, ...]]) -> None:
    length, width, columns = sizes
    with emulation_support.cuda_serves_the_cpu():
        vectors, rotations = vectors_and_rotations(length, width, columns, dtype)
        padding = torch.rand(2, length) < 0.2
        actual = functional.lsh_hash(vectors, rotations, key_padding_mask=padding, backend="cuda")
    assert torch.equal(actual, reference.hash_vectors(vectors.double(), rotations, padding))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hash_of_ties_and_of_nothing_is_valid(dtype: torch.dtype) -> None:
    with emulation_support.cuda_serves_the_cpu():
        vectors = torch.zeros(1, 1, 5, 6, dtype=dtype)
        vectors[:, :, 2], vectors[:, :, 3], vectors[:, :, 4] = NAN, INFINITY, 1.0
        rotations = torch.randn(1, 6, 3, 5)
        rotations[..., 3] = -rotations[..., 1]
        rotations[..., 4] = rotations[..., 1]
        buckets = functional.lsh_hash(vectors, rotations, backend="cuda")
        assert functional.lsh_hash(vectors[:, :, :0], rotations, backend="cuda").shape == (1, 1, 3, 0)
    assert buckets[..., :3].eq(0).all() and buckets.ge(0).all() and buckets.lt(10).all()
    assert torch.equal(buckets[..., 4:], reference.hash_vectors(vectors[:, :, 4:].double(), [rotations], None))


def test_rotations_of_any_size_and_small_vectors() -> None:
    """Parts of numbers in 16 bits must neither overflow nor vanish."""
    for dtype, size, factor in ((torch.float16, 6e-8, 1e6), (torch.float16, 6e4, 1e-6), (torch.bfloat16, 1e30, 1e-30)):
        with emulation_support.cuda_serves_the_cpu():
            vectors, rotations = vectors_and_rotations(20, 16, (6,), torch.float32)
            vectors = (vectors.clamp(-1.0, 1.0) * size).to(dtype)
            rotations = [rotations[0] * factor]
            actual = functional.lsh_hash(vectors, rotations, backend="cuda")
        assert torch.equal(actual, reference.hash_vectors(vectors.double(), rotations, None))


@pytest.mark.parametrize("n_buckets", [1, 33, 300, 2**31 - 1])
def test_sort_is_stable(n_buckets: int) -> None:
    with emulation_support.cuda_serves_the_cpu():
        buckets = torch.randint(0, n_buckets, (1, 2, 1, 2500))
        buckets[:, :, 0, 1900:2100] = n_buckets - 1
        sort = library.overload("lsh_sort", "cuda")
        order = sort(buckets, n_buckets)
        assert sort(buckets[..., :0], n_buckets).shape == (1, 2, 1, 0)
    assert torch.equal(order, reference.sort_positions(buckets))


def test_schedules_change_no_bit() -> None:
    with emulation_support.cuda_serves_the_cpu():
        vectors, rotations = vectors_and_rotations(70, 24, (40,), torch.bfloat16)
        sort = library.overload("lsh_sort", "cuda")
        buckets = functional.lsh_hash(vectors, rotations, backend="cuda")
        order = sort(buckets, 80)
        for seed in range(1, 9):
            emulation_support.set_seed(seed)
            assert torch.equal(functional.lsh_hash(vectors, rotations, backend="cuda"), buckets)
            assert torch.equal(sort(buckets, 80), order)


def test_opcheck() -> None:
    with emulation_support.cuda_serves_the_cpu():
        vectors, rotations = vectors_and_rotations(10, 8, (4,), torch.float16)
        padding = torch.rand(2, 10) < 0.2
        torch.library.opcheck(library.overload("lsh_hash", "cuda"), (vectors, rotations, padding))
        buckets = functional.lsh_hash(vectors, rotations, key_padding_mask=padding, backend="cuda")
        torch.library.opcheck(library.overload("lsh_sort", "cuda"), (buckets, 9))


# Faults by file of csrc/cuda/lsh_attention: what is replaced, by what where PLANTED, and what the report says of it;
# None where every access is in order and only the result is wrong.
FAULTS: dict[str, tuple[str, str, str, str | None]] = {
    "operands overwritten too early": (
        "hash", "__syncthreads();\n      if (first", "if (!PLANTED) __syncthreads();\n      if (first", "race",
    ),
    "operands read too early": (
        "hash", "__syncthreads();\n      product", "if (!PLANTED) __syncthreads();\n      product", "reads",
    ),
    "the last of equals": ("hash", "other_number < number", "(PLANTED ? true : other_number < number)", None),
    "the parts of a rotation but the first": (
        "hash_product", "part < rotation_parts; ++part", "part < (PLANTED ? 1 : rotation_parts); ++part", None,
    ),
    "counts read too early": (
        "sort", "__syncthreads();\n  for (int bin = threadIdx.x; bin < pass.bins; bin += sort_threads) tile",
        "if (!PLANTED) __syncthreads();\n  for (int bin = threadIdx.x; bin < pass.bins; bin += sort_threads) tile",
        "race",
    ),
    "one slot of sums": ("sort", "slot ^= 1;", "slot ^= PLANTED ? 0 : 1;", "race"),
    "lanes do not meet": (
        "sort", "__syncwarp();\n    if (exists && ", "if (!PLANTED) __syncwarp();\n    if (exists && ", "race",
    ),
    "starts read too early": (
        "sort", "__syncthreads();\n#pragma unroll\n  for (int step",
        "if (!PLANTED) __syncthreads();\n#pragma unroll\n  for (int step", "race",
    ),
    "digits in another order": (
        "sort", "lanes & ((1u << lane) - 1)", "lanes & (PLANTED ? ~((2u << lane) - 1) : (1u << lane) - 1)", None,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def mutant(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Every fault in one library, whose variable ``planted`` holds the number of the one that acts."""
    root = tmp_path_factory.mktemp("mutant")
    shutil.copytree(toolchain.source_root() / "cuda" / "lsh_attention", root / "lsh_attention")
    for number, (file, before, after, _) in enumerate(FAULTS.values(), 1):
        path = root / "lsh_attention" / f"lsh_{file}.cuh"
        text = path.read_text()
        assert text.count(before) == 1, before
        path.write_text(text.replace(before, after.replace("PLANTED", f"(planted == {number})")))
    for name in ("hash_product", "sort"):
        path = root / "lsh_attention" / f"lsh_{name}.cuh"
        path.write_text(path.read_text().replace("#pragma once", '#pragma once\nextern "C" int planted;'))
    return emulation_support.compile_for_emulator(
        NATIVE / "lsh_mutant.cu", root / "mutant.so", [root / "lsh_attention"]
    )


# More counts than the scan takes at a time.
LENGTH, BUCKETS = 8200, 256
VECTORS, WIDTH, COLUMNS = 500, 72, 70


def _run(library_: ctypes.CDLL, number: int, seed: int) -> tuple[str, bool]:
    """What the emulator reports, and whether the results are those of the formula."""
    ctypes.c_int.in_dll(library_, "planted").value = number
    emulation_support.set_seed(seed)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(VECTORS, WIDTH, generator=generator).bfloat16()
    rotations = torch.randn(WIDTH, COLUMNS, generator=generator)
    rotations[:, 1::2] = rotations[:, ::2]
    given = torch.randint(0, BUCKETS, (LENGTH,), generator=generator)
    buckets, order = torch.full((VECTORS,), -1), torch.full((LENGTH,), -1, dtype=torch.int32)
    workspace = torch.zeros(library_.workspace_bytes(LENGTH, BUCKETS), dtype=torch.uint8)
    with (
        emulation_support.buffers(vectors=vectors, rotations=rotations, given=given, writable=False),
        emulation_support.buffers(buckets=buckets, order=order, workspace=workspace, written=False),
    ):
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (vectors, rotations, buckets)]
        errors = [library_.hash(*pointers, VECTORS, WIDTH, COLUMNS)]
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (given, order, workspace)]
        if errors == [0]:
            errors.append(library_.sort(*pointers, LENGTH, BUCKETS))
    assert set(errors) <= {0, LAUNCH_FAILURE}
    if LAUNCH_FAILURE in errors:
        return emulation_support.report(), False
    expected = reference.hash_vectors(vectors[None, None].double(), [rotations[None, :, None]], None)
    right = torch.equal(buckets, expected[0, 0, 0])
    return "", right and torch.equal(order, reference.sort_positions(given[None, None, None])[0, 0, 0])


def test_the_kernels_without_a_fault_pass(mutant: ctypes.CDLL) -> None:
    for seed in range(1, 4):
        assert _run(mutant, 0, seed) == ("", True)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(mutant: ctypes.CDLL, name: str) -> None:
    expected = FAULTS[name][3]
    for seed in (1, 2):
        report, right = _run(mutant, list(FAULTS).index(name) + 1, seed)
        assert not right
        assert report == "" if expected is None else expected in report
