"""Softmax under autograd, functorch, opcheck, compile, export and autocast; its dtypes; its errors."""

import pytest
import torch
from op_support import DTYPES, Target, dtypes, kernel_targets, targets, with_gradients
from torch.func import grad, jacrev, vmap

from fusewright import functional, testing
from fusewright_kernels import library
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError
from fusewright_kernels.softmax import reference

INPUT = torch.ones(4, 8)


def softmax(target, input, dim=-1, **keywords):
    return functional.softmax(input, dim, backend=target.backend, **keywords)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_first_and_second_derivatives_in_float64(dim):
    target = Target("reference", "cpu")
    input = target.tensor(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: softmax(target, x, dim), [input])
    assert torch.autograd.gradgradcheck(lambda x: softmax(target, x, dim), [input])


def _second_derivative(function, input):
    leaf = input.detach().requires_grad_()
    (first,) = torch.autograd.grad((function(leaf).double() ** 3).sum(), leaf, create_graph=True)
    return torch.autograd.grad((first.double() ** 2).sum(), leaf)[0]


@kernel_targets
def test_double_backward(target):
    input = target.tensor(6, 40)
    actual = _second_derivative(lambda x: softmax(target, x), input)
    plain = _second_derivative(lambda x: torch.softmax(x, -1), input.cpu())
    oracle = _second_derivative(lambda x: reference.softmax(x, -1, torch.float64), input.cpu().double())
    # Two backward passes and the losses between them round more often than one op may.
    assert testing.error_in_u(actual.cpu(), oracle) <= max(24.0, 2.0 * testing.error_in_u(plain, oracle))


@targets
def test_functorch(target):
    input = target.tensor(5, 3, 16)

    def close(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

    def loss(x):
        return softmax(target, x).square().sum()

    def plain(x):
        return torch.softmax(x, -1).square().sum()

    close(grad(loss)(input), grad(plain)(input))
    close(vmap(grad(loss))(input), vmap(grad(plain))(input))
    close(jacrev(lambda x: softmax(target, x, 0))(input[0]), jacrev(lambda x: torch.softmax(x, 0))(input[0]))
    for in_dim in (0, 1, 2):
        for dim in (0, 1, -1):
            actual = vmap(lambda x, dim=dim: softmax(target, x, dim), in_dim)(input)
            close(actual, vmap(lambda x, dim=dim: torch.softmax(x, dim), in_dim)(input))


@dtypes
@targets
def test_opcheck(target, dtype):
    input, gradient = target.tensor(4, 6, 24, dtype=dtype), target.tensor(4, 6, 24, dtype=dtype, seed=1)
    forward, backward = (library.overload(f"softmax_{name}", target.backend) for name in ("forward", "backward"))
    for dim in (0, 2):
        torch.library.opcheck(forward, (input, dim, dtype))
        torch.library.opcheck(forward, (input.mT, dim, torch.float32))
        torch.library.opcheck(
            library.overload("softmax_forward_out", target.backend), (input, dim, torch.empty_like(input))
        )
        torch.library.opcheck(backward, (gradient, forward(input, dim, dtype), dim, dtype))


@pytest.mark.parametrize("dynamic", [True, False])
@targets
def test_compile_without_graph_breaks(target, dynamic):
    torch.compiler.reset()

    def function(x):
        return softmax(target, x * 2.0, 1)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((5, 32, 3), (7, 32, 4)):
        input = target.tensor(*shape)
        for actual, expected in zip(with_gradients(compiled, [input]), with_gradients(function, [input]), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@targets
def test_export(target):
    class Module(torch.nn.Module):
        def forward(self, x):
            return softmax(target, x)

    exported = torch.export.export(
        Module(), (target.tensor(5, 32),), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2, max=64)}}
    )
    other = target.tensor(9, 32, seed=4)
    torch.testing.assert_close(exported.module()(other), torch.softmax(other, -1), rtol=1e-6, atol=1e-7)


# float64 inputs belong to the reference, so they are not forced onto a backend.
@pytest.mark.parametrize("input_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:softmax runs as plain PyTorch")
def test_dtype_converts_as_in_torch(input_dtype, dtype):
    input = Target("reference", "cpu").tensor(6, 50, dtype=input_dtype)
    ours = with_gradients(lambda x: functional.softmax(x, -1, dtype), [input])
    theirs = with_gradients(lambda x: torch.softmax(x, -1, dtype), [input])
    tolerance = 4 * max(torch.finfo(item).eps for item in (dtype, input_dtype))
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance / 50)


@targets
def test_autocast_mirrors_torch(target):
    input = target.tensor(4, 32, dtype=torch.bfloat16)
    with torch.autocast(target.device, torch.bfloat16):
        ours, theirs = softmax(target, input), torch.softmax(input, -1)
    assert ours.dtype is theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)


def test_meta_tensors_have_shapes_only(recwarn):
    input = torch.empty(3, 5, device="meta", dtype=torch.bfloat16, requires_grad=True)
    output = functional.softmax(input, 0, torch.float32)
    output.sum().backward()
    assert (output.shape, output.dtype, input.grad.dtype) == (input.shape, torch.float32, torch.bfloat16)
    assert not recwarn.list


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input": [1.0]}, ArgumentTypeError, "input is a list"),
        ({"input": INPUT.long()}, ArgumentTypeError, "input.dtype is torch.int64"),
        ({"input": INPUT.to_sparse()}, ArgumentTypeError, "input.layout is torch.sparse_coo"),
        ({"dim": 2}, ArgumentValueError, "dim is 2"),
        ({"dim": -3}, ArgumentValueError, "dim is -3"),
        ({"dim": 1.0}, ArgumentTypeError, "dim is a float"),
        ({"dim": None}, ArgumentTypeError, "dim is a NoneType"),
        ({"dtype": torch.int32}, ArgumentTypeError, "dtype is torch.int32"),
        ({"dtype": "float32"}, ArgumentTypeError, "dtype is"),
        ({"backend": "gpu"}, ArgumentValueError, "backend is 'gpu'"),
        ({"out": torch.zeros(4, 9)}, ArgumentValueError, "out.shape is (4, 9)"),
        ({"out": torch.zeros(4, 8).half()}, ArgumentTypeError, "out.dtype is torch.float16"),
        ({"out": torch.zeros(8, 4).T}, ArgumentValueError, "out.stride() is (1, 4)"),
        ({"out": torch.zeros(4, 8, requires_grad=True)}, ArgumentValueError, "out is given"),
        ({"input": torch.tensor(1.0), "dim": 1}, ArgumentValueError, "dim is 1"),
        ({"input": torch.tensor(1.0), "out": 3}, ArgumentTypeError, "out is a int"),
    ],
)
def test_a_bad_argument_is_named(change, error, message):
    with pytest.raises(error) as raised:
        functional.softmax(**({"input": INPUT} | change))
    assert message in str(raised.value)
    assert "expected" in str(raised.value)


def test_nothing_is_written_on_an_error():
    out = testing.GuardedTensor((4, 8))
    out.tensor.fill_(7.0)
    with pytest.raises(ValueError, match="dim is 2"):
        functional.softmax(INPUT, 2, out=out.tensor)
    out.check("out")
    assert (out.tensor == 7.0).all()
