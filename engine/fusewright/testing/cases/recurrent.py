"""Cases of the recurrent layers: widths, lengths of sequences, and every feature."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fusewright import functional
from fusewright.testing.budgets import Budget
from fusewright.testing.case import Expected, Tensors, dtype_name, generator_of, gradients
from fusewright_kernels.recurrent import reference

OPS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEATURES = ("no_bias", "reverse", "lengths", "resets")
PROJECTION = "projection"  # of the hidden state to half its width: an LSTM's

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
_LEAVES = ("input", "h0", "c0", *_PARAMETERS)
_SIZES = ((1, 3, 5, 7), (7, 1, 40, 65), (20, 17, 33, 100), (3, 50, 100, 128), (64, 4, 32, 32))

# Rounding errors are carried on from step to step; within this many they stay below the budget of one product.
_STEPS_IN_BUDGET = 128


@dataclass(frozen=True)
class RecurrentCase:
    """``sizes`` are T, B, I, H. Weights are drawn as torch.nn draws them."""

    op: str
    sizes: tuple[int, int, int, int]
    dtype: torch.dtype
    features: tuple[str, ...] = ()

    @cached_property
    def id(self) -> str:
        return "/".join([self.op, "x".join(map(str, self.sizes)), dtype_name(self.dtype), *self.features])

    def inputs(self) -> Tensors:
        generator = generator_of(self.id)
        steps, batch, width, hidden = self.sizes
        gates = _GATES[self.op] * hidden
        state = hidden if PROJECTION not in self.features else (hidden + 1) // 2

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(self.dtype)

        def uniform(*size: int) -> Tensor:
            return (torch.rand(*size, generator=generator, dtype=torch.float64) * 2.0 - 1.0) / hidden**0.5

        tensors = {"input": normal(steps, batch, width), "h0": normal(batch, state)}
        if self.op == "lstm":
            tensors["c0"] = normal(batch, hidden)
        tensors["weight_ih"], tensors["weight_hh"] = uniform(gates, width), uniform(gates, state)
        if "no_bias" not in self.features:
            tensors["bias_ih"], tensors["bias_hh"] = uniform(gates), uniform(gates)
        if PROJECTION in self.features:
            tensors["weight_hr"] = uniform(state, hidden)
        if self.op == "rnn_relu":
            # Away from 0, where the rounding of a sum decides whether a unit has a gradient.
            for name in ("weight_ih", "weight_hh"):
                tensors[name] *= 0.2
            if "bias_ih" in tensors:
                tensors["bias_ih"] += 3.0 * torch.where(torch.arange(gates) % 3 == 0, -1.0, 1.0)
        tensors = {name: tensor.to(self.dtype) for name, tensor in tensors.items()}
        if "lengths" in self.features:
            tensors["lengths"] = torch.randint(0, steps + 1, (batch,), generator=generator)
        if "resets" in self.features:
            tensors["resets"] = torch.rand(steps, batch, generator=generator) < 0.2
        tensors["grad_output"], tensors["grad_h_n"] = normal(steps, batch, state), normal(batch, state)
        if self.op == "lstm":
            tensors["grad_c_n"] = normal(batch, hidden)
        return tensors

    def ours(self, inputs: Tensors, backend: str | None) -> Tensors:
        return self._results(inputs, lambda **leaves: getattr(functional, self.op)(**leaves, backend=backend))

    def plain(self, inputs: Tensors) -> Tensors:
        """torch's own layer; a step at a time where a feature is not one of the layer's."""
        if "lengths" in self.features or "resets" in self.features:
            return self._results(inputs, self._torch_steps)
        return self._results(inputs, self._torch_layer)

    def oracle(self, inputs: Tensors) -> dict[str, Expected]:
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}

        def layer(reverse: bool, lengths: Tensor | None = None, resets: Tensor | None = None, **leaves: Tensor) -> Any:
            tensors: Any = [leaves.get(name) for name in _LEAVES]
            return reference.recurrent(*(*tensors, lengths, resets, self.op, reverse))

        results = self._results(wide, layer)
        return {
            name: Expected(value, "gradient" if name.startswith("grad_") else "forward", 0.0)
            for name, value in results.items()
        }

    def budget(self, inputs: Tensors, budget: Budget) -> Budget:
        return budget.scaled(max(1.0, (self.sizes[0] / _STEPS_IN_BUDGET) ** 0.5))

    def _results(self, inputs: Tensors, layer: Callable[..., Any]) -> Tensors:
        leaves = {name: inputs[name].detach().clone().requires_grad_() for name in _LEAVES if name in inputs}
        others = {name: inputs[name] for name in ("lengths", "resets") if name in inputs}
        names = ("output", "h_n", "c_n")[: 3 if self.op == "lstm" else 2]
        outputs = dict(zip(names, layer(**leaves, **others, reverse="reverse" in self.features), strict=False))
        return outputs | gradients(outputs, leaves, {name: inputs[f"grad_{name}"] for name in names})

    def _torch_layer(self, input: Tensor, reverse: bool, **leaves: Tensor) -> tuple[Tensor, ...]:
        states = tuple(leaves[name].unsqueeze(0) for name in ("h0", "c0") if name in leaves)
        weights = [leaves[name] for name in _PARAMETERS if name in leaves]
        function = getattr(torch, self.op)
        output, *last = function(
            input.flip(0) if reverse else input, states if self.op == "lstm" else states[0], weights,
            "bias_ih" in leaves, 1, 0.0, True, False, False,
        )  # fmt: skip
        return output.flip(0) if reverse else output, *(state.squeeze(0) for state in last)

    def _torch_steps(
        self,
        input: Tensor,
        reverse: bool,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        **leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        weights = {name: leaves[name] for name in _PARAMETERS if name in leaves}
        states = [leaves[name] for name in ("h0", "c0") if name in leaves]
        steps, batch = input.shape[:2]
        if lengths is None:
            lengths = torch.full((batch,), steps)
        outputs = [input.new_zeros(0)] * steps
        for t in range(steps - 1, -1, -1) if reverse else range(steps):
            active = (lengths.to(input.device) > t).unsqueeze(1)
            before = states
            if resets is not None:
                before = [torch.where(resets[t].unsqueeze(1), 0.0, state) for state in states]
            _, *after = self._torch_layer(
                input[t : t + 1], False, **dict(zip(("h0", "c0"), before, strict=False)), **weights
            )
            outputs[t] = torch.where(active, after[0], 0.0)
            states = [torch.where(active, new, old) for new, old in zip(after, states, strict=True)]
        return torch.stack(outputs), *states


def cases_of(op: str) -> Iterator[RecurrentCase]:
    """The grid of one cell."""
    for dtype in DTYPES:
        for sizes in _SIZES:
            yield RecurrentCase(op, sizes, dtype)
        for feature in FEATURES:
            if op == "rnn_relu" and feature == "no_bias" and dtype is not torch.float32:
                continue  # nothing keeps its units away from 0
            yield RecurrentCase(op, _SIZES[2], dtype, (feature,))
        yield RecurrentCase(op, _SIZES[2], dtype, FEATURES[1:])
        # A single step has kernels of its own.
        yield RecurrentCase(op, (1, 35, 70, 50), dtype, FEATURES[1:])
        if op == "lstm":
            for sizes in (_SIZES[0], _SIZES[2], _SIZES[3]):
                yield RecurrentCase(op, sizes, dtype, (PROJECTION,))
            for sizes in (_SIZES[1], _SIZES[2], (1, 35, 70, 50)):
                yield RecurrentCase(op, sizes, dtype, (*FEATURES[1:], PROJECTION))
