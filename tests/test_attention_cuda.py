"""CUDA attention on a GPU: what the emulator shows of it must hold there."""

import pytest
import torch
from torch import Tensor

from fusewright import functional, testing
from fusewright_kernels import dispatch
from fusewright_kernels.attention import backend_native

pytestmark = pytest.mark.gpu

LENGTHS = [(1, 1), (1, 300), (129, 127), (200, 513), (385, 96), (1024, 1024), (2000, 4096)]


@pytest.fixture(autouse=True)
def kernels() -> None:
    reason = backend_native.refuse_cuda(dispatch.Call("attention", "cuda", (torch.bfloat16,), 4))
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels of the backward need compute capability 9.0")


def _inputs(dtype: torch.dtype, heads: int, key_heads: int, queries: int, keys: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = [(2, heads, queries, width), (2, key_heads, keys, width), (2, key_heads, keys, width)]
    return [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("alignment", [None, "top_left", "bottom_right"])
def test_against_the_oracle(dtype, width, lengths, alignment):
    tensors = _inputs(dtype, 4, 2, *lengths, width)
    keywords = {"is_causal": alignment is not None, "causal_alignment": alignment or "top_left", "enable_gqa": True}
    output, lse = functional.scaled_dot_product_attention(*tensors, **keywords, return_lse=True, backend="cuda")
    oracle, oracle_lse = functional.scaled_dot_product_attention(
        *(tensor.double() for tensor in tensors), **keywords, return_lse=True
    )
    testing.assert_accurate(output.cpu(), oracle.cpu())
    torch.testing.assert_close(lse.double(), oracle_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [64, 128])
def test_repeats_bit_for_bit_and_agrees_with_triton(width):
    tensors = _inputs(torch.bfloat16, 8, 8, 1500, 1500, width)
    first = functional.scaled_dot_product_attention(*tensors, is_causal=True, backend="cuda")
    for _ in range(20):
        again = functional.scaled_dot_product_attention(*tensors, is_causal=True, backend="cuda")
        assert testing.bits_equal(again, first)
    triton = functional.scaled_dot_product_attention(*tensors, is_causal=True, backend="triton")
    testing.assert_accurate(first.cpu(), triton.cpu().double())


@pytest.mark.parametrize("widths", [(64, 64), (96, 40), (8, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_keys_that_repeat(dtype, widths, lengths):
    """Hopper, too, runs the kernel of devices below it here."""
    query, key, value = _inputs(dtype, 4, 2, *lengths, 128)
    tensors = [query[..., : widths[0]], key[:1, ..., : widths[0]].expand(2, -1, -1, -1)]
    tensors.append(value[:1, ..., : widths[1]].expand(2, -1, -1, -1))
    keywords = {"is_causal": True, "causal_alignment": "bottom_right", "enable_gqa": True, "return_lse": True}
    output, lse = functional.scaled_dot_product_attention(*tensors, **keywords, backend="cuda")
    wide = [tensor.double() for tensor in tensors]
    oracle, oracle_lse = functional.scaled_dot_product_attention(*wide, **keywords)
    testing.assert_accurate(output.cpu(), oracle.cpu())
    torch.testing.assert_close(lse.double(), oracle_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("alignment", [None, "top_left", "bottom_right"])
def test_packed_sequences(width, alignment):
    lengths = [(5, 70), (0, 30), (1300, 1400), (40, 0), (128, 128), (700, 513)]
    offsets = [torch.tensor([0, *column], device="cuda").cumsum(0).int() for column in zip(*lengths, strict=True)]
    rows = [int(ends[-1]) + 9 for ends in offsets]
    tensors = [tensor[0].transpose(0, 1) for tensor in _inputs(torch.bfloat16, 4, 2, *rows, width)]
    keywords = {"is_causal": alignment is not None, "causal_alignment": alignment or "top_left", "return_lse": True}
    cotangent = torch.randn(rows[0], 4, width, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16)

    def run(dtype: torch.dtype, backend: str | None) -> list[Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        output, lse = functional.varlen_attention(*leaves, *offsets, 1300, 1400, **keywords, backend=backend)
        return [lse.detach(), output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(dtype))]

    lse, output, *gradients = run(torch.bfloat16, "cuda")
    oracle_lse, oracle, *expected = run(torch.float64, None)
    torch.testing.assert_close(lse.double(), oracle_lse, rtol=1e-5, atol=1e-5)
    testing.assert_accurate(output.cpu(), oracle.cpu())
    for gradient, oracle_gradient in zip(gradients, expected, strict=True):
        testing.assert_accurate(gradient.cpu(), oracle_gradient.cpu(), "gradient")


def _gradients(tensors: list[Tensor], keywords: dict[str, object], backend: str | None) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = functional.scaled_dot_product_attention(*leaves, **keywords, enable_gqa=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(output)
    return list(torch.autograd.grad(output, leaves, cotangent))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("alignment", [None, "top_left", "bottom_right"])
def test_gradients_against_the_oracle(dtype, width, lengths, alignment):
    tensors = _inputs(dtype, 4, 2, *lengths, width)
    keywords = {"is_causal": alignment is not None, "causal_alignment": alignment or "top_left"}
    actual = _gradients(tensors, keywords, "cuda")
    expected = _gradients([tensor.double() for tensor in tensors], keywords, None)
    for gradient, oracle in zip(actual, expected, strict=True):
        testing.assert_accurate(gradient.cpu(), oracle.cpu(), "gradient")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_gradients_repeat_bit_for_bit_where_that_is_asked_for(width, causal):
    tensors = _inputs(torch.bfloat16, 16, 8, 1900, 2100, width)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [_gradients(tensors, {"is_causal": causal}, "cuda") for _ in range(20)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs:
        assert all(testing.bits_equal(*pair) for pair in zip(run, runs[0], strict=True))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("widths", [(96, 96), (80, 40), (24, 128)], ids=str)
def test_head_dimensions(widths):
    query, key, value = _inputs(torch.bfloat16, 4, 2, 300, 500, 128)
    tensors = [query[..., : widths[0]], key[..., : widths[0]], value[..., : widths[1]]]
    actual = _gradients(tensors, {"is_causal": True}, "cuda")
    expected = _gradients([tensor.double() for tensor in tensors], {"is_causal": True}, None)
    for gradient, oracle in zip(actual, expected, strict=True):
        testing.assert_accurate(gradient.cpu(), oracle.cpu(), "gradient")


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("width", [64, 128])
def test_decoding_agrees_with_the_oracle(width, queries):
    query, keys, values = _inputs(torch.bfloat16, 32, 8, queries, 5000, width)
    lengths = torch.tensor([4097, 5], device="cuda")
    output = functional.decode_attention(query, keys, values, lengths, backend="cuda")
    oracle = functional.decode_attention(query.double(), keys.double(), values.double(), lengths)
    testing.assert_accurate(output.cpu(), oracle.cpu())


@pytest.mark.usefixtures("hopper")
def test_gradients_agree_with_tritons():
    tensors = _inputs(torch.bfloat16, 8, 2, 1500, 1500, 128)
    cuda, triton = (_gradients(tensors, {"is_causal": True}, backend) for backend in ("cuda", "triton"))
    for actual, expected in zip(cuda, triton, strict=True):
        testing.assert_accurate(actual.cpu(), expected.cpu().double(), "gradient")
