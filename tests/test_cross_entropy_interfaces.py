"""Cross-entropy and its linear form under autograd, functorch, opcheck, compile and autocast; their errors."""

import pytest
import torch
import torch.nn.functional as F
from op_support import Target, kernel_targets, targets, with_gradients
from torch.func import grad, vmap

from fusewright import functional
from fusewright_kernels import library
from fusewright_kernels.checks import ArgumentIndexError, ArgumentTypeError, ArgumentValueError
from fusewright_kernels.cross_entropy.function import CrossEntropy
from fusewright_kernels.cross_entropy.linear_function import LinearCrossEntropy

INDICES = torch.tensor([1, -100, 4])
INPUT = torch.arange(15.0).reshape(3, 5)
LINEAR = torch.arange(20.0).reshape(5, 4)


def test_first_and_second_derivatives_in_float64():
    target = Target("reference", "cpu")
    input = target.tensor(3, 5, 2, dtype=torch.float64, requires_grad=True)
    wanted = target.tensor(3, 5, 2, dtype=torch.float64, seed=1, requires_grad=True)
    indices = torch.tensor([[1, 4], [-100, 0], [2, 2]])
    weight = torch.rand(5, dtype=torch.float64)

    def losses(x, t):
        return CrossEntropy.apply(x, t, weight, -100, 0.1, 0.1, 3.0, "reference")[0]

    for inputs in ([input, indices], [input, wanted]):
        assert torch.autograd.gradcheck(losses, inputs)
        assert torch.autograd.gradgradcheck(losses, inputs)


@pytest.mark.parametrize("equal_gradients", [True, False])
def test_derivatives_of_the_linear_form_in_float64(equal_gradients):
    target = Target("reference", "cpu")
    sizes = ((3, 4), (5, 4), (5,))
    tensors = [target.tensor(*size, dtype=torch.float64, seed=i, requires_grad=True) for i, size in enumerate(sizes)]

    def loss(x, w, b):
        losses, *_ = LinearCrossEntropy.apply(
            x, w, b, INDICES, None, -100, 0.1, 0.1, 3.0, equal_gradients, True, True, True, "reference"
        )
        return losses.sum() if equal_gradients else losses

    assert torch.autograd.gradcheck(loss, tensors)
    assert torch.autograd.gradgradcheck(loss, tensors)


@kernel_targets
def test_double_backward(target):
    input, indices = target.tensor(4, 9), torch.tensor([1, 8, -100, 0], device=target.device)

    def second(function):
        leaf = input.detach().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    ours = second(lambda x: functional.cross_entropy(x, indices, label_smoothing=0.1, backend=target.backend))
    torch.testing.assert_close(
        ours, second(lambda x: F.cross_entropy(x, indices, label_smoothing=0.1)), rtol=1e-4, atol=1e-6
    )


@targets
def test_functorch(target):
    input = target.tensor(4, 3, 5)
    indices = INDICES.to(target.device)

    def ours(x, t=indices):
        return functional.cross_entropy(x, t, backend=target.backend)

    def theirs(x, t=indices):
        return F.cross_entropy(x, t)

    for dim in (0, 1, 2):
        batched = input.movedim(0, dim)
        torch.testing.assert_close(vmap(ours, dim)(batched), vmap(theirs, dim)(batched))
    torch.testing.assert_close(vmap(grad(ours))(input), vmap(grad(theirs))(input), rtol=1e-5, atol=1e-6)
    many = indices.repeat(4, 1)
    torch.testing.assert_close(vmap(ours)(input, many), vmap(theirs)(input, many))
    weight = target.tensor(5, 5, seed=1)

    def linear(x):
        return functional.linear_cross_entropy(x, weight, indices, backend=target.backend)

    torch.testing.assert_close(
        vmap(grad(linear))(input), vmap(grad(lambda x: theirs(x @ weight.T)))(input), rtol=1e-4, atol=1e-5
    )


@targets
def test_opcheck(target):
    input, indices = target.tensor(6, 24, 2), torch.randint(0, 24, (6, 2), device=target.device)
    forward, backward = (library.overload(f"cross_entropy_{name}", target.backend) for name in ("forward", "backward"))
    options = (-100, 0.1, 0.01, 5.0)
    for goal in (indices, input.softmax(1)):
        torch.library.opcheck(forward, (input, goal, None, *options))
        losses, statistics = forward(input, goal, None, *options)
        torch.library.opcheck(
            backward, (losses, input, goal, None, statistics, *options, True, goal.is_floating_point())
        )
    linear = (target.tensor(6, 4), target.tensor(24, 4), target.tensor(24), indices[:, 0], None, *options)
    torch.library.opcheck(library.overload("linear_cross_entropy_forward", target.backend), linear)
    torch.library.opcheck(
        library.overload("linear_cross_entropy_gradients", target.backend), (None, *linear, True, True, False)
    )


@pytest.mark.parametrize("dynamic", [True, False])
@targets
def test_compile_without_graph_breaks(target, dynamic):
    torch.compiler.reset()

    def function(x, w, t):
        losses = functional.cross_entropy(x, t, label_smoothing=0.1, backend=target.backend)
        return losses + functional.linear_cross_entropy(x, w, t, backend=target.backend)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    weight = target.tensor(12, 12, seed=2)
    for rows in (5, 7):
        indices = torch.arange(rows, device=target.device)
        results = [
            with_gradients(lambda x, w, f=f, t=indices: f(x, w, t), [target.tensor(rows, 12), weight])
            for f in (compiled, function)
        ]
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@targets
def test_autocast_mirrors_torch(target):
    input, indices = target.tensor(4, 32, dtype=torch.bfloat16), torch.arange(4, device=target.device)
    with torch.autocast(target.device, torch.bfloat16):
        ours, theirs = functional.cross_entropy(input, indices, backend=target.backend), F.cross_entropy(input, indices)
        hidden, weight = target.tensor(4, 8), target.tensor(32, 8)
        linear = functional.linear_cross_entropy(hidden, weight, indices, backend=target.backend)
        plain = F.cross_entropy(F.linear(hidden, weight), indices)
    assert ours.dtype is theirs.dtype is torch.float32
    assert linear.dtype is plain.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(linear, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input": [1.0]}, ArgumentTypeError, "input is a list"),
        ({"input": INPUT.long()}, ArgumentTypeError, "input.dtype is torch.int64"),
        ({"input": torch.tensor(1.0)}, ArgumentValueError, "input.ndim is 0"),
        ({"target": INDICES[:2]}, ArgumentValueError, "target.shape is (2,)"),
        ({"target": INDICES.int()}, ArgumentTypeError, "target.dtype is torch.int32"),
        ({"target": INPUT[:, :4]}, ArgumentValueError, "target.shape is (3, 4)"),
        ({"target": INDICES + 1}, ArgumentIndexError, "target is -99"),
        ({"target": INDICES.clamp_min(5)}, ArgumentIndexError, "target is 5"),
        ({"weight": torch.ones(4)}, ArgumentValueError, "weight.shape is (4,)"),
        ({"weight": torch.ones(5, requires_grad=True)}, ArgumentValueError, "weight.requires_grad is True"),
        ({"reduction": "median"}, ArgumentValueError, "reduction is 'median'"),
        ({"label_smoothing": 1.5}, ArgumentValueError, "label_smoothing is 1.5"),
        ({"ignore_index": 1.0}, ArgumentTypeError, "ignore_index is a float"),
        ({"z_loss": -1.0}, ArgumentValueError, "z_loss is -1.0"),
        ({"softcap": 0.0}, ArgumentValueError, "softcap is 0.0"),
        ({"backend": "gpu"}, ArgumentValueError, "backend is 'gpu'"),
    ],
)
def test_a_bad_argument_is_named(change, error, message):
    with pytest.raises(error) as raised:
        functional.cross_entropy(**({"input": INPUT, "target": INDICES} | change))
    assert message in str(raised.value)
    assert "expected" in str(raised.value)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"weight": LINEAR[:, :3]}, ArgumentValueError, "weight.shape is (5, 3)"),
        ({"weight": LINEAR.double()}, ArgumentTypeError, "weight.dtype is torch.float64"),
        ({"bias": torch.ones(4)}, ArgumentValueError, "bias.shape is (4,)"),
        ({"target": torch.rand(3)}, ArgumentTypeError, "target.dtype is torch.float32"),
        ({"target": INDICES[:2]}, ArgumentValueError, "target.shape is (2,)"),
        ({"target": INDICES.clamp_min(5)}, IndexError, "target is 5"),
        ({"class_weight": torch.ones(4)}, ArgumentValueError, "class_weight.shape is (4,)"),
    ],
)
def test_a_bad_argument_of_the_linear_form_is_named(change, error, message):
    arguments = {"input": torch.ones(3, 4), "weight": LINEAR, "target": INDICES}
    with pytest.raises(error) as raised:
        functional.linear_cross_entropy(**(arguments | change))
    assert message in str(raised.value)
    assert "expected" in str(raised.value)
