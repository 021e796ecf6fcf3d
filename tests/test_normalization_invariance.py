"""Normalisation gives the same bits for a row in any batch, on every run and for every thread count."""

import pytest
import torch
from op_support import add_norm, add_norms, dtypes, norm, norms, targets, with_gradients

from fusewright import testing

sizes = pytest.mark.parametrize("rows, columns", [(17, 64), (9, 1000), (33, 257)])


@sizes
@dtypes
@norms
@targets
def test_a_row_does_not_depend_on_its_batch(target, op, dtype, rows, columns):
    if target.backend == "reference":
        pytest.skip("torch's own reductions split by the shape of the whole tensor")
    input, grad = target.tensor(rows, columns, dtype=dtype), target.tensor(rows, columns, dtype=dtype, seed=3)
    weight, bias = target.tensor(columns, dtype=dtype, seed=1), target.tensor(columns, dtype=dtype, seed=2)

    def forward_and_input_gradient(x, g):
        leaf = x.detach().requires_grad_()
        output = norm(op, target, leaf, weight, bias)
        return output, *torch.autograd.grad(output, leaf, g)

    testing.assert_batch_invariant(forward_and_input_gradient, [input, grad])


@add_norms
@targets
def test_a_row_of_the_fused_addition_does_not_depend_on_its_batch(target, op):
    if target.backend == "reference":
        pytest.skip("torch's own reductions split by the shape of the whole tensor")
    input, residual = target.tensor(19, 333, dtype=torch.bfloat16), target.tensor(19, 333, seed=1)

    def forward_and_gradients(x, r):
        leaves = [x.detach().requires_grad_(), r.detach().requires_grad_()]
        outputs = add_norm(op, target, *leaves)
        return *outputs, *torch.autograd.grad([outputs[1]], leaves, [torch.ones_like(outputs[1])])

    testing.assert_batch_invariant(forward_and_gradients, [input, residual])


# 4096 rows are enough for every backend to split weight gradients into partial sums.
@pytest.mark.parametrize("rows, columns", [(4096, 96), (61, 1000), (3, 4097), (1, 70000)])
@dtypes
@norms
@targets
def test_every_run_and_every_thread_count_gives_the_same_bits(target, op, dtype, rows, columns):
    if target.interpreted:
        pytest.skip("the interpreter runs one program after the other")
    inputs = [
        target.tensor(*size, dtype=dtype, seed=i) for i, size in enumerate([(rows, columns), (columns,), (columns,)])
    ]

    def function(x, w, b):
        return with_gradients(lambda *tensors: norm(op, target, *tensors), [x, w, b])

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        testing.assert_repeatable(function, inputs)
        if target.device == "cpu" and target.backend != "reference":
            testing.assert_thread_count_invariant(function, inputs)
    finally:
        torch.use_deterministic_algorithms(before)


@add_norms
@targets
def test_the_fused_addition_gives_the_same_bits_for_every_thread_count(target, op):
    if target.backend != "cpu":
        pytest.skip("only the compiled CPU kernels divide work by the thread count")
    inputs = [target.tensor(*size, seed=i) for i, size in enumerate([(2048, 96), (2048, 96), (96,), (96,)])]
    testing.assert_thread_count_invariant(
        lambda *tensors: with_gradients(lambda *t: add_norm(op, target, *t, dropout_p=0.1, seed=5), tensors), inputs
    )


@norms
@targets
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(target, op):
    input, weight, bias = target.tensor(40, 130), target.tensor(130, seed=1), target.tensor(130, seed=2)
    grad = target.tensor(40, 130, seed=3)

    def gradients(*wanted):
        tensors = [t.clone().requires_grad_(want) for t, want in zip((input, weight, bias), wanted, strict=True)]
        norm(op, target, *tensors).backward(grad)
        return [tensor.grad for tensor in tensors]

    together = gradients(True, True, True)
    for index in range(3):
        alone = gradients(*(index == other for other in range(3)))
        testing.assert_accurate(alone[index], together[index].double())
        assert [gradient is None for gradient in alone] == [index != other for other in range(3)]
