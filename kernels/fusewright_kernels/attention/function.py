"""Exact attention as an ``autograd.Function``, with the rules for vmap and for double backward.

The backward works from the output and the two statistics of each row; the probabilities are recomputed.
"""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import autograd, library
from fusewright_kernels.attention import backend_native
from fusewright_kernels.attention.backend_reference import log_sum_exp, plain_attention, plain_gradients

# Tensor arguments of the op; behind them come the numbers, then the backend.
_TENSORS = 10


class Attention(torch.autograd.Function):
    """(the inputs of ``attention_forward``..., return_lse, backend, forced) -> (output, statistics, lse or None).

    ``backend`` is what dispatch chose, ``forced`` that it was asked for by name; tensors' sizes may still refuse it.
    """

    # Every argument by name: torch.compile counts them to tell a forward without a context from one with.
    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        block_mask: Tensor | None,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        seed: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        block_size: int,
        scale: float,
        softcap: float,
        dropout_p: float,
        window_left: int,
        window_right: int,
        bottom_right: bool,
        return_lse: bool,
        backend: str,
        forced: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        arguments = (
            query, key, value, mask, block_mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k,
            block_size, scale, softcap, dropout_p, window_left, window_right, bottom_right,
        )  # fmt: skip
        overload = library.overload("attention_forward", backend_native.forward_backend_of(backend, forced, arguments))
        output, statistics = overload(*arguments)
        return output, statistics, log_sum_exp(statistics) if return_lse else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        output, statistics, _ = outputs
        *ctx.numbers, _, ctx.backend, ctx.forced = inputs[_TENSORS:]
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
        needed = ctx.needs_input_grad
        wanted = (needed[0], needed[1], needed[2], needed[3], needed[6])
        arguments = (grad_output, grad_lse, output, statistics, *tensors, *ctx.numbers, *wanted)
        if autograd.second_derivative_possible(grad_output, grad_lse, *tensors[:4], tensors[6]):
            gradients = AttentionBackward.apply(*arguments, ctx.backend, ctx.forced)
        else:
            gradients = _backward(ctx.backend, ctx.forced, arguments)
        query, key, value, mask, sinks = autograd.only_wanted(gradients, wanted)
        return query, key, value, mask, None, None, sinks, *[None] * (len(needed) - 7)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        tensors, (*numbers, return_lse, backend, forced) = inputs[:_TENSORS], inputs[_TENSORS:]
        size, dims = info.batch_size, in_dims[:_TENSORS]
        # Samples with one seed must draw the same mask, and one op call takes one set of sinks and of packed sequences.
        if any(tensor is not None for tensor in tensors[7:]) or dims[4] is not None or dims[6] is not None:

            def plain(*tensors: Any) -> tuple[Tensor, ...]:
                output, statistics = plain_attention(*tensors, *numbers)
                return (output, statistics, log_sum_exp(statistics)) if return_lse else (output, statistics)

            results = torch.vmap(plain, dims)(*tensors)
            return (*results, None)[:3], (0, 0, 0 if return_lse else None)
        folded: list[Any] = list(tensors)
        for index in (0, 1, 2, 3, 5):
            tensor = tensors[index]
            if tensor is None or (index > 2 and dims[index] is None and tensor.shape[0] == 1):
                continue
            batched = autograd.batch_first(tensor, dims[index], size)
            if index > 2 and batched.shape[1] == 1:
                batched = batched.expand(size, _unbatched(tensors[0], dims[0]), *batched.shape[2:])
            folded[index] = batched.flatten(0, 1)
        output, statistics, lse = Attention.apply(*folded, *numbers, return_lse, backend, forced)
        output, statistics = output.unflatten(0, (size, -1)), statistics.unflatten(1, (size, -1))
        if lse is None:
            return (output, statistics, None), (0, 1, None)
        return (output, statistics, lse.unflatten(0, (size, -1))), (0, 1, 0)


def _unbatched(query: Tensor, batch_dim: int | None) -> int:
    """The batch size B of one sample's query."""
    return query.shape[0] if batch_dim is None or batch_dim > 0 else query.shape[1]


def _backward(backend: str, forced: bool, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """``attention_backward`` of ``arguments`` as ``backend`` runs it, or the one that serves them."""
    return backend_native.backward_overload(backend_native.backward_backend_of(backend, forced, arguments[4:-5]))(
        *arguments
    )


class AttentionBackward(torch.autograd.Function):
    """(the inputs of ``attention_backward``..., backend, forced) -> gradients of query, key, value, mask and sinks."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *arguments, backend, forced = inputs
        return _backward(backend, forced, tuple(arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        ctx.numbers = inputs[4 + _TENSORS : -2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], *inputs[4 : 4 + _TENSORS])

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, grad_lse, *tensors = ctx.saved_tensors
        differentiable = [grad_output, grad_lse, *tensors[:4], tensors[6]]
        incoming = [gradient for gradient, want in zip(grad_gradients, ctx.numbers[-5:], strict=True) if want]

        def plain(*inputs: Any) -> list[Tensor]:
            return _plain_backward(inputs, tensors, ctx.numbers)

        second = autograd.pullback(plain, differentiable, incoming)
        return (
            *second[:2],
            None,
            None,
            *second[2:6],
            None,
            None,
            second[6],
            *[None] * (len(ctx.needs_input_grad) - 11),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        numbers = inputs[4 + _TENSORS : -2]
        dims = (*in_dims[:2], *in_dims[4 : 4 + _TENSORS])
        wanted = numbers[-5:]

        def plain(grad_output: Any, grad_lse: Any, *tensors: Any) -> tuple[Tensor, ...]:
            differentiable = (grad_output, grad_lse, *tensors[:4], tensors[6])
            gradients = iter(_plain_backward(differentiable, list(tensors), numbers))
            return tuple(next(gradients) if want else grad_output.new_empty((0,)) for want in wanted)

        return torch.vmap(plain, dims)(*inputs[:2], *inputs[4 : 4 + _TENSORS]), (0,) * 5


def _plain_backward(differentiable: tuple[Any, ...], tensors: list[Any], numbers: tuple[Any, ...]) -> list[Tensor]:
    """The wanted gradients by the plain formula, itself differentiable.

    Args:
        differentiable: grad_output, grad_lse or None, query, key, value, mask, sinks.
        tensors: the tensor inputs of the op; those that are differentiable are taken from there.
        numbers: the op's numbers and, last, which five gradients are wanted.
    """
    grad_output, grad_lse, query, key, value, mask, sinks = differentiable
    inputs = (query, key, value, mask, *tensors[4:6], sinks, *tensors[7:])
    gradients = plain_gradients(grad_output, grad_lse, *inputs, *numbers[:-5])
    return [gradient for gradient, want in zip(gradients, numbers[-5:], strict=True) if want and gradient is not None]
