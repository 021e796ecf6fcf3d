"""The study of recurrent models: tags of a small text, and that both models follow torch's curve."""

import torch

from fusewright_bench.studies import recurrent_models


def test_kinds_of_tokens():
    text = 'if x1 == 2:\n    y = "a"  # b\n'
    names = [recurrent_models.KINDS[kind] for kind in recurrent_models.kinds_of(text).tolist()]
    expected = ["keyword"] * 2 + ["space"] + ["name"] * 2 + ["space"] + ["operator"] * 2
    expected += ["space", "number", "operator"] + ["space"] * 5 + ["name", "space", "operator", "space"]
    assert names == expected + ["string"] * 3 + ["space"] * 2 + ["comment"] * 3 + ["space"]


def test_both_models_follow_torchs_curve():
    options = recurrent_models.parser().parse_args(["--length", "24", "--batch", "3", "--width", "16", "--steps", "6"])
    texts = ["def f(x):\n    return x + 1  # one more\n" * 20]
    for make in (recurrent_models.language_task, recurrent_models.tagging_task):
        runs = recurrent_models.train(make(texts, options), options)
        losses = [torch.tensor(runs[name].losses) for name in recurrent_models.LAYERS]
        assert len(losses[0]) == options.steps
        torch.testing.assert_close(*losses)
