"""Cross-entropy and linear cross-entropy against the float64 oracle and against torch's own, on every backend."""

import math

import pytest
import torch
import torch.nn.functional as F
from op_support import dtypes, kernel_targets, targets, with_gradients

from fusewright import functional, testing
from fusewright_kernels import native
from fusewright_kernels.cross_entropy import linear_chunks

SHAPES = [(7,), (6, 5), (4, 33), (3, 7, 5), (2, 70, 3, 2)]


def _rows(shape):
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def _indices(target, shape, ignore_index=-100, seed=5):
    classes = shape[min(len(shape) - 1, 1)]
    indices = torch.randint(0, classes, _rows(shape), generator=torch.Generator().manual_seed(seed))
    ignored = torch.arange(indices.numel()).reshape(indices.shape) % 4 == 1
    return indices.masked_fill(ignored, ignore_index).to(target.device)


def _failures(op, target, dtype, step=1):
    backend, device, interpreted = target or ("cpu", "cpu", False)
    chosen = [case for case in testing.cases([op]) if case.dtype is dtype]
    if interpreted:
        chosen = [case for case in chosen if case.rows * case.classes < 6000]
    failures = []
    for case in chosen[::step]:
        judgements = testing.evaluate(case, backend, device, interpreted=interpreted)
        failures += [f"{case.id} {name}: {item.failures}" for name, item in judgements.items() if not item.passed]
    return failures


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
@dtypes
@targets
def test_every_public_case_is_within_its_budget(target, dtype, op):
    assert _failures(op, (target.backend, target.device, target.interpreted), dtype) == []


@pytest.mark.skipif(native.cpu_unavailable_reason() is not None, reason=str(native.cpu_unavailable_reason()))
@dtypes
def test_every_instruction_set_of_this_machine_is_within_budget(dtype):
    before, failures = native.cpu_isa(), {}
    try:
        for isa in native.cpu_isas():
            native.select_cpu_isa(isa)
            failures[isa] = _failures("cross_entropy", None, dtype, step=2)
    finally:
        native.select_cpu_isa(before)
    assert failures == {isa: [] for isa in native.cpu_isas()}


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@targets
def test_class_indices_as_in_torch(target, shape, weighted, label_smoothing, reduction):
    input = target.tensor(*shape)
    indices = _indices(target, shape, ignore_index=2)
    weight = target.tensor(shape[min(len(shape) - 1, 1)], seed=2).abs() if weighted else None
    keywords = {"ignore_index": 2, "reduction": reduction, "label_smoothing": label_smoothing}
    ours = with_gradients(
        lambda x: functional.cross_entropy(x, indices, weight, **keywords, backend=target.backend), [input]
    )
    theirs = with_gradients(lambda x: F.cross_entropy(x, indices, weight, **keywords), [input])
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@targets
def test_probabilities_as_in_torch(target, shape, weighted, reduction):
    input, wanted = target.tensor(*shape), target.tensor(*shape, seed=1).softmax(min(len(shape) - 1, 1))
    weight = target.tensor(shape[min(len(shape) - 1, 1)], seed=2).abs() if weighted else None
    keywords = {"reduction": reduction, "label_smoothing": 0.1}
    ours = with_gradients(
        lambda x, q: functional.cross_entropy(x, q, weight, **keywords, backend=target.backend), [input, wanted]
    )
    theirs = with_gradients(lambda x, q: F.cross_entropy(x, q, weight, **keywords), [input, wanted])
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=3e-6, atol=3e-6)


@targets
def test_the_order_of_memory_does_not_matter(target):
    rows = target.tensor(9, 40)
    indices = _indices(target, (9, 40))
    expected = with_gradients(
        lambda x: functional.cross_entropy(x, indices, reduction="none", backend=target.backend), [rows]
    )
    for layout in (lambda x: x.T.contiguous().T, lambda x: x.repeat_interleave(2, 1)[:, ::2]):
        leaf = layout(rows).detach().requires_grad_()
        losses = functional.cross_entropy(leaf, indices, reduction="none", backend=target.backend)
        torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=1e-6)


@targets
def test_special_logits_as_in_torch(target):
    input = target.tensor(7, 300)
    input[0] = -math.inf
    input[1, 1:] = -math.inf
    input[2, :299] = -math.inf
    input[3, 5] = math.nan
    input[4, 5] = math.inf
    input[5] = 1e30
    input[6, 0] = -math.inf
    indices = torch.zeros(7, dtype=torch.int64, device=target.device)
    ours = functional.cross_entropy(input, indices, reduction="none", backend=target.backend)
    theirs = F.cross_entropy(input, indices, reduction="none")
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-6, atol=1e-6)


@targets
def test_an_ignored_row_reaches_nothing(target):
    input = target.tensor(4, 30)
    input[1] = math.nan
    indices = torch.tensor([3, -100, 5, 29], device=target.device)
    loss, gradient = with_gradients(
        lambda x: functional.cross_entropy(x, indices, label_smoothing=0.1, backend=target.backend), [input]
    )
    if target.backend != "reference":
        assert (gradient[1] == 0).all()
    kept = [0, 2, 3]
    expected = with_gradients(lambda x: F.cross_entropy(x, indices[kept], label_smoothing=0.1), [input[kept]])
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient[kept], expected[1], rtol=1e-5, atol=1e-6)


@targets
def test_no_rows_and_only_ignored_rows(target):
    for rows in (0, 3):
        indices = torch.full((rows,), -100, device=target.device)
        input = target.tensor(rows, 5)
        for reduction, expected in (("sum", 0.0), ("mean", math.nan)):
            loss = functional.cross_entropy(input, indices, reduction=reduction, backend=target.backend)
            torch.testing.assert_close(loss.item(), expected, equal_nan=True)


@dtypes
@pytest.mark.parametrize("columns", [1, 7, 33, 100, 257])
@targets
def test_nothing_beside_a_tensor_is_read_or_written(target, columns, dtype):
    if target.interpreted and columns > 40:
        pytest.skip("the interpreter is slow, and two widths have every tail")
    input = testing.guarded(target.tensor(5, columns, dtype=dtype), 1)
    wanted = testing.guarded(target.tensor(5, columns, dtype=dtype, seed=1).float().softmax(1).to(dtype), 1)
    for goal in (_indices(target, (5, columns)), wanted.tensor):
        with testing.poisoned_allocations(), testing.guarded_allocations():
            losses, *gradients = with_gradients(
                lambda x, goal=goal: functional.cross_entropy(
                    x, goal, reduction="none", label_smoothing=0.1, backend=target.backend
                ),
                [input.tensor],
            )
        testing.assert_no_nan(losses, *gradients)
    input.check()
    wanted.check()


@kernel_targets
def test_a_row_does_not_depend_on_its_batch_or_the_threads(target):
    indices = _indices(target, (17, 100))

    def run(x, t):
        return with_gradients(
            lambda leaf: functional.cross_entropy(leaf, t, reduction="none", backend=target.backend), [x]
        )

    together, alone = run(target.tensor(17, 100), indices), run(target.tensor(17, 100)[4:5], indices[4:5])
    assert torch.equal(together[0][4:5], alone[0])
    testing.assert_repeatable(lambda x: run(x, indices), [target.tensor(17, 100)])


OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none"},
    {"softcap": 4.0, "z_loss": 1e-2},
]


def _linear_inputs(target, dtype=torch.float32):
    input, weight = target.tensor(50, 24, dtype=dtype), target.tensor(101, 24, dtype=dtype, seed=1)
    return [input, weight / 2, target.tensor(101, dtype=dtype, seed=2)], _indices(target, (50, 101))


@pytest.mark.parametrize("keywords", OPTIONS, ids=str)
@targets
def test_linear_cross_entropy_over_many_chunks(target, keywords, monkeypatch):
    # 64 rows are the fewest of a chunk on a CPU; here 7.
    monkeypatch.setattr(linear_chunks, "FEWEST_ROWS", 7)
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    tensors, indices = _linear_inputs(target)
    ours = with_gradients(
        lambda x, w, b: functional.linear_cross_entropy(x, w, indices, b, **keywords, backend=target.backend), tensors
    )
    theirs = with_gradients(
        lambda x, w, b: functional.cross_entropy(F.linear(x, w, b), indices, **keywords, backend="reference"), tensors
    )
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@targets
def test_linear_cross_entropy_twice_through_one_graph(target):
    """Each backward scales the gradients that the forward made, and none of them changes these."""
    (input, weight, bias), indices = _linear_inputs(target)
    leaf = weight.detach().requires_grad_()
    loss = functional.linear_cross_entropy(input, leaf, indices, bias, backend=target.backend)
    first = torch.autograd.grad(loss, leaf, torch.tensor(3.0, device=target.device), retain_graph=True)[0]
    second = torch.autograd.grad(loss, leaf)[0]
    torch.testing.assert_close(first, 3.0 * second)


@targets
def test_linear_cross_entropy_takes_any_leading_shape_and_no_rows(target):
    (input, weight, _), indices = _linear_inputs(target)
    losses = functional.linear_cross_entropy(
        input.reshape(5, 10, 24), weight, indices.reshape(5, 10), reduction="none", backend=target.backend
    )
    flat = functional.linear_cross_entropy(input, weight, indices, reduction="none", backend=target.backend)
    torch.testing.assert_close(losses.flatten(), flat)
    empty = with_gradients(
        lambda x, w: functional.linear_cross_entropy(x, w, indices[:0], reduction="sum", backend=target.backend),
        [input[:0], weight],
    )
    assert empty[0] == 0
    assert (empty[2] == 0).all()


@pytest.mark.skipif(native.cpu_unavailable_reason() is not None, reason=str(native.cpu_unavailable_reason()))
def test_linear_cross_entropy_never_holds_all_logits():
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for item in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(item, torch.Tensor):
                    largest = max(largest, item.numel())
            return result

    rows, classes, width = 4096, 8192, 8
    input, weight = torch.randn(rows, width, requires_grad=True), torch.randn(classes, width, requires_grad=True)
    with Watch():
        functional.linear_cross_entropy(input, weight, torch.zeros(rows, dtype=torch.int64)).backward()
    assert largest <= rows * classes // 2
