"""BLEU and ROUGE of texts, by the libraries that define them: ``pip install fusewright[metrics]``."""

import importlib
from collections.abc import Sequence
from types import ModuleType

from fusewright_kernels.checks import value_error


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of a corpus in [0, 100], as sacrebleu counts it.

    Source: Post, "A call for clarity in reporting BLEU scores", 2018.
    """
    _check_pairs(hypotheses, references)
    return _library("sacrebleu").corpus_bleu(list(hypotheses), [list(references)]).score


def sentence_bleu(hypothesis: str, reference: str) -> float:
    """Smoothed BLEU of one sentence in [0, 100], of use as a utility of minimum Bayes risk."""
    return _library("sacrebleu").sentence_bleu(hypothesis, [reference]).score


def rouge(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-measures ``"rouge1"``, ``"rouge2"`` and ``"rougeL"`` in [0, 1], with stems, as rouge-score counts them.

    Source: Lin, "ROUGE: a package for automatic evaluation of summaries", 2004.
    """
    _check_pairs(hypotheses, references)
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(hypotheses, references, strict=True)]
    return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in kinds}


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name.partition('.')[0]} is not installed: pip install fusewright[metrics]") from error


def _check_pairs(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(hypotheses, str) or isinstance(references, str) or not hypotheses:
        raise value_error("hypotheses and references", "a string or empty", "lists of at least one text")
    if len(hypotheses) != len(references):
        raise value_error("len(references)", len(references), f"{len(hypotheses)}, one for each hypothesis")
