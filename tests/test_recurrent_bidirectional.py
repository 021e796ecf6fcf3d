"""Both directions of a recurrent layer at once: the bits of one after the other, and every way to differentiate it."""

import pytest
import torch
from test_recurrent_numerics import layer_inputs

from fusewright import nn, testing
from fusewright_kernels import library
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError
from fusewright_kernels.recurrent.layer import Weights
from fusewright_kernels.recurrent.op import bidirectional, recurrent

OPS = ("lstm", "projected_lstm", "gru", "rnn_tanh", "rnn_relu")
ops = pytest.mark.parametrize("op", OPS)


def inputs_of(op, steps, batch, width, hidden, dtype=torch.float32):
    """Input, states of both directions, and the parameters of either, None for what the cell has not."""
    forward = layer_inputs(op, steps, batch, width, hidden, dtype)
    reverse = {name: tensor.flip(0) for name, tensor in forward.items()}
    states = [torch.stack([forward[n], reverse[n]]) if n in forward else None for n in ("h0", "c0")]
    parameters = [weights.get(name) for weights in (forward, reverse) for name in Weights._fields]
    return [forward["input"], *states, *parameters]


def side_by_side(op, tensors, lengths=None, resets=None, backend=None):
    cell = op.removeprefix("projected_")
    weights = Weights(*tensors[3:8]), Weights(*tensors[8:])
    results = bidirectional(cell, *tensors[:3], *weights, lengths, resets, backend)
    return results[: 3 if cell == "lstm" else 2]


def one_after_the_other(op, tensors, lengths=None, resets=None, backend=None):
    cell = op.removeprefix("projected_")
    input, h0, c0, *parameters = tensors
    outputs, *states = zip(
        *(
            recurrent(
                cell, input, h0[d], None if c0 is None else c0[d], Weights(*parameters[5 * d : 5 * d + 5]), lengths,
                resets, d == 1, backend,
            )
            for d in range(2)
        ),
        strict=True,
    )  # fmt: skip
    return torch.cat(outputs, -1), *(torch.stack(pair) for pair in states[: 2 if cell == "lstm" else 1])


def results_and_gradients(function, op, tensors, *masks, **options):
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    results = function(op, leaves, *masks, **options)
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(result.shape, generator=generator).to(result) for result in results]
    return [*results, *torch.autograd.grad(results, [leaf for leaf in leaves if leaf is not None], grads)]


@ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 3, 5, 7), (20, 17, 33, 100), (30, 2, 8, 130)], ids=str)
def test_the_bits_of_one_after_the_other(op, dtype, sizes):
    """On as many threads as share out in every way: one for both, one or two each, three for each in turn."""
    tensors, (steps, batch) = inputs_of(op, *sizes, dtype), sizes[:2]
    masks = torch.randint(0, steps + 1, (batch,)), torch.rand(steps, batch) < 0.2
    for given in ((), masks):
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            expected = results_and_gradients(one_after_the_other, op, tensors, *given)
            with testing.poisoned_allocations():
                actual = results_and_gradients(side_by_side, op, tensors, *given)
            assert all(testing.bits_equal(*pair) for pair in zip(actual, expected, strict=True))
    torch.set_num_threads(1)


@ops
def test_empty_sizes(op):
    for steps, batch in ((0, 3), (4, 0)):
        tensors = inputs_of(op, steps, batch, 5, 6)
        expected = results_and_gradients(one_after_the_other, op, tensors)
        for actual, other in zip(results_and_gradients(side_by_side, op, tensors), expected, strict=True):
            assert testing.bits_equal(actual, other)


@ops
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(op, backend):
    forward, backward = (library.overload(f"bidirectional_{name}", backend) for name in ("forward", "backward"))
    cell = op.removeprefix("projected_")
    arguments = (*inputs_of(op, 4, 3, 5, 6), torch.tensor([4, 0, 2]), torch.rand(4, 3) < 0.5, cell)
    checks = ("test_schema", "test_faketensor")
    for save_states in (False, True):
        torch.library.opcheck(forward, (*arguments, save_states), test_utils=checks)
    output, h_n, c_n, gates, cells = forward(*arguments, True)
    every = torch.randn_like(output), torch.randn_like(h_n), torch.randn_like(c_n) if cell == "lstm" else None
    for grads, needs in ((every, (True, True, True)), ((every[0], None, None), (True, False, False))):
        torch.library.opcheck(backward, (*grads, output, gates, cells, *arguments, *needs), test_utils=checks)


@ops
def test_second_derivatives(op):
    results = []
    for function in (side_by_side, one_after_the_other):
        leaves = [None if t is None else t.requires_grad_() for t in inputs_of(op, 4, 3, 5, 6)]
        wanted = [leaf for leaf in leaves if leaf is not None]
        first = torch.autograd.grad(function(op, leaves)[0].square().sum(), wanted, create_graph=True)
        results.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), wanted))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("op", ["projected_lstm", "gru"])
def test_vmap(op):
    """Over samples, over the weights of one direction, and of gradients."""
    tensors = inputs_of(op, 4, 3, 5, 6)
    for mapped in ((0,), (0, 1), (9,), (0, 3, 8)):
        dims = tuple(0 if index in mapped else None for index in range(len(tensors)))
        batched = [torch.stack([t, 2.0 * t]) if d == 0 else t for t, d in zip(tensors, dims, strict=True)]

        def loss(*tensors):
            return side_by_side(op, tensors)[0].square().sum()

        actual = torch.vmap(lambda *values: side_by_side(op, values), dims)(*batched)
        grads = torch.vmap(torch.func.grad(loss, mapped), dims)(*batched)
        for n in range(2):
            sample = [t[n] if d == 0 else t for t, d in zip(batched, dims, strict=True)]
            for result, expected in zip(actual, side_by_side(op, sample), strict=True):
                torch.testing.assert_close(result[n], expected)
            for grad, expected in zip(grads, torch.func.grad(loss, mapped)(*sample), strict=True):
                torch.testing.assert_close(grad[n], expected)


def test_only_the_wanted_gradients():
    module = nn.GRU(5, 6, bidirectional=True)
    module.weight_hh_l0_reverse.requires_grad_(False)
    input = torch.randn(4, 3, 5)
    module(input)[0].sum().backward()
    assert module.weight_hh_l0_reverse.grad is None and module.weight_hh_l0.grad.ne(0).any() and input.grad is None
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    grad = torch.autograd.grad(module(input.requires_grad_())[0].sum(), input)[0]
    assert grad.ne(0).all()


def test_states_of_one_direction_are_refused():
    tensors = inputs_of("lstm", 4, 3, 5, 6)
    for index, name in ((1, "h0"), (2, "c0")):
        with pytest.raises(ArgumentValueError, match=rf"{name}\.shape is \(3, 6\)"):
            side_by_side("lstm", [*tensors[:index], tensors[index][0], *tensors[index + 1 :]])
    with pytest.raises(ArgumentTypeError, match="c0 is a NoneType"):
        side_by_side("lstm", [*tensors[:2], None, *tensors[3:]])
    masks_and_cell = (None, None, "lstm")
    with pytest.raises(RuntimeError, match="c0 is None"):
        library.overload("bidirectional_forward", "cpu")(*tensors[:2], None, *tensors[3:], *masks_and_cell, False)


def test_what_serves_both_directions_elsewhere_is_two_of_one():
    tensors = [None if t is None else t.double() for t in inputs_of("lstm", 4, 3, 5, 6)]
    results = results_and_gradients(side_by_side, "lstm", tensors)
    for actual, expected in zip(results, results_and_gradients(one_after_the_other, "lstm", tensors), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)
