"""Hopper attention on a CPU, in the emulator: against the oracle under many schedules, and with faults put into it."""

import ctypes

import emulated_attention as emulated
import emulation_support
import pytest
import torch
from emulated_attention import Change, Fault, Limits, Mutant
from torch import Tensor

from fusewright import explain, functional, testing
from fusewright_kernels import dispatch
from fusewright_kernels.attention import backend_native

pytestmark = emulation_support.needs_emulator


LENGTHS = [(128, 128), (1, 1), (1, 300), (129, 127), (200, 513), (385, 96)]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths_and_windows(dtype, width, lengths):
    with emulation_support.device_memory():
        tensors = emulated.inputs(dtype, 1, 2, 1, *lengths, width)
        for seed, limits in enumerate(
            [emulated.NONE, Limits(right=0), Limits(right=0, bottom_right=True), Limits(40, 7, True), Limits(0, 0)]
        ):
            emulation_support.set_seed(seed)
            emulated.checked_forward(tensors, limits)


def test_batches_grouped_heads_and_layouts():
    with emulation_support.device_memory():
        tensors = emulated.inputs(torch.bfloat16, 2, 6, 2, 140, 260, 64)
        contiguous = emulated.checked_forward(tensors, Limits(right=0))
        length_first = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
        # Rows of a wider tensor, whose other columns are NaN.
        sliced = []
        for tensor in tensors:
            wide = torch.full((*tensor.shape[:3], 96), float("nan"), dtype=tensor.dtype)
            wide[..., 16:80] = tensor
            sliced.append(wide[..., 16:80])
        for layout in (length_first, sliced):
            for actual, expected in zip(emulated.checked_forward(layout, Limits(right=0)), contiguous, strict=True):
                assert testing.bits_equal(actual, expected)


def test_a_hundred_schedules_give_the_same_bits():
    with emulation_support.device_memory():
        tensors = emulated.inputs(torch.bfloat16, 1, 1, 1, 130, 390, 64)
        first = emulated.checked_forward(tensors, Limits(right=0, bottom_right=True))
        for seed in range(1, 101):
            emulation_support.set_seed(seed)
            for actual, expected in zip(
                emulated.forward("cuda", tensors, Limits(right=0, bottom_right=True)), first, strict=True
            ):
                assert testing.bits_equal(actual, expected), f"schedule {seed}"


@pytest.mark.parametrize("width", [64, 128])
def test_what_is_hidden_reaches_no_result(width):
    """Keys and values behind the diagonal are NaN or infinite, in the tile that it crosses and in others."""
    with emulation_support.device_memory():
        clean = emulated.inputs(torch.bfloat16, 1, 1, 1, 130, 300, width)
        for special in (float("nan"), float("inf"), -float("inf")):
            query, key, value = (tensor.clone() for tensor in clean)
            key[..., 100, :3], value[..., 100, 3:] = special, special
            value[..., 250:, :] = special
            output, statistics = emulated.forward("cuda", [query, key, value], Limits(right=0))
            oracle, _ = emulated.forward(
                "default", [tensor[..., :100, :].double() for tensor in clean], Limits(right=0)
            )
            testing.assert_accurate(output[..., :100, :], oracle)
            assert statistics[..., :100].isfinite().all()
            if special != special:
                assert output[..., 100:, :].isnan().all()


def test_large_logits_and_infinities_as_in_the_plain_formula():
    with emulation_support.device_memory():
        query, key, value = emulated.inputs(torch.float16, 1, 1, 1, 64, 200, 64)
        emulated.checked_forward([query * 30, key * 30, value])
        value[0, 0, 3, 5] = float("inf")
        output, _ = emulated.forward("cuda", [query, key, value])
        assert output[..., 5].isinf().all()
        assert output[..., :5].isfinite().all()


def test_the_public_function_runs_it():
    with emulation_support.cuda_serves_the_cpu():
        query, key, value = emulated.inputs(torch.bfloat16, 1, 4, 2, 70, 140, 64)
        output, lse = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True, return_lse=True, backend="cuda"
        )
        oracle, oracle_lse = functional.scaled_dot_product_attention(
            query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True, return_lse=True
        )
    testing.assert_accurate(output, oracle)
    torch.testing.assert_close(lse.double(), oracle_lse, rtol=1e-5, atol=1e-5)


def test_calls_that_no_cuda_kernel_takes():
    def reason(*tensors: Tensor, mask: Tensor | None = None, scale: float = 1.0, softcap: float = 0.0) -> str | None:
        return backend_native.refuse_forward(*tensors, mask, *(None,) * 6, 0, scale, softcap, 0.0, -1, -1, False)

    def tensors(*shape: int) -> list[Tensor]:
        return [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(3)]

    plain = tensors(1, 2, 9, 64)
    assert reason(*plain) is None
    assert "multiples of 16" in reason(*[torch.zeros(1 + 2 * 9 * 64, dtype=torch.bfloat16)[1:].view(1, 2, 9, 64)] * 3)
    assert reason(*tensors(1, 2, 9, 80)) is None
    for width in (12, 136):
        assert f"head dimensions are {width} and {width}" in reason(*tensors(1, 2, 9, width))
    for empty in (tensors(1, 2, 0, 64), tensors(0, 2, 9, 64)):
        assert "empty" in reason(*empty)
    assert reason(*plain, mask=torch.ones(1, 1, 9, 9, dtype=torch.bool), softcap=2.0) == "it has no mask and no softcap"
    assert "scale is -1.0" in reason(*plain, scale=-1.0)


def test_what_cuda_refuses_goes_on_unless_it_was_asked_for():
    with emulation_support.cuda_serves_the_cpu():
        query = emulated.inputs(torch.bfloat16, 1, 1, 1, 9, 9, 64)[0].requires_grad_()
        with pytest.raises(dispatch.RefusedBackendError, match=r"'cuda', expected .* attention: it has no softcap"):
            functional.scaled_dot_product_attention(query, query, query, softcap=2.0, backend="cuda")
        rows = explain(functional.scaled_dot_product_attention, query, query, query, softcap=2.0)
        assert [(row.backend, row.serves) for row in rows] == [("cuda", False), ("triton", False), ("cpu", True)]
        assert rows[0].reason == "it has no softcap"
        rows = explain(functional.scaled_dot_product_attention, query, query, query)
        assert [(row.backend, row.serves) for row in rows] == [("cuda", True)]


def test_the_kernel_refuses_what_it_cannot_take():
    refused = pytest.raises(RuntimeError, match="attention_forward: CUDA error 1, invalid argument")
    with emulation_support.device_memory(), refused:
        emulated.forward("cuda", emulated.inputs(torch.bfloat16, 1, 1, 1, 8, 8, 136))


SM90 = "attention_forward_sm90.cuh"
TILE = "attention_tile_sm90.cuh"
FAULTS = {
    "early release": Fault(
        SM90,
        "wgmma_wait<1>(logits);\n      release_stage(&shared.key_empty[stage]);",
        "release_stage(&shared.key_empty[stage]);\n      wgmma_wait<1>(logits);",
        "race with the read by a wgmma",
    ),
    "weights packed in flight": Fault(
        SM90,
        "softmax.add_tile(logits, tiles.key(n), first_query);",
        "softmax.add_tile(logits, tiles.key(n), first_query); pack<T>(logits, weights);",
        "operand registers were written",
    ),
    "keys read before they have landed": Fault(
        SM90, "mbarrier_wait(&shared.key_full[stage], parity_of(n));", "", "a wgmma"
    ),
    "wrong parity": Fault(
        SM90,
        "mbarrier_wait(&shared.key_full[stage], parity_of(n));",
        "mbarrier_wait(&shared.key_full[stage], parity_of(n) ^ 1);",
        "",
    ),
    "stage loaded before it is free": Fault(SM90, "mbarrier_wait(&shared.key_empty[stage], parity_of(n) ^ 1);", "", ""),
    "release by one warp for all": Fault(
        TILE,
        "if (threadIdx.x % warp_size == 0) mbarrier_arrive(empty);",
        "if (threadIdx.x % warpgroup_size < 4) mbarrier_arrive(empty);",
        "race with the read by a wgmma",
    ),
    "second arrival": Fault(
        TILE,
        "if (threadIdx.x % warp_size == 0) mbarrier_arrive(empty);",
        "if (threadIdx.x % warp_size == 0) { mbarrier_arrive(empty); mbarrier_arrive(empty); }",
        "arrival",
    ),
    "arrival of every lane": Fault(
        TILE, "if (threadIdx.x % warp_size == 0) mbarrier_arrive(empty);", "mbarrier_arrive(empty);", ""
    ),
    "release forgotten": Fault(SM90, "release_stage(&shared.value_empty[value_stage]);", "", "deadlock"),
    "too few bytes expected": Fault(
        TILE,
        "mbarrier_arrive_expect_bytes(full, AttentionTile<Rows, D>::bytes);",
        "mbarrier_arrive_expect_bytes(full, AttentionTile<Rows, D>::bytes - 128);",
        "",
    ),
    "logits read in flight": Fault(SM90, "wgmma_wait<1>(logits);", "", ""),
    "sums rescaled in flight": Fault(SM90, "wgmma_wait<0>(sums);", "", ""),
    "no fence before products": Fault(SM90, "wgmma_fence();", "", "wgmma.fence is missing"),
    "no barrier after initialisation": Fault(SM90, "__syncthreads();", "", "mbarrier"),
    "no fence after initialisation": Fault(SM90, "mbarrier_fence_init();", "", "fence.mbarrier_init is missing"),
    "turn not passed": Fault(SM90, "turns.pass();", "", "deadlock"),
    "rows of the other warpgroup": Fault(SM90, "shared.query.at(64 * consumer, k)", "shared.query.at(0, k)", None),
    "values out of order": Fault(
        SM90, "shared.value[stage].at(16 * k, 0)", "shared.value[stage].at(16 * k ^ 16, 0)", None
    ),
}
WRAPPER_MUTATIONS = {
    "wrong swizzle of an operand": ("uint64_t{1} << 62", "uint64_t{2} << 62"),
    "wrong stride of an operand": ("swizzle_rows * slab_row_bytes / 16", "slab_row_bytes / 16"),
}


@pytest.fixture(scope="module")
def mutant(tmp_path_factory) -> Mutant:
    return Mutant(tmp_path_factory.mktemp("mutant"), "attention_mutant.cu", FAULTS)


def _run(library: ctypes.CDLL, seed: int) -> tuple[int, bool]:
    return emulated.run_forward(library, seed, 128, 700)


def test_the_kernel_without_a_fault_passes(mutant):
    mutant.switch_on(None)
    for seed in range(1, 11):
        assert _run(mutant.library, seed) == (0, True), emulation_support.report()


@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_the_kernel_are_found(mutant, name):
    mutant.switch_on(name)
    for seed in range(1, 6):
        emulated.assert_found(FAULTS[name], *_run(mutant.library, seed))


@pytest.mark.parametrize("name", WRAPPER_MUTATIONS)
def test_wrong_descriptors_are_found(tmp_path, name):
    change = Change("include/fusewright/cuda/wgmma.cuh", *WRAPPER_MUTATIONS[name])
    error, right = _run(emulated.compile_mutant(tmp_path, "attention_mutant.cu", [change]), 1)
    assert error == emulated.LAUNCH_FAILURE or not right
