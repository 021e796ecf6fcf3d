"""The normalisation ops under opcheck, compile, export, autocast and the meta device."""

import shutil

import pytest
import torch
from op_support import DTYPES, Target, add_norm, add_norms, kernel_targets, norm, norms, targets, with_gradients
from torch._dynamo.testing import CompileCounterWithBackend

from fusewright import functional, testing
from fusewright_kernels import library


def _opcheck(name, target, *arguments):
    torch.library.opcheck(library.overload(name, target.backend), arguments)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@targets
def test_opcheck(target, dtype, center):
    input, grad = target.tensor(4, 3, 24, dtype=dtype), target.tensor(4, 3, 24, dtype=dtype, seed=3)
    weight, bias = target.tensor(24, seed=1), target.tensor(24, dtype=dtype, seed=2)
    _opcheck("norm_forward", target, input, weight, bias, 1, 1e-5, center, 0.0, True)
    _opcheck("norm_forward", target, input.mT, None, None, 2, 1e-5, center, 0.0, False)
    _opcheck("norm_forward_out", target, input, weight, bias, 1, 1e-5, center, 0.0, torch.empty_like(input))
    statistics = library.overload("norm_forward", target.backend)(input, weight, bias, 1, 1e-5, center, 0.0, True)[1]
    _opcheck("norm_backward", target, grad, input, statistics, weight, bias, 1, center, 0.0, True, True, True)
    _opcheck("norm_backward", target, grad, input, statistics, None, None, 1, center, 0.0, True, False, False)
    _opcheck("norm_backward", target, grad, input, statistics, weight, bias, 1, center, 0.0, False, True, True)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
@targets
def test_opcheck_of_the_fused_addition(target, stream):
    input, weight = target.tensor(6, 24, dtype=torch.bfloat16), target.tensor(24, seed=1)
    residual, seed = target.tensor(6, 24, dtype=stream, seed=2), torch.tensor([5], device=target.device)
    forward = (input, residual, weight, None, seed, 1, 1e-5, False, 0.0, 0.25, stream, True)
    _opcheck("add_norm_forward", target, *forward)
    _opcheck("add_norm_forward", target, *forward[:4], None, *forward[5:9], 0.0, stream, False)
    output, new_residual, statistics = library.overload("add_norm_forward", target.backend)(*forward)
    backward = (weight, None, seed, 1, False, 0.0, 0.25, torch.bfloat16, stream)
    gradients = (output, new_residual, new_residual, statistics)
    _opcheck("add_norm_backward", target, *gradients, *backward, True, True, True, False)
    _opcheck("add_norm_backward", target, output, None, *gradients[2:], *backward, False, True, False, False)


def _block(op, target):
    def function(x, r, w, b):
        output = norm(op, target, x * 2.0, w, b)
        return add_norm(f"add_{op}", target, output, r, w)

    return function


@pytest.mark.parametrize("dynamic", [True, False])
@norms
@targets
def test_compile_without_graph_breaks(target, op, dynamic):
    torch.compiler.reset()
    function = _block(op, target)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 7):
        tensors = [target.tensor(*size, seed=i) for i, size in enumerate([(rows, 32), (rows, 32), (32,), (32,)])]
        for actual, expected in zip(with_gradients(compiled, tensors), with_gradients(function, tensors), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@kernel_targets
def test_dynamic_shapes_compile_once(target):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_block("rms_norm", target), fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for rows, columns in ((5, 32), (7, 48), (9, 130)):
        sizes = [(rows, columns), (rows, columns), (columns,), (columns,)]
        compiled(*(target.tensor(*size, seed=i) for i, size in enumerate(sizes)))
        compilations.append(counter.frame_count)
    # The constant choice of a backend is a frame of its own.
    assert compilations[0] == compilations[-1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, g++ is not found")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_runs_the_kernel():
    target = Target("cpu", "cpu")
    tensors = [target.tensor(*size, seed=i) for i, size in enumerate([(6, 32), (6, 32), (32,), (32,)])]
    function = _block("layer_norm", target)
    try:
        expected = with_gradients(function, tensors)
    except ValueError as error:
        pytest.skip(str(error))
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    for actual, result in zip(with_gradients(compiled, tensors), expected, strict=True):
        torch.testing.assert_close(actual, result, rtol=1e-6, atol=1e-6)


@kernel_targets
def test_dropout_compiles_and_repeats_with_the_generator(target):
    torch.compiler.reset()
    input, residual = target.tensor(6, 64), target.tensor(6, 64, seed=1)

    def function(x, r):
        return add_norm("add_rms_norm", target, x, r, dropout_p=0.5)[1]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    first, second = compiled(input, residual), compiled(input, residual)
    torch.manual_seed(3)
    assert torch.equal(compiled(input, residual), first)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(function(input, residual), first)


class _Block(torch.nn.Module):
    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target
        self.weight = torch.nn.Parameter(target.tensor(32, seed=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return norm("layer_norm", self.target, x, self.weight, self.weight)


@targets
def test_export(target):
    module, input = _Block(target), target.tensor(5, 32)
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(module, (input,), dynamic_shapes={"x": {0: rows}})
    other = target.tensor(9, 32, seed=4)
    torch.testing.assert_close(exported.module()(other), module(other), rtol=1e-6, atol=1e-6)
    if target.backend != "reference":
        names = [str(node.target) for node in exported.graph.nodes]
        assert f"fusewright.norm_forward.{target.backend}" in names


@norms
@targets
def test_autocast_mirrors_torch(target, op):
    """On CUDA torch normalises in float32 under autocast, on the CPU in the type of the input."""
    input, weight = target.tensor(4, 32, dtype=torch.bfloat16), target.tensor(32, dtype=torch.bfloat16, seed=1)
    with torch.autocast(target.device, torch.bfloat16):
        ours = norm(op, target, input, weight)
        theirs = getattr(torch.nn.functional, op)(input, (32,), weight)
    assert ours.dtype is theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_meta_tensors_have_shapes_only(dtype, recwarn):
    input = torch.empty(3, 5, 8, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(8, device="meta", requires_grad=True)
    output = functional.layer_norm(input, 8, weight)
    assert (output.shape, output.dtype, output.device.type) == (input.shape, dtype, "meta")
    output, stream = functional.add_rms_norm(output, output, 8, weight, dropout_p=0.1)
    output.sum().backward()
    assert (stream.shape, input.grad.shape, weight.grad.shape) == (input.shape, input.shape, weight.shape)
    assert not recwarn.list


@add_norms
@targets
def test_dtypes_of_a_call_are_those_of_the_fakes(target, op):
    """opcheck compares shapes and strides of what it is given; these are the combinations that mixed training has."""
    for dtype in DTYPES:
        for stream in {dtype, torch.float32}:
            for parameter in {dtype, torch.float32}:
                tensors = [
                    target.tensor(4, 16, dtype=dtype), target.tensor(4, 16, dtype=stream, seed=1),
                    target.tensor(16, dtype=parameter, seed=2),
                ]  # fmt: skip
                results = with_gradients(lambda x, r, w: add_norm(op, target, x, r, w), tensors)
                assert [result.dtype for result in results] == [dtype, stream, dtype, stream, parameter]
                testing.assert_no_nan(*results)
