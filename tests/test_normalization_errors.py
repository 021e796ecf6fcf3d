"""Bad arguments of the normalisation ops: one clear error before any kernel runs, and nothing written."""

import math

import pytest
import torch
from op_support import targets

from fusewright import functional, testing
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError

INPUT = torch.ones(4, 8)
WEIGHT = torch.ones(8)

PLAIN_ERRORS = [
    pytest.param({"input": [1.0]}, ArgumentTypeError, "input is a list", id="input type"),
    pytest.param({"input": INPUT.int()}, ArgumentTypeError, "input.dtype is torch.int32", id="input dtype"),
    pytest.param({"input": INPUT.cfloat()}, ArgumentTypeError, "input.dtype is torch.complex64", id="complex"),
    pytest.param({"input": INPUT.to_sparse()}, ArgumentTypeError, "input.layout is torch.sparse_coo", id="sparse"),
    pytest.param({"input": torch.tensor(1.0)}, ArgumentValueError, "normalized_shape is (8,)", id="input rank 0"),
    pytest.param({"normalized_shape": 7}, ArgumentValueError, "normalized_shape is (7,)", id="normalized_shape"),
    pytest.param({"normalized_shape": ()}, ArgumentValueError, "normalized_shape is ()", id="empty normalized_shape"),
    pytest.param({"normalized_shape": (2, 4, 8)}, ArgumentValueError, "normalized_shape is (2, 4, 8)", id="too long"),
    pytest.param({"normalized_shape": -8}, ArgumentValueError, "normalized_shape is (-8,)", id="negative shape"),
    pytest.param({"normalized_shape": "8"}, ArgumentTypeError, "normalized_shape", id="normalized_shape text"),
    pytest.param({"normalized_shape": 8.0}, ArgumentTypeError, "normalized_shape", id="normalized_shape float"),
    pytest.param({"normalized_shape": None}, ArgumentTypeError, "normalized_shape", id="normalized_shape None"),
    pytest.param({"weight": torch.ones(7)}, ArgumentValueError, "weight.shape is (7,)", id="weight shape"),
    pytest.param({"weight": torch.ones(1, 8)}, ArgumentValueError, "weight.shape is (1, 8)", id="weight rank"),
    pytest.param({"weight": 1.0}, ArgumentTypeError, "weight is a float", id="weight type"),
    pytest.param({"weight": WEIGHT.long()}, ArgumentTypeError, "weight.dtype is torch.int64", id="weight dtype"),
    pytest.param({"weight": WEIGHT.double()}, ArgumentTypeError, "weight.dtype is torch.float64", id="float64 weight"),
    pytest.param({"weight": WEIGHT.to("meta")}, ArgumentValueError, "weight.device is meta", id="weight device"),
    pytest.param({"bias": torch.ones(9)}, ArgumentValueError, "bias.shape is (9,)", id="bias shape"),
    pytest.param({"bias": WEIGHT.to("meta")}, ArgumentValueError, "bias.device is meta", id="bias device"),
    pytest.param({"bias": WEIGHT.double()}, ArgumentTypeError, "bias.dtype is torch.float64", id="float64 bias"),
    pytest.param({"eps": -1e-5}, ArgumentValueError, "eps is -1e-05", id="negative eps"),
    pytest.param({"eps": math.nan}, ArgumentValueError, "eps is nan", id="eps nan"),
    pytest.param({"eps": math.inf}, ArgumentValueError, "eps is inf", id="eps inf"),
    pytest.param({"eps": "1e-5"}, ArgumentTypeError, "eps is a str", id="eps text"),
    pytest.param({"backend": "gpu"}, ArgumentValueError, "backend is 'gpu'", id="backend"),
]

OUT_ERRORS = [
    pytest.param({"out": torch.zeros(4, 9)}, ArgumentValueError, "out.shape is (4, 9)", id="out shape"),
    pytest.param({"out": INPUT.bfloat16()}, ArgumentTypeError, "out.dtype is torch.bfloat16", id="out dtype"),
    pytest.param({"out": torch.zeros(8, 4).T}, ArgumentValueError, "out.stride() is (1, 4)", id="out strides"),
    pytest.param({"out": torch.zeros(4, 8, device="meta")}, ArgumentValueError, "out.device is meta", id="out device"),
    pytest.param({"out": 1}, ArgumentTypeError, "out is a int", id="out type"),
    pytest.param({"out": torch.zeros(4, 8, requires_grad=True)}, ArgumentValueError, "out is given", id="out grad"),
]

ADD_ERRORS = [
    pytest.param({"residual": torch.ones(4, 9)}, ArgumentValueError, "residual.shape is (4, 9)", id="residual shape"),
    pytest.param({"residual": torch.ones(8)}, ArgumentValueError, "residual.shape is (8,)", id="residual broadcast"),
    pytest.param({"residual": None}, ArgumentTypeError, "residual is a NoneType", id="residual None"),
    pytest.param({"residual": INPUT.half()}, ArgumentTypeError, "residual.dtype is torch.float16", id="residual dtype"),
    pytest.param({"residual": INPUT.to("meta")}, ArgumentValueError, "residual.device is meta", id="residual device"),
    pytest.param({"residual_dtype": torch.float16}, ArgumentTypeError, "residual_dtype is torch.float16", id="stream"),
    pytest.param({"residual_dtype": "float32"}, ArgumentTypeError, "residual_dtype is", id="stream dtype text"),
    pytest.param({"dropout_p": -0.1}, ArgumentValueError, "dropout_p is -0.1", id="negative dropout"),
    pytest.param({"dropout_p": 1.5}, ArgumentValueError, "dropout_p is 1.5", id="dropout above 1"),
    pytest.param({"dropout_p": math.nan}, ArgumentValueError, "dropout_p is nan", id="dropout nan"),
    pytest.param({"dropout_p": "0.1"}, ArgumentTypeError, "dropout_p is a str", id="dropout text"),
    pytest.param({"dropout_p": 0.5, "seed": "x"}, ArgumentTypeError, "seed is a str", id="seed text"),
    pytest.param({"dropout_p": 0.5, "seed": 0.5}, ArgumentTypeError, "seed is a float", id="seed float"),
    pytest.param({"dropout_p": 0.5, "seed": 2**64}, ArgumentValueError, "seed is 18446744073709551616", id="seed size"),
    pytest.param(
        {"dropout_p": 0.5, "seed": torch.zeros(2, dtype=torch.int64)}, ArgumentValueError, "seed", id="seed shape"
    ),
]


def _assert_named(function, arguments, error, message):
    with pytest.raises(error) as raised:
        function(**arguments)
    assert message in str(raised.value)
    assert "expected" in str(raised.value)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("change, error, message", PLAIN_ERRORS)
def test_a_bad_argument_is_named(op, change, error, message):
    arguments = {"input": INPUT, "normalized_shape": 8, "weight": WEIGHT, "bias": WEIGHT}
    if op.startswith("add_"):
        arguments["residual"] = INPUT
    _assert_named(getattr(functional, op), arguments | change, error, message)


@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("change, error, message", ADD_ERRORS)
def test_a_bad_argument_of_the_fused_addition_is_named(op, change, error, message):
    arguments = {"input": INPUT, "residual": INPUT, "normalized_shape": 8} | change
    state = torch.get_rng_state()
    _assert_named(getattr(functional, op), arguments, error, message)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("change, error, message", OUT_ERRORS)
def test_a_bad_out_is_named(op, change, error, message):
    _assert_named(getattr(functional, op), {"input": INPUT, "normalized_shape": 8} | change, error, message)


@pytest.mark.parametrize("change", [{"eps": -1.0}, {"weight": torch.ones(7)}, {"backend": "gpu"}])
def test_nothing_is_written_on_an_error(change):
    out = testing.GuardedTensor((4, 8))
    out.tensor.fill_(7.0)
    with pytest.raises(ValueError, match="expected"):
        functional.layer_norm(**({"input": INPUT, "normalized_shape": 8, "out": out.tensor} | change))
    out.check("out")
    assert (out.tensor == 7.0).all()


def test_the_errors_are_also_those_that_torch_raises():
    with pytest.raises(RuntimeError):
        functional.layer_norm(INPUT, 7)
    with pytest.raises(RuntimeError):
        functional.layer_norm(INPUT.int(), 8)


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
def test_a_forced_backend_that_cannot_serve_says_why(backend):
    with pytest.raises(ArgumentValueError, match=f"backend is '{backend}', expected a backend that can serve norm: .+"):
        functional.layer_norm(INPUT.double(), 8, backend=backend)


@targets
def test_many_dimensions_are_served_or_refused_with_a_reason(target):
    input = target.tensor(*[1] * 20, 2, 8)
    strided = input.transpose(-1, -2)
    try:
        output = functional.layer_norm(strided, 2, backend=target.backend)
    except ArgumentValueError as error:
        assert "22 dimensions" in str(error)
    else:
        torch.testing.assert_close(output, torch.nn.functional.layer_norm(strided, (2,)))
    # Without a forced backend such a call has somewhere to go.
    torch.testing.assert_close(functional.layer_norm(input, 8), torch.nn.functional.layer_norm(input, (8,)))
