"""Hopper attention over packed sequences on a CPU, in the emulator: the oracle, many schedules, planted faults."""

import ctypes
from collections.abc import Iterator

import emulated_attention as emulated
import emulation_support
import pytest
import torch
from emulated_attention import Fault, Limits, Mutant
from torch import Tensor

from fusewright import functional, testing
from fusewright_kernels.attention import backend_native

pytestmark = emulation_support.needs_emulator

LIMITS = [Limits(), Limits(right=0), Limits(right=0, bottom_right=True), Limits(40, 7, True), Limits(0, 0)]
# Without queries, without keys, longer than a tile, as long as one.
QUERIES, KEYS = (5, 0, 130, 40, 128), (70, 30, 140, 0, 128)
# Rows behind the last sequence.
SPARE = 9


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    with emulation_support.device_memory():
        yield


def _offsets(lengths: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def _inputs(dtype: torch.dtype, width: int) -> list[Tensor]:
    return emulated.inputs(dtype, 1, 2, 1, sum(QUERIES) + SPARE, sum(KEYS) + SPARE, width)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_lengths_and_windows(dtype, width):
    tensors = _inputs(dtype, width)
    for seed, limits in enumerate(LIMITS):
        emulation_support.set_seed(seed)
        types = (torch.int32, torch.int64) if seed % 2 else (torch.int64, torch.int32)
        offsets = (_offsets(QUERIES, types[0]), _offsets(KEYS, types[1]))
        output, _ = emulated.checked_forward(tensors, limits, offsets)
        assert not output[..., -SPARE:, :].any()


@pytest.mark.parametrize("width", [64, 128])
def test_gradients(width):
    offsets = (_offsets(QUERIES), _offsets(KEYS))
    tensors = _inputs(torch.bfloat16, width)
    for seed, limits in enumerate(LIMITS[width // 128 :: 2]):
        emulation_support.set_seed(seed)
        results = emulated.forward("cuda", tensors, limits, offsets)
        grad_output = emulated.gradient_like(results[0])
        gradients = emulated.backward("cuda", grad_output, results, tensors, limits, offsets, ordered=seed % 2 == 0)
        emulated.assert_gradients(gradients, emulated.oracle_gradients(grad_output, tensors, limits, offsets))


def test_ordered_gradients_of_a_sequence_have_the_bits_that_it_has_alone():
    tensors, offsets, limits = _inputs(torch.bfloat16, 64), (_offsets(QUERIES), _offsets(KEYS)), Limits(right=0)

    def gradients(tensors: list[Tensor], offsets: emulated.Offsets, grad_output: Tensor) -> list[Tensor]:
        results = emulated.forward("cuda", tensors, limits, offsets)
        return emulated.backward("cuda", grad_output, results, tensors, limits, offsets, ordered=True)

    grad_output = emulated.gradient_like(tensors[0])
    whole = gradients(tensors, offsets, grad_output)
    with emulation_support.clusters_together(3):
        for seed in range(1, 4):
            emulation_support.set_seed(seed)
            again = gradients(tensors, offsets, grad_output)
            assert all(testing.bits_equal(*pair) for pair in zip(again, whole, strict=True)), f"schedule {seed}"
    rows, keys = (slice(*cut[2:4].tolist()) for cut in offsets)
    alone = gradients(
        [tensors[0][:, :, rows], tensors[1][:, :, keys], tensors[2][:, :, keys]],
        emulated.NOT_PACKED,
        grad_output[:, :, rows],
    )
    cuts = (rows, keys, keys)
    assert all(testing.bits_equal(part[:, :, cut], own) for part, cut, own in zip(whole, cuts, alone, strict=True))


def test_no_sequence_and_only_empty_ones():
    tensors = _inputs(torch.bfloat16, 64)
    for lengths in ((), (0,), (0, 0, 0)):
        output, _ = emulated.checked_forward(tensors, Limits(), (_offsets(lengths), _offsets(lengths)))
        assert not output.any()


def test_a_sequence_has_the_bits_that_it_has_alone():
    tensors = _inputs(torch.bfloat16, 64)
    offsets = (_offsets(QUERIES), _offsets(KEYS))
    limits = Limits(right=0, bottom_right=True)
    whole = emulated.forward("cuda", tensors, limits, offsets)
    for seed in range(1, 11):
        emulation_support.set_seed(seed)
        for actual, expected in zip(emulated.forward("cuda", tensors, limits, offsets), whole, strict=True):
            assert testing.bits_equal(actual, expected), f"schedule {seed}"
    for n in (0, 2, 4):
        rows, keys = (slice(*cut[n : n + 2].tolist()) for cut in offsets)
        alone = emulated.forward(
            "cuda", [tensors[0][:, :, rows], tensors[1][:, :, keys], tensors[2][:, :, keys]], limits
        )
        assert testing.bits_equal(whole[0][:, :, rows], alone[0])
        assert testing.bits_equal(whole[1][..., rows], alone[1])


def test_other_sequences_reach_no_result():
    clean = _inputs(torch.bfloat16, 64)
    offsets = (_offsets(QUERIES), _offsets(KEYS))
    expected, _ = emulated.forward("default", [tensor.double() for tensor in clean], Limits(right=0), offsets)
    query, key, value = (tensor.clone() for tensor in clean)
    first_key, end_key = offsets[1][2:4].tolist()
    key[..., first_key:end_key, :], value[..., first_key:end_key, :] = float("nan"), float("inf")
    output, _ = emulated.forward("cuda", [query, key, value], Limits(right=0), offsets)
    first_query, end_query = offsets[0][2:4].tolist()
    testing.assert_accurate(output[..., :first_query, :], expected[..., :first_query, :])
    testing.assert_accurate(output[..., end_query:, :], expected[..., end_query:, :])


def test_the_public_function_runs_it():
    tensors = [tensor[0].transpose(0, 1) for tensor in _inputs(torch.bfloat16, 64)]
    lengths = (_offsets(QUERIES), _offsets(KEYS), max(QUERIES), max(KEYS))
    with emulation_support.cuda_serves_the_cpu():
        output, lse = functional.varlen_attention(*tensors, *lengths, is_causal=True, return_lse=True, backend="cuda")
        wide = [tensor.double() for tensor in tensors]
        oracle, oracle_lse = functional.varlen_attention(*wide, *lengths, is_causal=True, return_lse=True)
        testing.assert_accurate(output, oracle)
        torch.testing.assert_close(lse.double(), oracle_lse, rtol=1e-5, atol=1e-5)


def test_rows_that_repeat_are_refused():
    tensor, offsets = torch.zeros(1, 2, 9, 64, dtype=torch.bfloat16), _offsets((9,))
    numbers = (*(None,) * 5, offsets, offsets, 0, 1.0, 0.0, 0.0, -1, -1, False)
    assert backend_native.refuse_forward(tensor, tensor, tensor, *numbers) is None
    repeated = tensor[:, :1].expand(1, 2, 9, 64)
    assert "rows repeat" in backend_native.refuse_forward(tensor, repeated, tensor, *numbers)


PACKED = "attention_packed.cuh"
SM90 = "attention_forward_sm90.cuh"
FAULTS = {
    "keys of another sequence": Fault(SM90, "work.key_begin + tiles.key(n)", "tiles.key(n)", None),
    "queries of another sequence": Fault(SM90, "work.query_begin + work.first_query", "work.first_query", None),
    "results behind the sequence": Fault(
        "attention_exact_row.cuh", "if (row.index >= rows.queries) return;", "", "race"
    ),
    "one alignment for all": Fault(PACKED, "packing_.bottom_right ? rows.keys - rows.queries : 0", "0", None),
    "sequences numbered by whole tiles": Fault(
        PACKED, "begin(middle) / Tile + middle <= number", "begin(middle) / Tile <= number", ""
    ),
    "keys behind the sequence": Fault(PACKED, "key_begin(sequence + 1) - first_key", "rows.keys - first_key", None),
    "no barrier before the sequence is read": Fault(SM90, "__syncthreads();", "", ""),
}


@pytest.fixture(scope="module")
def mutant(tmp_path_factory) -> Mutant:
    return Mutant(tmp_path_factory.mktemp("mutant"), "attention_packed_mutant.cu", FAULTS)


@pytest.mark.parametrize("name", [None, *FAULTS])
def test_faults_in_the_kernel_are_found(mutant, name):
    offsets = (_offsets(QUERIES), _offsets(KEYS))
    query, key, value = (tensor[0, 0] for tensor in _inputs(torch.bfloat16, 64))
    query, key, value = query.clone(), key.clone(), value.clone()
    oracle, _ = emulated.forward(
        "default", [tensor[None, None].double() for tensor in (query, key, value)], Limits(-1, 0, True), offsets
    )
    mutant.switch_on(name)
    for seed in range(1, 4):
        output, statistics = torch.full_like(query, float("nan")), torch.full((2, query.shape[0]), float("nan"))
        given = {"query": query, "key": key, "value": value, "query offsets": offsets[0], "key offsets": offsets[1]}
        emulation_support.set_seed(seed)
        with (
            emulation_support.buffers(**given, writable=False),
            emulation_support.buffers(output=output, statistics=statistics, written=False),
        ):
            pointers = [
                ctypes.c_void_p(tensor.data_ptr()) for tensor in (query, key, value, output, statistics, *offsets)
            ]
            sizes = (ctypes.c_int64(size) for size in (len(QUERIES), len(query), len(key)))
            error = mutant.library.attention(*pointers, *sizes)
        right = bool(testing.error_in_u(output[None, None], oracle) < 2.0)
        if name is None:
            assert (error, right) == (0, True), emulation_support.report()
        else:
            emulated.assert_found(FAULTS[name], error, right)
