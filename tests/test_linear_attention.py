"""Linear attention against its formula in float64, on every backend and instruction set."""

import pytest
import torch
from torch import Tensor

from fusewright import functional, testing
from fusewright_kernels import library, native
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError
from fusewright_kernels.linear_attention import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = native.cpu_isas() if native.cpu_unavailable_reason() is None else []
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


def inputs(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """query, key, value and a state for sizes B, H, T, S, D, DV."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, queries, keys, width, value_width = sizes
    shapes = [(batch, heads, queries, width), (batch, heads, keys, width), (batch, heads, keys, value_width)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    state = torch.rand((batch, heads, width, value_width + 1), generator=generator)
    return [*made, state]


def compare(operands: list[Tensor], backend: str, *, with_state: bool = False, **options: object) -> None:
    """Output, final state and every gradient within twice the budget of the float64 formula."""
    leaves = [tensor.detach().requires_grad_() for tensor in operands[: 4 if with_state else 3]]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    results, names = [], ("output", "state", "query", "key", "value", "state's")
    generator = torch.Generator().manual_seed(1)
    cotangents = None
    for tensors, forced in ((leaves, backend), (wide, "reference")):
        output, state = functional.linear_attention(
            *tensors[:3], state=tensors[3] if with_state else None, return_state=True, backend=forced, **options
        )
        if cotangents is None:
            cotangents = [torch.randn(result.shape, generator=generator).to(result) for result in (output, state)]
        given = [cotangent.to(result.dtype) for cotangent, result in zip(cotangents, (output, state), strict=True)]
        results.append([output, state, *torch.autograd.grad((output, state), tensors, given)])
    for name, actual, expected in zip(names, *results, strict=False):
        budget = testing.budget_of(actual.dtype).scaled(2.0)
        if actual.dtype is torch.float32 and operands[0].dtype is not torch.float32 and name == "state's":
            # float32, but made of an output that was rounded to 16 bits.
            budget = testing.budget_of(torch.float32).scaled(2.0**15)
        # Gradients of queries and keys cancel: with one key the output hardly depends on them.
        magnitude = testing.rms(expected) + (testing.rms(results[1][4]) if name in ("query", "key") else 0.0)
        testing.assert_accurate(actual, expected.detach(), "gradient", magnitude=magnitude, budget=budget, name=name)


SIZES = [
    (1, 1, 1, 1, 1, 1), (2, 2, 64, 64, 16, 16), (1, 2, 65, 65, 7, 5), (1, 1, 200, 200, 40, 33),
    (2, 1, 130, 130, 64, 64), (1, 1, 3, 3, 130, 20),
]  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_size(sizes, dtype, causal, backend):
    for with_state in (False, True):
        compare(inputs(*sizes, dtype=dtype), backend, is_causal=causal, with_state=with_state)


@BACKENDS
def test_queries_and_keys_of_different_number(backend):
    for queries, keys in ((5, 150), (150, 5), (70, 1)):
        compare(inputs(1, 2, queries, keys, 12, 9), backend)


@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
def test_padding_and_features(causal, backend):
    padding = torch.rand(2, 130, generator=torch.Generator().manual_seed(2)) < 0.4
    padding[1] = True
    compare(inputs(2, 2, 130, 130, 12, 9), backend, is_causal=causal, key_padding_mask=padding)
    operands = inputs(2, 2, 130, 130, 12, 9)
    operands[0], operands[1] = operands[0].exp(), operands[1].exp()
    compare(operands, backend, is_causal=causal, feature_map="identity", eps=0.0)


@pytest.mark.parametrize("isa", ISAS[1:])
def test_other_instruction_sets(isa):
    best = native.cpu_isa()
    native.select_cpu_isa(isa)
    try:
        for dtype in DTYPES:
            for causal in (False, True):
                compare(inputs(1, 2, 150, 150, 20, 33, dtype=dtype), "cpu", is_causal=causal, with_state=True)
    finally:
        native.select_cpu_isa(best)


@BACKENDS
def test_the_state_carries_a_sequence_from_call_to_call(backend):
    query, key, value, _ = inputs(1, 2, 150, 150, 12, 9)
    whole, last = functional.linear_attention(query, key, value, True, return_state=True, backend=backend)
    state, parts = None, []
    for begin, end in ((0, 70), (70, 71), (71, 72), (72, 150)):
        part = [tensor[:, :, begin:end] for tensor in (query, key, value)]
        output, state = functional.linear_attention(*part, True, state=state, return_state=True, backend=backend)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    torch.testing.assert_close(state, last)


@BACKENDS
def test_padding_leaves_no_trace_and_nan_stays_behind_itself(backend):
    clean = inputs(1, 1, 100, 100, 8, 8)[:3]
    other = [tensor.clone() for tensor in clean]
    padding = torch.zeros(1, 100, dtype=torch.bool)
    padding[:, 40:60] = True
    other[1][:, :, 40:60], other[2][:, :, 40:60] = float("nan"), float("inf")
    for causal in (False, True):
        options = {"is_causal": causal, "key_padding_mask": padding, "backend": backend}
        first, second = (functional.linear_attention(*tensors, **options) for tensors in (clean, other))
        torch.testing.assert_close(second, first)
    other = [tensor.clone() for tensor in clean]
    other[1][:, :, 70] = float("nan")
    first, second = (functional.linear_attention(*tensors, True, backend=backend) for tensors in (clean, other))
    torch.testing.assert_close(second[:, :, :70], first[:, :, :70])
    assert second[:, :, 70:].isnan().all()


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_special_values_stay_behind_themselves(name, special):
    """A causal row is met by later ones alone, and its gradient by earlier ones; also within a chunk."""
    clean = inputs(1, 1, 150, 150, 4, 4)[:3]
    dirty = [tensor.clone() for tensor in clean]
    dirty[("query", "key", "value").index(name)][:, :, 80] = special
    results = []
    for tensors in (clean, dirty):
        leaves = [tensor.requires_grad_() for tensor in tensors]
        output = functional.linear_attention(*leaves, True, backend="cpu")
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    expected, actual = results
    others = torch.arange(150) != 80 if name == "query" else slice(80)
    for result, other in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(result[:, :, others], other[:, :, others])
    if name == "query":
        for result, other in zip(actual[2:], expected[2:], strict=True):
            torch.testing.assert_close(result[:, :, 81:], other[:, :, 81:])
    else:
        assert not actual[0][:, :, 80:].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_neither_threads_nor_batch(dtype):
    results = []
    for threads, batch in ((1, 3), (2, 3), (2, 1)):
        torch.set_num_threads(threads)
        leaves = [tensor[:batch].clone().requires_grad_() for tensor in inputs(3, 2, 150, 150, 16, 16, dtype=dtype)[:3]]
        output = functional.linear_attention(*leaves, True, backend="cpu")
        results.append([output[:1], *(gradient[:1] for gradient in torch.autograd.grad(output.sum(), leaves))])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@BACKENDS
@pytest.mark.parametrize(
    "sizes",
    [(0, 1, 3, 3, 4, 2), (1, 0, 3, 3, 4, 2), (1, 1, 0, 0, 4, 2), (1, 1, 3, 0, 4, 2), (1, 1, 3, 3, 4, 0)],
    ids=str,
)
def test_empty_sizes(sizes, backend):
    leaves = [tensor.requires_grad_() for tensor in inputs(*sizes)[:3]]
    output = functional.linear_attention(*leaves, backend=backend)
    assert output.shape == (*sizes[:3], sizes[5])
    assert sizes[3] > 0 or output.eq(0).all()
    for gradient, leaf in zip(torch.autograd.grad(output.sum(), leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape and gradient.isfinite().all()


def test_any_strides():
    packed = torch.randn(2, 90, 3, 2, 24)
    query, key, value = (packed[:, :, i, :, ::2].transpose(1, 2) for i in range(3))
    strided = functional.linear_attention(query, key, value, True, backend="cpu")
    contiguous = (tensor.contiguous() for tensor in (query, key, value))
    assert torch.equal(strided, functional.linear_attention(*contiguous, True, backend="cpu"))


@BACKENDS
def test_opcheck(backend):
    query, key, value, state = inputs(2, 2, 10, 10, 8, 4)
    forward, backward = (library.overload(f"linear_attention_{name}", backend) for name in ("forward", "backward"))
    for extras in ((None, None, False, 1e-6, 0), (torch.rand(2, 10) < 0.3, state, True, 0.0, 1)):
        arguments = (query, key, value, *extras)
        torch.library.opcheck(forward, arguments)
        output, normalizer, final = forward(*arguments)
        for wanted in ((True, True, True, extras[1] is not None), (False, True, False, False)):
            for grad_state in (None, torch.randn_like(final)):
                given = (torch.randn_like(output), grad_state, output, normalizer, *arguments, *wanted)
                torch.library.opcheck(backward, given)


@pytest.mark.parametrize("causal", [False, True])
def test_first_and_second_derivatives(causal):
    leaves = [tensor.double().requires_grad_() for tensor in inputs(1, 2, 4, 4, 3, 2)]

    def function(query, key, value, state):
        return functional.linear_attention(query, key, value, causal, state=state, return_state=True)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_vmap_compile_and_autocast():
    query, key, value, _ = inputs(2, 2, 10, 10, 8, 4)
    samples = [tensor[:, None] for tensor in (query, key, value)]
    mapped = torch.vmap(functional.linear_attention)(*samples)
    torch.testing.assert_close(mapped[:, 0], functional.linear_attention(query, key, value))

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def function(*tensors):
        return functional.linear_attention(*tensors, True)

    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    compiled, eager = function(*leaves), functional.linear_attention(*leaves, True)
    assert torch.equal(compiled, eager)
    for gradient, other in zip(
        torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True
    ):
        assert torch.equal(gradient, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.linear_attention(*leaves).dtype is torch.bfloat16


def test_explicit_gradients_are_those_of_autograd():
    for causal in (False, True):
        for given in (False, True):
            operands = [tensor.double().requires_grad_() for tensor in inputs(2, 1, 6, 6, 4, 3)]
            state = operands[3] if given else None
            numbers = (None, state, causal, 0.1, reference.ELU)
            output, _, final = reference.attention(*operands[:3], *numbers)
            cotangents = [torch.randn_like(output), torch.randn_like(final)]
            leaves = operands if given else operands[:3]
            expected = torch.autograd.grad((output, final), leaves, cotangents)
            actual = reference.attention_backward(*cotangents, *operands[:3], *numbers)
            for result, other in zip(actual, expected, strict=False):
                torch.testing.assert_close(result, other)


QUERY, KEY, VALUE, STATE = inputs(2, 2, 5, 5, 4, 3)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"query": QUERY[0]}, ArgumentValueError, "query.ndim is 3"),
        ({"query": QUERY.int()}, ArgumentTypeError, "query.dtype is torch.int32"),
        ({"key": KEY.half()}, ArgumentTypeError, "key.dtype is torch.float16"),
        ({"key": KEY[:, :1]}, ArgumentValueError, "key.shape is (2, 1, 5, 4)"),
        ({"key": KEY[..., :3]}, ArgumentValueError, "key.shape[3] is 3"),
        ({"value": VALUE[:, :, :4]}, ArgumentValueError, "value.shape[2] is 4"),
        ({"query": QUERY[:, :, :4], "is_causal": True}, ArgumentValueError, "key.shape[2] is 5, expected 4"),
        ({"feature_map": "exp"}, ArgumentValueError, "feature_map is 'exp', expected one of elu, identity"),
        ({"eps": -1.0}, ArgumentValueError, "eps is -1.0"),
        ({"state": STATE[..., :3]}, ArgumentValueError, "state.shape is (2, 2, 4, 3)"),
        ({"key_padding_mask": torch.zeros(2, 5)}, ArgumentTypeError, "key_padding_mask is torch.float32"),
        ({"key_padding_mask": torch.zeros(2, 4).bool()}, ArgumentValueError, "key_padding_mask.shape is (2, 4)"),
        ({"backend": "cuda"}, ArgumentValueError, "backend is 'cuda'"),
    ],
    ids=str,
)
def test_bad_arguments(changes, error, message):
    arguments = {"query": QUERY, "key": KEY, "value": VALUE} | changes
    with pytest.raises(error) as caught:
        functional.linear_attention(**arguments)
    assert message in str(caught.value)
