"""The CUDA kernels on a CPU, in the emulator: each of them against the oracle, and under many schedules."""

from collections.abc import Iterator

import emulation_support
import pytest
import torch
from op_support import Target, add_norm, add_norms, dtypes, norm, norms, with_gradients

from fusewright import functional, testing
from fusewright_kernels.normalization import reference as normalization
from fusewright_kernels.softmax import reference as softmax_reference

pytestmark = emulation_support.needs_emulator

CUDA = Target("cuda", "cpu")
SEEDS = range(1, 13)


@pytest.fixture(autouse=True)
def emulation() -> Iterator[None]:
    with emulation_support.cuda_serves_the_cpu():
        yield


# torch says that its own rms_norm has no fused form for mixed dtypes.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@dtypes
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_public_cases_are_within_their_budgets(op, dtype):
    chosen = [case for case in testing.cases([op]) if case.dtype is dtype and case.rows * case.columns < 40_000]
    assert len(chosen) > 10
    failures = []
    for number, case in enumerate(chosen):
        emulation_support.set_seed(number)
        for name, judgement in testing.evaluate(case, "cuda", "cpu").items():
            # Not by the ratio to PyTorch's own error: where that is by luck 0, it asks for the same order of additions.
            wrong = [failure for failure in judgement.failures if "plain PyTorch" not in failure]
            failures += [f"{case.id} {name}: {failure}" for failure in wrong]
    assert failures == []


def _norm_of(op, target=CUDA):
    return lambda x, w, b: norm(op, target, x, w, b)


def _norm_oracle(op):
    return lambda x, w, b: normalization.norm(x, w, b, 1, 1e-5, op == "layer_norm", 0.0)


def _assert_accurate(actual, oracle, magnitude=None):
    for index, (result, expected) in enumerate(zip(actual, oracle, strict=True)):
        direction = "forward" if index == 0 else "gradient"
        testing.assert_accurate(result, expected, direction, magnitude=magnitude, name=f"result {index}")


# A width for each kernel: 8 lanes of a warp, a warp, a block, shared memory, neither registers nor shared memory; then
# the same where a row is no whole number of vectors.
WIDTHS = (64, 256, 4096, 8192, 17408, 30720, 3, 511, 4099, 8195)


@pytest.mark.parametrize("width", WIDTHS)
@norms
def test_every_kernel_of_normalisation(op, width):
    rows = 70 if width < 300 else 4
    inputs = [CUDA.tensor(*size, seed=seed) for seed, size in enumerate([(rows, width), (width,), (width,)])]
    _assert_accurate(
        with_gradients(_norm_of(op), inputs), with_gradients(_norm_oracle(op), [tensor.double() for tensor in inputs])
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_every_kernel_of_softmax(width):
    rows = 70 if width < 300 else 4
    for shape, dim in (((rows, width), 1), ((width, 35), 0)):
        if dim == 0 and width > 9000:
            continue  # one kernel serves every width along another dimension
        input = CUDA.tensor(*shape)
        actual = with_gradients(lambda x, dim=dim: functional.softmax(x, dim, backend="cuda"), [input])
        oracle = with_gradients(lambda x, dim=dim: softmax_reference.softmax(x, dim, torch.float64), [input.double()])
        _assert_accurate(actual, oracle, magnitude=testing.rms(oracle[0]) * 4)


@add_norms
def test_the_fused_addition_with_dropout_draws_the_mask_of_the_cpu(op):
    inputs = [CUDA.tensor(33, 130, seed=seed) for seed in range(2)] + [
        CUDA.tensor(130, seed=2),
        CUDA.tensor(130, seed=3),
    ]

    def run(target):
        return with_gradients(lambda x, r, w, b: add_norm(op, target, x, r, w, b, dropout_p=0.4, seed=5), inputs)

    _assert_accurate(run(CUDA), [tensor.double() for tensor in run(Target("cpu", "cpu"))])


@pytest.mark.parametrize("width", [96, 520, 8192])
def test_no_schedule_changes_a_bit(width):
    """Every sum has a fixed order, so neither the order of blocks, warps and lanes nor their number can be seen."""
    inputs = [CUDA.tensor(*size, seed=seed) for seed, size in enumerate([(19, width), (width,), (width,)])]

    def results():
        return [
            *with_gradients(_norm_of("layer_norm"), inputs),
            *with_gradients(lambda x: functional.softmax(x, 1, backend="cuda"), inputs[:1]),
            *with_gradients(lambda x: functional.softmax(x, 0, backend="cuda"), inputs[:1]),
        ]

    first = results()
    for seed in SEEDS if width < 1000 else SEEDS[:3]:
        emulation_support.set_seed(seed)
        for actual, expected in zip(results(), first, strict=True):
            assert testing.bits_equal(actual, expected), f"schedule {seed}"


def test_blocks_take_several_rows_in_turn():
    """Fewer multiprocessors give each block of a backward more rows, and partial sums another order."""
    inputs = [CUDA.tensor(*size, seed=seed) for seed, size in enumerate([(700, 40), (40,), (40,)])]
    oracle = with_gradients(_norm_oracle("layer_norm"), [tensor.double() for tensor in inputs])
    try:
        for multiprocessors in (1, 2, 132):
            emulation_support.set_multiprocessors(multiprocessors)
            _assert_accurate(with_gradients(_norm_of("layer_norm"), inputs), oracle)
    finally:
        emulation_support.set_multiprocessors(3)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_no_elements(shape):
    assert functional.softmax(CUDA.tensor(*shape), backend="cuda").shape == shape
