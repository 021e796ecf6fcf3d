"""The public numerical cases of every op.

A case keeps its id and its inputs for as long as ``CASES_VERSION`` stands: errors measured on different days and
devices are compared under them.
"""

from collections.abc import Iterable

from fusewright.testing.case import Case
from fusewright.testing.cases import (
    attention,
    cross_entropy,
    feed_forward,
    lsh_attention,
    normalization,
    recurrent,
    softmax,
)

CASES_VERSION = 1

_FAMILIES = (attention, cross_entropy, feed_forward, lsh_attention, normalization, recurrent, softmax)


def ops() -> tuple[str, ...]:
    """The ops that have cases."""
    return tuple(op for family in _FAMILIES for op in family.OPS)


def cases(wanted: Iterable[str] | None = None) -> list[Case]:
    """The cases of the ops ``wanted``, of every op by default, in a fixed order."""
    chosen = ops() if wanted is None else tuple(wanted)
    unknown = [op for op in chosen if op not in ops()]
    if unknown:
        raise ValueError(f"wanted holds {', '.join(unknown)}, expected some of {', '.join(ops())}")
    return [case for family in _FAMILIES for op in family.OPS if op in chosen for case in family.cases_of(op)]
