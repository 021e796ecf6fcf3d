"""Text from models that give logits: greedy, sampled, by beam search, of minimum Bayes risk, as a whole or as a stream.

A model is anything of the shape of :class:`DecodingModel`: those in :mod:`fusewright.models` are.
"""

from fusewright.generation import metrics
from fusewright.generation.beam_search import beam_search
from fusewright.generation.decoding import Generated, generate, stream
from fusewright.generation.minimum_bayes_risk import least_risk, minimum_bayes_risk, token_f1
from fusewright.generation.model import DecodingModel, DecodingState
from fusewright.generation.sampling import Sampling

__all__ = [
    "DecodingModel",
    "DecodingState",
    "Generated",
    "Sampling",
    "beam_search",
    "generate",
    "least_risk",
    "metrics",
    "minimum_bayes_risk",
    "stream",
    "token_f1",
]
