"""Decoding: what is chosen, where it stops, what it costs in order."""

import itertools
import math
import sys

import pytest
import torch

from fusewright.generation import (
    Generated,
    Sampling,
    beam_search,
    generate,
    least_risk,
    metrics,
    minimum_bayes_risk,
    stream,
    token_f1,
)
from fusewright.models import GPT
from fusewright_kernels.checks import ArgumentTypeError, ArgumentValueError

PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


class Chain:
    """A model whose logits follow from the last token alone: row ``token`` of a table."""

    max_positions = 12

    def __init__(self, table):
        self.table, self.calls = table, []

    def make_state(self, batch_size, capacity):
        return ChainState(batch_size, capacity)

    def __call__(self, tokens, *, state, lengths=None):
        assert not torch.is_grad_enabled()
        self.calls.append(tokens.clone())
        added = torch.full((tokens.shape[0],), tokens.shape[1]) if lengths is None else lengths
        state.held = state.held + added
        assert (state.held <= state.capacity).all()
        return self.table[tokens]


class ChainState:
    longest_step = None

    def __init__(self, batch_size, capacity):
        self.held, self.capacity = torch.zeros(batch_size, dtype=torch.int64), capacity

    def select(self, rows):
        self.held = self.held[rows]


def _chain(vocabulary=5, seed=0, scale=1.5):
    return Chain(torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale)


def _log_probability(model, start, tokens):
    total = 0.0
    for token in tokens:
        total += model.table[start].log_softmax(-1)[token].item()
        start = token
    return total


def test_greedy_takes_the_most_probable_token():
    model = _chain(7)
    result = generate(model, PROMPT, 4)
    for row, start in enumerate((3, 6)):
        expected = []
        for _ in range(4):
            expected.append(int(model.table[expected[-1] if expected else start].argmax()))
        assert result.tokens[row].tolist() == expected
        assert result.log_probability[row].item() == pytest.approx(_log_probability(model, start, expected), rel=1e-5)
    assert result.lengths.tolist() == [4, 4]
    assert [call.shape[1] for call in model.calls] == [3, 1, 1, 1]


def test_stop_tokens_end_a_sequence_and_the_batch():
    model = _chain(7)
    free = generate(model, PROMPT, 6).tokens
    stop = int(free[0, 1])
    model.calls.clear()
    result = generate(model, PROMPT, 6, stop_tokens=[stop], pad_token=99)
    ends = [row.index(stop) + 1 if stop in row else 6 for row in free.tolist()]
    assert result.lengths.tolist() == ends and result.tokens.shape[1] == max(ends)
    for row, end in enumerate(ends):
        assert result.tokens[row, :end].tolist() == free[row, :end].tolist()
        assert set(result.tokens[row, end:].tolist()) <= {99}
        assert result.log_probability[row].item() == pytest.approx(
            _log_probability(model, int(PROMPT[row, -1]), free[row, :end].tolist()), rel=1e-5
        )
    assert len(model.calls) == max(ends)


def test_a_stream_gives_each_token_when_it_is_there():
    model = _chain(7)
    expected = generate(model, PROMPT, 5).tokens
    model.calls.clear()
    tokens = stream(model, PROMPT, 5)
    first = next(tokens)
    assert len(model.calls) == 1 and torch.is_grad_enabled()
    assert torch.equal(torch.stack([first, *tokens], 1), expected)


@pytest.mark.parametrize("decode", [generate, beam_search, minimum_bayes_risk])
def test_edges(decode):
    model = _chain(7)
    none = decode(model, PROMPT, 0)
    assert none.tokens.shape == (2, 0) and none.lengths.tolist() == [0, 0] and model.calls == []
    assert decode(model, PROMPT, 9).tokens.shape == (2, 9)
    for arguments, error, message in (
        ((PROMPT[:, :0], 2), ArgumentValueError, "prompt.shape is \\(2, 0\\)"),
        ((PROMPT[:0], 2), ArgumentValueError, "prompt.shape is \\(0, 3\\)"),
        ((PROMPT, 10), ArgumentValueError, "the length of prompt and new tokens is 13, expected at most 12"),
        ((PROMPT, -1), ArgumentValueError, "max_new_tokens is -1"),
        ((PROMPT.float(), 2), ArgumentTypeError, "prompt is of torch.float32"),
        (([[1]], 2), ArgumentTypeError, "prompt is a list"),
    ):
        with pytest.raises(error, match=message):
            decode(model, *arguments)
    for lengths in (torch.tensor([0, 3]), torch.tensor([1, 4]), torch.tensor([1.0, 2.0]), torch.tensor([1])):
        with pytest.raises(ArgumentValueError, match="prompt_lengths is"):
            decode(model, PROMPT, 2, prompt_lengths=lengths)
    with pytest.raises(ArgumentValueError):
        stream(model, PROMPT, 10)


def test_prompts_of_different_lengths_are_as_alone():
    torch.manual_seed(0)
    for options in ({}, {"rotary": True, "num_kv_heads": 1}, {"window": 3, "rotary": True}):
        model = GPT(11, 40, 16, 2, 2, dropout=0.0, **options)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        lengths = torch.tensor([5, 2, 9])
        prompt = torch.randint(11, (3, 9))
        together = generate(model, prompt, 20, prompt_lengths=lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = generate(model, prompt[row : row + 1, :length], 20)
            assert torch.equal(together.tokens[row], alone.tokens[0])
        # And as without any cache.
        tokens = prompt[:1, :5]
        for _ in range(20):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
        assert torch.equal(tokens[0, 5:], together.tokens[0])


def test_paged_states_give_the_same():
    torch.manual_seed(0)
    model = GPT(11, 40, 16, 2, 2, dropout=0.0)
    prompt = torch.randint(11, (3, 9))
    paged = model.make_state(3, 28, page_size=4)
    assert torch.equal(generate(model, prompt, 20, state=paged).tokens, generate(model, prompt, 20).tokens)
    for beams in (1, 4):
        paged = model.make_state(3, 28, page_size=4)
        actual = beam_search(model, prompt, 6, beams=beams, state=paged)
        assert torch.equal(actual.tokens, beam_search(model, prompt, 6, beams=beams).tokens)


def test_sampling_limits():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])

    def kept(**options):
        return Sampling(**options).log_probabilities(logits).isfinite().tolist()

    assert kept(top_k=2)[0] == [True, False, True, False] and sum(kept(top_k=2)[1]) == 2
    # Probabilities of the first row: 0.64, 0.09, 0.24, 0.03.
    assert kept(top_p=0.6)[0] == [True, False, False, False]
    assert kept(top_p=0.7)[0] == [True, False, True, False]
    assert kept(top_p=1.0) == [[True] * 4] * 2
    assert kept(top_p=1e-9)[0] == [True, False, False, False]
    assert kept(top_p=0.5)[1] == [True, True, False, False]
    hot = Sampling(temperature=2.0).log_probabilities(logits)
    torch.testing.assert_close(hot, (logits / 2).log_softmax(-1))
    assert Sampling(temperature=0.0).draw(logits).tolist() == [0, 0]
    # The nucleus is taken from what top-k left.
    assert Sampling(top_k=2, top_p=0.5).log_probabilities(logits)[0].isfinite().tolist() == [True, False, False, False]


def test_samples_follow_the_distribution_and_the_generator():
    model = _chain(5)
    prompt = torch.full((20000, 1), 2)
    draws = [
        generate(model, prompt, 1, sampling=Sampling(0.7), generator=torch.Generator().manual_seed(seed)).tokens
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    shares = torch.bincount(draws[0].flatten(), minlength=5) / 20000
    torch.testing.assert_close(shares, (model.table[2] / 0.7).softmax(-1), rtol=0.0, atol=0.02)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_wide_beams_find_the_best_of_all_continuations(penalty):
    vocabulary, limit, stop = 4, 4, 3
    for seed in range(5):
        model = _chain(vocabulary, seed)
        result = beam_search(
            model, torch.tensor([[0], [1]]), limit, beams=80, length_penalty=penalty, stop_tokens=[stop], pad_token=9
        )
        for row, start in enumerate((0, 1)):
            complete = [
                tokens
                for length in range(1, limit + 1)
                for tokens in itertools.product(range(vocabulary), repeat=length)
                if stop not in tokens[:-1] and (tokens[-1] == stop or length == limit)
            ]
            scores = {
                tokens: _log_probability(model, start, tokens) / ((5 + len(tokens)) / 6) ** penalty
                for tokens in complete
            }
            best = max(scores, key=scores.get)
            length = int(result.lengths[row])
            assert tuple(result.tokens[row, :length].tolist()) == best
            assert (result.tokens[row, length:] == 9).all()
            assert result.log_probability[row].item() == pytest.approx(_log_probability(model, start, best), rel=1e-4)


def test_one_beam_is_greedy_and_more_are_no_worse():
    torch.manual_seed(0)
    model = GPT(11, 40, 16, 2, 2, dropout=0.0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    prompt, lengths = torch.randint(11, (3, 6)), torch.tensor([6, 3, 4])
    greedy = generate(model, prompt, 8, prompt_lengths=lengths)
    one = beam_search(model, prompt, 8, beams=1, prompt_lengths=lengths)
    assert torch.equal(greedy.tokens, one.tokens)
    torch.testing.assert_close(one.log_probability, greedy.log_probability, rtol=1e-4, atol=1e-4)
    wide = beam_search(model, prompt, 8, beams=6, prompt_lengths=lengths)
    assert (wide.log_probability >= greedy.log_probability - 1e-4).all()
    # The log-probability is that of the tokens, by the model without a cache.
    for row, length in enumerate(lengths.tolist()):
        whole = torch.cat([prompt[row, :length], wide.tokens[row]])[None]
        steps = model(whole)[0, length - 1 : -1].log_softmax(-1).gather(-1, wide.tokens[row][:, None])
        assert wide.log_probability[row].item() == pytest.approx(steps.sum().item(), rel=1e-4)


def test_least_risk():
    assert [token_f1(*pair) for pair in (([], []), ([1], []), ([1, 1, 2], [1, 2, 3]))] == [1.0, 0.0, 2 / 3]
    assert least_risk([[1, 2], [1, 2, 3], [7, 8]], token_f1) == 0
    assert least_risk(["a"], lambda one, other: 0.0) == 0
    with pytest.raises(ArgumentValueError, match="samples is empty"):
        least_risk([], token_f1)


def test_minimum_bayes_risk_is_the_sample_that_agrees_best():
    model = _chain(5)
    options = {"sampling": Sampling(1.0), "stop_tokens": [4]}
    drawn = generate(
        model,
        PROMPT[:, :1].clamp(max=3).repeat_interleave(6, 0),
        4,
        generator=torch.Generator().manual_seed(3),
        **options,
    )
    chosen = minimum_bayes_risk(
        model, PROMPT[:, :1].clamp(max=3), 4, samples=6, generator=torch.Generator().manual_seed(3), **options
    )
    assert isinstance(chosen, Generated)
    for row in range(2):
        texts = [drawn.tokens[i, : drawn.lengths[i]].tolist() for i in range(6 * row, 6 * row + 6)]
        best = max(texts, key=lambda text: sum(token_f1(text, other) for other in texts))
        assert chosen.tokens[row, : chosen.lengths[row]].tolist() == best


def test_bad_options():
    for options in ({"temperature": -1.0}, {"temperature": math.inf}, {"temperature": math.nan}, {"top_k": 0},
                    {"top_p": 0.0}, {"top_p": 1.5}):  # fmt: skip
        with pytest.raises(ArgumentValueError, match=next(iter(options))):
            Sampling(**options)
    with pytest.raises(ArgumentValueError, match="beams is 0"):
        beam_search(_chain(), PROMPT[:, :1], 1, beams=0)
    with pytest.raises(ArgumentValueError, match="length_penalty is -1"):
        beam_search(_chain(), PROMPT[:, :1], 1, length_penalty=-1)


def test_metrics_are_the_libraries():
    sacrebleu, rouge_scorer = pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score.rouge_scorer")
    texts, references = ["the cat sat on the mat", "a dog runs"], ["the cat sat on a mat", "the dogs run fast"]
    assert metrics.bleu(texts, references) == sacrebleu.corpus_bleu(texts, [references]).score
    assert metrics.bleu(references, references) == pytest.approx(100.0)
    assert metrics.sentence_bleu(texts[0], references[0]) == sacrebleu.sentence_bleu(texts[0], references[:1]).score
    scores = metrics.rouge(texts, references)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    expected = [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(texts, references, strict=True)]
    assert scores["rougeL"] == pytest.approx(sum(expected) / 2)


def test_metrics_name_the_extra_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"sacrebleu is not installed: pip install fusewright\[metrics\]"):
        metrics.bleu(["a"], ["a"])
    with pytest.raises(ArgumentValueError, match="lists of at least one text"):
        metrics.bleu("a", "a")
    with pytest.raises(ArgumentValueError, match=r"len\(references\) is 2"):
        metrics.bleu(["a"], ["a", "b"])
