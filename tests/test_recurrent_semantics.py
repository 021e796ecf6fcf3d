"""Lengths, resets, directions and empty sizes of the recurrent layers; memory beside their tensors; processes."""

import os
import signal
import threading

import pytest
import torch
from test_recurrent_numerics import layer_inputs, run

from fusewright import testing

OPS = ("lstm", "projected_lstm", "gru", "rnn_tanh", "rnn_relu")
ops = pytest.mark.parametrize("op", OPS)
backends = pytest.mark.parametrize("backend", ["cpu", "reference"])
NAN = float("nan")


def with_gradients(op, leaves, **options):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    results = run(op, leaves, **options)
    results = results[: 3 if "c0" in leaves else 2]
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(result.shape, generator=generator).to(result) for result in results]
    return list(results), dict(zip(leaves, torch.autograd.grad(results, list(leaves.values()), grads), strict=True))


@ops
@backends
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_are_each_sample_alone(op, backend, reverse):
    leaves = layer_inputs(op, 7, 6, 5, 20)
    lengths = torch.tensor([3, 7, 0, 1, 7, 6])
    behind = (torch.arange(7)[:, None] >= lengths)[..., None]
    leaves["input"] = leaves["input"].masked_fill(behind, NAN)
    output, *last = run(op, leaves, lengths=lengths.int(), reverse=reverse, backend=backend)
    assert output.masked_select(behind.expand_as(output)).eq(0).all()
    for b, length in enumerate(lengths.tolist()):
        alone = dict(leaves, input=leaves["input"][:length, b : b + 1])
        alone |= {name: leaves[name][b : b + 1] for name in ("h0", "c0") if name in leaves}
        expected, *states = run(op, alone, reverse=reverse, backend=backend)
        torch.testing.assert_close(output[:length, b : b + 1], expected)
        for state, other in zip(last, states, strict=True):
            torch.testing.assert_close(state[b : b + 1], other)


@ops
@backends
def test_gradients_reach_nothing_behind_the_end(op, backend):
    leaves = layer_inputs(op, 7, 4, 5, 20)
    lengths = torch.tensor([3, 7, 0, 5])
    behind = (torch.arange(7)[:, None] >= lengths)[..., None]
    clean = with_gradients(op, leaves, lengths=lengths, backend=backend)[1]
    leaves["input"] = leaves["input"].masked_fill(behind, NAN)
    grads = with_gradients(op, leaves, lengths=lengths, backend=backend)[1]
    assert grads["input"].masked_select(behind).eq(0).all()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, clean[name])


@ops
@backends
@pytest.mark.parametrize("reverse", [False, True])
def test_a_reset_starts_a_sequence_anew(op, backend, reverse):
    leaves = layer_inputs(op, 8, 3, 5, 20)
    resets = torch.zeros(8, 3, dtype=torch.bool)
    resets[4, 1] = True
    output, *_ = run(op, leaves, resets=resets, reverse=reverse, backend=backend)
    plain, *_ = run(op, leaves, reverse=reverse, backend=backend)
    changed = slice(0, 5) if reverse else slice(4, 8)
    torch.testing.assert_close(output[:, [0, 2]], plain[:, [0, 2]])
    fresh = dict(leaves, input=leaves["input"][changed])
    fresh |= {name: torch.zeros_like(leaves[name]) for name in ("h0", "c0") if name in leaves}
    torch.testing.assert_close(output[changed, 1], run(op, fresh, reverse=reverse, backend=backend)[0][:, 1])
    assert not torch.allclose(output[changed, 1], plain[changed, 1])


@ops
def test_reverse_is_the_flipped_sequence(op):
    leaves = layer_inputs(op, 9, 4, 5, 20)
    output, *last = run(op, leaves, reverse=True)
    flipped, *others = run(op, dict(leaves, input=leaves["input"].flip(0)))
    assert testing.bits_equal(output, flipped.flip(0))
    assert all(testing.bits_equal(a, b) for a, b in zip(last, others, strict=True))


@ops
@backends
def test_empty_sizes(op, backend):
    for steps, batch in ((0, 3), (4, 0), (0, 0)):
        leaves = layer_inputs(op, steps, batch, 5, 6)
        results, grads = with_gradients(op, leaves, backend=backend)
        assert results[0].shape == (steps, batch, leaves["h0"].shape[1])
        if steps == 0:
            assert testing.bits_equal(results[1], leaves["h0"])
        assert grads["weight_ih"].eq(0).all() and grads["bias_hh"].eq(0).all()
    for steps in (1, 3):
        leaves = layer_inputs(op, steps, 2, 5, 6)
        (output, h_n, *_), grads = with_gradients(
            op, leaves, lengths=torch.zeros(2, dtype=torch.int64), backend=backend
        )
        assert output.eq(0).all() and testing.bits_equal(h_n, leaves["h0"])
        assert grads["h0"].ne(0).any() and grads["weight_hh"].eq(0).all()
    leaves = layer_inputs(op, 3, 2, 0, 6)
    (output, *_), grads = with_gradients(op, leaves, backend=backend)
    assert output.isfinite().all() and grads["input"].shape == (3, 2, 0)


@ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_beside_the_tensors_is_read_or_written(op, dtype):
    for steps, batch, width, hidden in ((3, 5, 7, 9), (2, 17, 33, 47)):
        leaves = layer_inputs(op, steps, batch, width, hidden, dtype)
        guards = {name: testing.guarded(tensor, offset=1) for name, tensor in leaves.items()}
        inside = {name: guard.tensor for name, guard in guards.items()}
        lengths = torch.randint(0, steps + 1, (batch,), generator=torch.Generator().manual_seed(0))
        with testing.poisoned_allocations():
            results, grads = with_gradients(op, inside, lengths=lengths, backend="cpu")
        testing.assert_no_nan(*results, *grads.values())
        expected, expected_grads = with_gradients(op, leaves, lengths=lengths, backend="cpu")
        assert all(testing.bits_equal(a, b) for a, b in zip(results, expected, strict=True))
        assert all(testing.bits_equal(grads[name], expected_grads[name]) for name in grads)
        for name, guard in guards.items():
            guard.check(name)


@ops
def test_any_strides(op):
    leaves = layer_inputs(op, 5, 6, 8, 20)
    results, grads = with_gradients(op, leaves)
    spread = {
        name: torch.stack([tensor, tensor + 1.0], -1)[..., 0] if tensor.ndim < 3
        else tensor.transpose(0, 1).contiguous().transpose(0, 1)
        for name, tensor in leaves.items()
    }  # fmt: skip
    for inputs in (spread, dict(leaves, input=torch.stack([leaves["input"]] * 2, -1)[..., 1])):
        others, other_grads = with_gradients(op, inputs)
        assert all(testing.bits_equal(a, b) for a, b in zip(results, others, strict=True))
        for name, grad in grads.items():
            torch.testing.assert_close(grad, other_grads[name], msg=name)
    expanded = leaves["input"][:, :1].expand_as(leaves["input"])
    torch.testing.assert_close(
        run(op, dict(leaves, input=expanded))[0], run(op, dict(leaves, input=expanded.contiguous()))[0]
    )


def test_a_gradient_of_the_last_states_alone():
    leaves = {name: tensor.requires_grad_() for name, tensor in layer_inputs("lstm", 4, 3, 5, 6).items()}
    for index in (1, 2):
        grads = [
            torch.autograd.grad(run("lstm", leaves, backend=backend)[index].square().sum(), list(leaves.values()))
            for backend in ("cpu", "reference")
        ]
        for actual, expected in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected)


def _layer():
    leaves = layer_inputs("lstm", 20, 16, 128, 128)
    return run("lstm", leaves)[0]


def test_a_forked_child_with_one_thread_works():
    torch.set_num_threads(2)
    expected = _layer()
    child = os.fork()
    if child == 0:  # no assertion may leave the child, and a hang must end
        signal.alarm(60)
        torch.set_num_threads(1)
        os._exit(0 if testing.bits_equal(_layer(), expected) else 1)
    torch.set_num_threads(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_several_threads_of_the_program_at_once():
    expected = _layer()
    wrong = []

    def work():
        torch.set_num_threads(2)
        wrong.extend(n for n in range(5) if not testing.bits_equal(_layer(), expected))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(1)
    assert not wrong


def test_inside_a_parallel_region():
    """A backward runs on a thread of autograd's own, and torch's fork of the interpreter on one of its pool."""
    expected = _layer()
    torch.set_num_threads(2)
    futures = [torch.jit.fork(_layer) for _ in range(3)]
    assert all(testing.bits_equal(torch.jit.wait(future), expected) for future in futures)
    torch.set_num_threads(1)
