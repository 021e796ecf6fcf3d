"""The choice of a token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusewright_kernels.checks import value_error


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; the limits apply one after the other, in this order.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: only the most probable k tokens.
        top_p: only the fewest tokens whose probabilities add up to at least p (nucleus sampling).

    Source: Fan et al., "Hierarchical neural story generation", 2018 (top-k); Holtzman et al., "The curious case of
    neural text degeneration", 2020 (top-p).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise value_error("temperature", self.temperature, "a finite number >= 0")
        if self.top_k is not None and self.top_k < 1:
            raise value_error("top_k", self.top_k, "an int >= 1 or None")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise value_error("top_p", self.top_p, "a number in (0, 1] or None")

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Of the tokens that may be drawn, -inf for the others: (B, V) float32 from (B, V), temperature > 0."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            # By places, not by value, so that ties leave no more than k.
            kept = logits.topk(self.top_k, dim=-1).indices
            logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
        if self.top_p is not None and self.top_p < 1.0:
            ordered, places = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered
            dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, places, before >= self.top_p)
            logits = logits.masked_fill(dropped, -torch.inf)
        return logits.log_softmax(-1)

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A token (B,) int64 for each row of ``logits`` (B, V)."""
        if self.temperature == 0.0:
            return logits.argmax(-1)
        return torch.multinomial(self.log_probabilities(logits).exp(), 1, generator=generator).squeeze(-1)


GREEDY = Sampling(temperature=0.0)
