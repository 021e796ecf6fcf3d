"""What the tests of row-wise ops share: the backends to test on, tensors, and the four normalisations as one table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fusewright import functional
from fusewright_kernels import dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Target:
    """A backend on the device that it is tested on."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter is a thousand times slower than a kernel: tests give it fewer and smaller examples."""
        return self.backend == "triton" and self.device == "cpu"

    def tensor(self, *size: int, dtype: torch.dtype = torch.float32, seed: int = 0, **keywords: Any) -> Tensor:
        """Normal values that are the same on every device."""
        values = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return values.to(dtype).to(self.device).requires_grad_(keywords.get("requires_grad", False))


def _refusal(target: Target) -> str | None:
    try:
        for op in ("norm", "softmax"):
            dispatch.choose(op, target.device, (torch.float32,) * 3, 2, target.backend)
    except ValueError as error:
        return str(error)
    return None


def _parameter(target: Target) -> Any:
    reason = _refusal(target)
    marks = () if reason is None else pytest.mark.skip(reason=reason)
    return pytest.param(target, id=f"{target.backend}-{target.device}", marks=marks)


_TARGETS = [Target("reference", "cpu"), Target("cpu", "cpu"), Target("triton", "cpu")]
if torch.cuda.is_available():
    _TARGETS += [Target("reference", "cuda"), Target("triton", "cuda"), Target("cuda", "cuda")]

targets = pytest.mark.parametrize("target", [_parameter(target) for target in _TARGETS])
kernel_targets = pytest.mark.parametrize(
    "target", [_parameter(target) for target in _TARGETS if target.backend != "reference"]
)
norms = pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
add_norms = pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])


def norm(
    op: str,
    target: Target,
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    normalized_shape: Sequence[int] | None = None,
    **keywords: Any,
) -> Tensor:
    """Layer or RMS normalisation of ``input`` over its last dimension or ``normalized_shape``."""
    shape = input.shape[-1:] if normalized_shape is None else normalized_shape
    keywords.setdefault("eps", 1e-5)
    return getattr(functional, op)(input, shape, weight, bias=bias, backend=target.backend, **keywords)


def add_norm(
    op: str,
    target: Target,
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor]:
    """The fused addition and normalisation over the last dimension."""
    keywords.setdefault("eps", 1e-5)
    return getattr(functional, op)(
        input, residual, input.shape[-1:], weight, bias=bias, backend=target.backend, **keywords
    )


def with_gradients(function: Any, inputs: Sequence[Tensor], seed: int = 9) -> list[Tensor]:
    """The results of ``function`` and the gradients of its inputs for a cotangent of fixed random values."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    results = function(*leaves)
    results = [results] if isinstance(results, Tensor) else list(results)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result) for result in results]
    return [result.detach() for result in results] + list(torch.autograd.grad(results, leaves, cotangents))


def plain_norm(op: str) -> Any:
    """``torch.nn.functional``'s function of the same name as (input, weight, bias) over the last dimension."""
    if op == "layer_norm":
        return lambda input, weight, bias: torch.nn.functional.layer_norm(input, input.shape[-1:], weight, bias, 1e-5)
    return _plain_rms_norm


def _plain_rms_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    output = torch.nn.functional.rms_norm(input, input.shape[-1:], weight, 1e-5)
    return output if bias is None else output + bias
