"""Linear cross-entropy as an ``autograd.Function``, with the rules for vmap and for double backward.

Where all losses will get the same gradient, as those of a mean or a sum do, the forward computes the gradients as well,
while it has the logits: the backward only scales them. Else the backward computes the logits again.
"""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import autograd, library
from fusewright_kernels.cross_entropy import linear_reference
from fusewright_kernels.cross_entropy.reference import Options


class LinearCrossEntropy(torch.autograd.Function):
    """-> (losses, grad_input, grad_weight, grad_bias); gradients without elements where none are asked for."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        equal_gradients: bool,
        need_input: bool,
        need_weight: bool,
        need_bias: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = (
            input, weight, bias, target, class_weight, ignore_index, label_smoothing, z_loss, softcap,
        )  # fmt: skip
        if equal_gradients:
            gradients = library.overload("linear_cross_entropy_gradients", backend)
            return gradients(None, *inputs, need_input, need_weight, need_bias)
        losses = library.overload("linear_cross_entropy_forward", backend)(*inputs)
        return losses, *(input.new_empty((0,)) for _ in range(3))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.equal_gradients, need_input, need_weight, need_bias, ctx.backend = inputs
        input, weight, bias, target, class_weight, *options = tensors
        ctx.options, ctx.wanted = Options(*options), (need_input, need_weight, need_bias)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, target, class_weight, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_losses is None:
            return (None,) * 14
        *tensors, grad_input, grad_weight, grad_bias = ctx.saved_tensors
        input, weight, bias, _, _ = tensors
        if autograd.second_derivative_possible(grad_losses, input, weight, bias):
            gradients = LinearCrossEntropyBackward.apply(grad_losses, *tensors, *ctx.options, *ctx.wanted, ctx.backend)
        elif ctx.equal_gradients:
            # No row, no first gradient; the gradients are zero then.
            scale = grad_losses[:1].sum()
            gradients = [(grad * scale).to(grad.dtype) for grad in (grad_input, grad_weight, grad_bias)]
        else:
            compute = library.overload("linear_cross_entropy_gradients", ctx.backend)
            gradients = compute(grad_losses, *tensors, *ctx.options, *ctx.wanted)[1:]
        return *autograd.only_wanted(gradients, ctx.wanted), *[None] * 11

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        *options, equal_gradients, _, _, _, _ = inputs[5:]

        def plain(
            input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None
        ) -> tuple[Tensor, ...]:
            given = (input, weight, bias, target, class_weight, Options(*options))
            losses = linear_reference.losses(*given)
            if not equal_gradients:
                return losses, *(input.new_empty((0,)) for _ in range(3))
            return losses, *linear_reference.backward(torch.ones_like(losses), *given)

        return torch.vmap(plain, in_dims[:5])(*inputs[:5]), (0, 0, 0, 0)


class LinearCrossEntropyBackward(torch.autograd.Function):
    """(grad_losses, the tensors, options and wishes of the forward, backend) -> the three gradients."""

    @staticmethod
    def forward(
        grad_losses: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        need_input: bool,
        need_weight: bool,
        need_bias: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        compute = library.overload("linear_cross_entropy_gradients", backend)
        _, *gradients = compute(
            grad_losses, input, weight, bias, target, class_weight, ignore_index, label_smoothing, z_loss, softcap,
            need_input, need_weight, need_bias,
        )  # fmt: skip
        return tuple(gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.wanted = Options(*inputs[6:10]), inputs[10:13]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6])

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *differentiable, target, class_weight = ctx.saved_tensors

        def plain(grad_losses: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
            gradients = linear_reference.backward(grad_losses, input, weight, bias, target, class_weight, ctx.options)
            return [gradient for gradient, want in zip(gradients, ctx.wanted, strict=True) if want]

        incoming = [gradient for gradient, want in zip(grad_gradients, ctx.wanted, strict=True) if want]
        return *autograd.pullback(plain, differentiable, incoming), *[None] * 10

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        def plain(
            grad_losses: Tensor,
            input: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            target: Tensor,
            class_weight: Tensor | None,
        ) -> tuple[Tensor, ...]:
            return linear_reference.backward(
                grad_losses, input, weight, bias, target, class_weight, Options(*inputs[6:10])
            )

        return torch.vmap(plain, in_dims[:6])(*inputs[:6]), (0, 0, 0)
