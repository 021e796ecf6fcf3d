"""The default overload of each op: the plain formula in the shape of the op's schema."""

from typing import Any

from torch import Tensor

from fusewright_kernels import library
from fusewright_kernels.linear_attention import reference


def linear_attention_forward(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    output, normalizer, state = reference.attention(query, key, value, *arguments)
    shape = (*query.shape[:3], value.shape[3])
    return library.in_layout_of(query, shape).copy_(output), normalizer, state


def linear_attention_backward(
    grad_output: Tensor,
    grad_final_state: Tensor | None,
    output: Tensor,
    normalizer: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *inputs, need_query, need_key, need_value, need_state = arguments
    *gradients, grad_state = reference.attention_backward(grad_output, grad_final_state, query, key, value, *inputs)
    results = [
        library.in_layout_of(like, like.shape).copy_(gradient) if want else query.new_empty((0,))
        for gradient, like, want in zip(gradients, (query, key, value), (need_query, need_key, need_value), strict=True)
    ]
    return (*results, grad_state.contiguous() if need_state else query.new_empty((0,)))


def attach() -> None:
    for op in (linear_attention_forward, linear_attention_backward):
        library.attach_reference(op.__name__, op)
