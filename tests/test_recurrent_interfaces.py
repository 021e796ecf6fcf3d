"""The recurrent layers and cells under autograd, vmap, compile, export, autocast, meta and opcheck; their errors."""

import pytest
import torch
from test_recurrent_numerics import layer_inputs, run
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import fusewright
from fusewright import functional, nn, testing
from fusewright_kernels import library
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError

OPS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
NAMES = ("input", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
ops = pytest.mark.parametrize("op", OPS)


@pytest.mark.parametrize("op", [*OPS, "projected_lstm"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(op, backend):
    forward, backward = (library.overload(f"recurrent_{name}", backend) for name in ("forward", "backward"))
    for dtype in (torch.float32, torch.bfloat16) if backend == "cpu" else (torch.bfloat16,):
        leaves = layer_inputs(op, 4, 3, 5, 6, dtype)
        tensors = [leaves.get(name) for name in NAMES]
        cell = op.removeprefix("projected_")
        variants = [
            (*tensors, None, None, cell, False),
            (tensors[0].mT.contiguous().mT, *tensors[1:5], None, None, tensors[7], torch.tensor([4, 0, 2]),
             torch.rand(4, 3) < 0.5, cell, True),
        ]  # fmt: skip
        for arguments in variants:
            torch.library.opcheck(forward, (*arguments, False))
            torch.library.opcheck(forward, (*arguments, True))
            output, h_n, c_n, gates, cells = forward(*arguments, True)
            grad_c_n = torch.randn_like(c_n) if cell == "lstm" else None
            every = (torch.randn_like(output), torch.randn_like(h_n), grad_c_n)
            for grads, needs in (
                (every, (True, True, True)),
                (every, (False, False, True)),
                ((None, None, grad_c_n), (True, False, False)),
            ):
                torch.library.opcheck(backward, (*grads, output, gates, cells, *arguments, *needs))


@ops
def test_first_and_second_derivatives(op):
    leaves = layer_inputs(op, 3, 2, 3, 4, torch.float64)
    if op == "rnn_relu":  # away from its corner
        leaves["bias_ih"] = leaves["bias_ih"] + 5.0 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    resets = torch.tensor([[False, False], [True, False], [False, True]])

    def function(*tensors):
        keywords = {"lengths": torch.tensor([3, 2]), "resets": resets, "reverse": True}
        return getattr(functional, op)(**dict(zip(leaves, tensors, strict=True)), **keywords)[
            : 3 if op == "lstm" else 2
        ]

    inputs = [tensor.requires_grad_() for tensor in leaves.values()]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("op", [*OPS, "projected_lstm"])
def test_second_derivative_of_the_kernel_is_that_of_the_formula(op):
    results = []
    for backend in ("cpu", "reference"):
        leaves = {name: tensor.requires_grad_() for name, tensor in layer_inputs(op, 4, 3, 5, 6).items()}
        tensors = list(leaves.values())
        output = run(op, leaves, backend=backend)[0]
        first = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
        results.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), tensors))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@ops
def test_only_the_wanted_gradients(op):
    for wanted in (("input",), ("h0",), ("weight_hh", "bias_ih")):
        leaves = layer_inputs(op, 4, 3, 5, 6)
        for name in wanted:
            leaves[name].requires_grad_()
        output = getattr(functional, op)(**leaves)[0]
        grads = torch.autograd.grad(output.sum(), [leaves[name] for name in wanted])
        every = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
        expected = torch.autograd.grad(getattr(functional, op)(**every)[0].sum(), [every[name] for name in wanted])
        for actual, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(actual, other)


@pytest.mark.parametrize("op", ["lstm", "projected_lstm", "gru"])
def test_vmap_over_samples_and_over_weights(op):
    leaves = layer_inputs(op, 4, 3, 5, 6)
    names = list(leaves)
    for mapped in (("input",), ("input", "h0"), ("h0",), ("input", "weight_ih"), ("weight_hh", "bias_ih")):
        dims = [(1 if name == "input" else 0) if name in mapped else None for name in names]
        tensors = [
            leaf if dim is None else torch.stack([leaf, 2.0 * leaf], dim)
            for leaf, dim in zip(leaves.values(), dims, strict=True)
        ]

        def function(*values):
            return run(op, dict(zip(names, values, strict=True)))[:2]

        output, h_n = torch.vmap(function, tuple(dims))(*tensors)
        for n in range(2):
            sample = [leaf if dim is None else leaf.select(dim, n) for leaf, dim in zip(tensors, dims, strict=True)]
            for actual, expected in zip((output[n], h_n[n]), function(*sample), strict=True):
                torch.testing.assert_close(actual, expected)


def test_lengths_and_resets_under_transforms():
    module = nn.LSTM(5, 6, 2, bidirectional=True)
    lengths, resets = torch.tensor([[4, 2, 3], [1, 0, 4]]), torch.rand(2, 4, 3) < 0.4
    inputs = torch.randn(2, 4, 3, 5)

    def function(input, lengths, resets):
        return module(input, lengths=lengths, resets=resets)[0]

    def loss(*arguments):
        return function(*arguments).square().sum()

    mapped = torch.vmap(function)(inputs, lengths, resets)
    grads = torch.vmap(torch.func.grad(loss))(inputs, lengths, resets)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in range(2):
        sample = (inputs[n], lengths[n], resets[n])
        expected = function(*sample)
        torch.testing.assert_close(mapped[n], expected)
        torch.testing.assert_close(compiled(*sample), expected)
        torch.testing.assert_close(grads[n], torch.func.grad(loss)(*sample))
    with pytest.raises(RuntimeError, match="lengths"):
        torch.vmap(function)(inputs, lengths + 1, resets)


@pytest.mark.parametrize("op", ["lstm", "gru", "rnn_tanh"])
def test_per_sample_gradients(op):
    leaves = layer_inputs(op, 4, 3, 5, 6)
    inputs = torch.randn(2, 4, 3, 5)

    def loss(weight_hh, input):
        return getattr(functional, op)(**dict(leaves, weight_hh=weight_hh, input=input))[0].square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(leaves["weight_hh"], inputs)
    for n in range(2):
        torch.testing.assert_close(per_sample[n], torch.func.grad(loss)(leaves["weight_hh"], inputs[n]))
    hessian = torch.func.jacrev(torch.func.grad(lambda h0: loss(leaves["weight_hh"], inputs[0]) + h0.sum()))(
        leaves["h0"]
    )
    assert hessian.eq(0).all()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_compiles_once_to_one_op_for_each_layer(kind):
    torch.compiler.reset()
    module = getattr(nn, kind)(5, 6, num_layers=2, bidirectional=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for steps in (4, 7, 11):
        input = torch.randn(steps, 3, 5, requires_grad=True)
        results = []
        for function in (compiled, module):
            output = function(input)[0]
            results.append([output, *torch.autograd.grad(output.square().sum(), [input, *module.parameters()])])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1

    ops_of_graph = []

    def count_ops(graph, inputs):
        ops_of_graph.append(sum("bidirectional_forward" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(module, fullgraph=True, backend=aot_autograd(fw_compiler=count_ops))(torch.randn(4, 3, 5))
    assert ops_of_graph == [2]


def test_exports():
    module = nn.LSTM(5, 6, batch_first=True)
    inputs = (torch.randn(3, 4, 5),)
    program = torch.export.export(module, inputs)
    torch.testing.assert_close(program.module()(*inputs), module(*inputs))


def test_autocast_runs_in_the_low_precision_type():
    module = nn.LSTM(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        output, (h_n, c_n) = module(torch.randn(4, 3, 5))
        assert output.dtype is h_n.dtype is c_n.dtype is torch.bfloat16
        output.float().sum().backward()
    assert module.weight_hh_l0.grad.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.lstm_cell(torch.randn(3, 5), None, *module.parameters())[0].dtype is torch.bfloat16


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_backward_under_autocast_stays_in_the_type_of_its_forward(steps, backend):
    leaves = {name: tensor.requires_grad_() for name, tensor in layer_inputs("gru", steps, 3, 20, 30).items()}
    expected = torch.autograd.grad(functional.gru(**leaves, backend=backend)[0].sum(), list(leaves.values()))
    output = functional.gru(**leaves, backend=backend)[0]
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(output.sum(), list(leaves.values()))
    for gradient, other in zip(actual, expected, strict=True):
        assert testing.bits_equal(gradient, other)


def test_meta_tensors_give_shapes():
    output, (h_n, c_n) = nn.LSTM(5, 6, num_layers=2, device="meta")(torch.randn(4, 3, 5, device="meta"))
    assert output.shape == (4, 3, 6) and h_n.shape == c_n.shape == (2, 3, 6) and output.is_meta


@ops
@pytest.mark.parametrize("batch", [(), (3,)], ids=["single", "batch"])
def test_cells_take_torchs_calls(op, batch):
    gates = {"lstm": 4, "gru": 3}.get(op, 1) * 6
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    input, h, c = normal(*batch, 5), normal(*batch, 6), normal(*batch, 6)
    weights = [normal(gates, 5), normal(gates, 6), normal(gates), normal(gates)]
    state = [h, c] if op == "lstm" else h
    ours, torchs = getattr(functional, f"{op}_cell"), getattr(torch, f"{op}_cell")
    if not batch:
        wide = [s[None] for s in state] if op == "lstm" else state[None]
        expected = torchs(input[None], wide, *weights)
        expected = tuple(e[0] for e in expected) if op == "lstm" else expected[0]
    else:
        expected = torchs(input, state, *weights)
    torch.testing.assert_close(ours(input, state, *weights), expected)
    zeros = [0.0 * h, 0.0 * c] if op == "lstm" else 0.0 * h
    torch.testing.assert_close(ours(input, None, *weights[:2]), ours(input, zeros, *weights[:2]))


def test_what_serves_a_projection():
    rows = fusewright.explain(nn.LSTM(5, 6, proj_size=3), torch.randn(4, 3, 5))
    assert (rows[0].backend, rows[0].serves) == ("cuda", False) and "projection" in rows[0].reason
    assert (rows[-1].backend, rows[-1].serves) == ("cpu", True)


GOOD = layer_inputs("lstm", 4, 3, 5, 6)
ERRORS = [
    pytest.param({"input": torch.ones(4, 3, 5).int()}, ArgumentTypeError, "input.dtype is torch.int32", id="dtype"),
    pytest.param({"input": [1.0]}, ArgumentTypeError, "input is a list", id="input type"),
    pytest.param({"h0": 1.0}, ArgumentTypeError, "h0 is a float", id="state type"),
    pytest.param({"weight_hh": None}, ArgumentTypeError, "weight_hh is a NoneType", id="weight type"),
    pytest.param({"h0": GOOD["h0"].double()}, ArgumentTypeError, "h0.dtype is torch.float64", id="mixed dtypes"),
    pytest.param({"weight_ih": GOOD["weight_ih"].to("meta")}, ArgumentValueError, "weight_ih.device", id="device"),
    pytest.param({"input": GOOD["input"][0]}, ArgumentValueError, "input.ndim is 2", id="rank"),
    pytest.param({"input": torch.ones(4, 3, 4)}, ArgumentValueError, "weight_ih.shape is (24, 5)", id="width"),
    pytest.param({"input": torch.ones(4, 2, 5)}, ArgumentValueError, "h0.shape is (3, 6)", id="batch"),
    pytest.param({"h0": torch.ones(1, 3, 6)}, ArgumentValueError, "h0.shape is (1, 3, 6)", id="state rank"),
    pytest.param({"h0": torch.ones(3, 7)}, ArgumentValueError, "h0.shape is (3, 7)", id="state width"),
    pytest.param({"c0": torch.ones(2, 6)}, ArgumentValueError, "c0.shape is (2, 6)", id="cell state"),
    pytest.param({"weight_hh": torch.ones(24, 5)}, ArgumentValueError, "weight_hh.shape is (24, 5)", id="hidden"),
    pytest.param({"weight_hh": torch.ones(23, 6)}, ArgumentValueError, "weight_hh.shape is (23, 6)", id="gates"),
    pytest.param({"weight_hh": torch.ones(24)}, ArgumentValueError, "weight_hh.shape is (24,)", id="weight rank"),
    pytest.param({"weight_ih": torch.ones(18, 5)}, ArgumentValueError, "weight_ih.shape is (18, 5)", id="other gates"),
    pytest.param({"bias_ih": torch.ones(6)}, ArgumentValueError, "bias_ih.shape is (6,)", id="bias"),
    pytest.param({"bias_ih": None}, ArgumentValueError, "bias_ih is None", id="one bias"),
    pytest.param({"weight_hr": torch.ones(2, 6)}, ArgumentValueError, "weight_hh.shape", id="projection"),
    pytest.param({"lengths": [4, 3, 2]}, ArgumentTypeError, "lengths is a list", id="lengths type"),
    pytest.param({"lengths": torch.ones(3)}, ArgumentTypeError, "lengths.dtype", id="lengths dtype"),
    pytest.param({"lengths": torch.tensor([4, 3])}, ArgumentValueError, "lengths.shape is (2,)", id="lengths shape"),
    pytest.param({"lengths": torch.tensor([5, 3, 0])}, ArgumentValueError, "[0, 4]", id="too long"),
    pytest.param({"lengths": torch.tensor([4, -1, 0])}, ArgumentValueError, "[0, 4]", id="negative length"),
    pytest.param({"resets": torch.ones(4, 3)}, ArgumentTypeError, "resets.dtype", id="resets dtype"),
    pytest.param({"resets": torch.ones(3, 4).bool()}, ArgumentValueError, "resets.shape is (3, 4)", id="resets shape"),
    pytest.param({"reverse": 1}, ArgumentTypeError, "reverse is a int", id="reverse"),
    pytest.param({"backend": "none"}, ArgumentValueError, "backend is 'none'", id="backend"),
]


@pytest.mark.parametrize("changes, error, message", ERRORS)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error) as caught:
        functional.lstm(**{**GOOD, **changes})
    assert message in str(caught.value)
    assert isinstance(caught.value, RuntimeError)


def test_bad_arguments_of_cells():
    weights = [GOOD[name] for name in NAMES[3:7]]
    input, state = torch.ones(3, 5), torch.ones(3, 6)
    for hx in (state, [state], [state, state, state], [state, torch.ones(6)], [state, None, 1], [torch.ones(3, 5)] * 2):
        with pytest.raises((ArgumentValueError, ArgumentTypeError)):
            functional.lstm_cell(input, hx, *weights)
    with pytest.raises(ArgumentValueError, match=r"input\.ndim is 3"):
        functional.lstm_cell(input[None], None, *weights)
    with pytest.raises(ArgumentValueError, match=r"weight_hh\.shape"):
        functional.gru_cell(input, state, *weights)
