"""What the tests of ``enable`` share: inputs, comparisons, and the check that everything is given back."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention as imported_before

import fusewright
from fusewright.integrations.switch import OPS

TORCHS = {name: getattr(F if hasattr(F, name) else torch, name) for name in OPS}


@pytest.fixture
def everything_is_given_back():
    fastpath = torch.backends.mha.get_fastpath_enabled()
    priority = torch._C._get_sdp_priority_order()
    yield
    fusewright.disable()
    for name, function in TORCHS.items():
        assert all(getattr(place, name) is function for place in ((F,) if hasattr(F, name) else (torch, torch._VF)))
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert torch._C._get_sdp_priority_order() == priority
    assert torch.nn.attention.current_flash_attention_impl() is None
    assert not served_by_ours(imported_before)


def normal(*size, dtype=torch.float32, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(*leading, heads=4, key_heads=4, queries=8, keys=9, width=8, value_width=8, dtype=torch.float32):
    shapes = ((heads, queries, width), (key_heads, keys, width), (key_heads, keys, value_width))
    return [normal(*(leading or (2,)), *shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def served_by_ours(function, *arguments, **options):
    """Whether ``function`` ran on a kernel of ours, by default on a small call."""
    rows = fusewright.explain(function, *(arguments or qkv()), **options)
    return any(row.serves and row.backend == "cpu" for row in rows)


def gradients(function, tensors, *arguments, **options):
    """The result and the gradients of ``tensors``."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves, *arguments, **options)
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)]


def assert_same(actual, expected, rtol=1e-4, atol=2e-5):
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol)
