"""One token after the other."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fusewright.generation.model import DecodingModel, DecodingState, check_prompt, read_prompt
from fusewright.generation.sampling import GREEDY, Sampling


class Generated(NamedTuple):
    """New tokens of B sequences, without the prompts.

    Attributes:
        tokens: (B, n) int64; behind a stop token only padding.
        lengths: (B,) int64, the stop token included.
        log_probability: (B,) float32: the sum over the tokens, under the model's own distribution.
    """

    tokens: Tensor
    lengths: Tensor
    log_probability: Tensor


class _Step(NamedTuple):
    tokens: Tensor
    log_probability: Tensor
    counts: Tensor  # (B,) bool, False behind the end of a sequence


def generate(
    model: DecodingModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    prompt_lengths: Tensor | None = None,
    stop_tokens: Iterable[int] = (),
    pad_token: int = 0,
    state: DecodingState | None = None,
    generator: torch.Generator | None = None,
) -> Generated:
    """Go on from each prompt, until it has a stop token or ``max_new_tokens``.

    Args:
        prompt: (B, T) int64 or int32, at least one token each.
        sampling: how tokens are chosen, greedily by default.
        prompt_lengths: (B,) how many tokens of each prompt count, those behind are padding; None is all.
        stop_tokens: after any of these a sequence is at its end.
        pad_token: what stands behind the end.
        state: what the model knows besides the prompt, such as an encoded source; ``model.make_state`` by default.
        generator: of the random numbers; torch's default one if None.

    Raises:
        ValueError: an empty prompt; prompt and new tokens longer than ``model.max_positions``. No token is computed.
    """
    check_prompt(model, prompt, prompt_lengths, max_new_tokens)
    options = (sampling, prompt_lengths, frozenset(stop_tokens), pad_token, state, generator)
    steps = list(_steps(model, prompt, max_new_tokens, *options))
    batch = prompt.shape[0]
    if not steps:
        return Generated(
            prompt.new_empty((batch, 0), dtype=torch.int64), prompt.new_zeros(batch, dtype=torch.int64),
            prompt.new_zeros(batch, dtype=torch.float32),
        )  # fmt: skip
    tokens, log_probability, counts = (torch.stack(parts, 1) for parts in zip(*steps, strict=True))
    return Generated(tokens, counts.sum(1), log_probability.sum(1))


def stream(
    model: DecodingModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    prompt_lengths: Tensor | None = None,
    stop_tokens: Iterable[int] = (),
    pad_token: int = 0,
    state: DecodingState | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """:func:`generate` step by step: the tokens (B,) of each position as soon as they are there."""
    check_prompt(model, prompt, prompt_lengths, max_new_tokens)
    options = (sampling, prompt_lengths, frozenset(stop_tokens), pad_token, state, generator)
    return (step.tokens for step in _steps(model, prompt, max_new_tokens, *options))


def _steps(
    model: DecodingModel,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    prompt_lengths: Tensor | None,
    stop_tokens: frozenset[int],
    pad_token: int,
    state: DecodingState | None,
    generator: torch.Generator | None,
) -> Iterator[_Step]:
    if max_new_tokens == 0:
        return
    # Not a decorator: between two steps of a generator the caller's mode must hold.
    with torch.no_grad():
        logits, state = read_prompt(model, prompt, prompt_lengths, max_new_tokens, state)
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=prompt.device)
    finished = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    drawn = prompt[:, -1]
    for index in range(max_new_tokens):
        with torch.no_grad():
            if index > 0:
                # A finished sequence goes on unseen: the padding need not be a token that the model knows.
                logits = model(drawn[:, None], state=state)[:, -1]
            drawn = sampling.draw(logits, generator)
            gained = logits.float().log_softmax(-1).gather(-1, drawn[:, None]).squeeze(-1)
            step = _Step(drawn.masked_fill(finished, pad_token), gained.masked_fill(finished, 0.0), ~finished)
            finished = finished | torch.isin(drawn, stops)
        yield step
        if stop_tokens and bool(finished.all()):
            return
