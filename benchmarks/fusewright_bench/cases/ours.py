"""Our providers: a functional on each backend that the device may use."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusewright_bench.case import Forward, Inputs, Outputs, Provider, Shape

# "reference" is left out: it is the plain formula, which runs as the provider "naive".
KERNEL_BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

Functional = Callable[..., Any]
Arguments = Callable[[Inputs], dict[str, Any]]
Make = Callable[[Shape, torch.dtype, torch.device, torch.Generator], Inputs]


def as_outputs(result: Tensor | Outputs) -> Outputs:
    return (result,) if isinstance(result, Tensor) else result


def forward_of(functional: Functional, keywords: dict[str, Any]) -> Forward:
    return lambda: as_outputs(functional(**keywords))


def providers(
    device: torch.device,
    functional: Functional,
    arguments: Arguments,
    tiny_inputs: Callable[[torch.dtype, torch.device], Inputs],
    *,
    takes_out: bool,
) -> list[Provider]:
    """``functional`` as ``fusewright`` once per backend, and as ``fusewright-out`` into a preallocated output."""
    made = []
    for backend in KERNEL_BACKENDS.get(device.type, ()):

        def bind(inputs: Inputs, backend: str = backend) -> Forward:
            return forward_of(functional, {**arguments(inputs), "backend": backend})

        def bind_out(inputs: Inputs, backend: str = backend) -> Forward:
            out = torch.empty_like(inputs["input"], memory_format=torch.contiguous_format)
            return forward_of(functional, {**arguments(inputs), "backend": backend, "out": out})

        def absence(device: torch.device, dtype: torch.dtype, bind: Callable[[Inputs], Forward] = bind) -> str | None:
            # A forced backend that cannot serve a call raises ValueError with the reason; a tiny call asks for it.
            try:
                bind(tiny_inputs(dtype, device))()
            except ValueError as refusal:
                return str(refusal)
            return None

        made.append(Provider("fusewright", backend, bind, absence=absence))
        if takes_out:
            made.append(Provider("fusewright-out", backend, bind_out, modes=("fwd",), absence=absence))
    return made


def tiny_inputs(make: Make, tiny: Shape) -> Callable[[torch.dtype, torch.device], Inputs]:
    """Inputs of the shape ``tiny``, for a call that only asks whether a backend serves."""
    return lambda dtype, device: make(tiny, dtype, device, torch.Generator().manual_seed(0))


def others(
    formula: Callable[[Inputs], Outputs], torch_function: Functional | None = None, arguments: Arguments = dict
) -> list[Provider]:
    """The plain formula, torch's own function where it has one, and the formula compiled."""
    made = [Provider("naive", "reference", lambda inputs: partial(formula, inputs))]
    if torch_function is not None:
        made.append(Provider("torch", "torch", lambda inputs: forward_of(torch_function, arguments(inputs))))
    return [*made, compiled(formula)]


def compiled(formula: Callable[[Inputs], Outputs]) -> Provider:
    """The plain formula under ``torch.compile``; its first call takes seconds, so it runs only when asked for."""

    def bind(inputs: Inputs) -> Forward:
        function = torch.compile(formula, dynamic=False)
        return lambda: function(inputs)

    return Provider("torch-compile", "inductor", bind, by_default=False)
