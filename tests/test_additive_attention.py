"""Additive attention against the formula written out, on every backend and instruction set."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fusewright import functional, testing
from fusewright.nn import AdditiveAttention
from fusewright_kernels import library, native
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = native.cpu_isas() if native.cpu_unavailable_reason() is None else []


def inputs(*sizes: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> list[Tensor]:
    """query, key, value, score_weight for sizes B, H, HK, T, S, D, DV."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, key_heads, queries, keys, width, value_width = sizes

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    operands = [normal(batch, heads, queries, width) * size, normal(batch, key_heads, keys, width) * size]
    operands.append(normal(batch, key_heads, keys, value_width))
    weight = normal(heads, width) / max(1, width) ** 0.5
    return [operand.to(dtype) for operand in operands] + [weight.float()]


def formula(query, key, value, score_weight, mask=None, scale=1.0):
    """With the (B, H, T, S, D) sums in memory, and the log-sum-exp."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (torch.tanh(query[:, :, :, None] + key[:, :, None]) * score_weight[:, None, None]).sum(-1) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    weights = torch.where(scores.amax(-1, keepdim=True) == -math.inf, 0.0, torch.softmax(scores, -1))
    return weights @ value, scores.logsumexp(-1)


def compare(operands: list[Tensor], backend: str, mask: Tensor | None = None, **options: object) -> None:
    """Output, log-sum-exp and every gradient of ``backend`` within twice the budget of the float64 formula."""
    additive = mask is not None and mask.dtype is not torch.bool
    leaves = [tensor.detach().requires_grad_() for tensor in (*operands, *([mask] if additive else []))]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    output, lse = functional.additive_attention(
        *leaves[:4], leaves[4] if additive else mask, enable_gqa=True, return_lse=True, backend=backend, **options
    )
    hidden = wide[4] if additive else mask
    if "window" in options or options.get("is_causal"):
        queries, keys = output.shape[2], operands[1].shape[2]
        relative = torch.arange(keys) - torch.arange(queries)[:, None]
        visible = relative <= 0 if options.get("is_causal") else relative.abs() <= options["window"]
        hidden = visible if mask is None else mask & visible
    expected, expected_lse = formula(*wide[:4], hidden, options.get("scale", 1.0))
    seen = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    cotangents = [torch.randn(output.shape, dtype=torch.float64).to(output), torch.randn(lse.shape).where(seen, 0.0)]
    actual = [output, torch.where(seen, lse, 0.0), *torch.autograd.grad((output, lse), leaves, cotangents)]
    wide_cotangents = [cotangent.double() for cotangent in cotangents]
    wide_lse = torch.where(seen, expected_lse, 0.0)
    oracle = [expected, wide_lse, *torch.autograd.grad((expected, wide_lse), wide, wide_cotangents)]
    names = ("output", "lse", "query", "key", "value", "score_weight", "mask")
    for name, result, other in zip(names, actual, oracle, strict=False):
        # Gradients of scores cancel in a softmax; what they are made of is of the size of the values' gradients.
        magnitude = testing.rms(other) + (testing.rms(oracle[4]) if name in ("query", "key", "score_weight") else 0.0)
        budget = testing.budget_of(output.dtype if name != "lse" else torch.float32).scaled(2.0)
        if result.dtype is torch.float32 and output.dtype is not torch.float32:
            # The weight's gradient is float32 made of rounded terms.
            budget = budget.scaled(2.0**15 if output.dtype is torch.bfloat16 else 2.0**12)
        testing.assert_accurate(result, other.detach(), "gradient", magnitude=magnitude, budget=budget, name=name)


BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
SIZES = [
    (1, 1, 1, 1, 1, 1, 1), (2, 2, 1, 1, 70, 20, 5), (1, 2, 2, 5, 3, 16, 16), (2, 4, 2, 66, 65, 33, 17),
    (1, 1, 1, 130, 200, 64, 64), (1, 1, 1, 3, 600, 130, 8),
]  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_size(sizes, dtype, backend):
    compare(inputs(*sizes, dtype=dtype), backend)


@BACKENDS
@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, {"window": 9}, {"scale": 0.25}, {"scale": -2.0}, {"is_causal": True, "scale": 3.0}],
    ids=str,
)  # fmt: skip
def test_options(options, backend):
    compare(inputs(2, 2, 1, 70, 90, 24, 16), backend, **options)


@BACKENDS
@pytest.mark.parametrize("shape", [(2, 2, 70, 90), (2, 1, 1, 90), (1, 2, 70, 1)], ids=str)
def test_masks(shape, backend):
    generator = torch.Generator().manual_seed(1)
    operands = inputs(2, 2, 1, 70, 90, 24, 16)
    boolean = torch.rand(shape, generator=generator) < 0.5
    compare(operands, backend, boolean)
    compare(operands, backend, torch.randn(shape, generator=generator))


@pytest.mark.parametrize("isa", ISAS[1:])
def test_other_instruction_sets(isa):
    best = native.cpu_isa()
    native.select_cpu_isa(isa)
    try:
        for dtype in DTYPES:
            compare(inputs(2, 4, 2, 66, 65, 33, 17, dtype=dtype), "cpu", is_causal=True)
            compare(inputs(1, 1, 1, 3, 70, 40, 8, dtype=dtype, size=30.0), "cpu")
    finally:
        native.select_cpu_isa(best)


@pytest.mark.parametrize("size", [1e-4, 5.0, 25.0, 300.0])
def test_small_and_large_terms(size):
    """Where exp(2 query) exp(2 key) would overflow, and where a tanh is next to nothing."""
    compare(inputs(1, 2, 2, 20, 70, 24, 16, size=size), "cpu")
    operands = inputs(1, 2, 2, 20, 70, 24, 16)
    operands[0][:, :, 3], operands[1][:, :, 5] = 60.0, -45.0
    compare(operands, "cpu")


@BACKENDS
def test_dropout_is_redrawn_from_its_seed(backend):
    operands = [tensor.requires_grad_() for tensor in inputs(1, 2, 2, 70, 80, 16, 8)]
    options = {"dropout_p": 0.4, "seed": 3, "backend": backend}
    output = functional.additive_attention(*operands, **options)
    wide = [tensor.detach().double().requires_grad_() for tensor in operands]
    expected = functional.additive_attention(*wide, **{**options, "backend": "reference"})
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(output.sum(), operands)
    for gradient, other in zip(gradients, torch.autograd.grad(expected.sum(), wide), strict=True):
        torch.testing.assert_close(gradient.double(), other, rtol=1e-3, atol=1e-4)


@BACKENDS
def test_nan_reaches_only_what_sees_it(backend):
    clean, other = inputs(1, 1, 1, 70, 70, 8, 4), inputs(1, 1, 1, 70, 70, 8, 4)
    other[1][:, :, 50], other[2][:, :, 60] = float("nan"), float("inf")
    first, second = (
        functional.additive_attention(*operands, is_causal=True, backend=backend) for operands in (clean, other)
    )
    torch.testing.assert_close(second[:, :, :50], first[:, :, :50])
    assert second[:, :, 50:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(dtype):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaves = [tensor.requires_grad_() for tensor in inputs(1, 2, 1, 300, 200, 24, 16, dtype=dtype)]
        output = functional.additive_attention(*leaves, enable_gqa=True, backend="cpu")
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    torch.set_num_threads(1)
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@BACKENDS
@pytest.mark.parametrize(
    "sizes",
    [(0, 1, 1, 3, 3, 4, 2), (1, 0, 0, 3, 3, 4, 2), (1, 1, 1, 0, 3, 4, 2), (1, 1, 1, 3, 0, 4, 2), (1, 1, 1, 3, 3, 0, 2)],
    ids=str,
)
def test_empty_sizes(sizes, backend):
    leaves = [tensor.requires_grad_() for tensor in inputs(*sizes)]
    output = functional.additive_attention(*leaves, backend=backend)
    assert output.shape == (sizes[0], sizes[1], sizes[3], sizes[6])
    if sizes[4] == 0:
        assert output.eq(0).all()
    for gradient, leaf in zip(torch.autograd.grad(output.sum(), leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape and gradient.isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend):
    query, key, value, weight = inputs(2, 2, 1, 10, 12, 8, 4)
    forward, backward = (library.overload(f"additive_attention_{name}", backend) for name in ("forward", "backward"))
    for extras in (
        (None, None, 1.0, 0.0, -1, -1, False),
        (torch.randn(2, 1, 10, 12), torch.tensor([3]), 0.5, 0.2, 4, 0, True),
    ):
        arguments = (query, key, value, weight, *extras)
        torch.library.opcheck(forward, arguments)
        output, statistics = forward(*arguments)
        for wanted in ((True,) * 4, (False, True, False, False)):
            needs = (*wanted, extras[0] is not None and wanted[0])
            given = (torch.randn_like(output), torch.randn(2, 2, 10), output, statistics, *arguments, *needs)
            torch.library.opcheck(backward, given)


def test_first_and_second_derivatives():
    leaves = [tensor.double().requires_grad_() for tensor in inputs(1, 2, 1, 3, 4, 3, 2)]

    def function(*tensors):
        return functional.additive_attention(*tensors, enable_gqa=True, is_causal=True, return_lse=True)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_vmap():
    query, key, value, weight = inputs(2, 2, 2, 10, 12, 8, 4)
    for dims in ((0, 0, 0, None), (0, None, 0, None)):
        tensors = [tensor if dim == 0 else tensor[0] for tensor, dim in zip((query, key, value), dims, strict=False)]
        actual = torch.vmap(functional.additive_attention, dims)(*tensors, weight)
        for n in range(2):
            sample = [tensor[n] if dim == 0 else tensor for tensor, dim in zip(tensors, dims, strict=False)]
            torch.testing.assert_close(actual[n], functional.additive_attention(*sample, weight))
    weights = torch.randn(2, 2, 8)
    actual = torch.vmap(functional.additive_attention, (None, None, None, 0))(query, key, value, weights)
    torch.testing.assert_close(actual[1], functional.additive_attention(query, key, value, weights[1]))


def test_compiles_and_runs_under_autocast():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def function(*tensors):
        return functional.additive_attention(*tensors, is_causal=True)

    leaves = [tensor.requires_grad_() for tensor in inputs(1, 2, 2, 10, 12, 8, 4)]
    compiled, eager = function(*leaves), functional.additive_attention(*leaves, is_causal=True)
    assert torch.equal(compiled, eager)
    for gradient, other in zip(
        torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True
    ):
        assert torch.equal(gradient, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.additive_attention(*leaves).dtype is torch.bfloat16


@pytest.mark.parametrize("shape", [(10, 8), (3, 10, 8), (2, 3, 4, 10, 8)])
def test_any_number_of_leading_dimensions(shape):
    query, key, value = (torch.randn(shape) for _ in range(3))
    weight = torch.randn(8)
    heads = shape[-3] if len(shape) > 2 else 1
    expected, _ = formula(
        *(tensor.reshape(-1, heads, 10, 8) for tensor in (query, key, value)), weight.expand(heads, 8)
    )
    torch.testing.assert_close(functional.additive_attention(query, key, value, weight), expected.reshape(shape))


QUERY, KEY, VALUE, WEIGHT = inputs(2, 2, 2, 5, 6, 4, 3)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"score_weight": WEIGHT[:, :3]}, ArgumentValueError, "score_weight.shape is (2, 3), expected (4,) or (2, 4)"),
        ({"score_weight": WEIGHT.int()}, ArgumentTypeError, "score_weight.dtype is torch.int32"),
        ({"score_weight": WEIGHT.to("meta")}, ArgumentValueError, "score_weight.device is meta"),
        ({"key": KEY[..., :3]}, ArgumentValueError, "key.shape[-1] is 3"),
        ({"value": VALUE[:, :, :4]}, ArgumentValueError, "value.shape[-2] is 4"),
        ({"dropout_p": 2.0}, ArgumentValueError, "dropout_p is 2.0"),
        ({"scale": math.nan}, ArgumentValueError, "scale is nan"),
        ({"attn_mask": torch.ones(5, 6).int()}, ArgumentTypeError, "attn_mask.dtype is torch.int32"),
        ({"backend": "cuda"}, ArgumentValueError, "backend is 'cuda'"),
    ],
    ids=str,
)
def test_bad_arguments(changes, error, message):
    arguments = {"query": QUERY, "key": KEY, "value": VALUE, "score_weight": WEIGHT} | changes
    with pytest.raises(error) as caught:
        functional.additive_attention(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(("heads", "causal"), itertools.product((1, 2), (False, True)))
def test_module(heads, causal):
    torch.manual_seed(0)
    module = AdditiveAttention(6, 8, 12, heads).eval()
    query, key = torch.randn(2, 5, 6), torch.randn(2, 7, 8)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    mask = ~padding[:, None, None, :]
    if causal:
        mask = mask & (torch.arange(7) <= torch.arange(5)[:, None])

    def split(tensor):
        return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)

    operands = (split(module.query_proj(query)), split(module.key_proj(key)), split(key))
    expected, _ = formula(*operands, module.score_weight, mask)
    actual = module(query, key, key_padding_mask=padding, is_causal=causal)
    torch.testing.assert_close(actual, expected.transpose(1, 2).flatten(2))
    with pytest.raises(ArgumentValueError, match="num_heads is 5"):
        AdditiveAttention(6, 8, 12, 5)
