"""The public numerics API: oracle and error, budgets, memory guards, layouts, invariants, cases.

``error_in_u`` measures a result by a float64 oracle, ``assert_accurate`` judges it; ``cases()`` are the cases that
``fusewright verify`` runs and ``evaluate`` runs one of them.
"""

from fusewright.testing.budgets import (
    BUDGETS,
    ELEMENT_FACTOR,
    PLAIN_FACTOR,
    Budget,
    Judgement,
    assert_accurate,
    budget_of,
    judge,
)
from fusewright.testing.case import Case, Expected, evaluate
from fusewright.testing.cases import CASES_VERSION, cases, ops
from fusewright.testing.errors import (
    UNIT,
    bits,
    bits_equal,
    error_in_u,
    magnitude_in,
    max_element_error_in_u,
    rms,
    unit,
)
from fusewright.testing.guards import (
    GuardedTensor,
    assert_no_nan,
    guarded,
    guarded_allocations,
    poisoned_allocations,
)
from fusewright.testing.layouts import layout_variants
from fusewright.testing.properties import (
    assert_batch_invariant,
    assert_column_permutation_equivariant,
    assert_inner_products,
    assert_repeatable,
    assert_row_permutation_equivariant,
    assert_rows_sum_to,
    assert_scale_invariant,
    assert_shift_invariant,
    assert_thread_count_invariant,
)

__all__ = [
    "BUDGETS",
    "CASES_VERSION",
    "ELEMENT_FACTOR",
    "PLAIN_FACTOR",
    "UNIT",
    "Budget",
    "Case",
    "Expected",
    "GuardedTensor",
    "Judgement",
    "assert_accurate",
    "assert_batch_invariant",
    "assert_column_permutation_equivariant",
    "assert_inner_products",
    "assert_no_nan",
    "assert_repeatable",
    "assert_row_permutation_equivariant",
    "assert_rows_sum_to",
    "assert_scale_invariant",
    "assert_shift_invariant",
    "assert_thread_count_invariant",
    "bits",
    "bits_equal",
    "budget_of",
    "cases",
    "error_in_u",
    "evaluate",
    "guarded",
    "guarded_allocations",
    "judge",
    "layout_variants",
    "magnitude_in",
    "max_element_error_in_u",
    "ops",
    "poisoned_allocations",
    "rms",
    "unit",
]
