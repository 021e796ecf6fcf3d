"""``patch`` and ``unpatch``: the modules of a model become ours where they stand, and become what they were again."""

import warnings
from dataclasses import dataclass, field

from torch import nn

from fusewright.integrations.swaps import ORIGINAL_CLASS, Kept, Swap, choose
from fusewright_kernels.checks import type_error

_ADDED = "_fusewright_added_attributes"


@dataclass(frozen=True)
class Entry:
    """One module of a patched model.

    Attributes:
        name: its name in the model, ``""`` for the model itself.
        kind: its class before.
        outcome: its class now, or why that stayed.
    """

    name: str
    kind: str
    outcome: str


@dataclass
class Report:
    """What :func:`patch` did. Prints as a table.

    Attributes:
        swapped: modules that run on our kernels now.
        kept: modules of a kind that we have which were left as they are.
    """

    swapped: list[Entry] = field(default_factory=list)
    kept: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} modules swapped, {len(self.kept)} kept"]
        if not self.swapped:
            lines[0] = "nothing to swap" if not self.kept else f"nothing swapped, {len(self.kept)} kept"
        width = max((len(entry.name or "(model)") for entry in self.swapped + self.kept), default=0)
        for arrow, entries in (("->", self.swapped), ("kept:", self.kept)):
            lines += [f"  {entry.name or '(model)':{width}}  {entry.kind} {arrow} {entry.outcome}" for entry in entries]
        return "\n".join(lines)


def patch(model: nn.Module) -> Report:
    """Let the modules of ``model`` run on our kernels, until :func:`unpatch`.

    Swapped are torch.nn's MultiheadAttention, LayerNorm, RMSNorm, TransformerEncoder and its layer,
    TransformerDecoderLayer, LSTM, GRU, RNN and their cells, CrossEntropyLoss, and the Llama-style RMS normalisations of
    transformers.
    A module stays the same object with the same parameters, hooks, mode, dtype and device: only its class changes, to
    the one of the same name in :mod:`fusewright.nn`. A copy of a patched model is patched, and can be saved.

    The recurrent modules are no longer instances of torch.nn.LSTM, GRU and RNN (but of torch.nn.RNNBase): torch.compile
    refuses those. Where results may differ from torch's the docstrings of our classes say so. A subclass of a module
    that we have, or a configuration that we have no kernel for, is left alone.

    Returns:
        What was swapped, and what was not and why. A model with nothing to swap is also warned of. Patching twice is
        patching once.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check(model)
    report, before = Report(), 0
    # Chosen before any is changed: what a layer becomes depends on what its parts are.
    for name, module, choice in [(name, module, choose(module)) for name, module in model.named_modules()]:
        kind = type(module)
        if isinstance(choice, Swap):
            _change_class(module, choice)
            new = type(module)
            report.swapped.append(Entry(name, kind.__name__, f"{new.__module__}.{new.__qualname__}"))
        elif isinstance(choice, Kept):
            report.kept.append(Entry(name, kind.__name__, choice.reason))
        elif ORIGINAL_CLASS in module.__dict__:
            before += 1
    if not report.swapped and not before:
        warnings.warn(f"patch({type(model).__name__}): {report}", stacklevel=2)
    return report


def unpatch(model: nn.Module) -> list[str]:
    """Give the modules of ``model`` back the classes that :func:`patch` took.

    Returns:
        The names of the modules that are torch's again.
    """
    _check(model)
    restored = []
    for name, module in model.named_modules():
        original = module.__dict__.pop(ORIGINAL_CLASS, None)
        if original is None:
            continue
        for attribute in module.__dict__.pop(_ADDED):
            del module.__dict__[attribute]
        module.__class__ = original
        restored.append(name)
    return restored


def _change_class(module: nn.Module, swap: Swap) -> None:
    added = {name: value for name, value in swap.attributes.items() if name not in module.__dict__}
    module.__dict__.update(added)
    module.__dict__[ORIGINAL_CLASS] = type(module)
    module.__dict__[_ADDED] = tuple(added)
    module.__class__ = swap.new_class


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise type_error("model", f"a {type(model).__name__}", "a torch.nn.Module")
