"""Whole models in training and generation: torch's modules against ours, the same weights and the same data.

Text is the Python standard library's sources as bytes, images are scikit-learn's digits, the sequence-to-sequence task
is reversal; nothing is downloaded (``pip install fusewright[studies]`` brings scikit-learn and matplotlib). Steps of
both run in turns. Prints time per step, peak memory of a step, the loss curves and how far apart they run, and tokens
per second of generation; writes a table and a plot.

``python -m fusewright_bench.studies.end_to_end --models gpt,bert --output FOLDER``
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusewright import models
from fusewright.generation import generate
from fusewright_bench.memory import peak_memory_bytes
from fusewright_bench.studies import torch_models
from fusewright_bench.studies.reformer_language_model import CHARACTERS, text

Batch = tuple[Tensor, ...]
SIDES = ("torch", "fusewright")


@dataclass(frozen=True)
class Task:
    """A model and what it learns.

    Attributes:
        build: makes the model of a side, None where torch has none.
        batch: makes the arguments of ``model.loss``.
        prompt: makes the prompt, and for a model with a source the source, of generation; None without generation.
    """

    build: dict[str, Callable[[], Any]]
    batch: Callable[[], Batch]
    prompt: Callable[[], Batch] | None = None


@dataclass
class Result:
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    tokens_per_second: float | None = None


def tasks(options: argparse.Namespace) -> dict[str, Task]:
    batch, length = options.batch, options.length
    sizes = {"width": options.width, "layers": options.layers, "heads": options.heads, "dropout": 0.0}
    codes = text(validation=False)

    def of_both(name: str, *arguments: Any, **keywords: Any) -> dict[str, Callable[[], Any]]:
        return {
            "torch": lambda: getattr(torch_models, name)(*arguments, **keywords),
            "fusewright": lambda: getattr(models, name)(*arguments, **keywords),
        }

    def characters() -> Tensor:
        starts = torch.randint(0, codes.numel() - length - 1, (batch,))
        return torch.stack([codes[start : start + length + 1] for start in starts.tolist()]).long()

    def language() -> Batch:
        rows = characters()
        return rows[:, :-1], rows[:, 1:]

    def beginnings() -> Batch:
        return (characters()[:, : length // 4],)

    def masked() -> Batch:
        tokens = characters()[:, :-1]
        chosen = torch.rand(tokens.shape) < 0.15
        return tokens.masked_fill(chosen, CHARACTERS), tokens.masked_fill(~chosen, -100)

    def reversal() -> tuple[Tensor, Tensor]:
        """Symbols 1 to 63, and 0 followed by the same the other way round."""
        source = torch.randint(1, 64, (batch, options.reversal_length))
        return source, torch.cat([torch.zeros(batch, 1, dtype=torch.int64), source.flip(1)], 1)

    def pairs() -> Batch:
        source, target = reversal()
        return target[:, :-1], target[:, 1:], source

    def prompts() -> Batch:
        source, _ = reversal()
        return torch.zeros(batch, 1, dtype=torch.int64), source

    def padded_pairs() -> Batch:
        target, expected, source = pairs()
        lengths = torch.randint(options.reversal_length // 2, options.reversal_length + 1, (batch,))
        return target, expected, source, lengths

    span = min(64, length)

    def word_pairs() -> Batch:
        """A text and the same with some characters replaced."""
        first = characters()[:, :span]
        second = torch.where(torch.rand(first.shape) < 0.1, torch.randint_like(first, CHARACTERS), first)
        lengths = torch.randint(span // 2, span + 1, (batch,))
        return first, second, lengths, lengths

    def tagged() -> Batch:
        """Whether a character stands in a name, a number, white space, or none of them."""
        tokens = characters()[:, :span]
        kinds = torch.tensor([_kind(chr(code)) for code in range(CHARACTERS)])
        return tokens, kinds[tokens], torch.randint(span // 2, span + 1, (batch,))

    reformer = {
        "axial_shape": (16, -(-length // 16)), "axial_dims": (options.width // 2, options.width - options.width // 2),
        **sizes,
    }  # fmt: skip
    return {
        "gpt": Task(of_both("GPT", options.vocabulary, length, **sizes), language, beginnings),
        "bert": Task(of_both("BERT", CHARACTERS + 1, length, **sizes), masked),
        "encoder_decoder": Task(of_both("EncoderDecoder", 64, **sizes), pairs, prompts),
        "vit": Task(of_both("ViT", 8, 2, 10, 1, **sizes), _digits(batch)),
        "reformer": Task({"fusewright": lambda: models.Reformer(CHARACTERS, **reformer)}, language, beginnings),
        "rnn_encoder_decoder": Task(
            of_both("RNNEncoderDecoder", 64, 64, options.width, options.width), padded_pairs, prompts
        ),
        "siamese": Task(of_both("SiameseLSTM", CHARACTERS, options.width, options.width), word_pairs),
        "tagger": Task(of_both("LSTMTagger", CHARACTERS, 4, options.width, options.width), tagged),
    }


def _kind(character: str) -> int:
    if character.isalpha() or character == "_":
        return 0
    return 1 if character.isdigit() else 2 if character.isspace() else 3


def _digits(batch: int) -> Callable[[], Batch]:
    """Batches of 8 by 8 images; scikit-learn is asked for only where they are wanted."""
    kept: list[Tensor] = []

    def draw() -> Batch:
        if not kept:
            from sklearn.datasets import load_digits

            data = load_digits()
            kept.extend((torch.tensor(data.images).float()[:, None] / 16.0, torch.tensor(data.target)))
        chosen = torch.randint(len(kept[0]), (batch,))
        return kept[0][chosen], kept[1][chosen]

    return draw


def run(task: Task, options: argparse.Namespace) -> dict[str, Result]:
    """Both sides of a task, from the same weights, on the same batches, a step of either in turns."""
    dtype = getattr(torch, options.dtype)
    built = {}
    for side, build in task.build.items():
        torch.manual_seed(options.seed)
        built[side] = build()
    reference = built["fusewright"].state_dict()
    for model in built.values():
        _load_alike(model, reference)
        model.to(dtype)
    optimizers = {side: torch.optim.AdamW(model.parameters(), options.learning_rate) for side, model in built.items()}
    results = {side: Result() for side in built}
    for step in range(options.steps):
        torch.manual_seed(options.seed + 1 + step)
        batch = _floating_as(task.batch(), dtype)
        # Who comes first finds the caches cold.
        for side in sorted(built, reverse=step % 2 == 1):
            start = time.perf_counter()
            loss = _step(built[side], optimizers[side], batch)
            results[side].seconds.append(time.perf_counter() - start)
            results[side].losses.append(loss)
    for side, model in built.items():
        step_again = partial(_step, model, optimizers[side], batch)
        results[side].peak_bytes = peak_memory_bytes(step_again, torch.device("cpu"))
        if task.prompt is not None:
            torch.manual_seed(options.seed)
            results[side].tokens_per_second = _generation(model, task.prompt(), options.new_tokens, side)
    return results


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    optimizer.zero_grad()
    loss = model.loss(*batch)  # type: ignore[operator]
    loss.backward()
    optimizer.step()
    return loss.item()


def _generation(model: Any, given: Batch, new_tokens: int, side: str) -> float:
    """Greedy tokens per second. torch's modules have no cache: its GPT keeps one in its own loop, the other models of
    its side see the whole sequence at every step.
    """
    model.eval()
    prompt, source = given[0], given[1] if len(given) > 1 else None
    start = time.perf_counter()
    with torch.no_grad():
        if side == "fusewright":
            state = None
            if source is not None:
                options = {"capacity": new_tokens} if isinstance(model, models.EncoderDecoder) else {}
                state = model.encode(source, **options)
            generate(model, prompt, new_tokens, state=state)
        elif isinstance(model, torch_models.GPT):
            model.generate(prompt, new_tokens)
        else:
            tokens = prompt
            for _ in range(new_tokens):
                tokens = torch.cat([tokens, model(tokens, *given[1:])[:, -1:].argmax(-1)], 1)
    elapsed = time.perf_counter() - start
    model.train()
    return prompt.shape[0] * new_tokens / elapsed


def _load_alike(model: nn.Module, reference: dict[str, Tensor]) -> None:
    """Weights by name; a packed LSTM's names have one part more."""
    state = {}
    for name in model.state_dict():
        state[name] = reference[name if name in reference else name.replace("lstm.", "", 1)]
    model.load_state_dict(state)


def _floating_as(batch: Batch, dtype: torch.dtype) -> Batch:
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in batch)


HEADER = (
    "| model | side | ms per step | speed-up | peak MB | first and last loss | largest distance | tokens/s |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def rows_of(name: str, results: dict[str, Result]) -> list[str]:
    """One line for each side; the speed-up is the median of the steps' ratios."""
    rows = []
    for side, result in results.items():
        ratio = apart = ""
        if side == "fusewright" and "torch" in results:
            theirs = results["torch"]
            # The first steps fill caches.
            pairs = list(zip(theirs.seconds, result.seconds, strict=True))[min(3, len(result.seconds) - 1) :]
            ratio = f"{statistics.median(one / other for one, other in pairs):.2f}x"
            apart = f"{max(abs(one - other) for one, other in zip(theirs.losses, result.losses, strict=True)):.1e}"
        tokens = "" if result.tokens_per_second is None else f"{result.tokens_per_second:.0f}"
        curve = f"{result.losses[0]:.3f}, {result.losses[-1]:.3f}"
        rows.append(
            f"| {name} | {side} | {1e3 * statistics.median(result.seconds):.1f} | {ratio} |"
            f" {result.peak_bytes / 1e6:.1f} | {curve} | {apart} | {tokens} |"
        )
    return rows


def plot(results: dict[str, dict[str, Result]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(results), 3.2), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, (name, sides) in zip(axes, results.items(), strict=True):
        for side, style in zip(SIDES, ("-", "--"), strict=True):
            if side in sides:
                axis.plot(sides[side].losses, style, linewidth=1.2, label=side)
        axis.set(title=name, xlabel="step", ylabel="loss")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=150)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m fusewright_bench.studies.end_to_end", description=__doc__)
    for name, default in {
        "batch": 8, "length": 256, "reversal-length": 24, "width": 256, "layers": 4, "heads": 4, "steps": 100,
        "new-tokens": 64, "vocabulary": CHARACTERS, "threads": 2, "seed": 0,
    }.items():  # fmt: skip
        made.add_argument(f"--{name}", type=int, default=default)
    made.epilog = "--vocabulary is the GPT's, whose text has 128 characters however many there are"
    made.add_argument("--learning-rate", type=float, default=1e-3)
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    made.add_argument("--models", default="", help="names with commas between them, all by default")
    made.add_argument("--output", type=Path, help="folder for end_to_end.md and .png")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    known = tasks(options)
    names = options.models.split(",") if options.models else list(known)
    for name in names:
        if name not in known:
            raise SystemExit(f"--models is {name}, expected names among {', '.join(known)}")
    results, lines = {}, [HEADER]
    print(HEADER, flush=True)
    for name in names:
        results[name] = run(known[name], options)
        rows = rows_of(name, results[name])
        lines += rows
        print("\n".join(rows), flush=True)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "end_to_end.md").write_text("\n".join(lines) + "\n")
        plot(results, options.output / "end_to_end.png")


if __name__ == "__main__":
    main()
