"""Derivatives of every order, functorch transforms and checkpointing of the normalisation ops."""

import pytest
import torch
from op_support import Target, add_norm, add_norms, kernel_targets, norm, norms, plain_norm, targets
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from fusewright import testing
from fusewright_kernels.normalization import reference

FLOAT64 = Target("reference", "cpu")


@norms
@pytest.mark.parametrize("zero_centered_weight", [False, True])
def test_first_and_second_derivatives_in_float64(op, zero_centered_weight):
    tensors = [FLOAT64.tensor(*size, dtype=torch.float64, seed=i, requires_grad=True)
               for i, size in enumerate([(3, 2, 5), (5,), (5,)])]  # fmt: skip

    def function(x, w, b):
        return norm(op, FLOAT64, x, w, b, zero_centered_weight=zero_centered_weight)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@add_norms
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_derivatives_of_the_fused_addition_in_float64(op, dropout_p):
    tensors = [FLOAT64.tensor(*size, dtype=torch.float64, seed=i, requires_grad=True)
               for i, size in enumerate([(3, 5), (3, 5), (5,), (5,)])]  # fmt: skip

    def function(x, r, w, b):
        return add_norm(op, FLOAT64, x, r, w, b, dropout_p=dropout_p, seed=4)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def _second_derivatives(function, tensors):
    """Gradients of a scalar made of the first gradients, so that every second derivative takes part."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    loss = sum((output.double() ** 3).sum() for output in outputs)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    return torch.autograd.grad(sum((gradient.double() ** 2).sum() for gradient in first), leaves)


@norms
@kernel_targets
def test_double_backward(target, op):
    tensors = [target.tensor(*size, seed=i) for i, size in enumerate([(6, 40), (40,), (40,)])]
    actual = _second_derivatives(lambda *t: norm(op, target, *t), tensors)
    plain = _second_derivatives(plain_norm(op), [tensor.cpu() for tensor in tensors])
    expected = _second_derivatives(
        lambda x, w, b: reference.norm(x, w, b, 1, 1e-5, op == "layer_norm", 0.0),
        [tensor.cpu().double() for tensor in tensors],
    )
    for result, of_plain, oracle in zip(actual, plain, expected, strict=True):
        # Two backward passes and the losses between them round more often than one op may.
        allowed = max(24.0, 2.0 * testing.error_in_u(of_plain, oracle))
        assert testing.error_in_u(result.cpu(), oracle) <= allowed


@add_norms
@kernel_targets
def test_double_backward_of_the_fused_addition(target, op):
    tensors = [target.tensor(*size, seed=i) for i, size in enumerate([(6, 40), (6, 40), (40,), (40,)])]
    actual = _second_derivatives(lambda *t: add_norm(op, target, *t, dropout_p=0.2, seed=7), tensors)
    expected = _second_derivatives(
        lambda *t: add_norm(op, FLOAT64, *t, dropout_p=0.2, seed=7), [tensor.cpu().double() for tensor in tensors]
    )
    for result, oracle in zip(actual, expected, strict=True):
        testing.assert_accurate(result.cpu(), oracle, "gradient")


def _assert_like_plain(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@norms
@targets
def test_functorch_gradients(target, op):
    input, weight, bias = target.tensor(4, 24), target.tensor(24, seed=1), target.tensor(24, seed=2)

    def ours(x, w, b):
        return norm(op, target, x, w, b).square().sum()

    def plain(x, w, b):
        return plain_norm(op)(x, w, b).square().sum()

    arguments = (input, weight, bias)
    _assert_like_plain(grad(ours, (0, 1, 2))(*arguments), grad(plain, (0, 1, 2))(*arguments))
    for in_dims in ((0, None, None), (0, None, 0)):
        tensors = (input, weight, bias if in_dims[2] is None else target.tensor(4, 24, seed=3))
        per_sample = vmap(grad(ours, (0, 1, 2)), in_dims)(*tensors)
        _assert_like_plain(per_sample, vmap(grad(plain, (0, 1, 2)), in_dims)(*tensors))


@norms
@targets
def test_jacobians(target, op):
    input, weight, bias = target.tensor(2, 8), target.tensor(8, seed=1), target.tensor(8, seed=2)

    def ours(x, w):
        return norm(op, target, x, w, bias)

    def plain(x, w):
        return plain_norm(op)(x, w, bias)

    _assert_like_plain(jacrev(ours, (0, 1))(input, weight), jacrev(plain, (0, 1))(input, weight))
    if target.backend == "reference":
        _assert_like_plain(jacfwd(ours)(input, weight), jacfwd(plain)(input, weight))


@norms
@targets
@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (1, None, None), (2, None, None), (0, 0, None), (0, 1, 0), (None, 0, 0)]
)
def test_vmap_over_any_dimension(target, op, in_dims):
    sizes = [[3, 4, 16], [16], [16]]
    for size, dim in zip(sizes, in_dims, strict=True):
        if dim is not None:
            size.insert(dim, 5)
    tensors = [target.tensor(*size, seed=i) for i, size in enumerate(sizes)]
    actual = vmap(lambda *t: norm(op, target, *t), in_dims)(*tensors)
    _assert_like_plain(actual, vmap(plain_norm(op), in_dims)(*tensors))


@add_norms
@targets
def test_vmap_of_the_fused_addition(target, op):
    input, residual, weight = target.tensor(5, 3, 16), target.tensor(3, 16, seed=1), target.tensor(16, seed=2)

    def loss(x, r, w):
        output, stream = add_norm(op, target, x, r, w)
        return (output * stream).sum()

    def plain(x, r, w):
        return (plain_norm(op.removeprefix("add_"))(x + r, w, None) * (x + r)).sum()

    arguments = (input, residual, weight)
    actual = vmap(grad(loss, (0, 1, 2)), (0, None, None))(*arguments)
    _assert_like_plain(actual, vmap(grad(plain, (0, 1, 2)), (0, None, None))(*arguments))


@targets
def test_samples_under_vmap_share_the_mask_of_one_seed(target):
    input, residual = target.tensor(4, 3, 16), target.tensor(4, 3, 16, seed=1)

    def function(x, r):
        return add_norm("add_rms_norm", target, x, r, dropout_p=0.5, seed=3)[1]

    batched = vmap(function)(input, residual)
    for sample in range(4):
        assert torch.equal(batched[sample], function(input[sample], residual[sample]))


@norms
@targets
def test_gradient_checkpointing(target, op):
    input, weight = target.tensor(6, 32, requires_grad=True), target.tensor(32, seed=1, requires_grad=True)
    norm(op, target, input, weight).square().sum().backward()
    expected = input.grad.clone(), weight.grad.clone()
    input.grad = weight.grad = None
    checkpoint(lambda x: norm(op, target, x, weight), input, use_reentrant=False).square().sum().backward()
    assert testing.bits_equal(input.grad, expected[0])
    assert testing.bits_equal(weight.grad, expected[1])


@targets
def test_gradients_of_only_one_of_the_two_results(target):
    input, residual = target.tensor(5, 32, requires_grad=True), target.tensor(5, 32, seed=1, requires_grad=True)
    output, _ = add_norm("add_layer_norm", target, input, residual)
    grad_output = torch.autograd.grad(output.square().sum(), (input, residual))
    _, stream = add_norm("add_layer_norm", target, input, residual)
    grad_stream = torch.autograd.grad(stream.sum(), (input, residual))
    plain = torch.nn.functional.layer_norm(input + residual, (32,))
    _assert_like_plain(grad_output, torch.autograd.grad(plain.square().sum(), (input, residual)))
    assert all(torch.equal(gradient, torch.ones_like(gradient)) for gradient in grad_stream)


@norms
@targets
def test_no_graph_is_kept_without_need(target, op):
    input, weight = target.tensor(3, 8), target.tensor(8, seed=1, requires_grad=True)
    assert norm(op, target, input).grad_fn is None
    with torch.no_grad():
        assert norm(op, target, input, weight).grad_fn is None
    with torch.inference_mode():
        assert not norm(op, target, input, weight).requires_grad
    assert norm(op, target, input, weight).requires_grad


@targets
def test_a_module_is_called_functionally(target):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(16))

        def forward(self, x):
            return norm("rms_norm", target, x, self.weight)

    input, weight = target.tensor(4, 16), target.tensor(16, seed=1)
    actual = grad(lambda w: functional_call(Block(), {"weight": w}, input).square().sum())(weight)
    expected = grad(lambda w: plain_norm("rms_norm")(input, w, None).square().sum())(weight)
    _assert_like_plain(actual, expected)
