"""Cases of cross-entropy and of linear cross-entropy."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fusewright import functional
from fusewright.testing.budgets import Budget
from fusewright.testing.case import Expected, Tensors, dtype_name, generator_of, gradients
from fusewright.testing.errors import rms
from fusewright_kernels.cross_entropy import reference
from fusewright_kernels.cross_entropy.reference import Options

OPS = ("cross_entropy", "linear_cross_entropy")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH = 48  # E of the linear layer

_SHAPES = ((5, 1), (64, 10), (33, 1000), (7, 4097), (3, 50257))
_OPTIONS = {
    "plain": Options(),
    "smoothed": Options(label_smoothing=0.1),
    "z_loss": Options(z_loss=1e-2),
    "softcap": Options(softcap=10.0),
    "weighted": Options(label_smoothing=0.2),
    "probabilities": Options(),
    "offset": Options(),
}
_LINEAR_VARIANTS = ("plain", "smoothed", "softcap", "weighted")


@dataclass(frozen=True)
class CrossEntropyCase:
    """``rows`` losses over ``classes``, one in eight of them ignored; weights, offsets and targets by ``variant``."""

    op: str
    rows: int
    classes: int
    dtype: torch.dtype
    variant: str = "plain"

    @cached_property
    def id(self) -> str:
        return "/".join([self.op, f"{self.rows}x{self.classes}", dtype_name(self.dtype), self.variant])

    @property
    def _options(self) -> Options:
        return _OPTIONS[self.variant]

    def inputs(self) -> Tensors:
        generator = generator_of(self.id)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        target = torch.randint(0, self.classes, (self.rows,), generator=generator)
        tensors = {"target": target.masked_fill(torch.arange(self.rows) % 8 == 5, self._options.ignore_index)}
        if self.op == "cross_entropy":
            logits = 3.0 * normal(self.rows, self.classes) + (1e3 if self.variant == "offset" else 0.0)
            tensors["input"] = logits.to(self.dtype)
        else:
            tensors["input"] = normal(self.rows, WIDTH).to(self.dtype)
            tensors["weight"] = (normal(self.classes, WIDTH) / 4.0).to(self.dtype)
            tensors["bias"] = normal(self.classes).to(self.dtype)
        if self.variant == "probabilities":
            tensors["target"] = normal(self.rows, self.classes).softmax(1).to(self.dtype)
        if self.variant == "weighted":
            tensors["class_weight"] = torch.rand(self.classes, generator=generator) + 0.5
        tensors["grad_output"] = normal(self.rows).to(self.dtype)
        return tensors

    def ours(self, inputs: Tensors, backend: str | None) -> Tensors:
        keywords: dict[str, Any] = self._options._asdict() | {"reduction": "none", "backend": backend}
        keywords["softcap"] = self._options.softcap or None
        if self.op == "cross_entropy":
            weight = inputs.get("class_weight")
            return self._results(inputs, lambda x, t: functional.cross_entropy(x, t, weight, **keywords))
        keywords["class_weight"] = inputs.get("class_weight")
        return self._results(
            inputs, lambda x, w, b: functional.linear_cross_entropy(x, w, inputs["target"], b, **keywords)
        )

    def plain(self, inputs: Tensors) -> Tensors:
        """torch's own cross-entropy after the formulas it lacks, all in the inputs' dtype."""

        def losses(logits: Tensor, target: Tensor) -> Tensor:
            options = self._options
            if options.softcap > 0.0:
                logits = options.softcap * torch.tanh(logits / options.softcap)
            weight = inputs.get("class_weight")
            weight = None if weight is None else weight.to(logits.dtype)
            loss = torch.nn.functional.cross_entropy(
                logits, target, weight, reduction="none", label_smoothing=options.label_smoothing
            )
            squares = logits.logsumexp(1).square()
            return loss + options.z_loss * squares * (target != options.ignore_index) if options.z_loss else loss

        return self._of_logits(inputs, losses)

    def oracle(self, inputs: Tensors) -> dict[str, Expected]:
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        results = self._of_logits(
            wide, lambda x, target: reference.losses(x, target, wide.get("class_weight"), self._options)
        )
        sizes = self._sizes(wide)
        # The linear layer's logits, and their gradient, are rounded to the inputs' type before they are used.
        stored = torch.float32 if self.op == "cross_entropy" else self.dtype
        return {
            name: Expected(value, "gradient" if name.startswith("grad_") else "forward", sizes[name], stored)
            for name, value in results.items()
        }

    def budget(self, inputs: Tensors, budget: Budget) -> Budget:
        logits = inputs["input"].double()
        if self.op != "cross_entropy":
            logits = linear(logits, inputs["weight"].double(), inputs["bias"].double())
        return budget.for_logits((logits.amax(1, keepdim=True) - logits).clamp_max(104.0).max().item())

    def _sizes(self, wide: Tensors) -> dict[str, float]:
        """Uncancelled sizes: a loss is a difference of log-sum-exp and logit, a gradient of p and q."""
        grad = wide["grad_output"].abs().unsqueeze(1)
        if self.op == "cross_entropy":
            relative = wide["input"] - wide["input"].amax(1, keepdim=True)
            p = wide["input"].softmax(1)
            q = wide["target"] if self.variant == "probabilities" else torch.zeros_like(p)
            if self.variant != "probabilities":
                q = q.scatter(1, wide["target"].clamp_min(0).unsqueeze(1), 1.0)
            return {
                "output": rms(relative),
                "grad_input": rms(grad * (p.square() + q.square()).sqrt()),
                "grad_target": rms(grad * relative),
            }
        logits = linear(wide["input"], wide["weight"], wide["bias"])
        p, q = logits.softmax(1), torch.zeros_like(logits)
        terms = grad * (p + q.scatter(1, wide["target"].clamp_min(0).unsqueeze(1), 1.0))
        return {
            "output": rms(logits),
            "grad_input": rms((terms.square() @ wide["weight"].square()).sqrt()),
            "grad_weight": rms((terms.square().mT @ wide["input"].square()).sqrt()),
            "grad_bias": rms(terms.square().sum(0).sqrt()),
        }

    def _of_logits(self, inputs: Tensors, losses: Callable[[Tensor, Tensor], Tensor]) -> Tensors:
        if self.op == "cross_entropy":
            return self._results(inputs, losses)
        return self._results(inputs, lambda x, w, b: losses(linear(x, w, b), inputs["target"]))

    def _results(self, inputs: Tensors, function: Callable[..., Tensor]) -> Tensors:
        names = ("input", "target") if self.op == "cross_entropy" else ("input", "weight", "bias")
        leaves = {name: inputs[name].detach().clone() for name in names}
        for leaf in leaves.values():
            leaf.requires_grad_(leaf.is_floating_point())
        outputs = {"output": function(*leaves.values())}
        return outputs | gradients(outputs, leaves, {"output": inputs["grad_output"]})


def cases_of(op: str) -> Iterator[CrossEntropyCase]:
    """The grid of one op."""
    variants = tuple(_OPTIONS) if op == "cross_entropy" else _LINEAR_VARIANTS
    for dtype in DTYPES:
        for rows, classes in _SHAPES if op == "cross_entropy" else _SHAPES[1:3]:
            yield CrossEntropyCase(op, rows, classes, dtype)
        for variant in variants[1:]:
            yield CrossEntropyCase(op, 40, 777, dtype, variant)
