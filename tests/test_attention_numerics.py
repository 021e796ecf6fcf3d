"""Attention's compiled kernels against their float64 oracle, for every instruction set of this machine."""

import pytest
import torch

from fusewright import functional, testing
from fusewright.testing.case import evaluate
from fusewright.testing.cases.attention import AttentionCase, cases_of
from fusewright_kernels import native
from fusewright_kernels.attention import reference

CASES = list(cases_of("scaled_dot_product_attention"))
ISAS = native.cpu_isas() if native.cpu_unavailable_reason() is None else []


@pytest.fixture(autouse=True)
def nan_in_scratch():
    """Kernels keep their scratch from call to call; what a call of NaN leaves there must not reach the next."""
    torch.set_num_threads(1)
    nan = torch.full((1, 2, 128, 64), float("nan"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        leaves = [nan.to(dtype).requires_grad_() for _ in range(3)]
        mask = torch.full((128, 128), float("nan"), dtype=dtype)
        output = functional.scaled_dot_product_attention(*leaves, mask, 0.5, softcap=1.0, seed=0, backend="cpu")
        output.sum().backward()


def _failures(case, backend):
    return {name: verdict.failures for name, verdict in evaluate(case, backend).items() if not verdict.passed}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_cpu(case):
    assert not _failures(case, "cpu")


@pytest.mark.parametrize("isa", ISAS[1:])
def test_other_instruction_sets(isa):
    """Every third case, so that each width, length and feature comes up for some dtype.

    Without fused multiply-add an exponent is rounded twice. A machine that needs those kernels has no such instruction
    for torch either, so they are held to the budget and not to what torch does on this machine.
    """
    best = native.cpu_isa()
    native.select_cpu_isa(isa)
    try:
        failures = {case.id: _failures(case, "cpu") for case in CASES[::3]}
    finally:
        native.select_cpu_isa(best)
    allowed = "that of plain PyTorch" if isa == "generic" else "nothing"
    assert not [
        (case, name, reason)
        for case, results in failures.items()
        for name, reasons in results.items()
        for reason in reasons
        if allowed not in reason
    ]


@pytest.fixture
def tiles_with_split_float32():
    """The kernels in tiles, which multiply float32 as three bfloat16 when they are told to."""
    best = native.cpu_isa()
    tiles = next((isa for isa in ISAS if isa.startswith("amx")), None)
    if tiles is None:
        pytest.skip("neither AMX nor AVX512-BF16, which the model of AMX tiles needs")
    native.select_cpu_isa(tiles)
    native.split_float32_products(True)
    yield
    native.split_float32_products(False)
    native.select_cpu_isa(best)


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype is torch.float32][::4], ids=lambda case: case.id)
def test_float32_by_three_bfloat16(case, tiles_with_split_float32):
    assert not _failures(case, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_split_elements_that_are_not_finite(dtype, tiles_with_split_float32):
    """A key whose logit is -inf hides itself alone, and an infinite value reaches the rows that see it as infinity."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 90, 40).to(dtype) for _ in range(3))
    query[..., 0] = query[..., 0].abs() + 0.5
    key[:, 0, 30, 0] = -torch.inf
    value[:, 0, 10, 5] = torch.finfo(dtype).max
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True
    )
    value[:, 1, 80, 3] = torch.inf
    expected[:, 1, 80:, 3] = torch.inf
    output = functional.scaled_dot_product_attention(query, key, value, is_causal=True, backend="cpu")
    torch.testing.assert_close(output.double(), expected, rtol=2e-3, atol=2e-3)


def test_long_sequence_keeps_its_accuracy():
    """Errors of the sums must not grow with the number of keys."""
    assert not _failures(AttentionCase((1, 1, 1, 16, 30011, 16, 16), torch.float32), "cpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_row_of_large_finite_mask_is_a_plain_average(backend):
    """-1e9 swallows the logits in float32: the weights are equal, and so must those of the backward be."""
    query, key, value = (torch.randn(1, 1, 70, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    query, value = query.requires_grad_(), value.requires_grad_()
    mask = torch.full((70, 70), -1e9)
    output = functional.scaled_dot_product_attention(query, key, value, mask, backend=backend)
    torch.testing.assert_close(output, value.mean(2, keepdim=True).expand_as(output))
    grad_query, grad_value = torch.autograd.grad(output.sum(), (query, value))
    torch.testing.assert_close(grad_value, torch.ones_like(value))
    grad_weights = value.detach().sum(-1)
    grad_logits = (grad_weights - grad_weights.mean(-1, keepdim=True)) / 70
    expected = (grad_logits[..., None] * key).sum(2, keepdim=True) / 8**0.5
    torch.testing.assert_close(grad_query, expected.expand_as(grad_query))


def test_matches_torch_on_its_own_call():
    for options in ({}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.randn(2, 1, 33, 47)}):
        query = torch.randn(2, 4, 33, 16)
        key, value = torch.randn(2, 4, 47, 16), torch.randn(2, 4, 47, 24)
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
        actual = functional.scaled_dot_product_attention(query, key, value, **options)
        testing.assert_accurate(actual, expected.double(), budget=testing.budget_of(torch.float32).scaled(2.0))


def test_packed_sequences_are_each_sequence_alone():
    lengths_q, lengths_k = [5, 0, 70, 1], [9, 3, 64, 0]
    offsets_q, offsets_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k))
    query = torch.randn(int(offsets_q[-1]) + 2, 4, 16)
    key, value = (torch.randn(int(offsets_k[-1]) + 1, 2, 16) for _ in range(2))
    packed = functional.varlen_attention(
        query, key, value, offsets_q.int(), offsets_k, is_causal=True, causal_alignment="bottom_right"
    )
    assert packed[offsets_q[-1] :].eq(0).all()
    for n in range(len(lengths_q)):
        rows, columns = slice(*offsets_q[n : n + 2].tolist()), slice(*offsets_k[n : n + 2].tolist())
        heads_first = [tensor.transpose(0, 1)[None] for tensor in (query[rows], key[columns], value[columns])]
        alone = functional.scaled_dot_product_attention(
            *heads_first, is_causal=True, enable_gqa=True, causal_alignment="bottom_right"
        )
        assert testing.bits_equal(packed[rows].transpose(0, 1), alone[0])


def test_packed_sequences_have_gradients():
    offsets = torch.tensor([0, 30, 30, 100])
    leaves = [torch.randn(110, 2, 16, requires_grad=True) for _ in range(3)]
    output = functional.varlen_attention(*leaves, offsets, offsets, is_causal=True, window=(20, 0))
    grad = torch.randn_like(output)
    actual = torch.autograd.grad(output, leaves, grad)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    plain = functional.varlen_attention(*wide, offsets, offsets, is_causal=True, window=(20, 0))
    for result, expected in zip(actual, torch.autograd.grad(plain, wide, grad.double()), strict=True):
        testing.assert_accurate(result, expected, "gradient", magnitude=testing.rms(expected))


def test_explicit_gradients_of_the_reference_are_those_of_autograd():
    """The oracle's backward is written out, so it is checked against the derivative of its forward."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    query, key, value, mask, sinks = (
        normal(2, 4, 9, 5),
        normal(2, 2, 7, 5),
        normal(2, 2, 7, 3),
        normal(1, 4, 9, 7),
        normal(4),
    )
    keep = torch.rand(2, 4, 9, 7, generator=generator) < 0.7
    arguments = (None, torch.rand(4), sinks, keep, None, None, 0, 0.4, 3.0, 0.3, 5, 0, True)
    output, statistics = reference.attention(query, key, value, mask, *arguments)
    lse = statistics[0] + statistics[1].log()
    grad, grad_lse = torch.randn_like(output), torch.randn_like(lse)
    expected = torch.autograd.grad([output, lse], (query, key, value, mask, sinks), [grad, grad_lse])
    actual = list(reference.attention_backward(grad, grad_lse, query, key, value, mask, *arguments))
    actual[3] = actual[3].sum_to_size(mask.shape)
    for result, gradient in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, gradient)
