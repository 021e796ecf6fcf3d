"""How an op is defined, attached to and found.

An op is defined once per backend as an overload of one name, ``fusewright::norm_forward.cpu`` and so on, all with
the same schema and the same fake. ``dispatch`` picks the overload in Python, so a traced graph names the kernel
that will run, and the choice costs nothing inside the op. The default overload is the plain PyTorch formula: it
exists without any binary, on every device, and is what the compiled overloads are compared with.

Reference formulas and Triton kernels attach from Python; compiled kernels attach from C++ when their library loads.
"""

from collections.abc import Callable

import torch
from torch import Tensor

NAMESPACE = "fusewright"
COMPILED_BACKENDS = ("cuda", "triton", "cpu")

_library = torch.library.Library(NAMESPACE, "DEF")
_overloads: dict[tuple[str, str], torch._ops.OpOverload] = {}


def define(name: str, schema: str, fake: Callable) -> None:
    """Define op ``name`` for the plain formula and for every compiled backend, with one schema and one fake."""
    for suffix in ("", *(f".{backend}" for backend in COMPILED_BACKENDS)):
        _library.define(f"{name}{suffix}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}{suffix}", fake, lib=_library)
    packet = getattr(torch.ops.fusewright, name)
    _overloads[name, "reference"] = packet.default
    for backend in COMPILED_BACKENDS:
        _overloads[name, backend] = getattr(packet, backend)


def attach_reference(name: str, implementation: Callable) -> None:
    """Register the plain PyTorch formula as the default overload of op ``name``."""
    _library.impl(name, implementation, "CompositeExplicitAutograd")


def attach_triton(name: str, implementation: Callable, *, interpreted: bool) -> None:
    """Register the Triton launcher of op ``name``.

    Under the interpreter (``TRITON_INTERPRET=1``) kernels run on CPU tensors, so the overload serves those as well.
    """
    attach_composed(name, "triton", implementation, interpreted=interpreted)


def attach_composed(name: str, backend: str, implementation: Callable, *, interpreted: bool) -> None:
    """Register op ``name`` of one backend as Python that launches that backend's kernels or calls its other ops."""
    keys = ["CPU" if backend == "cpu" else "CUDA"]
    if backend == "triton" and interpreted:
        keys.append("CPU")
    for key in keys:
        _library.impl(f"{name}.{backend}", implementation, key)


def overload(name: str, backend: str) -> torch._ops.OpOverload:
    """Op ``name`` as one backend runs it: ``reference`` or one of ``COMPILED_BACKENDS``."""
    return _overloads[name, backend]


def contiguous_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Empty and contiguous, of ``tensor``'s shape and device."""
    return tensor.new_empty(tensor.shape, dtype=dtype or tensor.dtype)


def gradient_or_empty(wanted: bool, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An op returns a 0-element tensor for a gradient that was not asked for."""
    return contiguous_like(like, dtype) if wanted else like.new_empty((0,), dtype=dtype)
