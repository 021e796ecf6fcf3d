"""torch's own recurrent modules and functions on our kernels: same results, errors and scripts, and all given back."""

import pytest
import torch
from enable_support import assert_same, everything_is_given_back, gradients, normal, served_by_ours
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusewright

pytestmark = pytest.mark.usefixtures(everything_is_given_back.__name__)

LAYERS = {
    "LSTM": lambda **options: nn.LSTM(5, 8, **options),
    "GRU": lambda **options: nn.GRU(5, 8, **options),
    "RNN tanh": lambda **options: nn.RNN(5, 8, **options),
    "RNN relu": lambda **options: nn.RNN(5, 8, nonlinearity="relu", **options),
}
CELLS = {
    "LSTM": lambda: nn.LSTMCell(5, 8),
    "GRU": lambda: nn.GRUCell(5, 8),
    "RNN tanh": lambda: nn.RNNCell(5, 8),
    "RNN relu": lambda: nn.RNNCell(5, 8, nonlinearity="relu"),
}
layers = pytest.mark.parametrize("name", LAYERS)
cells = pytest.mark.parametrize("name", CELLS)
OPTIONS = [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False, "num_layers": 2}]


def made(module):
    torch.manual_seed(0)
    return module()


def flattened(result):
    """Its tensors."""
    if isinstance(result, torch.Tensor):
        return [result]
    parts = [result.data] if isinstance(result, PackedSequence) else result
    return [tensor for part in parts for tensor in flattened(part)]


def trained(module, *inputs):
    """Results and gradients of the parameters."""
    results = flattened(module(*inputs))
    loss = sum(result.square().sum() for result in results)
    return [*results, *torch.autograd.grad(loss, list(module.parameters()))]


@pytest.mark.parametrize(
    "name, options",
    [*((name, options) for name in LAYERS for options in OPTIONS), *(("LSTM", {**o, "proj_size": 3}) for o in OPTIONS)],
    ids=str,
)
def test_layers(name, options):
    module, input = made(lambda: LAYERS[name](**options)), normal(4, 6, 5)
    expected, unbatched = trained(module, input), flattened(module(input[0]))
    with fusewright.enabled():
        assert served_by_ours(module, input)
        assert_same(trained(module, input), expected)
        assert_same(flattened(module(input[0])), unbatched)


@layers
def test_packed_sequences(name):
    module = made(lambda: LAYERS[name](num_layers=2, bidirectional=True))
    packed = pack_padded_sequence(normal(7, 4, 5), torch.tensor([3, 7, 1, 7]), enforce_sorted=False)
    expected = trained(module, packed)
    with fusewright.enabled():
        assert served_by_ours(module, packed)
        assert_same(trained(module, packed), expected)


@cells
def test_cells(name):
    module, input = made(CELLS[name]), normal(3, 5)
    expected, unbatched = trained(module, input), flattened(module(input[0]))
    with fusewright.enabled():
        assert served_by_ours(module, input)
        assert_same(trained(module, input), expected)
        assert_same(flattened(module(input[0])), unbatched)


@layers
def test_scripted_modules_are_torchs(name):
    # A scripted nn.LSTM is called from other modules only.
    module, input = nn.Sequential(made(LAYERS[name])), normal(4, 3, 5)
    expected = flattened(module(input))
    with fusewright.enabled():
        scripted = torch.jit.script(module)
        assert_same(flattened(scripted(input)), expected, rtol=0, atol=0)
    assert_same(flattened(scripted(input)), expected, rtol=0, atol=0)


@cells
def test_cells_compile_as_torchs_do(name):
    module, input = made(CELLS[name]), normal(3, 5)
    expected = trained(module, input)
    with fusewright.enabled():
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert_same(trained(compiled, input), expected)


def test_dropout_between_layers_draws_and_can_be_switched_off():
    module, input = made(lambda: nn.LSTM(5, 8, 2, dropout=0.5)), normal(4, 3, 5)
    expected = flattened(module.eval()(input))
    with fusewright.enabled():
        assert_same(flattened(module(input)), expected)
        module.train()
        assert not torch.equal(module(input)[0], module(input)[0])
        torch.manual_seed(3)
        first = module(input)[0]
        torch.manual_seed(3)
        assert torch.equal(module(input)[0], first)


def test_autocast_and_float64():
    module, input = made(LAYERS["LSTM"]), normal(4, 3, 5)
    expected = flattened(made(LAYERS["LSTM"]).double()(input.double()))
    with fusewright.enabled():
        with torch.autocast("cpu", torch.bfloat16):
            results = flattened(module(input))
        assert not served_by_ours(module.double(), input.double())
        assert_same(flattened(module(input.double())), expected, rtol=0, atol=0)
    assert_same([result.double() for result in results], expected, rtol=0.05, atol=0.02)


def error_of(*arguments):
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)) as error:
        torch.gru(*arguments)
    return error.type, str(error.value)


def test_what_ours_do_not_take_is_torchs():
    """Forward-mode derivatives, empty sequences, and calls that no kernel may see."""
    input = normal(4, 3, 5)
    plain = made(LAYERS["GRU"])
    weights = list(plain.parameters())
    h0 = torch.zeros(1, 3, 8)
    flags = (True, 1, 0.0, False, False, False)
    wrong = [
        (input, h0, weights[:3], *flags),
        (input, h0[..., :7], weights, *flags),
        (input, h0, [weights[0].T, *weights[1:]], *flags),
        (input.bfloat16(), h0, weights, *flags),
        (input[0], h0, weights, *flags),
        (input.reshape(12, 5), torch.tensor([5, 4, 9]), h0, weights, *flags[:-1]),
        (input, h0, weights),
    ]
    errors = [error_of(*arguments) for arguments in wrong]
    tangent = torch.func.jvp(lambda x: plain(x)[0], (input,), (torch.ones_like(input),))
    with fusewright.enabled():
        assert_same(torch.func.jvp(lambda x: plain(x)[0], (input,), (torch.ones_like(input),)), tangent)
        for arguments, error in zip(wrong, errors, strict=True):
            assert error_of(*arguments) == error
        with pytest.raises(RuntimeError):
            torch.lstm_cell(input[0], (h0[0], h0[0][:, :7]), *nn.LSTMCell(5, 8).parameters())


@pytest.mark.parametrize("name", ["lstm", "gru_cell"])
def test_one_function_alone(name):
    fastpath = torch.backends.mha.get_fastpath_enabled()
    before = {other: getattr(torch._VF, other) for other in ("lstm", "gru", "lstm_cell", "gru_cell")}
    with fusewright.enabled([name]):
        changed = [other for other, function in before.items() if getattr(torch._VF, other) is not function]
        assert changed == [name]
        assert getattr(torch, name) is getattr(torch._VF, name)
        assert torch.backends.mha.get_fastpath_enabled() == fastpath


def test_another_replacement_meanwhile_stays():
    fusewright.enable(["gru"])
    ours = torch.gru
    try:
        torch.gru = theirs = lambda *arguments: ours(*arguments)
        fusewright.disable()
        assert torch.gru is theirs
        module, input = made(LAYERS["GRU"]), normal(4, 3, 5)
        states = torch.zeros(1, 3, 8)
        arguments = (input, states, list(module.parameters()), True, 1, 0.0, False, False, False)
        assert_same(torch.gru(*arguments), torch._VF.gru(*arguments))
    finally:
        torch.gru = torch._VF.gru


def test_gradients_of_inputs_and_states():
    module = made(LAYERS["LSTM"])
    tensors = [normal(4, 3, 5), normal(1, 3, 8, seed=1), normal(1, 3, 8, seed=2)]

    def output(input, h, c):
        return module(input, (h, c))[0]

    expected = gradients(output, tensors)
    with fusewright.enabled():
        assert_same(gradients(output, tensors), expected)
