"""Schemas of softmax over one dimension."""

from fusewright_kernels.library.registry import contiguous_like, define

define(
    "softmax_forward",
    "(Tensor input, int dim, ScalarType output_dtype) -> Tensor",
    lambda input, dim, output_dtype: contiguous_like(input, output_dtype),
)

define("softmax_forward_out", "(Tensor input, int dim, Tensor(a!) output) -> ()", lambda *args: None)

define(
    "softmax_backward",
    "(Tensor grad_output, Tensor output, int dim, ScalarType input_dtype) -> Tensor",
    lambda grad_output, output, dim, input_dtype: contiguous_like(output, input_dtype),
)
