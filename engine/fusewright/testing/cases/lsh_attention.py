"""Cases of lsh_attention: widths, lengths about multiples of the chunk, rounds, windows, and every restriction."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fusewright import functional
from fusewright.testing.budgets import Budget
from fusewright.testing.case import Expected, Tensors, dtype_name, generator_of, gradients
from fusewright.testing.errors import rms
from fusewright_kernels.lsh_attention import reference

OPS = ("lsh_attention",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEATURES = ("causal", "padding", "same_bucket", "no_duplicates")


@dataclass(frozen=True)
class LshAttentionCase:
    """``sizes`` are B, H, T, D, DV; ``rounds`` are R, C, chunks before and after."""

    sizes: tuple[int, int, int, int, int]
    rounds: tuple[int, int, int, int]
    dtype: torch.dtype
    features: tuple[str, ...] = ()
    op: str = OPS[0]

    @cached_property
    def id(self) -> str:
        sizes, rounds = "x".join(map(str, self.sizes)), "x".join(map(str, self.rounds))
        return "/".join([self.op, sizes, rounds, dtype_name(self.dtype), *self.features])

    def inputs(self) -> Tensors:
        generator = generator_of(self.id)
        batch, heads, length, width, value_width = self.sizes

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        n_buckets = 2 * max(1, length // self.rounds[1])
        tensors = {
            "query_key": normal(batch, heads, length, width).to(self.dtype),
            "value": normal(batch, heads, length, value_width).to(self.dtype),
            "buckets": torch.randint(0, n_buckets, (batch, heads, self.rounds[0], length), generator=generator),
            "grad_output": normal(batch, heads, length, value_width).to(self.dtype),
            "grad_lse": normal(batch, heads, length).float(),
        }
        if "padding" in self.features:
            tensors["key_padding_mask"] = torch.rand(batch, length, generator=generator) < 0.3
        return tensors

    @property
    def _scale(self) -> float:
        return 1.0 / math.sqrt(self.sizes[3])

    def ours(self, inputs: Tensors, backend: str | None) -> Tensors:
        query_key, value = _leaves(inputs)
        _, chunk_length, before, after = self.rounds
        output, lse = functional.lsh_attention(
            query_key,
            value,
            chunk_length=chunk_length,
            chunks_before=before,
            chunks_after=after,
            is_causal="causal" in self.features,
            key_padding_mask=inputs.get("key_padding_mask"),
            buckets=inputs["buckets"],
            scale=self._scale,
            attend_across_buckets="same_bucket" not in self.features,
            allow_duplicates="no_duplicates" not in self.features,
            return_lse=True,
            backend=backend,
        )
        return _with_gradients(inputs, query_key, value, output, lse)

    def _counts(self, inputs: Tensors) -> Tensor:
        """How often each pair meets; all once where one chunk holds every position."""
        length, (_, chunk_length, before, after) = self.sizes[2], self.rounds
        order = reference.sort_positions(inputs["buckets"])
        across = "same_bucket" not in self.features
        if length <= chunk_length and across:
            order, before, after = order[:, :, :1], 0, 0
        return reference.multiplicities(
            order,
            None if across else inputs["buckets"],
            inputs.get("key_padding_mask"),
            chunk_length,
            before,
            after,
            "causal" in self.features,
            "no_duplicates" not in self.features,
        )

    def plain(self, inputs: Tensors) -> Tensors:
        """Matrix products and softmax in the inputs' dtype over the (T, T) matrix."""
        query_key, value = _leaves(inputs)
        key = torch.nn.functional.normalize(query_key, dim=-1, eps=reference.SHORTEST)
        logits = query_key @ key.mT * self._scale + self._counts(inputs).to(query_key.dtype).log()
        output = torch.softmax(logits, -1) @ value
        return _with_gradients(inputs, query_key, value, output, torch.logsumexp(logits.float(), -1))

    def oracle(self, inputs: Tensors) -> dict[str, Expected]:
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        query_key, value = _leaves(wide)
        counts = self._counts(inputs)
        output, lse = reference.dense_attention(query_key, value, counts, self._scale)
        results = _with_gradients(wide, query_key, value, output, lse)
        sizes = self._magnitudes(query_key.detach(), value.detach(), wide["grad_output"], counts, output.detach())
        return {
            "output": Expected(results["output"].detach(), "forward", 0.0),
            "lse": Expected(results["lse"].detach(), "forward", 1.0),
            "grad_query_key": Expected(results["grad_query_key"], "gradient", sizes["query_key"], self.dtype),
            "grad_value": Expected(results["grad_value"], "gradient", sizes["value"], self.dtype),
        }

    def _magnitudes(
        self, query: Tensor, value: Tensor, grad: Tensor, counts: Tensor, output: Tensor
    ) -> dict[str, float]:
        """Sizes of the gradients' terms before they cancel."""
        inverse = reference.inverse_norm(query)
        key = query * inverse[..., None]
        weights = torch.softmax(query @ key.mT * self._scale + counts.double().log(), -1)
        delta = (grad * output).sum(-1, keepdim=True)
        terms = (weights * ((grad @ value.mT).square() + delta.square() + 1.0).sqrt()).square()
        as_query, as_key = terms @ key.square(), terms.mT @ query.square() * inverse.square()[..., None]
        return {
            "query_key": self._scale * rms((as_query + as_key).sqrt()),
            "value": rms((weights.square().mT @ grad.square()).sqrt()),
        }

    def budget(self, inputs: Tensors, budget: Budget) -> Budget:
        # A logit is at most the length of the query.
        longest = inputs["query_key"].double().norm(dim=-1).max().item()
        return budget.for_logits(longest * self._scale)


def _leaves(inputs: Tensors) -> tuple[Tensor, Tensor]:
    return (
        inputs["query_key"].detach().clone().requires_grad_(),
        inputs["value"].detach().clone().requires_grad_(),
    )


def _with_gradients(inputs: Tensors, query_key: Tensor, value: Tensor, output: Any, lse: Any) -> Tensors:
    outputs = {"output": output, "lse": lse}
    cotangents = {"output": inputs["grad_output"], "lse": inputs["grad_lse"].to(lse.dtype)}
    return outputs | gradients(outputs, {"query_key": query_key, "value": value}, cotangents)


def cases_of(op: str) -> Iterator[LshAttentionCase]:
    """The grid: widths, lengths, windows, and each feature alone and with each other."""
    combinations = [(), *((feature,) for feature in FEATURES), *_pairs(), FEATURES]
    for dtype in DTYPES:
        for width in (1, 3, 16, 40, 64, 80, 128, 257):
            yield LshAttentionCase((1, 2, 150, width, width), (2, 32, 1, 0), dtype)
        for length in (1, 31, 64, 65, 127, 200, 333):
            yield LshAttentionCase((2, 2, length, 32, 24), (3, 64, 1, 0), dtype, ("causal",))
        for rounds in ((1, 16, 1, 0), (4, 16, 1, 1), (2, 7, 0, 2), (2, 100, 2, 0), (8, 64, 1, 0), (1, 200, 1, 1)):
            yield LshAttentionCase((1, 2, 260, 32, 32), rounds, dtype)
        for features in combinations:
            yield LshAttentionCase((2, 2, 190, 24, 40), (3, 32, 1, 1), dtype, features)


def _pairs() -> list[tuple[str, ...]]:
    return [(first, second) for i, first in enumerate(FEATURES) for second in FEATURES[i + 1 :]]
