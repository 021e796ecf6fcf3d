"""Schema of dropout with a residual addition; without a residual it is the gradient of its input."""

from fusewright_kernels.library.registry import contiguous_like, define

define(
    "dropout_add",
    "(Tensor input, Tensor? residual, Tensor? seed, float dropout_p) -> Tensor",
    lambda input, residual, seed, dropout_p: contiguous_like(input),
)
