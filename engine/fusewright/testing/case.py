"""One numerical case: fixed inputs, our op, plain PyTorch, and the float64 oracle of every result."""

import zlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fusewright.testing.budgets import Budget, Direction, Judgement, budget_of, judge
from fusewright.testing.errors import magnitude_in

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Expected:
    """The oracle of one result.

    ``magnitude`` is the size of the result's terms before they cancel, each rounded to ``computed``, see
    :func:`fusewright.testing.error_in_u`.
    """

    value: Tensor
    direction: Direction
    magnitude: float
    computed: torch.dtype = torch.float32


class Case(Protocol):
    """What a case offers. Results are dictionaries by name, such as ``output`` and ``grad_input``."""

    @property
    def id(self) -> str:
        """Unique and stable: measured errors are kept under it."""

    @property
    def op(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def inputs(self) -> Tensors:
        """The inputs, on the CPU, the same on every machine and run."""

    def ours(self, inputs: Tensors, backend: str | None) -> Tensors: ...

    def plain(self, inputs: Tensors) -> Tensors:
        """The same by PyTorch's own functions in the same dtypes."""

    def oracle(self, inputs: Tensors) -> dict[str, Expected]: ...

    def budget(self, inputs: Tensors, budget: Budget) -> Budget:
        """``budget`` as this case's values change it."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def generator_of(case_id: str) -> torch.Generator:
    """A CPU generator seeded by the case alone."""
    return torch.Generator().manual_seed(zlib.crc32(case_id.encode()))


def gradients(outputs: Tensors, inputs: Tensors, cotangents: Tensors) -> Tensors:
    """``grad_<name>`` of every one of ``inputs`` that requires a gradient, given a cotangent per output."""
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    results = torch.autograd.grad(
        [outputs[name] for name in cotangents], list(wanted.values()), list(cotangents.values())
    )
    return {f"grad_{name}": gradient for name, gradient in zip(wanted, results, strict=True)}


def evaluate(
    case: Case, backend: str | None = None, device: torch.device | str = "cpu", *, interpreted: bool = False
) -> dict[str, Judgement]:
    """Run ``case`` on ``backend`` and judge every result: name of the result to verdict.

    ``interpreted``: the backend is Triton's interpreter, see :func:`fusewright.testing.budget_of`.
    """
    host = case.inputs()
    inputs = {name: tensor.to(device) for name, tensor in host.items()}
    ours, plain = case.ours(inputs, backend), case.plain(inputs)
    judgements = {}
    for name, expected in case.oracle(host).items():
        actual = ours[name].cpu()
        judgements[name] = judge(
            actual,
            expected.value,
            expected.direction,
            magnitude=magnitude_in(expected.magnitude, expected.computed, actual.dtype),
            plain=plain[name].cpu(),
            budget=case.budget(host, budget_of(actual.dtype, interpreted=interpreted)),
        )
    return judgements
