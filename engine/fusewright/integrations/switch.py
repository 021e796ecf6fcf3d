"""``enable``, ``disable`` and ``enabled``: our kernels behind torch's own functions, reversibly."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fusewright.integrations import recurrent_functions, torch_functions
from fusewright.integrations.sdpa_slot import Slots
from fusewright_kernels.checks import type_error, value_error

_ATTENTION: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": torch_functions.scaled_dot_product_attention,
    "multi_head_attention_forward": torch_functions.multi_head_attention_forward,
}
_REPLACEMENTS = {**_ATTENTION, **recurrent_functions.STAND_INS}
OPS = tuple(_REPLACEMENTS)

_active: set[str] = set()
_slots = Slots()
_fastpath_before = True


def enable(ops: Iterable[str] | None = None) -> None:
    """Let torch's own attention and recurrent layers run on our kernels, in models as they are, until :func:`disable`.

    What is taken over, by name in ``ops``:

    * ``"scaled_dot_product_attention"``: the function in torch.nn.functional, under every backend selected with
      ``torch.nn.attention.sdpa_kernel``; and torch's flash slots (by ``activate_flash_attention_impl``, which
      deactivates another implementation meanwhile), for calls from C++ and by references taken earlier. Where torch
      prefers cuDNN, flash attention moves ahead of it.
    * ``"multi_head_attention_forward"``: the function in torch.nn.functional that torch.nn.MultiheadAttention, and so
      torch's Transformer layers, call, attention weights included.

    * ``"lstm"``, ``"gru"``, ``"rnn_tanh"``, ``"rnn_relu"`` and each with ``"_cell"``: the functions in torch that the
      modules of torch.nn call, of padded and of packed sequences.

    Either of the first two switches ``torch.backends.mha``'s fast path off: it runs past both functions. A padded
    position of torch.nn.TransformerEncoder in inference then holds numbers, as in training, and not the fast path's
    zeros.

    A call that no kernel of ours takes (float64, tensor subclasses, forward-mode derivatives) runs on torch's kernel,
    and a wrong call fails as torch's does. Dropout draws other random numbers, rows without any key are 0 in
    MultiheadAttention where torch has NaN, and its ``is_causal`` is believed of the mask that comes with it, which
    torch does only where it needs no weights. Compiled functions are compiled again at their next call.

    Args:
        ops: names among the above, all by default. Enabling twice is enabling once.

    Raises:
        ValueError: an unknown name. Nothing is changed then.
    """
    _switch_to(_active | _checked(ops))


def disable() -> None:
    """Give torch back everything :func:`enable` took: its functions, slots, fast path and priorities."""
    _switch_to(set())


@contextmanager
def enabled(ops: Iterable[str] | None = None) -> Iterator[None]:
    """:func:`enable` within a block; behind it, what was enabled before is again, and nothing else."""
    before = set(_active)
    enable(ops)
    try:
        yield
    finally:
        _switch_to(before)


def _checked(ops: Iterable[str] | None) -> set[str]:
    if isinstance(ops, str):
        raise type_error("ops", repr(ops), "a list of names")
    names = set(OPS if ops is None else ops)
    for name in sorted(names - set(OPS)):
        raise value_error("ops", repr(name), f"names among {', '.join(OPS)}")
    return names


def _switch_to(wanted: set[str]) -> None:
    if wanted == _active:
        return
    if not _active & _ATTENTION.keys() and wanted & _ATTENTION.keys():
        _leave_fastpath()
    for name in wanted - _active:
        _replace(name)
    for name in _active - wanted:
        _restore(name)
    if _active & _ATTENTION.keys() and not wanted & _ATTENTION.keys():
        _return_to_fastpath()
    _active.clear()
    _active.update(wanted)
    # A compiled function holds the functions that it was traced with.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def _places(name: str) -> tuple[Any, ...]:
    """The modules that hold a function."""
    # torch.nn's recurrent modules look their functions up in the second, whose own attributes come first.
    return (torch.nn.functional,) if name in _ATTENTION else (torch, torch._VF)


def _replace(name: str) -> None:
    torch_functions.torch_functions[name] = getattr(_places(name)[0], name)
    for place in _places(name):
        setattr(place, name, _REPLACEMENTS[name])
    if name == "scaled_dot_product_attention":
        _slots.install()
    if name in recurrent_functions.STAND_INS:
        recurrent_functions.script_as_torchs()


def _restore(name: str) -> None:
    # Whoever replaced ours meanwhile keeps theirs, and ours below it keeps calling torch's.
    for place in _places(name):
        if getattr(place, name) is _REPLACEMENTS[name]:
            setattr(place, name, torch_functions.torch_functions[name])
    if name == "scaled_dot_product_attention":
        _slots.remove()


def _leave_fastpath() -> None:
    global _fastpath_before
    _fastpath_before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)


def _return_to_fastpath() -> None:
    # On by now is the user's doing, and stays.
    if not torch.backends.mha.get_fastpath_enabled():
        torch.backends.mha.set_fastpath_enabled(_fastpath_before)
