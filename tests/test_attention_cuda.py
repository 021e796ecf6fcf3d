"""Hopper attention on a Hopper GPU: what the emulator shows of it must hold there."""

import pytest
import torch
from torch import Tensor

from fusewright import functional, testing
from fusewright_kernels import dispatch
from fusewright_kernels.attention import backend_native

pytestmark = pytest.mark.gpu

LENGTHS = [(1, 1), (1, 300), (129, 127), (200, 513), (385, 96), (1024, 1024), (2000, 4096)]


@pytest.fixture(autouse=True)
def hopper() -> None:
    reason = backend_native.refuse_cuda(dispatch.Call("attention", "cuda", (torch.bfloat16,), 4))
    if reason is not None:
        pytest.skip(reason)


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


def test_gradients_by_triton_from_its_statistics():
    tensors = [tensor.requires_grad_() for tensor in _inputs(torch.bfloat16, 4, 2, 300, 500, 128)]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    gradients = []
    for inputs, backend in ((tensors, "cuda"), (wide, None)):
        output = functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True, backend=backend)
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        gradients.append(torch.autograd.grad(output, inputs, cotangent))
    for actual, expected in zip(*gradients, strict=True):
        testing.assert_accurate(actual.cpu(), expected.cpu(), "gradient")
