"""Both directions of a recurrent layer as one ``autograd.Function``, for a backend that runs them side by side."""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import autograd
from fusewright_kernels.recurrent.function import Recurrent, RecurrentBackward, run
from fusewright_kernels.recurrent.layer import COUNT, backward_inputs_of, inputs_of, joined, joined_gradients

# Arguments of the op: input and states, the parameters of both directions; behind them lengths, resets and the cell.
_DIFFERENTIABLE = 3 + 2 * COUNT
_TENSORS = _DIFFERENTIABLE + 2


class Bidirectional(torch.autograd.Function):
    """(the inputs of ``bidirectional_forward`` but the last, backend) -> (output, h_n, c_n, gates, cells)."""

    # Every argument by name: torch.compile counts them to tell a forward without a context from one with.
    @staticmethod
    def forward(
        input: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        weight_hr: Tensor | None,
        weight_ih_reverse: Tensor,
        weight_hh_reverse: Tensor,
        bias_ih_reverse: Tensor | None,
        bias_hh_reverse: Tensor | None,
        weight_hr_reverse: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        cell: str,
        backend: str,
    ) -> tuple[Tensor, ...]:
        weights = weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
        reverse = weight_ih_reverse, weight_hh_reverse, bias_ih_reverse, bias_hh_reverse, weight_hr_reverse
        arguments = (input, h0, c0, *weights, *reverse, lengths, resets, cell)
        return run("bidirectional_forward", backend, *arguments, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        output, _, _, gates, cells = outputs
        ctx.cell, ctx.backend = inputs[_TENSORS:]
        ctx.mark_non_differentiable(gates, cells)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, gates, cells, *inputs[:_TENSORS])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        output, gates, cells, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad
        needs = (needed[0], needed[1] or needed[2], any(needed[3:_DIFFERENTIABLE]))
        given = (grads[0], grads[1], None if tensors[2] is None else grads[2])
        arguments = (*given, output, gates, cells, *tensors, ctx.cell, *needs)
        if autograd.second_derivative_possible(*given, *tensors[:_DIFFERENTIABLE]):
            gradients = joined_gradients(
                *(RecurrentBackward.apply(*own, ctx.backend) for own in backward_inputs_of(*arguments))
            )
        else:
            gradients = run("bidirectional_backward", ctx.backend, *arguments)
        wanted = [
            need and tensor is not None
            for need, tensor in zip(needed[:_DIFFERENTIABLE], tensors[:_DIFFERENTIABLE], strict=True)
        ]
        return *autograd.only_wanted(gradients, wanted), *[None] * (len(needed) - _DIFFERENTIABLE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        def one_by_one(*inputs: Any) -> tuple[Tensor, ...]:
            *arguments, backend = inputs
            return joined(*(Recurrent.apply(*own, backend) for own in inputs_of(*arguments)))

        return torch.vmap(one_by_one, in_dims)(*inputs), (0,) * 5
