"""Additive attention: checks, shapes, dispatch, autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import autograd, dispatch, library, philox
from fusewright_kernels.attention import additive_reference, backend_native, backend_triton_additive, checks, shapes
from fusewright_kernels.attention.backend_reference import log_sum_exp
from fusewright_kernels.checks import floating_tensor, probability, same_device, value_error
from fusewright_kernels.checks import seed as check_seed

additive_reference.attach()
dispatch.register("additive_attention", {"triton": backend_triton_additive.refuse, "cpu": backend_native.refuse_cpu})

# Tensor arguments of the op; behind them come the numbers, then the backend.
_TENSORS = 6


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
    window: int | Sequence[int] | None,
    causal_alignment: str,
    return_lse: bool,
    seed: int | Tensor | None,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fusewright.functional.additive_attention`."""
    checks.operands(query, key, value, smallest_ndim=2, heads_dim=-3, enable_gqa=enable_gqa and query.ndim > 2)
    checks.key_lengths(key, value)
    checks.mask(attn_mask, query, is_causal)
    probability("dropout_p", dropout_p)
    check_seed("seed", seed)
    bottom_right = checks.bottom_right(causal_alignment)
    query, key, value, leading = shapes.broadcast(query, key, value, enable_gqa)
    mask = None if attn_mask is None else shapes.four_dimensional_mask(attn_mask, leading, query, key.shape[2])
    weight = _score_weight(score_weight, query)
    query, key, value = (autograd.low_precision_under_autocast(tensor) for tensor in (query, key, value))
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    seed_on_device = philox.seed_tensor(seed, query.device) if dropout_p > 0.0 else None
    dtypes = (query.dtype,) if mask is None else (query.dtype, mask.dtype)
    chosen = dispatch.choose("additive_attention", query.device.type, dtypes, query.ndim, backend)
    arguments = (
        query, key, value, weight, mask, seed_on_device, checks.scale(scale, query.shape[3]), float(dropout_p),
        *checks.window(window, is_causal), bottom_right,
    )  # fmt: skip
    if autograd.derivative_possible(query, key, value, weight, mask):
        output, _, lse = autograd.apply(AdditiveAttention, *arguments, return_lse, chosen)
    else:
        output, statistics = library.overload("additive_attention_forward", chosen)(*arguments)
        lse = log_sum_exp(statistics) if return_lse else None
    output = output.reshape(*leading, *output.shape[2:])
    return output if lse is None else (output, lse.reshape(*leading, lse.shape[2]))


def _score_weight(weight: Tensor, query: Tensor) -> Tensor:
    """(H, D) float32, or float64 for a float64 query."""
    floating_tensor("score_weight", weight)
    same_device("score_weight", weight, "query", query)
    heads, width = query.shape[1], query.shape[3]
    if tuple(weight.shape) not in ((width,), (1, width), (heads, width)):
        raise value_error("score_weight.shape", tuple(weight.shape), f"({width},) or ({heads}, {width})")
    return weight.to(torch.promote_types(query.dtype, torch.float32)).expand(heads, width)


class AdditiveAttention(torch.autograd.Function):
    """(the inputs of ``additive_attention_forward``..., return_lse, backend) -> (output, statistics, lse or None)."""

    # Every argument by name: torch.compile counts them to tell a forward without a context from one with.
    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_weight: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        scale: float,
        dropout_p: float,
        window_left: int,
        window_right: int,
        bottom_right: bool,
        return_lse: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        output, statistics = library.overload("additive_attention_forward", backend)(
            query, key, value, score_weight, mask, seed, scale, dropout_p, window_left, window_right, bottom_right
        )
        return output, statistics, log_sum_exp(statistics) if return_lse else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        output, statistics, _ = outputs
        *ctx.numbers, _, ctx.backend = inputs[_TENSORS:]
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, statistics, *inputs[:_TENSORS])

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, _: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        output, statistics, *tensors = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        wanted = ctx.needs_input_grad[:5]
        if autograd.second_derivative_possible(grad_output, grad_lse, *tensors[:5]):
            gradients = _differentiable_gradients(grad_output, grad_lse, tensors, ctx.numbers)
        else:
            gradients = library.overload("additive_attention_backward", ctx.backend)(
                grad_output, grad_lse, output, statistics, *tensors, *ctx.numbers, *wanted
            )
        return *autograd.only_wanted(gradients, wanted), *[None] * (len(ctx.needs_input_grad) - 5)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        tensors, (*numbers, return_lse, backend) = inputs[:_TENSORS], inputs[_TENSORS:]
        size, dims = info.batch_size, in_dims[:_TENSORS]
        # One op call takes one score weight, and samples with one seed must draw the same mask.
        if tensors[5] is not None or dims[3] is not None:

            def plain(*tensors: Any) -> tuple[Tensor, ...]:
                output, statistics = additive_reference.plain_additive_attention(*tensors, *numbers)
                return (output, statistics, log_sum_exp(statistics)) if return_lse else (output, statistics)

            results = torch.vmap(plain, dims)(*tensors)
            return (*results, None)[:3], (0, 0, 0 if return_lse else None)
        folded: list[Any] = list(tensors)
        for index in (0, 1, 2):
            folded[index] = autograd.batch_first(tensors[index], dims[index], size).flatten(0, 1)
        if tensors[4] is not None:
            mask = autograd.batch_first(tensors[4], dims[4], size)
            batch = folded[0].shape[0] // size
            folded[4] = mask.expand(size, batch, *mask.shape[2:]).flatten(0, 1)
        output, statistics, lse = AdditiveAttention.apply(*folded, *numbers, return_lse, backend)
        unfolded = (size, -1)
        output, statistics = output.unflatten(0, unfolded), statistics.unflatten(1, unfolded)
        return (output, statistics, None if lse is None else lse.unflatten(0, unfolded)), (0, 1, 0)


def _differentiable_gradients(
    grad_output: Tensor, grad_lse: Tensor | None, tensors: list[Any], numbers: list[Any]
) -> list[Tensor | None]:
    """Gradients by the plain formula, so that they can be differentiated themselves."""
    additive = tensors[4] is not None and tensors[4].dtype is not torch.bool
    mask = tensors[4] if additive else None

    def plain(query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, given: Tensor | None) -> list[Tensor]:
        output, statistics = additive_reference.plain_additive_attention(
            query, key, value, score_weight, given if additive else tensors[4], tensors[5], *numbers
        )
        return [output] if grad_lse is None else [output, log_sum_exp(statistics)]

    cotangents = [grad_output] if grad_lse is None else [grad_output, grad_lse]
    return autograd.pullback(plain, [*tensors[:4], mask], cotangents)
