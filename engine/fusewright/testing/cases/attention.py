"""Cases of scaled_dot_product_attention: head dimensions, lengths, every feature and every pair of features."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fusewright import functional, patterns
from fusewright.testing.budgets import Budget
from fusewright.testing.case import Expected, Tensors, dtype_name, generator_of, gradients
from fusewright.testing.errors import rms
from fusewright_kernels.attention import reference
from fusewright_kernels.philox import keep_mask

OPS = ("scaled_dot_product_attention",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FEATURES = (
    "causal", "bottom_right", "window", "bool_mask", "additive_mask", "broadcast_mask", "softcap", "alibi", "sinks",
    "dropout", "pattern",
)  # fmt: skip
# Two masks, or two alignments of one limit, are one argument.
_EXCLUSIVE = (
    {"bool_mask", "additive_mask"}, {"bool_mask", "broadcast_mask"}, {"additive_mask", "broadcast_mask"},
    {"causal", "bool_mask"}, {"causal", "additive_mask"}, {"causal", "broadcast_mask"},
)  # fmt: skip

_WIDTHS = (1, 3, 16, 40, 64, 80, 128, 257)
_LENGTHS = ((1, 1), (1, 300), (7, 20), (17, 65), (64, 64), (130, 63), (513, 257))
_SEED = 20
_DROPOUT = 0.25
_SOFTCAP = 4.0
_WINDOW = (40, 7)
_BLOCK = 16


@dataclass(frozen=True)
class AttentionCase:
    """``sizes`` are B, H, HK, T, S, D, DV."""

    sizes: tuple[int, int, int, int, int, int, int]
    dtype: torch.dtype
    features: tuple[str, ...] = ()
    scale: float | None = None
    op: str = OPS[0]

    @cached_property
    def id(self) -> str:
        parts = [self.op, "x".join(map(str, self.sizes)), dtype_name(self.dtype), *self.features]
        return "/".join(parts if self.scale is None else [*parts, f"scale={self.scale:g}"])

    def inputs(self) -> Tensors:
        generator = generator_of(self.id)
        batch, heads, key_heads, queries, keys, width, value_width = self.sizes

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        tensors = {
            "query": normal(batch, heads, queries, width).to(self.dtype),
            "key": normal(batch, key_heads, keys, width).to(self.dtype),
            "value": normal(batch, key_heads, keys, value_width).to(self.dtype),
            "grad_output": normal(batch, heads, queries, value_width).to(self.dtype),
            "grad_lse": normal(batch, heads, queries).float(),
        }
        if "bool_mask" in self.features:
            tensors["attn_mask"] = torch.rand(batch, 1, queries, keys, generator=generator) < 0.5
        if "additive_mask" in self.features:
            mask = normal(batch, heads, queries, keys)
            hidden = torch.rand(mask.shape, generator=generator) < 0.3
            tensors["attn_mask"] = mask.masked_fill(hidden, -math.inf).to(self.dtype)
        if "broadcast_mask" in self.features:
            tensors["attn_mask"] = normal(1, heads, 1, keys).to(self.dtype)
        if "alibi" in self.features:
            tensors["alibi_slopes"] = torch.rand(heads, generator=generator) * 0.1
        if "sinks" in self.features:
            tensors["sinks"] = normal(heads).float()
        return tensors

    def ours(self, inputs: Tensors, backend: str | None) -> Tensors:
        leaves = _leaves(inputs)
        output, lse = functional.scaled_dot_product_attention(
            leaves["query"],
            leaves["key"],
            leaves["value"],
            leaves.get("attn_mask"),
            _DROPOUT if "dropout" in self.features else 0.0,
            "causal" in self.features,
            self.scale,
            enable_gqa=True,
            window=_WINDOW if "window" in self.features else None,
            softcap=_SOFTCAP if "softcap" in self.features else None,
            alibi_slopes=leaves.get("alibi_slopes"),
            sinks=leaves.get("sinks"),
            pattern=self._pattern,
            causal_alignment="bottom_right" if "bottom_right" in self.features else "top_left",
            return_lse=True,
            seed=_SEED if "dropout" in self.features else None,
            backend=backend,
        )
        outputs = {"output": output, "lse": lse}
        return outputs | gradients(outputs, leaves, _cotangents(inputs, lse))

    @property
    def _pattern(self) -> patterns.Pattern | None:
        if "pattern" not in self.features:
            return None
        return patterns.Window(1, 0, _BLOCK) | patterns.Global(1, _BLOCK) | patterns.Random(1, block_size=_BLOCK)

    def _keep(self) -> Tensor | None:
        if "dropout" not in self.features:
            return None
        batch, heads, _, queries, keys, _, _ = self.sizes
        seed = torch.tensor([_SEED])
        return keep_mask(seed, batch * heads * queries, keys, _DROPOUT).reshape(batch, heads, queries, keys)

    def _visibility(self) -> dict[str, Any]:
        """The arguments of the reference that decide what takes part, but for mask and slopes."""
        _, heads, _, queries, keys, _, _ = self.sizes
        left, right = _WINDOW if "window" in self.features else (-1, -1)
        pattern = self._pattern
        block_mask = None if pattern is None else pattern.block_mask(heads, queries, keys, torch.device("cpu"))
        return {
            "block_mask": block_mask,
            "cu_seqlens_q": None,
            "cu_seqlens_k": None,
            "block_size": _BLOCK,
            "window_left": left,
            "window_right": 0 if "causal" in self.features else right,
            "bottom_right": "bottom_right" in self.features,
        }

    def _numbers(self) -> dict[str, Any]:
        return {
            "scale": 1.0 / math.sqrt(self.sizes[5]) if self.scale is None else self.scale,
            "softcap": _SOFTCAP if "softcap" in self.features else 0.0,
            "dropout_p": _DROPOUT if "dropout" in self.features else 0.0,
        }

    def plain(self, inputs: Tensors) -> Tensors:
        """Matrix products and softmax in the inputs' dtype, as one writes attention without a kernel."""
        leaves = _leaves(inputs)
        numbers, heads = self._numbers(), self.sizes[1]
        key, value = (leaves[name].repeat_interleave(heads // self.sizes[2], 1) for name in ("key", "value"))
        logits = leaves["query"] @ key.mT * numbers["scale"]
        if numbers["softcap"]:
            logits = numbers["softcap"] * torch.tanh(logits / numbers["softcap"])
        visibility = {name: _on(tensor, logits) for name, tensor in self._visibility().items()}
        logits, visible = reference.bias_and_visibility(
            logits, leaves.get("attn_mask"), alibi_slopes=leaves.get("alibi_slopes"), **visibility
        )
        logits = torch.where(visible, logits, -math.inf)
        if "sinks" in leaves:
            sinks = leaves["sinks"].to(logits.dtype).reshape(1, -1, 1, 1)
            logits = torch.cat([logits, sinks.expand(*logits.shape[:3], 1)], -1)
        weights = torch.where(logits.amax(-1, keepdim=True) == -math.inf, 0.0, torch.softmax(logits, -1))
        weights = weights[..., : key.shape[2]]
        keep = _on(self._keep(), logits)
        if keep is not None:
            weights = torch.where(keep, weights / (1.0 - _DROPOUT), 0.0)
        outputs = {"output": weights.to(value.dtype) @ value, "lse": torch.logsumexp(logits.float(), -1)}
        return outputs | gradients(outputs, leaves, _cotangents(inputs, outputs["lse"]))

    def oracle(self, inputs: Tensors) -> dict[str, Expected]:
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        query, key, value, grad = (wide[name] for name in ("query", "key", "value", "grad_output"))
        mask, sinks = wide.get("attn_mask"), wide.get("sinks")
        common = self._visibility() | self._numbers()
        common |= {"mask": mask, "alibi_slopes": wide.get("alibi_slopes"), "sinks": sinks, "keep": self._keep()}
        output, statistics = reference.attention(query, key, value, **common)
        lse = statistics[0] + statistics[1].log()
        grad_lse = _cotangents(wide, lse)["lse"]
        results = reference.attention_backward(grad, grad_lse, query, key, value, **common)
        sizes = self._magnitudes(query, key, value, grad, output)
        forward = {"output": Expected(output, "forward", 0.0), "lse": Expected(lse, "forward", 1.0)}
        *firsts, grad_logits, grad_sinks = results
        additive = mask is not None and mask.dtype is not torch.bool
        grad_mask = grad_logits.sum_to_size(mask.shape) if additive and mask is not None else None
        grads = dict(
            zip(("query", "key", "value", "attn_mask", "sinks"), (*firsts, grad_mask, grad_sinks), strict=True)
        )
        return forward | {
            f"grad_{name}": Expected(gradient, "gradient", sizes[name], self.dtype)
            for name, gradient in grads.items()
            if gradient is not None
        }

    def _magnitudes(self, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, output: Tensor) -> dict[str, float]:
        """Sizes of the gradients' terms before they cancel: weights times what they are multiplied by.

        Weights without biases serve: these are sizes, of which the order is what matters.
        """
        heads, key_heads = self.sizes[1], self.sizes[2]
        repeats = heads // key_heads
        wide_key, wide_value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scale = self._numbers()["scale"]
        logits, visible = reference.bias_and_visibility(
            query @ wide_key.mT * scale, None, alibi_slopes=None, **self._visibility()
        )
        weights = torch.softmax(torch.where(visible, logits, -1e30), -1)
        grad_weights = grad @ wide_value.mT
        delta = (grad * output).sum(-1, keepdim=True)
        terms = (weights * (grad_weights.square() + delta.square() + 1.0).sqrt()).square()
        return {
            "query": scale * rms((terms @ wide_key.square()).sqrt()),
            "key": scale * rms((terms.mT @ query.square()).sqrt()),
            "value": rms((weights.square().mT @ grad.square()).sqrt()),
            "attn_mask": rms(terms.sqrt()),
            "sinks": rms(delta.square().sum((0, 2, 3)).sqrt()),
        }

    def budget(self, inputs: Tensors, budget: Budget) -> Budget:
        logits = (
            inputs["query"].double() @ inputs["key"].double().repeat_interleave(self.sizes[1] // self.sizes[2], 1).mT
        )
        return budget.for_logits(logits.abs().max().item() * abs(self._numbers()["scale"]))


def _on(tensor: Any, like: Tensor) -> Any:
    return tensor.to(like.device) if isinstance(tensor, Tensor) else tensor


def _leaves(inputs: Tensors) -> Tensors:
    """Fresh leaves; all but boolean masks and slopes want a gradient."""
    leaves = {}
    for name, tensor in inputs.items():
        if not name.startswith("grad_"):
            wants = tensor.is_floating_point() and name != "alibi_slopes"
            leaves[name] = tensor.detach().clone().requires_grad_(wants)
    return leaves


def _cotangents(inputs: Tensors, lse: Tensor) -> Tensors:
    """Of the output, and of the log-sum-exp where a row has one."""
    grad_lse = inputs["grad_lse"].to(lse.dtype)
    return {"output": inputs["grad_output"], "lse": torch.where(lse.detach().isfinite(), grad_lse, 0.0)}


def cases_of(op: str) -> Iterator[AttentionCase]:
    """The grid: widths, lengths, each feature and each pair of features at one size."""
    pairs = [
        pair for pair in itertools.combinations(FEATURES, 2) if not any(set(pair) == other for other in _EXCLUSIVE)
    ]
    for dtype in DTYPES:
        for width in _WIDTHS:
            yield AttentionCase((1, 2, 2, 70, 130, width, width), dtype)
        for queries, keys in _LENGTHS:
            yield AttentionCase((2, 2, 1, queries, keys, 32, 32), dtype, ("causal", "bottom_right"))
        yield AttentionCase((1, 2, 1, 130, 200, 40, 72), dtype)
        yield AttentionCase((1, 2, 1, 130, 200, 64, 64), dtype, scale=1.0)
        yield AttentionCase((1, 1, 1, 64, 4097, 64, 64), dtype)
        # Slopes that carry logits to -100 and beyond, with rows that meet their first key late.
        yield AttentionCase((1, 2, 2, 1100, 1100, 16, 16), dtype, ("alibi", "pattern"))
        for queries in (1, 3):
            yield AttentionCase((2, 4, 2, queries, 1100, 64, 48), dtype)
            for feature in FEATURES[:1] + FEATURES[2:]:
                yield AttentionCase((1, 4, 2, queries, 600, 24, 24), dtype, (feature, "bottom_right"))
        for features in (*((feature,) for feature in FEATURES), *pairs):
            yield AttentionCase((2, 2, 1, 71, 101, 24, 24), dtype, features)
