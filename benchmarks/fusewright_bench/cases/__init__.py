"""Every operation of the suite, by name."""

from fusewright_bench.case import Operation
from fusewright_bench.cases import normalization, softmax

OPERATIONS: dict[str, Operation] = {
    operation.name: operation for operation in (*normalization.OPERATIONS, softmax.OPERATION)
}
