"""Cross-entropy as an ``autograd.Function``, with the rules for vmap and for double backward.

Rows are independent and classes lie in dimension 1, so a vmap dimension folds into the rows before them.
"""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import autograd, library
from fusewright_kernels.cross_entropy import reference
from fusewright_kernels.cross_entropy.reference import Options


class CrossEntropy(torch.autograd.Function):
    """(input, target, weight, ignore_index, label_smoothing, z_loss, softcap, backend) -> (losses, statistics)."""

    @staticmethod
    def forward(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        forward = library.overload("cross_entropy_forward", backend)
        return forward(input, target, weight, ignore_index, label_smoothing, z_loss, softcap)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, target, weight, *options, ctx.backend = inputs
        ctx.options = Options(*options)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, output[1])

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_losses is None:
            return (None,) * 8
        input, target, weight, statistics = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        arguments = (grad_losses, input, target, weight, statistics, *ctx.options, *wanted)
        if autograd.second_derivative_possible(grad_losses, input, target):
            gradients = CrossEntropyBackward.apply(*arguments, ctx.backend)
        else:
            gradients = library.overload("cross_entropy_backward", ctx.backend)(*arguments)
        return *autograd.only_wanted(gradients, wanted), *[None] * 6

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        input, target, weight, *arguments = inputs
        if in_dims[2] is not None:

            def plain(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
                return reference.losses_with_statistics(input, target, weight, Options(*arguments[:-1]))

            return torch.vmap(plain, in_dims[:3])(input, target, weight), (0, 0)
        input, target = (_folded(tensor, dim, info) for tensor, dim in ((input, in_dims[0]), (target, in_dims[1])))
        losses, statistics = CrossEntropy.apply(input, target, weight, *arguments)
        return (_unfolded(losses, 0, info), _unfolded(statistics, 1, info)), (0, 1)


class CrossEntropyBackward(torch.autograd.Function):
    """(grad_losses, input, target, weight, statistics, options..., wanted..., backend) -> gradients."""

    @staticmethod
    def forward(
        grad_losses: Tensor,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        statistics: Tensor,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        need_input: bool,
        need_target: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        backward = library.overload("cross_entropy_backward", backend)
        return backward(
            grad_losses, input, target, weight, statistics, ignore_index, label_smoothing, z_loss, softcap,
            need_input, need_target,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        grad_losses, input, target, weight, _, *arguments = inputs
        ctx.options, ctx.wanted = Options(*arguments[:4]), arguments[4:6]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_losses, input, target, weight)

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_losses, input, target, weight = ctx.saved_tensors
        probabilities = target.is_floating_point()

        def plain(grad_losses: Tensor, input: Tensor, target: Tensor = target) -> list[Tensor]:
            gradients = reference.backward(grad_losses, input, target, weight, ctx.options)
            return [gradient for gradient, want in zip(gradients, ctx.wanted, strict=True) if want]

        inputs = (grad_losses, input, target) if probabilities else (grad_losses, input)
        incoming = [gradient for gradient, want in zip(grad_gradients, ctx.wanted, strict=True) if want]
        second = autograd.pullback(plain, inputs, incoming)
        return *second, *[None] * (12 - len(second))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        grad_losses, input, target, weight, statistics, *arguments = inputs
        need_input, need_target = arguments[4:6]
        if in_dims[3] is not None:

            def plain(grad_losses: Tensor, input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
                return reference.backward(grad_losses, input, target, weight, Options(*arguments[:4]))

            return torch.vmap(plain, in_dims[:4])(grad_losses, input, target, weight), (0, 0)
        grad_losses, input, target = (
            _folded(tensor, dim, info) for tensor, dim in zip(inputs[:3], in_dims[:3], strict=True)
        )
        if in_dims[4] is None:
            statistics = statistics.unsqueeze(1).expand(3, info.batch_size, *statistics.shape[1:])
        else:
            statistics = statistics.movedim(in_dims[4], 1)
        gradients = CrossEntropyBackward.apply(grad_losses, input, target, weight, statistics.flatten(1, 2), *arguments)
        return tuple(
            _unfolded(gradient, 0, info) if want else gradient.expand(info.batch_size, 0)
            for gradient, want in zip(gradients, (need_input, need_target), strict=True)
        ), (0, 0)


def _folded(tensor: Tensor, batch_dim: int | None, info: Any) -> Tensor:
    """The vmap dimension as part of the rows."""
    return autograd.batch_first(tensor, batch_dim, info.batch_size).flatten(0, 1)


def _unfolded(tensor: Tensor, dim: int, info: Any) -> Tensor:
    # Sizes by name: -1 is ambiguous where there are no rows.
    return tensor.unflatten(dim, (info.batch_size, tensor.shape[dim] // info.batch_size))
