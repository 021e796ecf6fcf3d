"""Every operator schema and its fake (shape) function, in one place: a file for each family of ops.

Importing this package defines them all; ``registry`` says how.
"""

from fusewright_kernels.library import (  # noqa: F401  (they define schemas and export nothing)
    activation,
    cross_entropy,
    dropout_add,
    embedding,
    linear,
    linear_attention,
    linear_cross_entropy,
    lsh_attention,
    rotary,
    softmax,
)
from fusewright_kernels.library.attention import in_layout_of
from fusewright_kernels.library.normalization import norm_statistics
from fusewright_kernels.library.recurrent import CELL_GATES, saved_states
from fusewright_kernels.library.registry import (
    COMPILED_BACKENDS,
    attach_composed,
    attach_reference,
    attach_triton,
    overload,
)

__all__ = [
    "CELL_GATES", "COMPILED_BACKENDS", "attach_composed", "attach_reference", "attach_triton", "in_layout_of",
    "norm_statistics", "overload", "saved_states",
]  # fmt: skip
