"""Attention's forward below Hopper on a CPU, in the emulator: the oracle, many schedules, planted faults."""

from collections.abc import Iterator

import emulated_attention as emulated
import emulation_support
import pytest
import torch
from emulated_attention import Fault, Limits, Mutant

from fusewright import functional, testing
from fusewright_kernels.attention import backend_native

pytestmark = emulation_support.needs_emulator

LIMITS = [Limits(), Limits(right=0), Limits(right=0, bottom_right=True), Limits(40, 7, True), Limits(0, 0)]


@pytest.fixture(autouse=True)
def ampere() -> Iterator[None]:
    with emulation_support.generation(8), emulation_support.device_memory():
        yield


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_lengths_and_windows(dtype, width):
    for seed, lengths in enumerate([(128, 64), (1, 1), (1, 150), (129, 127), (100, 257), (200, 33)]):
        tensors = emulated.inputs(dtype, 1, 2, 1, *lengths, width)
        for limits in LIMITS[seed % 2 :: 2]:
            emulation_support.set_seed(seed)
            emulated.checked_forward(tensors, limits)


@pytest.mark.parametrize("widths", [(96, 40), (8, 72)], ids=str)
def test_layouts_widths_and_grouped_heads(widths):
    """Rows of wider tensors, whose other columns are NaN, and rows that repeat."""
    query, key, value = emulated.inputs(torch.bfloat16, 2, 4, 2, 70, 90, 112)
    for tensor, width in ((query, widths[0]), (key, widths[0]), (value, widths[1])):
        tensor[..., :8] = tensor[..., 8 + width :] = float("nan")
    sliced = [query[..., 8 : 8 + widths[0]], key[..., 8 : 8 + widths[0]], value[..., 8 : 8 + widths[1]]]
    expected = emulated.checked_forward(sliced, Limits(right=0))
    length_first = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in sliced]
    for actual, first in zip(emulated.checked_forward(length_first, Limits(right=0)), expected, strict=True):
        assert testing.bits_equal(actual, first)
    repeated = [sliced[0], *(tensor[:1].expand(2, -1, -1, -1) for tensor in sliced[1:])]
    emulated.checked_forward(repeated, Limits(right=0))


def test_hopper_runs_it_where_its_own_takes_no_repeated_rows():
    query, key, value = emulated.inputs(torch.bfloat16, 2, 2, 2, 70, 90, 64)
    repeated = [query, key[:1].expand(2, -1, -1, -1), value[:1].expand(2, -1, -1, -1)]
    expected = emulated.checked_forward(repeated)
    with emulation_support.generation(9):
        for actual, first in zip(emulated.checked_forward(repeated), expected, strict=True):
            assert testing.bits_equal(actual, first)


def test_a_hundred_schedules_give_the_same_bits():
    tensors = emulated.inputs(torch.bfloat16, 1, 1, 1, 130, 140, 64)
    limits = Limits(right=0, bottom_right=True)
    first = emulated.checked_forward(tensors, limits)
    for seed in range(1, 101):
        emulation_support.set_seed(seed)
        for actual, expected in zip(emulated.forward("cuda", tensors, limits), first, strict=True):
            assert testing.bits_equal(actual, expected), f"schedule {seed}"


@pytest.mark.parametrize("width", [64, 128])
def test_what_is_hidden_reaches_no_result(width):
    clean = emulated.inputs(torch.bfloat16, 1, 1, 1, 70, 140, width)
    oracle, _ = emulated.forward("default", [tensor[..., :50, :].double() for tensor in clean], Limits(right=0))
    for special in (float("nan"), float("inf"), -float("inf")):
        query, key, value = (tensor.clone() for tensor in clean)
        key[..., 50, :3], value[..., 50, 3:] = special, special
        value[..., 100:, :] = special
        output, statistics = emulated.forward("cuda", [query, key, value], Limits(right=0))
        testing.assert_accurate(output[..., :50, :], oracle)
        assert statistics[..., :50].isfinite().all()


def test_the_public_function_runs_it():
    with emulation_support.cuda_serves_the_cpu():
        query, key, value = emulated.inputs(torch.bfloat16, 1, 4, 2, 70, 140, 64)
        keywords = {"is_causal": True, "enable_gqa": True, "return_lse": True}
        output, lse = functional.scaled_dot_product_attention(query, key, value, **keywords, backend="cuda")
        wide = [tensor.double() for tensor in (query, key, value)]
        oracle, oracle_lse = functional.scaled_dot_product_attention(*wide, **keywords)
    testing.assert_accurate(output, oracle)
    torch.testing.assert_close(lse.double(), oracle_lse, rtol=1e-5, atol=1e-5)


def test_its_backward_is_hoppers():
    tensors = [torch.zeros(1, 2, 9, 64, dtype=torch.bfloat16)] * 3
    numbers = (*(None,) * 7, 0, 1.0, 0.0, 0.0, -1, -1, False)
    repeated = [tensor[:, :1].expand(1, 2, 9, 64) for tensor in tensors]
    assert backend_native.refuse_backward(*tensors, *numbers) is None
    assert backend_native.refuse_forward(*repeated, *numbers) is None
    assert "repeat" in backend_native.refuse_backward(*repeated, *numbers)


SM80 = "attention_forward_sm80.cuh"
FAULTS = {
    "keys read before they have landed": Fault(
        SM80,
        "copy_async_commit();\n    copy_async_wait<0>();\n    __syncthreads();",
        "copy_async_commit(); __syncthreads();",
        "shared memory",
    ),
    "values loaded over those in use": Fault(
        SM80,
        "copy_async_commit();\n    copy_async_wait<0>();\n    __syncthreads();",
        "copy_async_commit(); copy_async_wait<0>();",
        "shared memory",
    ),
    "keys loaded over those in use": Fault(
        SM80,
        "// The values are there, and nobody reads the keys any more.\n    copy_async_wait<0>();\n    __syncthreads();",
        "copy_async_wait<0>();",
        "shared memory",
    ),
    "values read before they have landed": Fault(
        SM80,
        "// The values are there, and nobody reads the keys any more.\n    copy_async_wait<0>();",
        "",
        "shared memory",
    ),
    "rows behind the last": Fault(SM80, "first + row < end && 8 * chunk < width", "true", "out of range"),
    "keys' columns in another order": Fault(SM80, "chunk + lane / 8 % 2", "chunk + 1 - lane / 8 % 2", None),
    "values of other keys": Fault(SM80, "16 * k + lane % 16", "16 * k + (lane % 16 ^ 8)", None),
    "sums not rescaled": Fault(SM80, "softmax[m].rescale(sums[m]);", "", None),
    "queries of the other rows": Fault(SM80, "warp * attention_sm80_row_blocks + m", "warp + m", None),
    "a tile taken for uncut": Fault(
        SM80,
        "softmax[m].add_tile(logits[m], tiles.key(n), first_query_of_warp + m * attention_sm80_block_rows);",
        "softmax[m].add_tile(logits[m], tiles.key(n), first_query + attention_sm80_query_tile);",
        None,
    ),
}


@pytest.fixture(scope="module")
def mutant(tmp_path_factory) -> Mutant:
    return Mutant(tmp_path_factory.mktemp("mutant"), "attention_sm80_mutant.cu", FAULTS)


def test_the_kernel_without_a_fault_passes(mutant):
    mutant.switch_on(None)
    for seed in range(1, 6):
        run = emulated.run_forward(mutant.library, seed, 200, 200, causal=True)
        assert run == (0, True), emulation_support.report()


@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_the_kernel_are_found(mutant, name):
    mutant.switch_on(name)
    for seed in range(1, 4):
        emulated.assert_found(FAULTS[name], *emulated.run_forward(mutant.library, seed, 200, 200, causal=True))
