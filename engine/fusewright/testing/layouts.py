"""The same values in other memory layouts, and hypothesis strategies over shapes, layouts and dtypes.

hypothesis is wanted only by the strategies and is imported by them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def transposed(tensor: Tensor) -> Tensor:
    """Dimensions stored in reverse order, so that the last dimension has the largest step."""
    dims = tuple(range(tensor.ndim - 1, -1, -1))
    return contiguous(tensor.detach().permute(dims)).permute(dims)


def gapped(tensor: Tensor) -> Tensor:
    """A slice of a larger tensor: three unused elements after each row; NaN stands in the gaps."""
    if tensor.ndim == 0:
        return contiguous(tensor)
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"))
    view = wide[..., 1 : 1 + tensor.shape[-1]]
    view.copy_(tensor.detach())
    return view


def every_second(tensor: Tensor) -> Tensor:
    """Elements two apart in the last dimension, NaN between them."""
    if tensor.ndim == 0:
        return contiguous(tensor)
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] * 2), float("nan"))
    view = wide[..., ::2]
    view.copy_(tensor.detach())
    return view


def misaligned(tensor: Tensor) -> Tensor:
    """Contiguous, and one element past a 64-byte boundary."""
    storage = tensor.new_empty(tensor.numel() + 1 + 64 // tensor.element_size())
    skip = (-storage.data_ptr() % 64) // tensor.element_size() + 1
    view = storage[skip : skip + tensor.numel()].view(tensor.shape)
    view.copy_(tensor.detach())
    return view


def expanded(tensor: Tensor) -> Tensor:
    """Step 0 in each dimension along which the values are constant; contiguous where there is none."""
    view = tensor.detach()
    for dim, size in enumerate(tensor.shape):
        if size > 1 and torch.equal(view, view.narrow(dim, 0, 1).expand_as(view)):
            view = view.narrow(dim, 0, 1)
    return contiguous(view).expand(tensor.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__: function for function in (contiguous, transposed, gapped, every_second, misaligned, expanded)
}


def layout_variants(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) pairs of equal values and different strides or alignment; the contiguous form comes first."""
    seen = set()
    for name, layout in LAYOUTS.items():
        variant = layout(tensor)
        key = (variant.stride(), variant.data_ptr() % 64 // variant.element_size() if name == "misaligned" else 0)
        if key not in seen:
            seen.add(key)
            yield name, variant


def derandomized(max_examples: int = 50) -> Any:
    """hypothesis settings for a test that is the same on every run and has no time limit per example."""
    from hypothesis import HealthCheck, settings

    return settings(
        max_examples=max_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def row_shapes(max_dims: int = 4, max_columns: int = 300, max_rows_per_dim: int = 5) -> Any:
    """Strategy of shapes (..., N): sizes around the vector widths, and leading dimensions that may be 0 or absent."""
    from hypothesis import strategies

    widths = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257]
    columns = strategies.sampled_from([width for width in widths if width <= max_columns]) | strategies.integers(
        1, max_columns
    )
    leading = strategies.lists(strategies.integers(0, max_rows_per_dim), max_size=max_dims - 1)
    return strategies.tuples(leading, columns).map(lambda parts: (*parts[0], parts[1]))


def dtypes() -> Any:
    """Strategy of the dtypes that kernels serve."""
    from hypothesis import strategies

    return strategies.sampled_from(FLOATING_DTYPES)


def layouts() -> Any:
    """Strategy of layout functions, each from a tensor to one of equal values."""
    from hypothesis import strategies

    return strategies.sampled_from(list(LAYOUTS.values()))


def seeds() -> Any:
    """Strategy of seeds for a ``torch.Generator``."""
    from hypothesis import strategies

    return strategies.integers(0, 2**31 - 1)
