"""Backward of Hopper attention on a CPU, in the emulator: against the oracle, under many schedules, and with faults."""

import ctypes

import emulated_attention as emulated
import emulation_support
import pytest
import torch
from emulated_attention import Fault, Limits, Mutant
from torch import Tensor

from fusewright import functional, testing

pytestmark = emulation_support.needs_emulator

LENGTHS = [(128, 128), (1, 1), (1, 300), (129, 127), (200, 260), (270, 96)]
LIMITS = [Limits(), Limits(right=0), Limits(right=0, bottom_right=True), Limits(40, 7, True), Limits(0, 0)]


def _check(tensors: list[Tensor], limits: Limits, *, ordered: bool) -> None:
    results = emulated.forward("cuda", tensors, limits)
    grad_output = emulated.gradient_like(results[0])
    gradients = emulated.backward("cuda", grad_output, results, tensors, limits, ordered=ordered)
    emulated.assert_gradients(gradients, emulated.oracle_gradients(grad_output, tensors, limits))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_lengths_and_windows(dtype, width):
    with emulation_support.device_memory():
        for seed, lengths in enumerate(LENGTHS):
            tensors = emulated.inputs(dtype, 1, 1, 1, *lengths, width)
            for number, limits in enumerate(LIMITS[seed % 2 :: 2]):
                emulation_support.set_seed(seed)
                _check(tensors, limits, ordered=number % 2 == 0)


def test_batches_grouped_heads_and_layouts():
    with emulation_support.device_memory():
        limits = Limits(right=0, bottom_right=True)
        tensors = emulated.inputs(torch.bfloat16, 2, 2, 1, 140, 150, 64)
        results = emulated.forward("cuda", tensors, limits)
        grad_output = emulated.gradient_like(results[0])
        grad_lse = torch.randn(2, 2, 140)
        expected = emulated.oracle_gradients(grad_output, tensors, limits, grad_lse=grad_lse)

        def length_first(tensor: Tensor) -> Tensor:
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)

        def misaligned(tensor: Tensor) -> Tensor:
            return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)

        for layout in (lambda tensor: tensor, length_first):
            laid_out = [layout(tensor) for tensor in tensors]
            for grad in (layout(grad_output), misaligned(grad_output), grad_output.mT.contiguous().mT):
                actual = emulated.backward("cuda", grad, results, laid_out, limits, grad_lse=grad_lse)
                emulated.assert_gradients(actual, expected)
                assert [part.stride() for part in actual] == [part.stride() for part in laid_out]


@pytest.mark.parametrize("widths", [(80, 80), (96, 40), (8, 128), (24, 64)], ids=str)
def test_head_dimensions(widths):
    with emulation_support.device_memory():
        limits = Limits(right=0)
        query, key, value = emulated.inputs(torch.bfloat16, 1, 2, 1, 100, 150, 128)
        tensors = [query[..., : widths[0]].contiguous(), key[..., : widths[0]], value[..., : widths[1]].contiguous()]
        results = emulated.forward("cuda", tensors, limits)
        oracle, _ = emulated.forward("default", [tensor.double() for tensor in tensors], limits)
        testing.assert_accurate(results[0], oracle)
        grad_output = emulated.gradient_like(results[0])
        actual = emulated.backward("cuda", grad_output, results, tensors, limits)
        emulated.assert_gradients(actual, emulated.oracle_gradients(grad_output, tensors, limits))


def test_an_expanded_gradient():
    with emulation_support.device_memory():
        tensors = emulated.inputs(torch.bfloat16, 1, 2, 1, 70, 90, 64)
        results = emulated.forward("cuda", tensors)
        grad_output = torch.ones((), dtype=torch.bfloat16).expand(results[0].shape)
        actual = emulated.backward("cuda", grad_output, results, tensors)
        emulated.assert_gradients(actual, emulated.oracle_gradients(grad_output, tensors))


@pytest.mark.parametrize("width", [64, 128])
def test_what_is_hidden_reaches_no_gradient(width):
    """Rows of every operand are special, in the tile that the diagonal crosses: only those that meet them see that."""
    length = 110
    with emulation_support.device_memory():
        limits = Limits(right=0)
        clean = emulated.inputs(torch.bfloat16, 1, 1, 1, length, length, width)
        clean_grad = emulated.gradient_like(clean[0])
        for special in (float("nan"), float("inf")):
            query, key, value = (tensor.clone() for tensor in clean)
            grad = clean_grad.clone()
            # Query 5 sees keys 0 to 5; keys 90 and 95 are seen by queries 90 and on.
            query[..., 5, 1], grad[..., 5, 2] = special, special
            key[..., 90, :3], value[..., 95, 3:] = special, special
            tensors = [query, key, value]
            actual = emulated.backward("cuda", grad, emulated.forward("cuda", tensors, limits), tensors, limits)
            query_rows = [row for row in range(90) if row != 5]
            only_clean = emulated.oracle_gradients(
                clean_grad[..., :90, :], [tensor[..., :90, :] for tensor in clean], limits
            )
            testing.assert_accurate(
                actual[0][..., query_rows, :],
                only_clean.gradients[0][..., query_rows, :],
                "gradient",
                magnitude=only_clean.magnitudes[0],
            )
            assert not actual[0][..., 5, :].isfinite().all()


def test_hidden_queries_reach_no_gradient_of_keys():
    with emulation_support.device_memory():
        limits = Limits(right=0)
        clean = emulated.inputs(torch.bfloat16, 1, 2, 1, 100, 100, 64)
        grad = emulated.gradient_like(clean[0])
        expected = emulated.oracle_gradients(grad, clean, limits)
        for special in (float("nan"), float("-inf")):
            query, special_grad = clean[0].clone(), grad.clone()
            query[:, 1, 5, 1], special_grad[:, 1, 6, 2] = special, special
            tensors = [query, *clean[1:]]
            actual = emulated.backward("cuda", special_grad, emulated.forward("cuda", tensors, limits), tensors, limits)
            # Keys behind those two queries.
            for index in (1, 2):
                testing.assert_accurate(
                    actual[index][..., 7:, :],
                    expected.gradients[index][..., 7:, :],
                    "gradient",
                    magnitude=expected.magnitudes[index],
                )
                assert not actual[index][..., :6, :].isfinite().all(-1).any()


def test_gradients_repeat_over_a_hundred_schedules():
    """Those of queries where that is asked for, while several blocks run at the same time."""
    with emulation_support.device_memory(), emulation_support.clusters_together(2):
        tensors = emulated.inputs(torch.bfloat16, 1, 1, 1, 20, 132, 64)
        results = emulated.forward("cuda", tensors, Limits(right=0, bottom_right=True))
        grad_output = emulated.gradient_like(results[0])
        arguments = ("cuda", grad_output, results, tensors, Limits(right=0, bottom_right=True))
        first = emulated.backward(*arguments, ordered=True)
        for seed in range(1, 101):
            emulation_support.set_seed(seed)
            again = emulated.backward(*arguments, ordered=seed % 4 != 0)
            for actual, expected in zip(again[seed % 4 == 0 :], first[seed % 4 == 0 :], strict=True):
                assert testing.bits_equal(actual, expected), f"schedule {seed}"


def test_the_public_function_and_torchs_deterministic_mode():
    with emulation_support.cuda_serves_the_cpu():
        tensors = [tensor.requires_grad_() for tensor in emulated.inputs(torch.bfloat16, 1, 4, 2, 70, 140, 64)]
        gradients = []
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            try:
                output = functional.scaled_dot_product_attention(
                    *tensors, is_causal=True, enable_gqa=True, backend="cuda"
                )
                gradients.append(torch.autograd.grad(output, tensors, emulated.gradient_like(output)))
            finally:
                torch.use_deterministic_algorithms(False)
        expected = emulated.oracle_gradients(
            emulated.gradient_like(tensors[0]), [tensor.detach() for tensor in tensors], Limits(right=0)
        )
        for actual in gradients:
            emulated.assert_gradients(actual, expected)


# What each fault leaves wrong if its report is this: the bits, from schedule to schedule.
ORDER = "order"
SM90 = "attention_backward_sm90.cuh"
LOAD = "attention_backward_load_sm90.cuh"
FAULTS = {
    "stage released early": Fault(
        SM90,
        "wgmma_wait<0>(value_sums);\n    wgmma_wait<0>(key_sums);\n    release_stage(&shared.empty[stage]);",
        "release_stage(&shared.empty[stage]);\n    wgmma_wait<0>(value_sums);\n    wgmma_wait<0>(key_sums);",
        "race",
    ),
    "slopes without a fence": Fault(
        SM90,
        "fence_async_proxy();\n    named_barrier_sync(attention_slopes_barrier, attention_consumers * warpgroup_size);",
        "named_barrier_sync(attention_slopes_barrier, attention_consumers * warpgroup_size);",
        "fence.proxy.async",
    ),
    "sums without a fence": Fault(
        SM90,
        "fence_async_proxy();\n"
        "    named_barrier_arrive(attention_sums_full_barrier + consumer, attention_sums_threads);",
        "named_barrier_arrive(attention_sums_full_barrier + consumer, attention_sums_threads);",
        "fence.proxy.async",
    ),
    "queries read before they have landed": Fault(
        SM90, "mbarrier_wait(&shared.query_full[stage], parity_of(n));", "", ""
    ),
    "gradients read before they have landed": Fault(
        SM90, "mbarrier_wait(&shared.grad_full[stage], parity_of(n));", "", ""
    ),
    "keys read before they have landed": Fault(SM90, "mbarrier_wait(&shared.keys_full, 0);", "", ""),
    "stage loaded before it is free": Fault(
        LOAD,
        "mbarrier_wait(&shared.empty[stage], parity_of(n) ^ 1);",
        "",
        "",
    ),
    "bytes that are not expected": Fault(LOAD, "QueryTile::bytes + sizeof(numbers)", "QueryTile::bytes", ""),
    "slopes read before the other warpgroup's are there": Fault(
        SM90,
        "named_barrier_sync(attention_slopes_barrier, attention_consumers * warpgroup_size);",
        "",
        "a wgmma reads",
    ),
    "one buffer for slopes": Fault(SM90, "n % 2", "0", "race"),
    "weights read in flight": Fault(SM90, "wgmma_wait<1>(weights);", "", ""),
    "slopes read in flight": Fault(SM90, "wgmma_wait<0>(slopes);", "", ""),
    "sums of queries read in flight": Fault(SM90, "wgmma_wait<1>(query_sums);", "", ""),
    "stage never released": Fault(SM90, "release_stage(&shared.empty[stage]);", "", "deadlock"),
    "sums overwritten while they are added": Fault(LOAD, "if (writes && n > 0) bulk_wait_read<0>();", "", "race"),
    "the block ends before its sums are read": Fault(
        LOAD, "if (writes) bulk_wait_read<0>();", "", "exits without waiting"
    ),
    "sums never free": Fault(
        LOAD,
        "named_barrier_arrive(attention_sums_empty_barrier + consumer, attention_sums_threads);",
        "",
        "deadlock",
    ),
    "sums written without asking": Fault(
        SM90,
        "named_barrier_sync(attention_sums_empty_barrier + consumer, attention_sums_threads);",
        "",
        "",
    ),
    "pairs that do not take part": Fault(
        SM90, "if (cut) hide_pairs(weights, rows, key, first_query, column);", "", None
    ),
    "rows of the other warpgroup": Fault(SM90, "by_rows ? 64 * consumer : 0", "0", None),
    "slopes stored to other keys": Fault(
        "attention_backward_slopes.cuh",
        "lane / 8 % 2",
        "(lane / 8 % 2 ^ 1)",
        None,
    ),
    "rows behind the last": Fault("attention_backward_rows.cuh", "query < rows.queries", "true", "out of range"),
    "turns not waited for": Fault(
        LOAD,
        "wait_for_turn(turns, work.first_key / attention_key_tile - first_key_tile);",
        "",
        ORDER,
    ),
    "turns that end before their additions": Fault(LOAD, "bulk_wait<0>();", "bulk_wait_read<0>();", ORDER),
}


@pytest.fixture(scope="module")
def mutant(tmp_path_factory) -> Mutant:
    mutant = Mutant(tmp_path_factory.mktemp("mutant"), "attention_backward_mutant.cu", FAULTS)
    mutant.library.attention_backward_workspace.restype = ctypes.c_int64
    return mutant


def _run(mutant: Mutant, seed: int, ordered: bool = False) -> tuple[int, list[Tensor], Tensor]:
    """The launch's error, gradients and workspace: causal, or ordered and not causal."""
    queries, keys = 400, 300 if ordered else 200
    tensors = emulated.inputs(torch.bfloat16, 1, 1, 1, queries, keys, 64)
    output, statistics = emulated.forward("default", tensors, Limits(right=0))
    given = [*tensors, output, emulated.gradient_like(output), statistics]
    results = [torch.full_like(tensor, float("nan")) for tensor in tensors]
    workspace = torch.full((mutant.library.attention_backward_workspace(1, queries) // 4,), float("nan"))
    emulation_support.set_seed(seed)
    with (
        emulation_support.buffers(**{f"input {i}": tensor for i, tensor in enumerate(given)}, writable=False),
        emulation_support.buffers(
            **{f"result {i}": tensor for i, tensor in enumerate([*results, workspace])}, written=False
        ),
    ):
        pointers = (ctypes.c_void_p * 10)(*(tensor.data_ptr() for tensor in [*given, *results, workspace]))
        sizes = (ctypes.c_int64(size) for size in (1, queries, keys))
        error = mutant.library.attention_backward(pointers, *sizes, int(not ordered), int(ordered))
    return error, results, workspace


def _is_right(gradients: list[Tensor]) -> bool:
    tensors = emulated.inputs(torch.bfloat16, 1, 1, 1, 400, 200, 64)
    expected = emulated.oracle_gradients(emulated.gradient_like(tensors[0]), tensors, Limits(right=0))
    return all(testing.error_in_u(*row) < 3.0 for row in zip(gradients, *expected, strict=True))


def test_the_kernels_without_a_fault_pass(mutant):
    mutant.switch_on(None)
    for seed in range(1, 5):
        error, gradients, _ = _run(mutant, seed)
        assert error == 0, emulation_support.report()
        assert _is_right(gradients)


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.report != ORDER])
def test_faults_in_the_kernels_are_found(mutant, name):
    expected = FAULTS[name].report
    mutant.switch_on(name)
    for seed in range(1, 4):
        error, gradients, _ = _run(mutant, seed)
        if expected is None:
            assert error == 0 and not _is_right(gradients)
        elif expected:
            assert error == emulated.LAUNCH_FAILURE, f"schedule {seed}"
            assert expected in emulation_support.report()
        else:
            assert error == emulated.LAUNCH_FAILURE or not _is_right(gradients), f"schedule {seed}"


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.report == ORDER])
def test_faults_in_the_order_of_additions_are_found(mutant, name):
    # Two additions would commute. Sums are compared before they are rounded: there the order shows.
    with emulation_support.clusters_together(3):
        mutant.switch_on(None)
        (_, _, first), *others = [_run(mutant, seed, ordered=True) for seed in range(1, 4)]
        assert all(error == 0 and testing.bits_equal(workspace, first) for error, _, workspace in others)
        mutant.switch_on(name)
        runs = [_run(mutant, seed, ordered=True) for seed in range(1, 6)]
    assert all(error == 0 for error, _, _ in runs)
    assert not all(testing.bits_equal(workspace, first) for _, _, workspace in runs)
