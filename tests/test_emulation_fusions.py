"""The CUDA kernels of the block's fusions in the emulator: wide rows, schedules, and how many blocks share a sum."""

from collections.abc import Iterator

import emulation_support
import pytest
import torch
from op_support import Target, dtypes, with_gradients

from fusewright import functional, testing
from fusewright_kernels.activation import reference as activation
from fusewright_kernels.cross_entropy import reference as cross_entropy
from fusewright_kernels.rotary.reference import rotate

pytestmark = emulation_support.needs_emulator

CUDA = Target("cuda", "cpu")
SEEDS = range(1, 9)


@pytest.fixture(autouse=True)
def emulation() -> Iterator[None]:
    with emulation_support.cuda_serves_the_cpu():
        yield


def _assert_accurate(actual, oracle):
    for index, (result, expected) in enumerate(zip(actual, oracle, strict=True)):
        testing.assert_accurate(result, expected, "forward" if index == 0 else "gradient", name=f"result {index}")


def _losses(input, target, weight=None, **keywords):
    return functional.cross_entropy(input, target, weight, reduction="none", backend="cuda", **keywords)


OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-3, "softcap": 20.0}]


@pytest.mark.parametrize("keywords", OPTIONS, ids=str)
@pytest.mark.parametrize("classes", [1024, 1025, 9000, 9001])
@dtypes
def test_wide_rows_of_classes(classes, dtype, keywords):
    """A warp, then a block to a row that goes over it tile by tile; the last row's maximum grows with every tile."""
    input = 4.0 * CUDA.tensor(3, classes, dtype=dtype)
    input[2] = torch.linspace(-100.0, 100.0, classes).to(dtype)
    target = torch.tensor([classes - 1, 5, 77])
    weight = CUDA.tensor(classes, seed=4).abs() if "label_smoothing" in keywords else None
    options = cross_entropy.Options(**keywords)
    oracle = with_gradients(lambda x: cross_entropy.losses(x, target, weight, options), [input.double()])
    actual = with_gradients(lambda x: _losses(x, target, weight, **keywords), [input])
    budget = testing.budget_of(dtype).for_logits(200.0)
    testing.assert_accurate(actual[0], oracle[0], budget=budget)
    testing.assert_accurate(actual[1], oracle[1], "gradient", budget=budget)


@pytest.mark.parametrize("shape", [(3, 2056), (2, 1100, 35)], ids=str)
def test_wide_rows_of_probabilities(shape):
    """In the last dimension, and in another: 32 rows side by side to a warp."""
    input, wanted = 4.0 * CUDA.tensor(*shape), CUDA.tensor(*shape, seed=1).softmax(1)
    options = cross_entropy.Options(label_smoothing=0.1)
    oracle = with_gradients(lambda x, q: cross_entropy.losses(x, q, None, options), [input.double(), wanted.double()])
    _assert_accurate(with_gradients(lambda x, q: _losses(x, q, label_smoothing=0.1), [input, wanted]), oracle)


def test_the_gradient_may_take_the_place_of_the_logits():
    input, target = CUDA.tensor(5, 2048), torch.tensor([0, 2047, -100, 9, 1024])
    expected = with_gradients(lambda x: _losses(x, target, label_smoothing=0.1), [input])
    options = (-100, 0.1, 0.0, 0.0)
    forward, backward = (
        getattr(torch.ops.fusewright, f"cross_entropy_{name}").cuda for name in ("forward", "backward_out")
    )
    losses, statistics = forward(input, target, None, *options)
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(losses.shape, generator=generator, dtype=torch.float64).to(losses)
    backward(grad, input, target, None, statistics, *options, input)
    assert testing.bits_equal(losses, expected[0])
    assert testing.bits_equal(input, expected[1])


@dtypes
@pytest.mark.parametrize("rows, columns", [(1, 8), (700, 40), (90, 264), (70, 1030), (130, 3)])
def test_the_gradient_of_a_bias_over_few_and_many_blocks(rows, columns, dtype):
    input, bias = CUDA.tensor(rows, columns, dtype=dtype), CUDA.tensor(columns, dtype=dtype, seed=1)
    oracle = with_gradients(lambda x, b: activation.bias_gelu(x, b, False), [input.double(), bias.double()])
    try:
        for multiprocessors in (1, 132):
            emulation_support.set_multiprocessors(multiprocessors)
            actual = with_gradients(lambda x, b: functional.bias_gelu(x, b, backend="cuda"), [input, bias])
            _assert_accurate(actual[:2], oracle[:2])
            testing.assert_accurate(actual[2], oracle[2], "gradient", magnitude=rows**0.5)
    finally:
        emulation_support.set_multiprocessors(3)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width, pairs", [(128, 64), (72, 32), (33, 16), (1040, 520)])
@dtypes
def test_rotary_in_vectors_and_element_by_element(width, pairs, interleaved, dtype):
    input = CUDA.tensor(2, 3, 5, width, dtype=dtype)
    angles = 7.0 * CUDA.tensor(1, 5, pairs, seed=3)
    cos, sin = angles.cos(), angles.sin()
    actual = with_gradients(
        lambda x: functional.rotary_embedding(x, cos, sin, interleaved=interleaved, backend="cuda"), [input]
    )
    oracle = with_gradients(lambda x: rotate(x, cos.double(), sin.double(), None, interleaved), [input.double()])
    _assert_accurate(actual, oracle)
    with torch.no_grad():
        in_place = input.clone()
        functional.rotary_embedding(in_place, cos, sin, interleaved=interleaved, in_place=True, backend="cuda")
    assert testing.bits_equal(in_place, actual[0])


@dtypes
@pytest.mark.parametrize("columns", [64, 70, 2100])
def test_dropout_draws_the_mask_of_the_cpu(columns, dtype):
    input, residual = (CUDA.tensor(5, columns, dtype=dtype, seed=seed) for seed in (0, 1))
    results = [
        with_gradients(lambda x, r, b=backend: functional.dropout_add(x, r, 0.4, seed=7, backend=b), [input, residual])
        for backend in ("cuda", "cpu")
    ]
    # One product and one sum, which a compiler may round together or apart.
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual == 0, expected == 0)
        testing.assert_accurate(actual, expected.double())


@pytest.mark.parametrize("width", [40, 2056])
def test_no_schedule_changes_a_bit(width):
    matrix, other, bias = CUDA.tensor(19, width), CUDA.tensor(19, width, seed=1), CUDA.tensor(width, seed=2)
    target = torch.arange(19) % width
    tables = CUDA.tensor(19, width // 2, seed=3), CUDA.tensor(19, width // 2, seed=4)

    def results():
        return [
            *with_gradients(lambda g, u: functional.swiglu(g, u, backend="cuda"), [matrix, other]),
            *with_gradients(lambda x, b: functional.bias_gelu(x, b, backend="cuda"), [matrix, bias]),
            *with_gradients(lambda x, r: functional.dropout_add(x, r, 0.3, seed=1, backend="cuda"), [matrix, other]),
            *with_gradients(lambda x: functional.rotary_embedding(x[None, None], *tables, backend="cuda"), [matrix]),
            *with_gradients(lambda x: _losses(x, target, label_smoothing=0.1), [matrix]),
        ]

    first = results()
    for seed in SEEDS if width < 1000 else SEEDS[:2]:
        emulation_support.set_seed(seed)
        for actual, expected in zip(results(), first, strict=True):
            assert testing.bits_equal(actual, expected), f"schedule {seed}"
