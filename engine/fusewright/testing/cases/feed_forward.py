"""Cases of what stands between a block's products: rotary embedding, activations, dropout with a residual."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from fusewright import functional
from fusewright.testing.budgets import Budget
from fusewright.testing.case import Expected, Tensors, dtype_name, generator_of, gradients
from fusewright.testing.errors import rms
from fusewright_kernels.activation import reference as activation
from fusewright_kernels.rotary import reference as rotary

OPS = ("rotary_embedding", "swiglu", "bias_gelu", "dropout_add")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIANTS = {
    "rotary_embedding": ("halves", "interleaved", "partial"),
    "swiglu": ("two", "packed"),
    "bias_gelu": ("none", "tanh", "wide"),
    "dropout_add": ("0.0",),
}
SHAPES = ((5, 2), (7, 34), (65, 768), (3, 4098))


@dataclass(frozen=True)
class FeedForwardCase:
    """``rows`` of ``columns`` features; a rotary embedding turns them as the rows of two heads."""

    op: str
    rows: int
    columns: int
    dtype: torch.dtype
    variant: str

    @cached_property
    def id(self) -> str:
        return "/".join([self.op, f"{self.rows}x{self.columns}", dtype_name(self.dtype), self.variant])

    def inputs(self) -> Tensors:
        generator = generator_of(self.id)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(self.dtype)

        matrix = (self.rows, self.columns)
        if self.op == "rotary_embedding":
            pairs = self.columns // 2 if self.variant != "partial" else (self.columns + 2) // 4
            angles = 100.0 * torch.rand(self.rows, pairs, generator=generator, dtype=torch.float64)
            heads = (1, 2, *matrix)
            tensors = {"input": normal(*heads), "cos": angles.cos().float(), "sin": angles.sin().float()}
            return tensors | {"grad_output": normal(*heads)}
        tensors = {"input": (10.0 if self.variant == "wide" else 2.0) * normal(*matrix)}
        if self.op == "bias_gelu":
            tensors["bias"] = normal(self.columns)
        elif self.variant != "packed":
            tensors["other"] = normal(*matrix)
        else:
            matrix = (self.rows, self.columns // 2)
        return tensors | {"grad_output": normal(*matrix)}

    def ours(self, inputs: Tensors, backend: str | None) -> Tensors:
        match self.op:
            case "rotary_embedding":
                cos, sin, interleaved = inputs["cos"], inputs["sin"], self.variant == "interleaved"
                return self._results(
                    inputs,
                    lambda x: functional.rotary_embedding(x, cos, sin, interleaved=interleaved, backend=backend),
                )
            case "swiglu":
                return self._results(inputs, lambda *tensors: functional.swiglu(*tensors, backend=backend))
            case "bias_gelu":
                return self._results(
                    inputs, lambda x, bias: functional.bias_gelu(x, bias, self._approximate, backend=backend)
                )
        return self._results(
            inputs, lambda x, residual: functional.dropout_add(x, residual, float(self.variant), backend=backend)
        )

    def plain(self, inputs: Tensors) -> Tensors:
        """By torch's operations in the inputs' dtype."""
        match self.op:
            case "rotary_embedding":
                return self._results(inputs, lambda x: self._turned(x, inputs))
            case "swiglu":

                def formula(*tensors: Tensor) -> Tensor:
                    gate, up = tensors if len(tensors) == 2 else tensors[0].chunk(2, dim=-1)
                    return silu(gate) * up

                return self._results(inputs, formula)
            case "bias_gelu":
                return self._results(inputs, lambda x, bias: gelu(x + bias, approximate=self._approximate))
        return self._results(inputs, lambda x, residual: x + residual)

    def oracle(self, inputs: Tensors) -> dict[str, Expected]:
        wide = {name: tensor.double() for name, tensor in inputs.items()}
        match self.op:
            case "rotary_embedding":
                tables, interleaved = (wide["cos"][None], wide["sin"][None]), self.variant == "interleaved"
                results = self._results(wide, lambda x: rotary.rotate(x, *tables, None, interleaved))
            case "swiglu":
                results = self._results(wide, lambda gate, up=None: activation.swiglu(gate, up))
            case "bias_gelu":
                tanh = self._approximate == "tanh"
                results = self._results(wide, lambda x, bias: activation.bias_gelu(x, bias, tanh))
            case _:
                results = self._results(wide, lambda x, residual: x + residual)
        # What a bias's gradient sums, and what a sum adds.
        sizes = {
            "grad_bias": rms(wide["grad_output"]) * self.rows**0.5,
            "output": rms(wide["input"]) if self.op in ("dropout_add", "rotary_embedding") else 0.0,
        }
        return {
            name: Expected(value, "gradient" if name.startswith("grad_") else "forward", sizes.get(name, 0.0))
            for name, value in results.items()
        }

    def budget(self, inputs: Tensors, budget: Budget) -> Budget:
        return budget

    @property
    def _approximate(self) -> str:
        return "tanh" if self.variant == "tanh" else "none"

    def _turned(self, input: Tensor, inputs: Tensors) -> Tensor:
        """As models write it."""
        cos, sin = inputs["cos"].to(self.dtype), inputs["sin"].to(self.dtype)
        width = 2 * cos.shape[-1]
        turned, rest = input[..., :width], input[..., width:]
        if self.variant == "interleaved":
            a, b = turned[..., ::2], turned[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        a, b = turned.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)

    def _results(self, inputs: Tensors, function: Callable[..., Tensor]) -> Tensors:
        names: list[str] = [name for name in ("input", "other", "bias") if name in inputs]
        leaves = {name: inputs[name].detach().clone().requires_grad_() for name in names}
        outputs = {"output": function(*leaves.values())}
        return outputs | gradients(outputs, leaves, {"output": inputs["grad_output"]})


def cases_of(op: str) -> Iterator[FeedForwardCase]:
    """The grid of one op."""
    for dtype in DTYPES:
        for variant in VARIANTS[op]:
            for rows, columns in SHAPES:
                yield FeedForwardCase(op, rows, columns, dtype, variant)
