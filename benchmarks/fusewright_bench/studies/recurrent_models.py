"""Two recurrent models on real text, with torch's layers and with ours from the same weights on the same batches.

The text are the Python standard library's sources. A character language model of two LSTM layers; and a tagger, a
bidirectional LSTM that tells of every character what kind of token it is part of, on passages of different lengths as
packed sequences. The steps of the two take turns, so that their times can be compared.

``python -m fusewright_bench.studies.recurrent_models --output FOLDER``
"""

import argparse
import io
import keyword
import math
import statistics
import sysconfig
import time
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fusewright import nn as fused

CHARACTERS = 128
KINDS = ("space", "name", "keyword", "number", "string", "operator", "comment")
_KIND_OF_TOKEN = {tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.OP: "operator",
                  tokenize.COMMENT: "comment"}  # fmt: skip
LAYERS = {"torch": nn.LSTM, "fusewright": fused.LSTM}

Batch = tuple[Tensor | PackedSequence, Tensor]


def sources() -> list[str]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def codes_of(text: str) -> Tensor:
    """ASCII codes, 127 for other characters."""
    return torch.tensor([min(ord(character), CHARACTERS - 1) for character in text], dtype=torch.uint8)


def kinds_of(text: str) -> Tensor:
    """The kind of token that each character is part of, as an index into KINDS."""
    begins = [0]
    for line in text.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    kinds = torch.zeros(len(text), dtype=torch.uint8)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            kind = "keyword" if keyword.iskeyword(token.string) else "name"
        elif tokenize.tok_name[token.type].startswith("FSTRING"):
            kind = "string"
        else:
            kind = _KIND_OF_TOKEN.get(token.type, "space")
        first, last = (begins[row - 1] + column for row, column in (token.start, token.end))
        kinds[first:last] = KINDS.index(kind)
    return kinds


class LanguageModel(nn.Module):
    """Characters (T, B) to logits of the next one."""

    def __init__(self, layer: type, width: int) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(CHARACTERS, width), layer(width, width, 2)
        self.head = nn.Linear(width, CHARACTERS)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(characters))[0]).flatten(0, 1)


class Tagger(nn.Module):
    """Packed characters to logits of each one's kind."""

    def __init__(self, layer: type, width: int) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(CHARACTERS, width), layer(width, width // 2, bidirectional=True)
        self.head = nn.Linear(width, len(KINDS))

    def forward(self, characters: PackedSequence) -> Tensor:
        return self.head(self.layers(characters._replace(data=self.embedding(characters.data)))[0].data)


class Task(NamedTuple):
    name: str
    model: type[nn.Module]
    batch: Callable[[], Batch]  # a new one, from torch's generator
    unit: str


def language_task(texts: Sequence[str], options: argparse.Namespace) -> Task:
    codes = torch.cat([codes_of(text) for text in texts])

    def batch() -> Batch:
        starts = torch.randint(0, codes.numel() - options.length - 1, (options.batch,))
        window = codes[starts + torch.arange(options.length + 1)[:, None]].long()
        return window[:-1], window[1:].flatten()

    return Task("character language model", LanguageModel, batch, "bits per character")


def tagging_task(texts: Sequence[str], options: argparse.Namespace) -> Task:
    codes = torch.cat([codes_of(text) for text in texts])
    kinds = torch.cat([kinds_of(text) for text in texts])

    def batch() -> Batch:
        lengths = torch.randint(options.length // 4, options.length + 1, (options.batch,)).sort(descending=True).values
        starts = torch.randint(0, codes.numel() - options.length, (options.batch,))
        spans = [slice(start, start + length) for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]
        characters = pack_sequence([codes[span].long() for span in spans])
        return characters, pack_sequence([kinds[span].long() for span in spans]).data

    return Task("bidirectional tagger", Tagger, batch, "bits per tag")


class Run(NamedTuple):
    losses: list[float]
    seconds: list[float]


def train(task: Task, options: argparse.Namespace) -> dict[str, Run]:
    """Loss and time of every step, by whose layers."""
    torch.manual_seed(options.seed)
    models = {name: task.model(layer, options.width) for name, layer in LAYERS.items()}
    weights = models["torch"].state_dict()
    for model in models.values():
        model.load_state_dict(weights)
    optimizers = {name: torch.optim.Adam(model.parameters(), options.learning_rate) for name, model in models.items()}
    runs = {name: Run([], []) for name in models}
    for step in range(1, options.steps + 1):
        inputs, targets = task.batch()
        for name, model in models.items():
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=options.autocast):
                logits = model(inputs)
            loss = nn.functional.cross_entropy(logits.float(), targets) / math.log(2.0)
            optimizers[name].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            runs[name].seconds.append(time.perf_counter() - start)
            runs[name].losses.append(loss.item())
        if step % options.report == 0:
            shown = (f"{name} {_recent(run, step, options.report):.3f}" for name, run in runs.items())
            print(f"{task.name}, step {step}: {task.unit} {', '.join(shown)}", flush=True)
    return runs


def _recent(run: Run, step: int, count: int) -> float:
    return sum(run.losses[step - count : step]) / count


def table_of(task: Task, runs: dict[str, Run], report: int) -> str:
    lines = [f"### {task.name}", "", f"| steps | {task.unit}: " + " | ".join(runs) + " |", "| --- | --- | --- |"]
    for step in range(report, len(next(iter(runs.values())).losses) + 1, report):
        lines.append(f"| {step} | " + " | ".join(f"{_recent(run, step, report):.3f}" for run in runs.values()) + " |")
    # The first steps build, trace and warm up.
    medians = {name: 1e3 * statistics.median(run.seconds[len(run.seconds) // 10 :]) for name, run in runs.items()}
    times = ", ".join(f"{name} {milliseconds:.1f} ms" for name, milliseconds in medians.items())
    ratio = medians["torch"] / medians["fusewright"]
    return "\n".join([*lines, "", f"A step, forward to optimizer, median: {times}; {ratio:.2f} times as fast."])


def plot(results: dict[Task, dict[str, Run]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axis, (task, runs) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
            axis.plot(range(1, len(run.losses) + 1), run.losses, style, linewidth=1, label=name)
        axis.set(title=task.name, xlabel="step", ylabel=task.unit)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=150)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m fusewright_bench.studies.recurrent_models", description=__doc__)
    for name, default in {
        "length": 128, "batch": 32, "width": 256, "steps": 300, "report": 20, "seed": 0, "threads": 2,
    }.items():  # fmt: skip
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--learning-rate", type=float, default=2e-3)
    made.add_argument("--autocast", action="store_true", help="recurrent layers in bfloat16")
    made.add_argument("--output", type=Path, help="folder for recurrent_models.md and .png")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    texts = sources()
    results: dict[Task, dict[str, Run]] = {}
    for make in (language_task, tagging_task):
        task = make(texts, options)
        results[task] = train(task, options)
    tables = "\n\n".join(table_of(task, runs, options.report) for task, runs in results.items())
    print(tables)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "recurrent_models.md").write_text(tables + "\n")
        plot(results, options.output / "recurrent_models.png")


if __name__ == "__main__":
    main()
