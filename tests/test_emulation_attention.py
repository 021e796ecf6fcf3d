"""Hopper attention on a CPU, in the emulator: against the oracle under many schedules, and with faults put into it."""

import ctypes
import shutil
from pathlib import Path

import emulation_support
import pytest
import torch
from torch import Tensor

from fusewright import functional, testing
from fusewright_kernels import toolchain
from fusewright_kernels.attention import backend_native

NATIVE = Path(__file__).parent / "native"
LAUNCH_FAILURE = 719

pytestmark = emulation_support.needs_emulator


def _inputs(
    dtype: torch.dtype, batch: int, heads: int, key_heads: int, queries: int, keys: int, width: int
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = [(batch, heads, queries, width), (batch, key_heads, keys, width), (batch, key_heads, keys, width)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _run(overload: str, tensors: list[Tensor], left: int, right: int, bottom_right: bool) -> tuple[Tensor, Tensor]:
    function = getattr(torch.ops.fusewright.attention_forward, overload)
    return function(*tensors, *(None,) * 7, 0, tensors[0].shape[3] ** -0.5, 0.0, 0.0, left, right, bottom_right)


def _check(tensors: list[Tensor], left: int = -1, right: int = -1, bottom_right: bool = False) -> tuple[Tensor, Tensor]:
    output, statistics = _run("cuda", tensors, left, right, bottom_right)
    oracle, oracle_statistics = _run("default", [tensor.double() for tensor in tensors], left, right, bottom_right)
    testing.assert_accurate(output, oracle, budget=testing.budget_of(output.dtype))
    lse = [reference + total.log() for reference, total in (statistics, oracle_statistics)]
    torch.testing.assert_close(lse[0].double(), lse[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(output[oracle_statistics[1] == 0], torch.zeros_like(output[oracle_statistics[1] == 0]))
    return output, statistics


LENGTHS = [(128, 128), (1, 1), (1, 300), (129, 127), (200, 513), (385, 96)]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths_and_windows(dtype, width, lengths):
    with emulation_support.device_memory():
        tensors = _inputs(dtype, 1, 2, 1, *lengths, width)
        for seed, (left, right, bottom_right) in enumerate(
            [(-1, -1, False), (-1, 0, False), (-1, 0, True), (40, 7, True), (0, 0, False)]
        ):
            emulation_support.set_seed(seed)
            _check(tensors, left, right, bottom_right)


def test_batches_grouped_heads_and_layouts():
    with emulation_support.device_memory():
        tensors = _inputs(torch.bfloat16, 2, 6, 2, 140, 260, 64)
        contiguous = _check(tensors, right=0)
        length_first = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
        # Rows of a wider tensor, whose other columns are NaN.
        sliced = []
        for tensor in tensors:
            wide = torch.full((*tensor.shape[:3], 96), float("nan"), dtype=tensor.dtype)
            wide[..., 16:80] = tensor
            sliced.append(wide[..., 16:80])
        for layout in (length_first, sliced):
            for actual, expected in zip(_check(layout, right=0), contiguous, strict=True):
                assert testing.bits_equal(actual, expected)


def test_a_hundred_schedules_give_the_same_bits():
    with emulation_support.device_memory():
        tensors = _inputs(torch.bfloat16, 1, 1, 1, 130, 520, 64)
        first = _check(tensors, right=0, bottom_right=True)
        for seed in range(1, 101):
            emulation_support.set_seed(seed)
            for actual, expected in zip(_run("cuda", tensors, -1, 0, True), first, strict=True):
                assert testing.bits_equal(actual, expected), f"schedule {seed}"


@pytest.mark.parametrize("width", [64, 128])
def test_what_is_hidden_reaches_no_result(width):
    """Keys and values behind the diagonal are NaN or infinite, in the tile that it crosses and in others."""
    with emulation_support.device_memory():
        clean = _inputs(torch.bfloat16, 1, 1, 1, 130, 300, width)
        for special in (float("nan"), float("inf"), -float("inf")):
            query, key, value = (tensor.clone() for tensor in clean)
            key[..., 100, :3], value[..., 100, 3:] = special, special
            value[..., 250:, :] = special
            output, statistics = _run("cuda", [query, key, value], -1, 0, False)
            oracle, _ = _run("default", [tensor[..., :100, :].double() for tensor in clean], -1, 0, False)
            testing.assert_accurate(output[..., :100, :], oracle)
            assert statistics[..., :100].isfinite().all()
            if special != special:
                assert output[..., 100:, :].isnan().all()


def test_large_logits_and_infinities_as_in_the_plain_formula():
    with emulation_support.device_memory():
        query, key, value = _inputs(torch.float16, 1, 1, 1, 64, 200, 64)
        _check([query * 30, key * 30, value])
        value[0, 0, 3, 5] = float("inf")
        output, _ = _run("cuda", [query, key, value], -1, -1, False)
        assert output[..., 5].isinf().all()
        assert output[..., :5].isfinite().all()


def test_the_public_function_runs_it():
    with emulation_support.cuda_serves_the_cpu():
        query, key, value = _inputs(torch.bfloat16, 1, 4, 2, 70, 140, 64)
        output, lse = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True, return_lse=True, backend="cuda"
        )
        oracle, oracle_lse = functional.scaled_dot_product_attention(
            query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True, return_lse=True
        )
    testing.assert_accurate(output, oracle)
    torch.testing.assert_close(lse.double(), oracle_lse, rtol=1e-5, atol=1e-5)


def test_calls_that_hoppers_kernel_does_not_take_go_to_triton():
    def overload(backend: str, *tensors: Tensor, mask: Tensor | None = None, scale: float = 1.0, softcap: float = 0.0):
        arguments = (*tensors, mask, *(None,) * 6, 0, scale, softcap, 0.0, -1, -1, False)
        return str(backend_native.forward_overload(backend, arguments))

    def tensors(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        return [torch.zeros(shape, dtype=dtype) for _ in range(3)]

    plain = tensors(1, 2, 9, 64)
    misaligned = [torch.zeros(1 + 2 * 9 * 64, dtype=torch.bfloat16)[1:].view(1, 2, 9, 64)] * 3
    assert overload("cuda", *plain).endswith(".cuda")
    assert overload("triton", *plain).endswith(".triton")
    assert overload("cuda", *(tensor[:, :, :1].expand(1, 2, 9, 64) for tensor in plain)).endswith(".triton")
    for others in (tensors(1, 2, 9, 80), tensors(1, 2, 0, 64), tensors(0, 2, 9, 64), misaligned):
        assert overload("cuda", *others).endswith(".triton")
    assert overload("cuda", *plain, mask=torch.ones(1, 1, 9, 9, dtype=torch.bool)).endswith(".triton")
    assert overload("cuda", *plain, softcap=2.0).endswith(".triton")
    assert overload("cuda", *plain, scale=-1.0).endswith(".triton")
    assert str(backend_native.backward_overload("cuda")).endswith(".triton")


def test_the_kernel_refuses_what_it_cannot_take():
    refused = pytest.raises(RuntimeError, match="attention_forward: CUDA error 1, invalid argument")
    with emulation_support.device_memory(), refused:
        _run("cuda", _inputs(torch.bfloat16, 1, 1, 1, 8, 8, 80), -1, -1, False)


# What is replaced in attention_forward_sm90.cuh, by what, and what the report says: None if there is none and only the
# numbers are wrong, nothing where it depends on the schedule.
MUTATIONS = {
    "keys read before they have landed": ("mbarrier_wait(&shared.key_full[stage], parity_of(n));", "", "a wgmma"),
    "wrong parity": (
        "mbarrier_wait(&shared.key_full[stage], parity_of(n));",
        "mbarrier_wait(&shared.key_full[stage], parity_of(n) ^ 1);",
        "",
    ),
    "stage loaded before it is free": ("mbarrier_wait(&shared.key_empty[stage], parity_of(n) ^ 1);", "", ""),
    "early release": (
        "wgmma_wait<1>(logits);\n      release(&shared.key_empty[stage]);",
        "release(&shared.key_empty[stage]);\n      wgmma_wait<1>(logits);",
        "race with the read by a wgmma",
    ),
    "release by one warp for all": (
        "if (lane == 0) mbarrier_arrive(empty);",
        "if (lane < 4 && threadIdx.x / warp_size % 4 == 0) mbarrier_arrive(empty);",
        "race with the read by a wgmma",
    ),
    "second arrival": (
        "if (lane == 0) mbarrier_arrive(empty);",
        "if (lane == 0) mbarrier_arrive(empty);\n    if (threadIdx.x % warpgroup_size == 0) mbarrier_arrive(empty);",
        "arrival",
    ),
    "arrival of every lane": ("if (lane == 0) mbarrier_arrive(empty);", "mbarrier_arrive(empty);", ""),
    "release forgotten": ("release(&shared.value_empty[value_stage]);", "", "deadlock"),
    "too few bytes expected": (
        "mbarrier_arrive_expect_bytes(full, AttentionTile<Rows, D>::bytes);",
        "mbarrier_arrive_expect_bytes(full, AttentionTile<Rows, D>::bytes - 128);",
        "",
    ),
    "logits read in flight": ("wgmma_wait<1>(logits);", "", ""),
    "sums rescaled in flight": ("wgmma_wait<0>(sums);\n      release", "release", ""),
    "weights packed in flight": (
        "tiles.key(n), first_query);\n      wgmma_wait<0>(sums);",
        "tiles.key(n), first_query);\n      pack<T>(logits, weights);\n      wgmma_wait<0>(sums);",
        "operand registers were written",
    ),
    "no fence before products": ("wgmma_fence();", "", "wgmma.fence is missing"),
    "no barrier after initialisation": ("__syncthreads();", "", "mbarrier"),
    "no fence after initialisation": ("mbarrier_fence_init();", "", "fence.mbarrier_init is missing"),
    "turn not passed": ("turns.pass();\n      wgmma_wait<1>", "wgmma_wait<1>", "deadlock"),
    "rows of the other warpgroup": ("shared.query.at(64 * consumer, k)", "shared.query.at(0, k)", None),
    "values out of order": ("shared.value[stage].at(16 * k, 0)", "shared.value[stage].at(16 * k ^ 16, 0)", None),
}
WRAPPER_MUTATIONS = {
    "wrong swizzle of an operand": ("uint64_t{1} << 62", "uint64_t{2} << 62"),
    "wrong stride of an operand": ("swizzle_rows * slab_row_bytes / 16", "slab_row_bytes / 16"),
}


def _compile(folder: Path, path: str, before: str, after: str) -> ctypes.CDLL:
    root = folder / "csrc"
    for name in ("include", "cuda"):
        shutil.copytree(toolchain.source_root() / name, root / name)
    text = (root / path).read_text()
    assert before in text
    (root / path).write_text(text.replace(before, after))
    includes = [root / "include", root / "cuda" / "attention"]
    return emulation_support.compile_for_emulator(NATIVE / "attention_mutant.cu", folder / "mutant.so", includes)


def _run_mutant(library: ctypes.CDLL, seed: int) -> tuple[int, bool]:
    """The launch's error, and whether the result is that of the formula."""
    query, key, value = _inputs(torch.bfloat16, 1, 1, 1, 128, 700, 64)
    output, statistics = torch.full_like(query, float("nan")), torch.full((2, 1, 128), float("nan"))
    emulation_support.set_seed(seed)
    with (
        emulation_support.buffers(query=query, key=key, value=value, writable=False),
        emulation_support.buffers(output=output, statistics=statistics, written=False),
    ):
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (query, key, value, output, statistics)]
        error = library.attention(*pointers, *(ctypes.c_int64(size) for size in (1, 1, 128, 700)), 0)
    oracle, _ = _run("default", [tensor.double() for tensor in (query, key, value)], -1, -1, False)
    return error, bool(testing.error_in_u(output, oracle) < 2.0)


def test_the_kernel_without_a_fault_passes(tmp_path):
    library = _compile(tmp_path, "cuda/attention/attention_forward_sm90.cuh", "turns.wait();", "turns.wait();")
    for seed in range(1, 11):
        assert _run_mutant(library, seed) == (0, True), emulation_support.report()


@pytest.mark.parametrize("name", MUTATIONS)
def test_faults_in_the_kernel_are_found(tmp_path, name):
    before, after, expected = MUTATIONS[name]
    library = _compile(tmp_path, "cuda/attention/attention_forward_sm90.cuh", before, after)
    for seed in range(1, 6):
        error, right = _run_mutant(library, seed)
        if expected is None:
            assert (error, right) == (0, False)
        elif expected:
            assert error == LAUNCH_FAILURE, f"schedule {seed}"
            assert expected in emulation_support.report()
        else:
            assert error == LAUNCH_FAILURE or not right, f"schedule {seed}"


@pytest.mark.parametrize("name", WRAPPER_MUTATIONS)
def test_wrong_descriptors_are_found(tmp_path, name):
    library = _compile(tmp_path, "include/fusewright/cuda/wgmma.cuh", *WRAPPER_MUTATIONS[name])
    error, right = _run_mutant(library, 1)
    assert error == LAUNCH_FAILURE or not right
