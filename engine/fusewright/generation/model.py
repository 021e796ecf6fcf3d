"""What generation asks of a model, and how it reads a prompt."""

from typing import Protocol

import torch
from torch import Tensor

from fusewright_kernels.checks import type_error, value_error


class DecodingState(Protocol):
    """What a model remembers of B sequences: caches of keys and values, recurrent states, an encoded source."""

    @property
    def longest_step(self) -> int | None:
        """How many positions one call may add, None for any number."""

    def select(self, rows: Tensor) -> None:
        """Let sequence i be what sequence ``rows[i]`` was; rows (any number,) int64 may repeat and leave out."""


class DecodingModel(Protocol):
    """A model that goes on from what it has seen.

    Attributes:
        max_positions: the longest sequence it takes, None without a limit.
    """

    max_positions: int | None

    def make_state(self, batch_size: int, capacity: int) -> DecodingState:
        """The state of ``batch_size`` empty sequences with room for ``capacity`` positions."""

    def __call__(self, tokens: Tensor, *, state: DecodingState, lengths: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) behind each of ``tokens`` (B, T), which the state then holds.

        ``lengths`` (B,) int64 tells how many of them belong to each sequence; what lies behind is padding, which the
        state must not hold.
        """


def read_prompt(
    model: DecodingModel,
    prompt: Tensor,
    prompt_lengths: Tensor | None,
    max_new_tokens: int,
    state: DecodingState | None,
) -> tuple[Tensor, DecodingState]:
    """Logits (B, V) behind the last token of each prompt, and the state that holds the prompts.

    The arguments have passed :func:`check_prompt`.
    """
    batch, longest = prompt.shape
    lengths = prompt.new_full((batch,), longest) if prompt_lengths is None else prompt_lengths.to(prompt.device)
    lengths = lengths.long()
    if state is None:
        # The last new token is not read.
        state = model.make_state(batch, longest + max_new_tokens - 1)
    step = longest if state.longest_step is None else state.longest_step
    last: Tensor | None = None
    for start in range(0, longest, step):
        part = prompt[:, start : start + step]
        counts = (lengths - start).clamp(0, part.shape[1])
        logits = model(part, state=state, lengths=None if prompt_lengths is None else counts)
        ends = (counts - 1).clamp(min=0)
        own = logits[torch.arange(batch, device=logits.device), ends]
        last = own if last is None else torch.where((counts > 0)[:, None], own, last)
    assert last is not None
    return last, state


def check_prompt(model: DecodingModel, prompt: Tensor, prompt_lengths: Tensor | None, max_new_tokens: int) -> None:
    """Raise if there is a prompt without a token, or no room for it and the new tokens."""
    if not isinstance(prompt, Tensor) or prompt.dtype not in (torch.int64, torch.int32):
        what = f"of {prompt.dtype}" if isinstance(prompt, Tensor) else f"a {type(prompt).__name__}"
        raise type_error("prompt", what, "a tensor of int64 or int32")
    if prompt.ndim != 2 or prompt.shape[0] == 0 or prompt.shape[1] == 0:
        raise value_error("prompt.shape", tuple(prompt.shape), "(B, T) with at least one sequence and one token")
    if max_new_tokens < 0:
        raise value_error("max_new_tokens", max_new_tokens, "an int >= 0")
    total = prompt.shape[1] + max_new_tokens
    if model.max_positions is not None and total > model.max_positions:
        expected = f"at most {model.max_positions}, the model's max_positions"
        raise value_error("the length of prompt and new tokens", total, expected)
    if prompt_lengths is None:
        return
    if prompt_lengths.shape != prompt.shape[:1] or prompt_lengths.dtype not in (torch.int64, torch.int32):
        what = f"{tuple(prompt_lengths.shape)} of {prompt_lengths.dtype}"
        raise value_error("prompt_lengths", what, f"({prompt.shape[0]},) of int64 or int32")
    if not ((prompt_lengths >= 1) & (prompt_lengths <= prompt.shape[1])).all():
        raise value_error("prompt_lengths", prompt_lengths.tolist(), f"numbers in [1, {prompt.shape[1]}]")
