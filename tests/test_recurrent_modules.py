"""nn.LSTM, GRU, RNN and their cells against torch.nn's: constructor, state_dict, every configuration, errors."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from fusewright import nn

KINDS = ("LSTM", "GRU", "RNN")
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def pair(kind, *args, **options):
    """torch's module and ours with its parameters."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(torch.nn, kind)(*args, **options)
        ours = getattr(nn, kind)(*args, **options)
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    assert theirs.load_state_dict(ours.state_dict()).unexpected_keys == []
    return theirs, ours


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]


def assert_same(theirs, ours, input, hx=None):
    """Equal in value and in the gradient of input, states and parameters."""
    results = []
    for module in (theirs, ours):
        leaf = input.data if isinstance(input, PackedSequence) else input
        leaf = leaf.detach().requires_grad_()
        given = input._replace(data=leaf) if isinstance(input, PackedSequence) else leaf
        states = [state.detach().requires_grad_() for state in (() if hx is None else flat(hx))]
        result = module(given, *(() if hx is None else (tuple(states) if len(states) > 1 else states[0],)))
        outputs = flat(result)
        generator = torch.Generator().manual_seed(5)
        grads = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
        leaves = [leaf, *states, *module.parameters()]
        results.append(outputs + list(torch.autograd.grad(outputs, leaves, grads)))
    for expected, actual in zip(*results, strict=True):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def states(kind, *size, dtype, proj=0):
    h = torch.randn(*size[:-1], proj or size[-1], dtype=dtype)
    return (h, torch.randn(*size, dtype=dtype)) if kind == "LSTM" else h


@kinds
@dtypes
def test_every_configuration(kind, dtype):
    for layers, directions, bias, batch_first in itertools.product((1, 2), (1, 2), (True, False), (False, True)):
        theirs, ours = pair(
            kind, 5, 6, layers, bias=bias, batch_first=batch_first, bidirectional=directions == 2, dtype=dtype
        )
        input = torch.randn(3, 4, 5, dtype=dtype)
        batch = 3 if batch_first else 4
        assert_same(theirs, ours, input)
        assert_same(theirs, ours, input, states(kind, layers * directions, batch, 6, dtype=dtype))
        assert_same(theirs, ours, input[0])
        assert_same(theirs, ours, input[0], states(kind, layers * directions, 6, dtype=dtype))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_projection(bidirectional):
    theirs, ours = pair("LSTM", 5, 6, 2, proj_size=3, bidirectional=bidirectional)
    assert_same(theirs, ours, torch.randn(4, 3, 5))
    hx = states("LSTM", 4 if bidirectional else 2, 3, 6, dtype=torch.float32, proj=3)
    assert_same(theirs, ours, torch.randn(4, 3, 5), hx)
    packed = pack_sequence([torch.randn(n, 5) for n in (2, 4, 1)], enforce_sorted=False)
    assert_same(theirs, ours, packed, hx)


@kinds
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences(kind, bidirectional):
    theirs, ours = pair(kind, 5, 6, 2, bidirectional=bidirectional)
    for lengths in ((5, 4, 2, 2), (2, 5, 1, 3), (1,)):
        packed = pack_sequence([torch.randn(n, 5) for n in lengths], enforce_sorted=lengths[0] == max(lengths))
        assert_same(theirs, ours, packed)
        hx = states(kind, 4 if bidirectional else 2, len(lengths), 6, dtype=torch.float32)
        assert_same(theirs, ours, packed, hx)


@kinds
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_are_packed_sequences(kind, batch_first):
    theirs, ours = pair(kind, 5, 6, 2, bidirectional=True, batch_first=batch_first)
    lengths = torch.tensor([2, 5, 1, 3])
    input = torch.randn(4, 5, 5) if batch_first else torch.randn(5, 4, 5)
    packed = pack_padded_sequence(input, lengths, batch_first, enforce_sorted=False)
    expected, last = theirs(packed)
    output, states_after = ours(input, lengths=lengths)
    torch.testing.assert_close(output, pad_packed_sequence(expected, batch_first)[0])
    for actual, other in zip(flat(states_after), flat(last), strict=True):
        torch.testing.assert_close(actual, other)


@kinds
def test_resets_split_a_sequence(kind):
    ours = getattr(nn, kind)(5, 6, 2, batch_first=True)
    input, resets = torch.randn(3, 7, 5), torch.zeros(3, 7, dtype=torch.bool)
    resets[:, 4] = True
    output, _ = ours(input, resets=resets)
    torch.testing.assert_close(output[:, 4:], ours(input[:, 4:])[0])
    torch.testing.assert_close(ours(input[0], resets=resets[0])[0], output[0])


def test_dropout_between_layers_draws_as_torch():
    theirs, ours = pair("GRU", 5, 6, 3, dropout=0.5)
    input = torch.randn(4, 3, 5)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(7)
        results.append(module(input)[0])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(ours.eval()(input)[0], theirs.eval()(input)[0])
    assert not torch.allclose(ours(input)[0], results[1])


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nonlinearities(nonlinearity):
    theirs, ours = pair("RNN", 5, 6, nonlinearity=nonlinearity)
    assert_same(theirs, ours, torch.randn(4, 3, 5))
    theirs, ours = pair("RNNCell", 5, 6, nonlinearity=nonlinearity)
    assert_same(theirs, ours, torch.randn(3, 5))


@pytest.mark.parametrize("bias", [True, False])
@kinds
def test_cells(kind, bias):
    theirs, ours = pair(f"{kind}Cell", 5, 6, bias)
    for batch in ((), (3,)):
        assert_same(theirs, ours, torch.randn(*batch, 5))
        assert_same(theirs, ours, torch.randn(*batch, 5), states(kind, *batch, 6, dtype=torch.float32))


@kinds
def test_low_precision_modules(kind):
    for dtype in (torch.bfloat16, torch.float16):
        theirs, ours = pair(kind, 20, 40, dtype=dtype)
        input = torch.randn(6, 3, 20, dtype=dtype)
        actual, expected = ours(input)[0], theirs.double()(input.double())[0]
        torch.testing.assert_close(actual.double(), expected, rtol=0.0, atol=2.0 * torch.finfo(dtype).eps)


@kinds
def test_copies_pickles_and_functional_calls(kind):
    _, ours = pair(kind, 5, 6, 2)
    input = torch.randn(4, 3, 5)
    expected = ours(input)[0]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours) and repr(other) == repr(ours)
        torch.testing.assert_close(other(input)[0], expected)
    doubled = {name: 2.0 * parameter for name, parameter in ours.named_parameters()}
    called = torch.func.functional_call(ours, doubled, (input,))[0]
    other = copy.deepcopy(ours)
    other.load_state_dict(doubled)
    torch.testing.assert_close(called, other(input)[0])
    assert ours.double()(input.double())[0].dtype is torch.float64


@kinds
def test_empty_inputs(kind):
    _, ours = pair(kind, 5, 6)
    hx = states(kind, 1, 3, 6, dtype=torch.float32)
    output, last = ours(torch.randn(0, 3, 5), hx)
    assert output.shape == (0, 3, 6)
    for actual, expected in zip(flat(last), flat(hx), strict=True):
        torch.testing.assert_close(actual, expected)
    assert ours(torch.randn(4, 0, 5))[0].shape == (4, 0, 6)


@kinds
def test_torchs_errors(kind):
    theirs, ours = pair(kind, 5, 6)
    good = torch.randn(4, 3, 5)
    for input, hx in (
        (torch.randn(4), None),
        (torch.randn(4, 3, 6), None),
        (good.double(), None),
        (good, states(kind, 2, 3, 6, dtype=torch.float32)),
        (good, states(kind, 1, 2, 6, dtype=torch.float32)),
        (good, states(kind, 1, 6, dtype=torch.float32)),
        (good[0], states(kind, 1, 3, 6, dtype=torch.float32)),
    ):
        with pytest.raises(Exception) as expected:  # whatever torch raises
            theirs(input, hx)
        with pytest.raises(expected.type) as actual:
            ours(input, hx)
        assert str(actual.value) == str(expected.value)
    if kind == "LSTM":
        for bidirectional, count in ((False, 1), (False, 3), (True, 1), (True, 3)):
            module = nn.LSTM(5, 6, bidirectional=bidirectional)
            with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
                module(good, (torch.zeros(2 if bidirectional else 1, 3, 6),) * count)
    with pytest.raises(ValueError, match="proj_size"):
        getattr(nn, kind)(5, 6, proj_size=6)
    with pytest.raises(ValueError, match="PackedSequence"):
        ours(pack_sequence([torch.randn(2, 5)]), lengths=torch.tensor([2]))


@kinds
def test_errors_of_cells(kind):
    theirs, ours = pair(f"{kind}Cell", 5, 6)
    for input in (torch.randn(2, 3, 5), torch.tensor(1.0)):
        with pytest.raises(Exception) as expected:
            theirs(input)
        with pytest.raises(expected.type, match="Expected input to be 1D or 2D"):
            ours(input)
    with pytest.raises(RuntimeError):
        ours(torch.randn(3, 4))
    with pytest.raises(RuntimeError):
        ours(torch.randn(3, 5), states(kind, 2, 6, dtype=torch.float32))
