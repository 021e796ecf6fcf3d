"""Linear attention as an ``autograd.Function``, with the rules for vmap and for double backward."""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import autograd, library
from fusewright_kernels.linear_attention import reference

# Tensor arguments of the op; behind them come the numbers, then the backend.
_TENSORS = 5


class LinearAttention(torch.autograd.Function):
    """(the inputs of ``linear_attention_forward``..., backend) -> (output, normalizer, final_state)."""

    # Every argument by name: torch.compile counts them to tell a forward without a context from one with.
    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        initial_state: Tensor | None,
        is_causal: bool,
        eps: float,
        feature_map: int,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return library.overload("linear_attention_forward", backend)(
            query, key, value, key_padding_mask, initial_state, is_causal, eps, feature_map
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        output, normalizer, _ = outputs
        *ctx.numbers, ctx.backend = inputs[_TENSORS:]
        ctx.mark_non_differentiable(normalizer)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, normalizer, *inputs[:_TENSORS])

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, _: Tensor | None, grad_final_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        output, normalizer, *tensors = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        needed = ctx.needs_input_grad
        wanted = (needed[0], needed[1], needed[2], needed[4])
        if autograd.second_derivative_possible(grad_output, grad_final_state, *tensors[:3], tensors[4]):
            gradients = reference.attention_backward(grad_output, grad_final_state, *tensors, *ctx.numbers)
        else:
            gradients = library.overload("linear_attention_backward", ctx.backend)(
                grad_output, grad_final_state, output, normalizer, *tensors, *ctx.numbers, *wanted
            )
        query, key, value, state = autograd.only_wanted(gradients, wanted)
        return query, key, value, None, state, *[None] * (len(needed) - _TENSORS)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        folded = [
            None if tensor is None else autograd.batch_first(tensor, dim, info.batch_size).flatten(0, 1)
            for tensor, dim in zip(inputs[:_TENSORS], in_dims[:_TENSORS], strict=True)
        ]
        results = LinearAttention.apply(*folded, *inputs[_TENSORS:])
        return tuple(result.unflatten(0, (info.batch_size, -1)) for result in results), (0, 0, 0)
