"""Attention under autograd, vmap, compile, export, autocast, the meta device and opcheck; and its errors."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fusewright import functional, patterns
from fusewright_kernels import library, native
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError

# The overloads that opcheck is given by name are there once the kernels are.
assert native.cpu_unavailable_reason() is None
attention = functional.scaled_dot_product_attention
plain_attention = torch.nn.functional.scaled_dot_product_attention


def _qkv(batch=2, heads=4, key_heads=4, queries=10, keys=12, width=8, **options):
    shapes = ((batch, heads, queries, width), (batch, key_heads, keys, width), (batch, key_heads, keys, width))
    generator = torch.Generator().manual_seed(0)
    wants = options.pop("requires_grad", False)
    return [torch.randn(shape, generator=generator).to(**options).requires_grad_(wants) for shape in shapes]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, backend):
    tensors = [tensor.to(dtype) for tensor in _qkv(key_heads=2)]
    offsets = torch.tensor([0, 4, 10])
    variants = [
        (*tensors, None, None, None, None, None, None, None, 0, 0.3, 0.0, 0.0, -1, 0, False),
        (*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors), torch.randn(1, 4, 10, 1).to(dtype),
         torch.ones(1, 1, 1, dtype=torch.bool), torch.rand(1, 4), torch.randn(4), torch.tensor([3]), None, None,
         64, 0.3, 5.0, 0.2, 3, 3, True),
        (*(t[:1] for t in tensors), None, None, None, None, None, offsets, offsets, 0, 0.3, 0.0, 0.0, -1, -1, False),
    ]  # fmt: skip
    forward, backward = (library.overload(f"attention_{name}", backend) for name in ("forward", "backward"))
    for arguments in variants:
        torch.library.opcheck(forward, arguments)
        output, statistics = forward(*arguments)
        grad_lse = torch.randn(output.shape[:3])
        additive, sinks = arguments[3] is not None, arguments[6] is not None
        for needs in ((True, True, True, additive, sinks), (False, True, False, False, False)):
            torch.library.opcheck(
                backward, (torch.randn_like(output), grad_lse, output, statistics, *arguments, *needs)
            )


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 3.0, "window": (3, 2)}], ids=str)
def test_first_and_second_derivatives(options):
    leaves = [tensor[:1, :2, :5].double().detach().requires_grad_() for tensor in _qkv()]

    def function(query, key, value):
        return attention(query, key, value, return_lse=True, **options)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_second_derivative_of_the_kernel_is_that_of_the_formula():
    results = []
    for function in (attention, plain_attention):
        leaves = _qkv(requires_grad=True)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
            results.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_mask_of_every_broadcast_shape_gets_its_gradient():
    query, key, value = _qkv(keys=70, queries=66)
    for sizes in itertools.product((1, 2), (1, 4), (1, 66), (1, 70)):
        masks = [torch.randn(sizes, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for _ in range(2)]
        single = masks[0].float().requires_grad_()
        double = masks[1].requires_grad_()
        grad = torch.randn(2, 4, 66, 8, generator=torch.Generator().manual_seed(2))
        actual = torch.autograd.grad(attention(query, key, value, single), single, grad)[0]
        wide = attention(query.double(), key.double(), value.double(), double)
        expected = torch.autograd.grad(wide, double, grad.double())[0]
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shape", [(10, 8), (4, 10, 8), (2, 3, 4, 10, 8)])
def test_any_number_of_leading_dimensions(shape):
    query, key, value = (torch.randn(shape) for _ in range(3))
    mask = torch.randn(10, 10)
    torch.testing.assert_close(attention(query, key, value, mask), plain_attention(query, key, value, mask))


def test_leading_dimensions_broadcast():
    query, key, value = torch.randn(3, 4, 5, 8), torch.randn(1, 4, 6, 8), torch.randn(4, 6, 8)
    torch.testing.assert_close(
        attention(query, key, value), plain_attention(query, key, value.expand(1, 4, 6, 8).expand_as(key))
    )


def test_vmap_of_every_input():
    query, key, value = _qkv(requires_grad=True)
    mask = torch.randn(2, 10, 12)
    for dims in ((0, 0, 0, None), (0, None, 0, 0), (None, 0, 0, 0), (1, 1, 1, None)):
        tensors = [
            tensor if dim is not None else tensor[0]
            for tensor, dim in zip((query, key, value, mask), dims, strict=True)
        ]
        actual = torch.vmap(attention, dims)(*tensors)
        size = next(tensor.shape[dim] for tensor, dim in zip(tensors, dims, strict=True) if dim is not None)
        for n in range(size):
            sample = [
                tensor if dim is None else tensor.select(dim, n) for tensor, dim in zip(tensors, dims, strict=True)
            ]
            torch.testing.assert_close(actual[n], attention(*sample))


def test_per_sample_gradients():
    query, key, value = _qkv()
    weight = torch.randn(8, 8)

    def loss(weight, query, key, value):
        return attention(query @ weight, key, value).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0, 0, 0))(weight, query, key, value)
    for n in range(2):
        expected = torch.func.grad(loss)(weight, query[n], key[n], value[n])
        torch.testing.assert_close(per_sample[n], expected, rtol=1e-4, atol=1e-4)


def test_compiles_once_for_every_length():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def function(query, key, value):
        return attention(query, key, value, is_causal=True)

    compilations = []
    for length in (10, 17, 30):
        leaves = _qkv(queries=length, keys=length, requires_grad=True)
        actual = function(*leaves)
        torch.testing.assert_close(actual, plain_attention(*leaves, is_causal=True))
        gradients = torch.autograd.grad(actual.square().sum(), leaves)
        expected = torch.autograd.grad(plain_attention(*leaves, is_causal=True).square().sum(), leaves)
        for gradient, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, query, key, value):
            return attention(query, key, value, window=(4, 0))

    inputs = tuple(_qkv())
    program = torch.export.export(Module(), inputs)
    torch.testing.assert_close(program.module()(*inputs), Module()(*inputs))


def test_autocast_runs_in_the_low_precision_type():
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*_qkv()).dtype is torch.bfloat16


def test_meta_tensors_give_shapes():
    output, lse = attention(*_qkv(device="meta"), return_lse=True)
    assert output.shape == (2, 4, 10, 8) and lse.shape == (2, 4, 10) and output.is_meta


QUERY, KEY, VALUE = _qkv()
ERRORS = [
    pytest.param({"query": QUERY.int()}, ArgumentTypeError, "query.dtype is torch.int32", id="query dtype"),
    pytest.param({"key": KEY.bfloat16()}, ArgumentTypeError, "key.dtype is torch.bfloat16", id="mixed dtypes"),
    pytest.param({"key": KEY[..., :7]}, ArgumentValueError, "key.shape[-1] is 7", id="head dimension"),
    pytest.param({"value": VALUE[:, :, :5]}, ArgumentValueError, "value.shape[-2] is 5", id="number of values"),
    pytest.param({"query": QUERY[0, 0, 0]}, ArgumentValueError, "query.ndim is 1", id="rank"),
    pytest.param({"value": VALUE.to("meta")}, ArgumentValueError, "value.device is meta", id="device"),
    pytest.param({"key": KEY[:, :3], "value": VALUE[:, :3]}, ArgumentValueError, "leading sizes", id="heads"),
    pytest.param(
        {"key": KEY[:, :3], "value": VALUE[:, :3], "enable_gqa": True}, ArgumentValueError, "a divisor of query's 4",
        id="heads that do not divide",
    ),
    pytest.param(
        {"value": VALUE[:, :2], "enable_gqa": True}, ArgumentValueError, "value's number of heads is 2", id="gqa value"
    ),
    pytest.param({"attn_mask": torch.ones(10, 12).int()}, ArgumentTypeError, "torch.int32", id="mask"),
    pytest.param({"attn_mask": torch.ones(9, 12)}, ArgumentValueError, "attn_mask.shape is (9, 12)", id="mask shape"),
    pytest.param({"attn_mask": torch.ones(10, 12).double()}, ArgumentTypeError, "attn_mask.dtype", id="wide mask"),
    pytest.param(
        {"attn_mask": torch.ones(10, 12), "is_causal": True}, ArgumentValueError, "is_causal is True", id="both masks"
    ),
    pytest.param({"dropout_p": 1.5}, ArgumentValueError, "dropout_p is 1.5", id="dropout"),
    pytest.param({"dropout_p": -0.1}, ArgumentValueError, "dropout_p is -0.1", id="negative dropout"),
    pytest.param({"scale": float("nan")}, ArgumentValueError, "scale is nan", id="scale"),
    pytest.param({"softcap": 0.0}, ArgumentValueError, "softcap is 0.0", id="softcap"),
    pytest.param({"window": (-2, 0)}, ArgumentValueError, "window is (-2, 0)", id="window"),
    pytest.param({"window": "4"}, ArgumentTypeError, "window is '4'", id="window type"),
    pytest.param({"sinks": torch.zeros(3)}, ArgumentValueError, "sinks.shape is (3,)", id="sinks"),
    pytest.param({"alibi_slopes": torch.zeros(3)}, ArgumentValueError, "alibi_slopes.shape is (3,)", id="slopes"),
    pytest.param(
        {"alibi_slopes": torch.zeros(4, requires_grad=True)}, ArgumentValueError, "requires_grad", id="slopes' gradient"
    ),
    pytest.param({"causal_alignment": "left"}, ArgumentValueError, "causal_alignment is 'left'", id="alignment"),
    pytest.param({"seed": 1.0}, ArgumentTypeError, "seed is a float", id="seed"),
    pytest.param({"backend": "cudnn"}, ArgumentValueError, "backend is 'cudnn'", id="backend"),
    pytest.param(
        {"pattern": patterns.PerHead([patterns.Window(1, 1)] * 3)}, ArgumentValueError, "heads is 3", id="pattern"
    ),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, message", ERRORS)
def test_bad_arguments(changes, error, message):
    arguments = {"query": QUERY, "key": KEY, "value": VALUE} | changes
    with pytest.raises(error) as caught:
        attention(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "offsets, message",
    [
        (torch.tensor([0, 5, 3]), "cu_seqlens_q is [0, 5, 3]"),
        (torch.tensor([0, 5, 11]), "cu_seqlens_q is [0, 5, 11]"),
        (torch.tensor([1, 5, 6]), "cu_seqlens_q is [1, 5, 6]"),
        (torch.tensor([0.0, 5.0]), "cu_seqlens_q.dtype is torch.float32"),
        (torch.tensor([0, 5]), "cu_seqlens_k.shape is (3,)"),
        (torch.zeros(1, 3).long(), "cu_seqlens_q.shape is (1, 3)"),
    ],
    ids=str,
)
def test_bad_offsets(offsets, message):
    packed = torch.randn(10, 4, 8)
    with pytest.raises((ArgumentValueError, ArgumentTypeError)) as caught:
        functional.varlen_attention(packed, packed, packed, offsets, torch.tensor([0, 5, 10]))
    assert message in str(caught.value)
