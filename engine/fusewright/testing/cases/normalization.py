"""Cases of layer_norm, rms_norm, add_layer_norm and add_rms_norm."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from fusewright import functional
from fusewright.testing.budgets import Budget
from fusewright.testing.case import Expected, Tensors, dtype_name, generator_of, gradients
from fusewright.testing.errors import rms
from fusewright_kernels import philox
from fusewright_kernels.normalization import reference

OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_EPS = 1e-5
_SEED = 20

# One width, partial vectors, whole vectors, one more and one less than a power of two, rows past every register file
# and past every cache. Widths between these have a neighbour here in the same regime.
COLUMNS = (1, 3, 31, 64, 100, 760, 1000, 1024, 1025, 4097, 65537)

# Means that leave room for a spread of 1 in the dtype; scales whose squares stay in float32's range.
_OFFSET = {torch.float32: 1e4, torch.bfloat16: 32.0, torch.float16: 256.0}
_TINY = {torch.float32: 1e-20, torch.bfloat16: 1e-20, torch.float16: 1e-4}
_HUGE = {torch.float32: 1e16, torch.bfloat16: 1e16, torch.float16: 1e3}


@dataclass(frozen=True)
class NormalizationCase:
    """``rows`` x ``columns`` of one distribution; ``parameters`` is the dtype of weight and bias."""

    op: str
    rows: int
    columns: int
    dtype: torch.dtype
    parameters: torch.dtype | None
    distribution: str = "normal"
    residual: torch.dtype | None = None
    dropout_p: float = 0.0
    zero_centered_weight: bool = False

    @cached_property
    def id(self) -> str:
        parts = [self.op, f"{self.rows}x{self.columns}", dtype_name(self.dtype), self.distribution]
        if self.parameters is not self.dtype:
            parts.append("plain" if self.parameters is None else f"weight={dtype_name(self.parameters)}")
        if self.residual not in (None, self.dtype):
            parts.append(f"residual={dtype_name(self.residual)}")
        if self.dropout_p:
            parts.append(f"dropout={self.dropout_p:g}")
        if self.zero_centered_weight:
            parts.append("zero-centered")
        return "/".join(parts)

    @property
    def adds(self) -> bool:
        return self.op.startswith("add_")

    @property
    def centers(self) -> bool:
        return self.op.endswith("layer_norm")

    @property
    def weight_offset(self) -> float:
        return 1.0 if self.zero_centered_weight else 0.0

    def inputs(self) -> Tensors:
        generator = generator_of(self.id)
        shape = (self.rows, self.columns)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        stored = self.residual or self.dtype
        tensors = {"input": self._distributed(normal(*shape), normal(self.rows, 1)).to(self.dtype)}
        if self.adds:
            tensors["residual"] = self._distributed(normal(*shape), normal(self.rows, 1)).to(stored)
        if self.parameters is not None:
            spread = 0.2 * normal(self.columns)
            tensors["weight"] = (spread if self.zero_centered_weight else 1.0 + spread).to(self.parameters)
            if self.centers:
                tensors["bias"] = (0.2 * normal(self.columns)).to(self.parameters)
        tensors["grad_output"] = normal(*shape).to(self.dtype)
        if self.adds:
            tensors["grad_new_residual"] = normal(*shape).to(stored)
        return tensors

    def _distributed(self, normal: Tensor, per_row: Tensor) -> Tensor:
        match self.distribution:
            case "normal":
                return normal
            case "offset":
                return normal + _OFFSET[self.dtype]
            case "tiny":
                return normal * _TINY[self.dtype]
            case "huge":
                return normal * _HUGE[self.dtype]
            case "constant":
                return per_row.expand_as(normal)
        raise ValueError(f"distribution is {self.distribution}, expected one that is defined here")

    def ours(self, inputs: Tensors, backend: str | None) -> Tensors:
        leaves = _leaves(inputs)
        op = getattr(functional, self.op)
        keywords: dict[str, Any] = {name: leaves[name] for name in ("weight", "bias") if name in leaves}
        keywords |= {"eps": _EPS, "zero_centered_weight": self.zero_centered_weight, "backend": backend}
        if self.adds:
            keywords |= {"dropout_p": self.dropout_p, "seed": _SEED if self.dropout_p else None}
            output, stream = op(leaves["input"], leaves["residual"], self.columns, **keywords)
            outputs = {"output": output, "new_residual": stream}
        else:
            outputs = {"output": op(leaves["input"], self.columns, **keywords)}
        return outputs | gradients(outputs, leaves, _cotangents(inputs))

    def plain(self, inputs: Tensors) -> Tensors:
        leaves = _leaves(inputs)
        stream = leaves["input"]
        outputs = {}
        if self.adds:
            stream = self._dropped(stream) + leaves["residual"]
            outputs["new_residual"] = stream.to(inputs["residual"].dtype)
        weight, bias = (_at_least(leaves.get(name), stream.dtype) for name in ("weight", "bias"))
        if weight is not None and self.zero_centered_weight:
            weight = weight + 1.0
        if self.centers:
            output = torch_functional.layer_norm(stream, (self.columns,), weight, bias, _EPS)
        else:
            output = torch_functional.rms_norm(stream, (self.columns,), weight, _EPS)
        outputs["output"] = output.to(self.dtype)
        return outputs | gradients(outputs, leaves, _cotangents(inputs))

    def _dropped(self, input: Tensor) -> Tensor:
        keep = self._keep(input.device)
        return input if keep is None else input * keep / (1.0 - self.dropout_p)

    def _keep(self, device: torch.device) -> Tensor | None:
        if not self.dropout_p:
            return None
        seed = torch.tensor([_SEED], device=device)
        return philox.keep_mask(seed, self.rows, self.columns, self.dropout_p)

    def oracle(self, inputs: Tensors) -> dict[str, Expected]:
        wide = {name: tensor.double() for name, tensor in inputs.items()}
        leaves = _leaves(wide)
        weight, bias = leaves.get("weight"), leaves.get("bias")
        arguments = (1, _EPS, self.centers, self.weight_offset)
        if self.adds:
            keep = self._keep(torch.device("cpu"))
            output, stream, _ = reference.add_norm_with_statistics(
                leaves["input"], leaves["residual"], weight, bias, keep, *arguments, self.dropout_p, torch.float64
            )
            outputs = {"output": output, "new_residual": stream}
        else:
            stream = leaves["input"]
            outputs = {"output": reference.norm(stream, weight, bias, *arguments)}
        values = outputs | gradients(outputs, leaves, _cotangents(wide))
        magnitudes = self._magnitudes(stream.detach(), wide)
        # Normalisation and backward of the fused addition start from the new residual as it was stored.
        stored = inputs["residual"].dtype if self.adds else torch.float32
        return {
            name: Expected(
                value.detach(),
                "gradient" if name.startswith("grad_") else "forward",
                magnitudes[name],
                torch.float32 if name == "new_residual" else stored,
            )
            for name, value in values.items()
        }

    def _magnitudes(self, x: Tensor, wide: Tensors) -> dict[str, float]:
        """Root-sum-square sizes of the terms of every result; ``x`` is what is normalised, float64."""
        columns = self.columns
        mean = x.mean(-1, keepdim=True) if self.centers else torch.zeros(1, dtype=x.dtype)
        rstd = torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + _EPS)
        normalized = (x - mean) * rstd
        size = torch.hypot(x, mean.expand_as(x)) * rstd
        weight = wide["weight"] + self.weight_offset if "weight" in wide else torch.ones(columns, dtype=x.dtype)
        grad = wide["grad_output"]
        weighted = grad * weight
        projection = (weighted * normalized).mean(-1, keepdim=True)
        projection_size = (weighted * size).square().sum(-1, keepdim=True).sqrt() / columns
        mean_size = weighted.square().sum(-1, keepdim=True).sqrt() / columns if self.centers else 0.0
        terms = weighted.square() + (size * projection).square() + (normalized * projection_size).square()
        grad_stream = rstd * (terms + mean_size**2).sqrt()
        if self.adds:
            grad_stream = torch.hypot(grad_stream, wide["grad_new_residual"])
        stream_size = rms(torch.hypot(wide["input"], wide["residual"])) if self.adds else rms(x)
        return {
            "output": rms(torch.hypot(size * weight, wide.get("bias", torch.zeros_like(weight)).expand_as(x))),
            "new_residual": stream_size,
            "grad_input": rms(grad_stream),
            "grad_residual": rms(grad_stream),
            "grad_weight": rms((grad * size).square().sum(0).sqrt()),
            "grad_bias": rms(grad.square().sum(0).sqrt()),
        }

    def budget(self, inputs: Tensors, budget: Budget) -> Budget:
        return budget


def _leaves(inputs: Tensors) -> Tensors:
    return {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in inputs.items()
        if not name.startswith("grad_")
    }


def _cotangents(inputs: Tensors) -> Tensors:
    return {name.removeprefix("grad_"): tensor for name, tensor in inputs.items() if name.startswith("grad_")}


def _at_least(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """torch's layer_norm takes parameters of the input's dtype or wider."""
    return parameter.float() if parameter is not None and dtype is torch.float32 else parameter


def cases_of(op: str) -> Iterator[NormalizationCase]:
    """The grid of one op."""
    for dtype in DTYPES:
        for columns in COLUMNS:
            yield NormalizationCase(op, 5, columns, dtype, dtype)
        for rows in (1, 199):
            yield NormalizationCase(op, rows, 1024, dtype, dtype)
        # Long sums of weight gradients, where accumulation in the parameter's own type is off by percents.
        yield NormalizationCase(op, 8192, 64, dtype, dtype)
        yield NormalizationCase(op, 37, 760, dtype, None)
        yield NormalizationCase(op, 37, 760, dtype, dtype, zero_centered_weight=True)
        yield NormalizationCase(op, 37, 760, dtype, torch.bfloat16 if dtype is torch.float32 else torch.float32)
        for distribution in ("offset", "tiny", "huge", "constant"):
            yield NormalizationCase(op, 37, 1000, dtype, dtype, distribution)
        if op.startswith("add_"):
            yield NormalizationCase(op, 37, 1000, dtype, dtype, dropout_p=0.1)
            if dtype is not torch.float32:
                yield NormalizationCase(op, 37, 1000, dtype, torch.float32, residual=torch.float32)
