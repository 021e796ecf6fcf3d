"""Beam search."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fusewright.generation.decoding import Generated
from fusewright.generation.model import DecodingModel, DecodingState, check_prompt, read_prompt
from fusewright_kernels.checks import value_error


class _Hypothesis(NamedTuple):
    score: float
    tokens: list[int]
    log_probability: float


def beam_search(
    model: DecodingModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    beams: int = 4,
    length_penalty: float = 0.6,
    prompt_lengths: Tensor | None = None,
    stop_tokens: Iterable[int] = (),
    pad_token: int = 0,
    state: DecodingState | None = None,
) -> Generated:
    """The most probable continuations that are found with ``beams`` of them kept at a time.

    A continuation Y counts ``log P(Y) / ((5 + |Y|) / 6)^length_penalty``. A sequence is at its end when no kept
    continuation can pass the best finished one any more; those cut off at ``max_new_tokens`` compete as they are.

    Args:
        beams: continuations kept for each prompt; 1 is greedy.
        length_penalty: 0 compares the probabilities themselves, which favours short ones.
        Others: as in :func:`fusewright.generation.generate`.

    Returns:
        The best continuation of each prompt.

    Source: Graves, "Sequence transduction with recurrent neural networks", 2012; Wu et al., "Google's neural machine
    translation system", 2016 (length penalty).
    """
    if beams < 1:
        raise value_error("beams", beams, "an int >= 1")
    if length_penalty < 0.0:
        raise value_error("length_penalty", length_penalty, "a number >= 0")
    check_prompt(model, prompt, prompt_lengths, max_new_tokens)
    search = _Search(prompt, beams, max_new_tokens, length_penalty, frozenset(stop_tokens))
    if max_new_tokens == 0:
        return search.best(pad_token)
    with torch.no_grad():
        logits, state = read_prompt(model, prompt, prompt_lengths, max_new_tokens, state)
        state.select(search.rows_of_start())
        logits = logits[search.rows_of_start()]
        for index in range(max_new_tokens):
            rows = search.advance(logits)
            if search.is_over() or index + 1 == max_new_tokens:
                break
            state.select(rows)
            logits = model(search.tokens[:, -1:], state=state)[:, -1]
    return search.best(pad_token)


class _Search:
    """The beams of B prompts: B * beams rows, those of one prompt side by side."""

    def __init__(self, prompt: Tensor, beams: int, limit: int, penalty: float, stop_tokens: frozenset[int]) -> None:
        self.batch, self.beams, self.limit, self.penalty = prompt.shape[0], beams, limit, penalty
        self.stops = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=prompt.device)
        self.tokens = prompt.new_empty((self.batch * beams, 0), dtype=torch.int64)
        # All beams start alike: but for the first, none takes part in the first step.
        self.log_probability = torch.full((self.batch, beams), -torch.inf, device=prompt.device)
        self.log_probability[:, 0] = 0.0
        self.finished = [_Hypothesis(-math.inf, [], -math.inf) for _ in range(self.batch)]

    def rows_of_start(self) -> Tensor:
        return torch.arange(self.batch, device=self.tokens.device).repeat_interleave(self.beams)

    def advance(self, logits: Tensor) -> Tensor:
        """One token more; returns the row that each row goes on from."""
        vocabulary = logits.shape[-1]
        scores = self.log_probability[..., None] + logits.float().log_softmax(-1).unflatten(0, (self.batch, self.beams))
        # So many that as many as there are beams go on, however many end here.
        count = min(self.beams * (1 + self.stops.numel()), scores[0].numel())
        best, places = scores.flatten(1).topk(count, dim=-1)
        parents, tokens = places // vocabulary, places % vocabulary
        ends = torch.isin(tokens, self.stops)
        if self.stops.numel() > 0:
            self._finish(best.masked_fill(~ends, -torch.inf), parents, tokens)
        # Those that go on, in the order of their scores; where too few do, the rest can never win.
        alive = torch.where(ends, -torch.inf, best)
        if count < self.beams:
            alive = torch.nn.functional.pad(alive, (0, self.beams - count), value=-torch.inf)
            parents, tokens = (torch.nn.functional.pad(x, (0, self.beams - count)) for x in (parents, tokens))
        self.log_probability, order = alive.topk(self.beams, dim=-1)
        first_rows = torch.arange(self.batch, device=order.device)[:, None] * self.beams
        rows = (first_rows + parents.gather(1, order)).flatten()
        self.tokens = torch.cat([self.tokens[rows], tokens.gather(1, order).flatten()[:, None]], 1)
        return rows

    def is_over(self) -> bool:
        """Whether for every prompt nothing alive can pass what has ended."""
        if self.stops.numel() == 0:
            return False
        # A sum of logarithms can only fall; its penalty is largest at the limit.
        bounds = (self.log_probability[:, 0] / self._penalty(self.limit)).tolist()
        return all(finished.score >= bound for bound, finished in zip(bounds, self.finished, strict=True))

    def best(self, pad_token: int) -> Generated:
        chosen, length = [], self.tokens.shape[1]
        for index in range(self.batch):
            log_probability = self.log_probability[index, 0].item()
            alive = _Hypothesis(
                log_probability / self._penalty(max(length, 1)),
                self.tokens[index * self.beams].tolist(),
                log_probability,
            )
            chosen.append(max(alive, self.finished[index], key=lambda hypothesis: hypothesis.score))
        longest = max(len(hypothesis.tokens) for hypothesis in chosen)
        device = self.tokens.device
        padded = [hypothesis.tokens + [pad_token] * (longest - len(hypothesis.tokens)) for hypothesis in chosen]
        return Generated(
            torch.tensor(padded, dtype=torch.int64, device=device).view(self.batch, longest),
            torch.tensor([len(hypothesis.tokens) for hypothesis in chosen], dtype=torch.int64, device=device),
            torch.tensor([hypothesis.log_probability for hypothesis in chosen], device=device),
        )

    def _finish(self, ended: Tensor, parents: Tensor, tokens: Tensor) -> None:
        """Keep the best of the candidates that end here, of log-probabilities ``ended``, if none was better."""
        penalty = self._penalty(self.tokens.shape[1] + 1)
        values, places = ended.max(-1)
        for index, (log_probability, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            if log_probability / penalty > self.finished[index].score:
                history = self.tokens[index * self.beams + int(parents[index, place])].tolist()
                whole = [*history, int(tokens[index, place])]
                self.finished[index] = _Hypothesis(log_probability / penalty, whole, log_probability)

    def _penalty(self, length: int) -> float:
        return ((5.0 + length) / 6.0) ** self.penalty
