"""Cases of softmax."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fusewright import functional
from fusewright.testing.budgets import Budget
from fusewright.testing.case import Expected, Tensors, dtype_name, generator_of, gradients
from fusewright.testing.errors import rms
from fusewright_kernels.softmax import reference

OPS = ("softmax",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COLUMNS = (1, 3, 31, 64, 100, 760, 1000, 1024, 1025, 4097, 65537)

# A finite stand-in for -inf that users put into masks; float16 has no -1e9.
_MASK_VALUE = {torch.float32: -1e9, torch.bfloat16: -1e9, torch.float16: -6e4}


@dataclass(frozen=True)
class SoftmaxCase:
    """Softmax over dimension ``dim`` of ``rows`` x ``columns`` logits."""

    rows: int
    columns: int
    dtype: torch.dtype
    distribution: str = "normal"
    dim: int = -1
    output: torch.dtype | None = None
    op: str = "softmax"

    @cached_property
    def id(self) -> str:
        parts = [self.op, f"{self.rows}x{self.columns}", dtype_name(self.dtype), self.distribution]
        if self.dim != -1:
            parts.append(f"dim={self.dim}")
        if self.output is not None:
            parts.append(f"output={dtype_name(self.output)}")
        return "/".join(parts)

    def inputs(self) -> Tensors:
        generator = generator_of(self.id)
        normal = torch.randn(self.rows, self.columns, generator=generator, dtype=torch.float64)
        hidden = torch.rand(self.rows, self.columns, generator=generator) < 0.5
        grad = torch.randn(self.rows, self.columns, generator=generator, dtype=torch.float64)
        return {
            "input": self._distributed(normal, hidden).to(self.dtype),
            "grad_output": grad.to(self.output or self.dtype),
        }

    def _distributed(self, normal: Tensor, hidden: Tensor) -> Tensor:
        match self.distribution:
            case "normal":
                return 2.0 * normal
            case "offset":
                return normal + 1e3
            case "huge":
                return 100.0 * normal
            case "constant":
                return normal[:, :1].expand_as(normal)
            case "masked":
                return normal.masked_fill(hidden, _MASK_VALUE[self.dtype])
            case "masked by -inf":
                return normal.masked_fill(hidden, float("-inf"))
        raise ValueError(f"distribution is {self.distribution}, expected one that is defined here")

    def ours(self, inputs: Tensors, backend: str | None) -> Tensors:
        leaf = inputs["input"].detach().clone().requires_grad_()
        outputs = {"output": functional.softmax(leaf, self.dim, self.output, backend=backend)}
        return outputs | gradients(outputs, {"input": leaf}, {"output": inputs["grad_output"]})

    def plain(self, inputs: Tensors) -> Tensors:
        leaf = inputs["input"].detach().clone().requires_grad_()
        outputs = {"output": torch.softmax(leaf, self.dim, self.output)}
        return outputs | gradients(outputs, {"input": leaf}, {"output": inputs["grad_output"]})

    def oracle(self, inputs: Tensors) -> dict[str, Expected]:
        leaf = inputs["input"].double().requires_grad_()
        outputs = {"output": reference.softmax(leaf, self.dim, torch.float64)}
        grad = inputs["grad_output"].double()
        values = outputs | gradients(outputs, {"input": leaf}, {"output": grad})
        output = outputs["output"].detach()
        dot_size = (output * grad).square().sum(self.dim, keepdim=True)
        grad_size = rms(output * (grad.square() + dot_size).sqrt())
        stored = self.output or self.dtype  # the backward starts from the output as it was stored
        return {
            "output": Expected(output, "forward", 0.0),
            "grad_input": Expected(values["grad_input"], "gradient", grad_size, stored),
        }

    def budget(self, inputs: Tensors, budget: Budget) -> Budget:
        logits = inputs["input"].double()
        distance = logits.amax(self.dim, keepdim=True) - logits
        # exp of what lies further below the maximum than this is 0 in every dtype.
        seen = distance[distance < 104.0]
        return budget.for_logits(seen.max().item())


def cases_of(op: str) -> Iterator[SoftmaxCase]:
    """The grid of softmax."""
    for dtype in DTYPES:
        for columns in COLUMNS:
            yield SoftmaxCase(5, columns, dtype)
        for rows in (1, 199):
            yield SoftmaxCase(rows, 1024, dtype)
        yield SoftmaxCase(64, 8192, dtype, dim=0)
        for distribution in ("offset", "huge", "constant", "masked", "masked by -inf"):
            yield SoftmaxCase(37, 1000, dtype, distribution)
        if dtype is not torch.float32:
            yield SoftmaxCase(37, 1000, dtype, output=torch.float32)
