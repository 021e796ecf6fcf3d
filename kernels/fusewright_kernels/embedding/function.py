"""Embedding with positions as an ``autograd.Function``. It is linear: the gradient of its gradient is itself again."""

from typing import Any

import torch
from torch import Tensor

from fusewright_kernels import autograd, library
from fusewright_kernels.embedding import reference


class Embedding(torch.autograd.Function):
    """(tokens, weight, table, rows, scale, padding_index, backend) -> output."""

    @staticmethod
    def forward(
        tokens: Tensor,
        weight: Tensor,
        table: Tensor | None,
        rows: Tensor | None,
        scale: float,
        padding_index: int,
        backend: str,
    ) -> Tensor:
        return library.overload("embedding_forward", backend)(tokens, weight, table, rows, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tokens, weight, table, rows, ctx.scale, ctx.padding_index, ctx.backend = inputs
        ctx.save_for_backward(tokens, rows)
        ctx.like = (weight.shape[0], weight.dtype)
        ctx.table_like = None if table is None else (table.shape[0], table.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        tokens, rows = ctx.saved_tensors
        grad_weight = grad_table = None
        if ctx.needs_input_grad[1]:
            count, dtype = ctx.like
            grad_weight = _gradient(grad_output, tokens, count, ctx.scale, ctx.padding_index, dtype, ctx.backend)
        if ctx.needs_input_grad[2]:
            count, dtype = ctx.table_like
            rows = reference.rows_of(tokens) if rows is None else rows
            grad_table = _gradient(grad_output, rows, count, 1.0, -1, dtype, ctx.backend)
        return None, grad_weight, grad_table, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        tokens, weight, table, rows, scale, *others = inputs
        if in_dims[1] is not None or in_dims[2] is not None:

            def plain(tokens: Tensor, weight: Tensor, table: Tensor | None, rows: Tensor | None) -> Tensor:
                return reference.embedding(tokens, weight, table, rows, scale)

            return torch.vmap(plain, in_dims[:4])(tokens, weight, table, rows), 0
        tokens = autograd.batch_first(tokens, in_dims[0], info.batch_size)
        if rows is not None:
            rows = autograd.batch_first(rows, in_dims[3], info.batch_size)
        return Embedding.apply(tokens, weight, table, rows, scale, *others), 0


class EmbeddingBackward(torch.autograd.Function):
    """(grad_output, indices, count, scale, skipped, dtype, backend) -> gradient."""

    @staticmethod
    def forward(
        grad_output: Tensor, indices: Tensor, count: int, scale: float, skipped: int, dtype: torch.dtype, backend: str
    ) -> Tensor:
        return library.overload("embedding_backward", backend)(grad_output, indices, count, scale, skipped, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_output, indices, _, ctx.scale, ctx.skipped, _, ctx.backend = inputs
        ctx.dtype = grad_output.dtype
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, grad_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        picked = Embedding.apply(indices, grad_gradient, None, None, ctx.scale, ctx.skipped, ctx.backend)
        if ctx.skipped >= 0:
            picked = picked.masked_fill((indices == ctx.skipped)[..., None], 0.0)
        return picked.to(ctx.dtype), *[None] * 6

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        def plain(grad_output: Tensor, indices: Tensor) -> Tensor:
            return reference.embedding_backward(grad_output, indices, *inputs[2:6])

        return torch.vmap(plain, in_dims[:2])(*inputs[:2]), 0


def _gradient(grad_output: Tensor, indices: Tensor, *arguments: Any) -> Tensor:
    if autograd.second_derivative_possible(grad_output):
        return EmbeddingBackward.apply(grad_output, indices, *arguments)
    *options, backend = arguments
    return library.overload("embedding_backward", backend)(grad_output, indices, *options)
