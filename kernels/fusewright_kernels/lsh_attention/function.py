"""LSH attention as an ``autograd.Function``, with the rules for vmap and for double backward.

The backward works from the output, the statistics and the order; the weights are recomputed.
"""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import autograd, library
from fusewright_kernels.lsh_attention.backend_reference import log_sum_exp, plain_attention

# Tensor arguments of the op; behind them come the numbers, then the backend.
_TENSORS = 6


class LshAttention(torch.autograd.Function):
    """(the inputs of ``lsh_attention_forward``..., return_lse, backend) -> (output, statistics, lse or None)."""

    # Every argument by name: torch.compile counts them to tell a forward without a context from one with.
    @staticmethod
    def forward(
        query_key: Tensor,
        value: Tensor,
        order: Tensor,
        buckets: Tensor | None,
        key_padding_mask: Tensor | None,
        seed: Tensor | None,
        chunk_length: int,
        chunks_before: int,
        chunks_after: int,
        is_causal: bool,
        scale: float,
        allow_duplicates: bool,
        dropout_p: float,
        return_lse: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        output, statistics = library.overload("lsh_attention_forward", backend)(
            query_key, value, order, buckets, key_padding_mask, seed, chunk_length, chunks_before, chunks_after,
            is_causal, scale, allow_duplicates, dropout_p,
        )  # fmt: skip
        return output, statistics, log_sum_exp(statistics) if return_lse else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        output, statistics, _ = outputs
        *ctx.numbers, ctx.return_lse, ctx.backend = inputs[_TENSORS:]
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
        if autograd.second_derivative_possible(grad_output, grad_lse, *tensors[:2]):
            gradients = _differentiable_gradients(grad_output, grad_lse, tensors, ctx.numbers)
        else:
            gradients = library.overload("lsh_attention_backward", ctx.backend)(
                grad_output, grad_lse, output, statistics, *tensors, *ctx.numbers
            )
        wanted = autograd.only_wanted(gradients, ctx.needs_input_grad[:2])
        return wanted[0], wanted[1], *[None] * (len(ctx.needs_input_grad) - 2)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        tensors, (*numbers, return_lse, backend) = inputs[:_TENSORS], inputs[_TENSORS:]
        if tensors[5] is not None:
            # Samples with one seed must draw the same mask.
            def plain(*tensors: Any) -> tuple[Tensor, ...]:
                output, statistics = plain_attention(*tensors, *numbers)
                return (output, statistics, log_sum_exp(statistics)) if return_lse else (output, statistics)

            results = torch.vmap(plain, in_dims[:_TENSORS])(*tensors)
            return (*results, None)[:3], (0, 0, 0 if return_lse else None)
        folded = [
            None if tensor is None else autograd.batch_first(tensor, dim, info.batch_size).flatten(0, 1)
            for tensor, dim in zip(tensors, in_dims[:_TENSORS], strict=True)
        ]
        output, statistics, lse = LshAttention.apply(*folded, *numbers, return_lse, backend)
        unfolded = (info.batch_size, -1)
        output, statistics = output.unflatten(0, unfolded), statistics.unflatten(1, unfolded)
        return (output, statistics, None if lse is None else lse.unflatten(0, unfolded)), (0, 1, 0)


def _differentiable_gradients(
    grad_output: Tensor, grad_lse: Tensor | None, tensors: list[Any], numbers: list[Any]
) -> list[Tensor]:
    """Gradients of query_key and value by the plain formula, so that they can be differentiated themselves."""

    def plain(query_key: Tensor, value: Tensor) -> list[Tensor]:
        output, statistics = plain_attention(query_key, value, *tensors[2:], *numbers)
        return [output] if grad_lse is None else [output, log_sum_exp(statistics).to(grad_lse.dtype)]

    cotangents = [grad_output] if grad_lse is None else [grad_output, grad_lse]
    gradients = autograd.pullback(plain, tensors[:2], cotangents)
    return [gradient for gradient in gradients if gradient is not None]
