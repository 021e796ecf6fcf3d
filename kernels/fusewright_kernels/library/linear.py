"""Schema of a linear layer on few rows: input (*, I), weight (O, I) and bias (O,) of one dtype."""

from fusewright_kernels.library.registry import define

define(
    "few_rows_linear",
    "(Tensor input, Tensor weight, Tensor? bias) -> Tensor",
    lambda input, weight, bias: input.new_empty((*input.shape[:-1], weight.shape[0])),
)
