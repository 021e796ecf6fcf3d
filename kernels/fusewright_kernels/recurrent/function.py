"""A recurrent layer as an ``autograd.Function``, with the rules for vmap and for double backward."""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import autograd, library
from fusewright_kernels.recurrent import reference

# Tensor arguments of the op, of which the first eight are differentiable; behind them cell, reverse and the backend.
_TENSORS = 10
_DIFFERENTIABLE = 8


def run(op: str, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
    """The op on ``backend``, its products in the types of their factors.

    Autocast has had its say before the checks. It would reach into the op's own products, and a backward may stand
    under one that its forward did not.
    """
    overload = library.overload(op, backend)
    device_type = next(argument for argument in arguments if argument is not None).device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return overload(*arguments)
    with torch.autocast(device_type, enabled=False):
        return overload(*arguments)


class Recurrent(torch.autograd.Function):
    """(the inputs of ``recurrent_forward`` but the last, backend) -> (output, h_n, c_n, gates, cells)."""

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
        lengths: Tensor | None,
        resets: Tensor | None,
        cell: str,
        reverse: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        return run(
            "recurrent_forward",
            backend,
            input,
            h0,
            c0,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            weight_hr,
            lengths,
            resets,
            cell,
            reverse,
            True,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        output, _, _, gates, cells = outputs
        *ctx.numbers, ctx.backend = inputs[_TENSORS:]
        ctx.mark_non_differentiable(gates, cells)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, gates, cells, *inputs[:_TENSORS])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        output, gates, cells, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad
        needs = (needed[0], needed[1] or needed[2], any(needed[3:_DIFFERENTIABLE]))
        grad_output, grad_h_n, grad_c_n = grads[0], grads[1], None if tensors[2] is None else grads[2]
        arguments = (grad_output, grad_h_n, grad_c_n, output, gates, cells, *tensors, *ctx.numbers, *needs)
        if autograd.second_derivative_possible(grad_output, grad_h_n, grad_c_n, *tensors[:_DIFFERENTIABLE]):
            gradients = RecurrentBackward.apply(*arguments, ctx.backend)
        else:
            gradients = run("recurrent_backward", ctx.backend, *arguments)
        wanted = [
            need and tensor is not None
            for need, tensor in zip(needed[:_DIFFERENTIABLE], tensors[:_DIFFERENTIABLE], strict=True)
        ]
        return *autograd.only_wanted(gradients, wanted), *[None] * (len(needed) - _DIFFERENTIABLE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        size, dims = info.batch_size, in_dims[:_TENSORS]
        if any(dim is not None for dim in dims[3:_DIFFERENTIABLE]):
            # One call takes one set of weights.
            return _each_sample(Recurrent, size, in_dims, inputs), (0,) * 5
        folded = list(inputs)
        # Samples are more of the batch, which is the second dimension of the input and of the resets.
        for index, batch_dim in ((0, 1), (1, 0), (2, 0), (8, 0), (9, 1)):
            if inputs[index] is not None:
                batched = autograd.batch_first(inputs[index], dims[index], size)
                folded[index] = batched.movedim(0, batch_dim).flatten(batch_dim, batch_dim + 1)
        output, h_n, c_n, gates, cells = Recurrent.apply(*folded)
        is_lstm = inputs[2] is not None
        unfolded = (
            output.unflatten(1, (size, -1)),
            h_n.unflatten(0, (size, -1)),
            c_n.unflatten(0, (size, -1)) if is_lstm else c_n,
            gates.unflatten(1, (size, -1)),
            cells.unflatten(1, (size, -1)) if is_lstm else cells,
        )
        return unfolded, (1, 0, 0 if is_lstm else None, 1, 1 if is_lstm else None)


def _each_sample(
    function: type[torch.autograd.Function], size: int, dims: tuple[int | None, ...], inputs: Any
) -> tuple[Tensor, ...]:
    """``function`` of each sample, the results stacked."""
    results = [
        function.apply(
            *(
                tensor if dim is None else tensor.select(dim, n)
                for tensor, dim in zip(inputs, dims, strict=True)
            )
        )
        for n in range(size)
    ]  # fmt: skip
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


class RecurrentBackward(torch.autograd.Function):
    """(the inputs of ``recurrent_backward``..., backend) -> the eight gradients."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *arguments, backend = inputs
        return run("recurrent_backward", backend, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        ctx.numbers = inputs[6 + _TENSORS : -4]
        need_input, need_states, need_weights = inputs[-4:-1]
        ctx.wanted = (need_input, need_states, need_states, *(need_weights,) * 5)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3], *inputs[6 : 6 + _TENSORS])

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *differentiable, lengths, resets = ctx.saved_tensors
        present = [
            want and tensor is not None for want, tensor in zip(ctx.wanted, differentiable[3:], strict=True)
        ]  # fmt: skip

        def plain(*inputs: Any) -> list[Tensor]:
            gradients = reference.recurrent_backward(*(*inputs, lengths, resets, *ctx.numbers))
            return [
                gradient for gradient, here in zip(gradients, present, strict=True) if gradient is not None and here
            ]

        incoming = [gradient for gradient, here in zip(grad_gradients, present, strict=True) if here]
        second = autograd.pullback(plain, differentiable, incoming)
        return *second[:3], None, None, None, *second[3:], *[None] * (len(ctx.needs_input_grad) - 6 - _DIFFERENTIABLE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        # Every sample has its own gradient of the weights.
        return _each_sample(RecurrentBackward, info.batch_size, in_dims, inputs), (0,) * _DIFFERENTIABLE
