"""What is benchmarked: one declaration per operation, from which correctness and speed both run.

An :class:`Operation` declares inputs, providers, the formula that serves as oracle, and FLOPs and bytes. A
:class:`Case` is one point of it: a shape, a dtype and a mode.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
Outputs = tuple[Tensor, ...]
Forward = Callable[[], Outputs]

MODES = ("fwd", "bwd", "both")  # both: one forward and one backward, timed together
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SUITES = ("quick", "micro", "models", "scaling", "full")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Shape:
    """A named problem size; an operation says what its ``sizes`` mean.

    ``layout`` is ``"contiguous"`` or ``"packed_qkv"``: (B, H, T, D) as a view of a packed (B, T, 3, H, D) tensor,
    which is what a fused projection hands to the normalisation of its queries.
    """

    name: str
    sizes: tuple[int, ...]
    suites: frozenset[str] = frozenset()
    layout: Literal["contiguous", "packed_qkv"] = "contiguous"

    @property
    def text(self) -> str:
        """``name (1024x768)``, or the sizes alone where they are the name."""
        sizes = "x".join(map(str, self.sizes))
        return self.name if self.name == sizes else f"{self.name} ({sizes})"


@dataclass(frozen=True)
class Growth:
    """Shapes that grow along one axis, such as the sequence length, and the size of each along it."""

    axis: str
    shapes: tuple[Shape, ...]
    sizes: tuple[int, ...]


def growth(axis: str, sizes: Sequence[int], shape_of: Callable[[int], tuple[int, ...]]) -> Growth:
    """``shape_of`` gives the sizes of the shape for every size along ``axis``."""
    made = [shape_of(size) for size in sizes]
    return Growth(
        axis, tuple(Shape("x".join(map(str, one)), one, frozenset({"scaling"})) for one in made), tuple(sizes)
    )


@dataclass(frozen=True)
class Cost:
    """The least work that any implementation of a case does.

    ``bytes`` counts every operand once, read or written; ``flops`` counts an exponential or a division as one.
    ``matrix`` says that nearly all of ``flops`` are matrix products, so that their measured peak is a bound too; no
    such bound follows from a count of exponentials and divisions. ``exponentials`` are those that no formula can do
    without; their measured rate is a bound.
    """

    flops: int
    bytes: int
    matrix: bool = False
    exponentials: int = 0


@dataclass(frozen=True)
class Provider:
    """One way of computing an operation.

    ``bind`` takes the inputs and returns a closure that holds the call and nothing else; what a caller would
    prepare once, such as an output buffer, is made in ``bind``. ``absence`` says why the provider cannot run on a
    device with a dtype, or None; ``install`` is the line that would bring it.
    """

    name: str
    backend: str
    bind: Callable[[Inputs], Forward]
    modes: tuple[str, ...] = MODES
    by_default: bool = True
    absence: Callable[[torch.device, torch.dtype], str | None] = field(default=lambda device, dtype: None)
    install: str | None = None

    @property
    def label(self) -> str:
        return f"{self.name}:{self.backend}" if self.name.startswith("fusewright") else self.name


@dataclass(frozen=True)
class Operation:
    """The declaration of one op.

    Attributes:
        name: the op's name in ``fusewright.functional``.
        shapes: the shapes of its suites.
        tiny: a shape so small that the time of a call is its host overhead.
        make_inputs: (shape, dtype, device, CPU generator) -> named inputs; drawn on the CPU in float32, so that every
            dtype and device sees the same values up to rounding.
        formula: the plain PyTorch formula; in float64 it is the oracle.
        providers: device -> every way to compute it, absent ones included.
        cost: (shape, dtype, mode) -> FLOPs and bytes.
        differentiable: the inputs that get gradients.
        outputs: names of the outputs, in order.
        rank: how many sizes a shape given on the command line needs at least.
        scaling: the shapes of the scaling suite, by axis.
        modes: what it does; ("fwd",) where it has no use for gradients.
        baseline: the provider that people use today; speed-ups are over it and errors are compared with its.
    """

    name: str
    shapes: tuple[Shape, ...]
    tiny: Shape
    make_inputs: Callable[[Shape, torch.dtype, torch.device, torch.Generator], Inputs]
    formula: Callable[[Inputs], Outputs]
    providers: Callable[[torch.device], Sequence[Provider]]
    cost: Callable[[Shape, torch.dtype, str], Cost]
    differentiable: tuple[str, ...]
    outputs: tuple[str, ...]
    rank: int = 2
    baseline: str = "torch"
    modes: tuple[str, ...] = MODES
    scaling: tuple[Growth, ...] = ()

    def shape(self, text: str) -> Shape | None:
        """The shape of that name, or an unnamed one such as ``"512x4096"``; None if ``text`` is neither."""
        for shape in self.shapes:
            if shape.name == text:
                return shape
        if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text) is None:
            return None
        sizes = tuple(int(size) for size in text.split("x"))
        return Shape(text, sizes) if len(sizes) >= self.rank else None


@dataclass(frozen=True)
class Case:
    """An operation at one shape, dtype and mode."""

    operation: Operation
    shape: Shape
    dtype: torch.dtype
    mode: str

    @property
    def text(self) -> str:
        return f"{self.operation.name} {self.shape.name} {dtype_name(self.dtype)} {self.mode}"

    @property
    def cost(self) -> Cost:
        return self.operation.cost(self.shape, self.dtype, self.mode)

    def inputs(self, device: torch.device, *, tiny: bool = False) -> Inputs:
        """Fresh inputs, the same values on every call; they ask for gradients unless the mode is forward."""
        generator = torch.Generator().manual_seed(0)
        shape = self.operation.tiny if tiny else self.shape
        inputs = self.operation.make_inputs(shape, self.dtype, device, generator)
        for name in self.operation.differentiable:
            inputs[name].requires_grad_(self.mode != "fwd")
        return inputs


def grad_outputs_of(outputs: Outputs, dtype: torch.dtype) -> Outputs:
    """Gradients to start a backward from: normal and rounded to ``dtype``, the same values on every call.

    Float64 outputs, the oracle's, get the same rounded values.
    """
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(output.shape, generator=generator).to(dtype).to(output.device, output.dtype) for output in outputs
    )


def bind_call(case: Case, provider: Provider, inputs: Inputs) -> Callable[[], Outputs]:
    """What is timed: the provider's forward, its backward, or one of each, by the case's mode.

    The backward returns the gradients of the differentiable inputs and accumulates into none.
    """
    forward = provider.bind(inputs)
    if case.mode == "fwd":
        return forward
    leaves = [inputs[name] for name in case.operation.differentiable]
    recorded = forward()
    grad_outputs = grad_outputs_of(recorded, case.dtype)
    if case.mode == "both":
        return lambda: torch.autograd.grad(forward(), leaves, grad_outputs)
    return partial(torch.autograd.grad, recorded, leaves, grad_outputs, retain_graph=True)
