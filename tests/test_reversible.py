"""Reversible layers against the same layers with stored activations."""

import pytest
import torch
from torch import Tensor, nn

from fusewright.nn import ReformerLayer, ReversibleBlock, ReversibleSequence
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError

WIDTH = 16


class Sublayer(nn.Module):
    """A sublayer with dropout and a side argument."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)

    def forward(self, x: Tensor, shift: Tensor | None = None, *, factor: float = 1.0) -> Tensor:
        hidden = torch.tanh(self.linear(x) * factor)
        return self.dropout(hidden if shift is None else hidden + shift)


def stack(depth: int, merge: str = "mean") -> ReversibleSequence:
    torch.manual_seed(0)
    return ReversibleSequence((ReversibleBlock(Sublayer(), Sublayer()) for _ in range(depth)), merge)


def stored(model: ReversibleSequence, hidden: Tensor, *args: Tensor, **kwargs: float) -> Tensor:
    """The same by ordinary autograd, with the random numbers that the model draws."""
    seed = int(torch.randint(0, 2**62, ()))
    y1 = y2 = hidden
    for index, block in enumerate(model.blocks):
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed + 2 * index)
            y1 = y1 + block.f(y2, *args, **kwargs)
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed + 2 * index + 1)
            y2 = y2 + block.g(y1)
    return (y1 + y2) / 2 if model.merge == "mean" else torch.cat([y1, y2], -1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("merge", ["mean", "concatenate"])
@pytest.mark.parametrize("depth", [0, 1, 12])
def test_gradients_are_those_of_stored_activations(depth, merge):
    model = stack(depth, merge)
    hidden, shift = (torch.randn(2, 5, WIDTH).requires_grad_() for _ in range(2))
    results = []
    for run in (model, lambda *args, **kwargs: stored(model, *args, **kwargs)):
        torch.manual_seed(1)
        output = run(hidden, shift, factor=0.9)
        leaves = [hidden, *([shift] if depth else []), *model.parameters()]
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_memory_does_not_grow_with_depth():
    def saved_bytes(run, depth):
        kept = {}

        def pack(tensor):
            if not isinstance(tensor, nn.Parameter):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model = stack(depth)
        hidden = torch.randn(2, 50, WIDTH, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(model, hidden)
        return sum(kept.values())

    def reversible(model, hidden):
        return model(hidden)

    assert saved_bytes(reversible, 12) == saved_bytes(reversible, 3)
    assert saved_bytes(stored, 12) > 10 * saved_bytes(reversible, 12)


def test_random_numbers_are_drawn_once_from_the_default_generator():
    model, hidden = stack(3), torch.randn(1, 4, WIDTH)
    torch.manual_seed(5)
    first, second = model(hidden), model(hidden)
    torch.manual_seed(5)
    assert torch.equal(model(hidden), first) and not torch.equal(first, second)
    state = torch.random.get_rng_state()
    first.sum().backward()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_autocast_is_the_same_in_the_backward():
    model, hidden = stack(4), torch.randn(1, 4, WIDTH)
    results = []
    for run in (model, lambda hidden: stored(model, hidden)):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            output = run(hidden)
        results.append(torch.autograd.grad(output.sum(), list(model.parameters())))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 5e-3


def test_evaluation_needs_no_function():
    model = stack(2).eval()
    hidden = torch.randn(1, 4, WIDTH)
    with torch.no_grad():
        output = model(hidden)
    assert output.grad_fn is None
    torch.testing.assert_close(output, model(hidden).detach())


def test_low_precision_comes_back_low_precision():
    model = ReversibleSequence([ReformerLayer(WIDTH, 2, 32, chunk_length=4, dtype=torch.bfloat16)])
    hidden = torch.randn(2, 10, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    output = model(hidden)
    output.float().square().sum().backward()
    assert output.dtype is torch.bfloat16 and hidden.grad.isfinite().all()


def test_a_second_derivative_is_refused():
    model, hidden = stack(1), torch.randn(1, 2, WIDTH, requires_grad=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(model(hidden).sum(), hidden, create_graph=True)


def test_shared_blocks_add_up():
    torch.manual_seed(0)
    block = ReversibleBlock(Sublayer(), Sublayer()).eval()
    model = ReversibleSequence([block, block])
    hidden = torch.randn(1, 3, WIDTH)
    actual = torch.autograd.grad(model(hidden).sum(), list(block.parameters()))
    expected = torch.autograd.grad(stored(model, hidden).sum(), list(block.parameters()))
    for gradient, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


def test_reformer_layers_replay_rotations_and_dropout():
    torch.manual_seed(0)
    options = {"dropout": 0.2, "n_hashes": 2, "chunk_length": 8, "is_causal": True, "feed_forward_chunk": 7}
    model = ReversibleSequence(ReformerLayer(WIDTH, 2, 32, **options) for _ in range(6))
    hidden = torch.randn(2, 50, WIDTH, requires_grad=True)
    results = []
    for run in (model, lambda hidden: stored(model, hidden)):
        torch.manual_seed(3)
        output = run(hidden)
        results.append([output, *torch.autograd.grad(output.square().sum(), [hidden, *model.parameters()])])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_bad_arguments():
    with pytest.raises(ArgumentTypeError, match="blocks is holding a Linear"):
        ReversibleSequence([nn.Linear(2, 2)])
    with pytest.raises(ArgumentValueError, match="merge is 'sum'"):
        ReversibleSequence([], merge="sum")
