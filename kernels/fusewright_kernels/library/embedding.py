"""Schemas of the embedding with positions: tokens and rows of one shape (*), weight (V, E), table (P, E).

Without rows, those of the table are 0, 1, 2, ... along the last dimension of tokens.
"""

from fusewright_kernels.library.registry import define

define(
    "embedding_forward",
    "(Tensor tokens, Tensor weight, Tensor? table, Tensor? rows, float scale) -> Tensor",
    lambda tokens, weight, table, rows, scale: weight.new_empty((*tokens.shape, weight.shape[1])),
)

# The gradient of a matrix whose rows `indices` named; that of row `skipped` is zero, -1 names none.
define(
    "embedding_backward",
    "(Tensor grad_output, Tensor indices, SymInt count, float scale, int skipped, ScalarType dtype) -> Tensor",
    lambda grad_output, indices, count, scale, skipped, dtype: grad_output.new_empty(
        (count, grad_output.shape[-1]), dtype=dtype
    ),
)
