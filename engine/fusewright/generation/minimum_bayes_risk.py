"""The sample that agrees best with the others."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fusewright.generation.decoding import Generated, generate
from fusewright.generation.model import DecodingModel, DecodingState, check_prompt
from fusewright.generation.sampling import Sampling
from fusewright_kernels.checks import value_error

Text = TypeVar("Text")


def token_f1(hypothesis: Sequence[int], reference: Sequence[int]) -> float:
    """Harmonic mean of the shares of tokens that each has in common with the other, in [0, 1]; 1 for two empty ones."""
    if not hypothesis or not reference:
        return float(not hypothesis and not reference)
    common = sum((Counter(hypothesis) & Counter(reference)).values())
    return 2.0 * common / (len(hypothesis) + len(reference))


def least_risk(samples: Sequence[Text], utility: Callable[[Text, Text], float]) -> int:
    """The index of the sample whose mean ``utility(sample, other)`` over all samples is highest, the first of equals.

    Source: Kumar, Byrne, "Minimum Bayes-risk decoding for statistical machine translation", 2004; Eikema, Aziz, "Is
    MAP decoding all you need?", 2020 (sampling).
    """
    if not samples:
        raise value_error("samples", "empty", "at least one sample")
    totals = [sum(utility(sample, other) for other in samples) for sample in samples]
    return totals.index(max(totals))


def minimum_bayes_risk(
    model: DecodingModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    samples: int = 16,
    utility: Callable[[list[int], list[int]], float] = token_f1,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    prompt_lengths: Tensor | None = None,
    stop_tokens: Iterable[int] = (),
    pad_token: int = 0,
    state: DecodingState | None = None,
    generator: torch.Generator | None = None,
) -> Generated:
    """Of ``samples`` continuations of each prompt the one of :func:`least_risk`.

    Args:
        utility: how well the first list of tokens, stop token included, does where the second is right.
        sampling: how they are drawn, from the model's distribution by default.
        Others: as in :func:`fusewright.generation.generate`.
    """
    if samples < 1:
        raise value_error("samples", samples, "an int >= 1")
    check_prompt(model, prompt, prompt_lengths, max_new_tokens)
    rows = torch.arange(prompt.shape[0], device=prompt.device).repeat_interleave(samples)
    if state is not None:
        state.select(rows)
    drawn = generate(
        model, prompt[rows], max_new_tokens, sampling=sampling, stop_tokens=stop_tokens, pad_token=pad_token,
        prompt_lengths=None if prompt_lengths is None else prompt_lengths[rows], state=state, generator=generator,
    )  # fmt: skip
    lengths = drawn.lengths.tolist()
    texts = [row[:length] for row, length in zip(drawn.tokens.tolist(), lengths, strict=True)]
    chosen = [start + least_risk(texts[start : start + samples], utility) for start in range(0, len(texts), samples)]
    return Generated(*(part[chosen] for part in drawn))
