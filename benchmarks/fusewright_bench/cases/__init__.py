"""Every operation of the suite, by name."""

from fusewright_bench.case import Operation
from fusewright_bench.cases import (
    additive_attention,
    attention,
    cross_entropy,
    embedding,
    feed_forward,
    linear,
    linear_attention,
    lsh_attention,
    normalization,
    recurrent,
    softmax,
)

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        *attention.OPERATIONS,
        additive_attention.OPERATION,
        *cross_entropy.OPERATIONS,
        embedding.OPERATION,
        *feed_forward.OPERATIONS,
        linear.OPERATION,
        linear_attention.OPERATION,
        *lsh_attention.OPERATIONS,
        *normalization.OPERATIONS,
        *recurrent.OPERATIONS,
        softmax.OPERATION,
    )
}
