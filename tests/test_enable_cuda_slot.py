"""The functions behind CUDA's flash slot, called as the dispatcher would, on CPU tensors: they are plain Python."""

import pytest
import torch
from enable_support import assert_same, everything_is_given_back, normal

from fusewright.integrations import sdpa_slot

pytestmark = pytest.mark.usefixtures(everything_is_given_back.__name__)
FLASH = torch.nn.attention.SDPBackend.FLASH_ATTENTION.value


def _qkv(queries=9, dtype=torch.bfloat16):
    return [normal(2, 4, length, 16, dtype=dtype, seed=i) for i, length in enumerate((queries, 9, 9))]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_forward_and_backward(dtype, is_causal):
    leaves = [tensor.requires_grad_() for tensor in _qkv(dtype=dtype)]
    grad = normal(2, 4, 9, 16, dtype=dtype, seed=5)
    expected = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=is_causal, scale=0.3)
    expected_gradients = torch.autograd.grad(expected, leaves, grad)
    with torch.no_grad():
        results = sdpa_slot._cuda_forward(None, *leaves, 0.0, is_causal, False, scale=0.3)
        output, lse, cum_seq_q, cum_seq_k, max_q, max_k, seed, offset, debug_mask = results
        gradients = sdpa_slot._cuda_backward(
            None, grad, *leaves, output, lse, cum_seq_q, cum_seq_k, max_q, max_k, 0.0, is_causal, seed, offset,
            scale=0.3,
        )  # fmt: skip
    assert_same([output, *gradients], [expected, *expected_gradients], rtol=0.02, atol=0.02)
    assert lse.shape == (2, 4, 9) and lse.is_contiguous() and (max_q, max_k) == (9, 9)
    assert seed.dtype is offset.dtype is torch.uint64 and debug_mask.numel() == 0


class _TorchKernel:
    def __init__(self):
        self.calls = []

    def call_boxed(self, *arguments, **options):
        self.calls.append((arguments, options))
        return "torch's"


@pytest.mark.parametrize(
    "queries, dtype, dropout_p, is_causal, debug",
    [
        (9, torch.bfloat16, 0.1, False, False),
        (9, torch.float64, 0.0, False, False),
        (5, torch.bfloat16, 0.0, True, False),
        (9, torch.bfloat16, 0.0, False, True),
    ],
)
def test_the_rest_is_torchs(monkeypatch, queries, dtype, dropout_p, is_causal, debug):
    kernel = _TorchKernel()
    for name in (sdpa_slot._CUDA_FORWARD, sdpa_slot._CUDA_BACKWARD):
        monkeypatch.setitem(sdpa_slot._torch_kernels, name, kernel)
    tensors = _qkv(queries, dtype)
    assert sdpa_slot._cuda_forward("keys", *tensors, dropout_p, is_causal, debug, scale=0.5) == "torch's"
    assert kernel.calls == [(("keys", *tensors, dropout_p, is_causal, debug), {"scale": 0.5})]
    if not debug:
        backward = ("keys", tensors[0], *tensors, tensors[0], None, None, None, queries, 9, dropout_p, is_causal)
        assert sdpa_slot._cuda_backward(*backward, "seed", "offset", scale=0.5) == "torch's"
        assert kernel.calls[1] == ((*backward, "seed", "offset"), {"scale": 0.5})


def test_flash_attention_comes_first_and_goes_back():
    before = torch._C._get_sdp_priority_order()
    cudnn_first = sorted(before, key=lambda backend: (backend == FLASH, backend))
    torch._C._set_sdp_priority_order(cudnn_first)
    overrides = sdpa_slot._Overrides()
    overrides._put_flash_first()
    order = torch._C._get_sdp_priority_order()
    overrides.remove()
    restored = torch._C._get_sdp_priority_order()
    torch._C._set_sdp_priority_order(before)
    assert order[0] == FLASH and sorted(order) == sorted(before)
    assert restored == cudnn_first
