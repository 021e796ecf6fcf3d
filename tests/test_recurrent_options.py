"""Options of the recurrent modules beyond torch's: weight dropout, zoneout, layer-normalised gates, peepholes,
identity initialisation.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F

import fusewright
from fusewright import functional, nn
from fusewright_kernels import dispatch

MODULES = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
modules = pytest.mark.parametrize("name", MODULES)
LENGTHS = [4, 6, 0]


@pytest.fixture(autouse=True)
def no_warning_of_the_plain_formula():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "varied_recurrent runs as plain PyTorch")
        yield


def made(name, seed=0, **options):
    torch.manual_seed(seed)
    return MODULES[name](5, 8, **options)


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return module


def inputs():
    return torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(1))


def normalised(product, gain, bias):
    return F.layer_norm(product, product.shape[-1:]) * gain + bias


def lstm_by_hand(module, x):
    """One layer with normalised gates and peepholes, written out."""
    h = c = x.new_zeros(x.shape[1], module.hidden_size)
    outputs = []
    for row in x:
        gates = normalised(row @ module.weight_ih_l0.T, module.gain_ih_l0, module.bias_ih_l0)
        gates = gates + normalised(h @ module.weight_hh_l0.T, module.gain_hh_l0, module.bias_hh_l0)
        i, f, g, o = gates.chunk(4, 1)
        peephole = module.peephole_l0
        c = (f + peephole[1] * c).sigmoid() * c + (i + peephole[0] * c).sigmoid() * g.tanh()
        shown = normalised(c, module.gain_cell_l0, module.bias_cell_l0)
        h = (o + peephole[2] * c).sigmoid() * shown.tanh()
        outputs.append(h)
    return torch.stack(outputs)


def gru_by_hand(module, x):
    h = x.new_zeros(x.shape[1], module.hidden_size)
    outputs = []
    for row in x:
        r_in, z_in, n_in = normalised(row @ module.weight_ih_l0.T, module.gain_ih_l0, module.bias_ih_l0).chunk(3, 1)
        r, z, n = normalised(h @ module.weight_hh_l0.T, module.gain_hh_l0, module.bias_hh_l0).chunk(3, 1)
        n = (n_in + (r_in + r).sigmoid() * n).tanh()
        h = n + (z_in + z).sigmoid() * (h - n)
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "name, by_hand, options",
    [("LSTM", lstm_by_hand, {"peephole": True}), ("GRU", gru_by_hand, {})],
    ids=["LSTM", "GRU"],
)
def test_normalised_gates_and_peepholes_are_the_formula(name, by_hand, options):
    module, x = randomised(made(name, layer_norm=True, **options).double()), inputs().double()
    actual, expected = module(x)[0], by_hand(module, x)
    torch.testing.assert_close(actual, expected)
    parameters = list(module.parameters())
    grads = [torch.autograd.grad(output.square().sum(), parameters) for output in (actual, expected)]
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right)


@modules
def test_options_that_change_nothing(name):
    plain, x = made(name, num_layers=2, bidirectional=True), inputs()
    varied = made(name, num_layers=2, bidirectional=True, zoneout=1e-30, weight_dropout=0.0)
    torch.testing.assert_close(varied.eval()(x), plain(x))
    assert plain.state_dict().keys() == getattr(torch.nn, name)(5, 8, 2, bidirectional=True).state_dict().keys()


def test_peepholes_of_zero_and_a_projection():
    plain, x = made("LSTM", proj_size=3), inputs()
    varied = made("LSTM", proj_size=3, peephole=True)
    varied.load_state_dict(plain.state_dict() | {"peephole_l0": torch.zeros(3, 8)})
    torch.testing.assert_close(varied(x), plain(x))


@modules
def test_lengths_and_resets_are_each_sample_alone(name):
    module, x = randomised(made(name, layer_norm=True, bidirectional=True)), inputs()
    behind = (torch.arange(6)[:, None] >= torch.tensor(LENGTHS))[..., None]
    resets = torch.zeros(6, 3, dtype=torch.bool)
    resets[2, 1] = True
    output, _ = module(x.masked_fill(behind, float("nan")), lengths=torch.tensor(LENGTHS), resets=resets)
    assert output.masked_select(behind.expand_as(output)).eq(0).all()
    torch.testing.assert_close(output[:4, 0], module(x[:4, 0])[0])
    forwards = torch.cat([module(x[:2, 1])[0], module(x[2:, 1])[0]])[:, :8]
    torch.testing.assert_close(output[:, 1, :8], forwards)


@modules
def test_zoneout(name):
    states = 2 if name == "LSTM" else 1
    x = inputs()
    frozen = made(name, zoneout=1.0)
    initial = torch.rand(1, 3, 8)
    output, last = frozen(x, (initial, initial) if states == 2 else initial)
    assert torch.equal(output, initial.expand(6, 3, 8))
    assert torch.equal(torch.stack(tuple(last)) if states == 2 else last[None], initial.expand(states, 1, 3, 8))
    module = made(name, zoneout=0.3)
    torch.manual_seed(5)
    first = module(x)[0]
    assert not torch.equal(module(x)[0], first)
    torch.manual_seed(5)
    assert torch.equal(module(x)[0], first)
    # A step is the mean in evaluation, and each element the old or the new one in training.
    step, plain = x[:1], made(name)
    given = (initial, initial) if states == 2 else initial
    new = plain(step, given)[0]
    kept = made(name, zoneout=(0.3, 0.0) if states == 2 else 0.3)
    torch.testing.assert_close(kept.eval()(step, given)[0], new + 0.3 * (initial - new))
    trained = kept.train()(step, given)[0]
    assert torch.isclose(trained, initial).logical_or(torch.isclose(trained, new, atol=1e-6)).all()


@modules
def test_weight_dropout_is_a_fused_layer_with_other_weights(name):
    module, x = made(name, weight_dropout=0.5), inputs()
    assert any(row.serves and row.backend == "cpu" for row in fusewright.explain(module, x))
    torch.manual_seed(9)
    output = module(x)[0]
    torch.manual_seed(9)
    dropped = F.dropout(module.weight_hh_l0, 0.5)
    weights = (module.weight_ih_l0, dropped, module.bias_ih_l0, module.bias_hh_l0)
    states = (None, None) if name == "LSTM" else (None,)
    function = {"LSTM": functional.lstm, "GRU": functional.gru, "RNN": functional.rnn_tanh}[name]
    assert torch.equal(output, function(x, *states, *weights)[0])
    torch.testing.assert_close(module.eval()(x), made(name)(x))


def test_identity_initialisation():
    module = nn.RNN(5, 8, 2, "relu", identity_init=True)
    assert torch.equal(module.weight_hh_l1, torch.eye(8))
    assert all(not parameter.any() for name, parameter in module.named_parameters() if "bias" in name)
    assert 0.0005 < module.weight_ih_l0.std() < 0.002
    # Nothing is forgotten: the state is the sum of what came in.
    x = inputs().abs()
    with torch.no_grad():
        module.weight_ih_l0.abs_()
    torch.testing.assert_close(nn.RNN.forward(module, x)[1][0], (x @ module.weight_ih_l0.T).sum(0))


def test_autocast_and_low_precision():
    module, x = made("LSTM", layer_norm=True), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)[0]
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output.float(), module(x)[0], rtol=0.05, atol=0.02)


@pytest.mark.filterwarnings("default")
def test_the_plain_formula_is_told_of_once():
    dispatch.forget()
    module, x = made("GRU", layer_norm=True), inputs()
    with pytest.warns(UserWarning, match="varied_recurrent runs as plain PyTorch.*no cpu kernel"):
        module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x)
        made("GRU", weight_dropout=0.5)(x)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("LSTM", {"zoneout": 1.5}, "zoneout is 1.5, expected a probability"),
        ("GRU", {"zoneout": (0.1, 0.2)}, "zoneout is"),
        ("LSTM", {"weight_dropout": -0.1}, "weight_dropout is -0.1, expected a probability"),
        ("GRU", {"peephole": True}, "peephole is given"),
        ("RNN", {"identity_init": True}, "identity_init is True, expected False with nonlinearity 'tanh'"),
    ],
    ids=str,
)
def test_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        made(name, **options)
