"""A Reformer language model on real text: characters of the Python standard library's sources at a length of 16384.

Reversible layers, LSH attention, axial positions, chunked feed-forward. Prints the loss in bits per character of each
step, and of text that was not trained on at the end; writes the curve as a table and a plot.

``python -m fusewright_bench.studies.reformer_language_model --output FOLDER``
"""

import argparse
import math
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fusewright.nn import AxialPositionalEmbedding, LayerNorm, ReformerLayer, ReversibleSequence

CHARACTERS = 128


class ReformerLanguageModel(nn.Module):
    """Characters to logits of the next one."""

    def __init__(self, length: int, width: int, heads: int, depth: int, rounds: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, width)
        side = 2 ** math.ceil(math.log2(length) / 2)
        self.position = AxialPositionalEmbedding((side, -(-length // side)), (width // 2, width - width // 2))
        self.layers = ReversibleSequence(
            ReformerLayer(
                width, heads, 4 * width, is_causal=True, n_hashes=rounds, chunk_length=64, feed_forward_chunk=4096
            )
            for _ in range(depth)
        )
        self.norm, self.head = LayerNorm(width), nn.Linear(width, CHARACTERS)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.position(self.embedding(characters)))))


def text(validation: bool) -> Tensor:
    """The sources as ASCII codes, others as 127; every tenth file is kept for validation."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    chosen = [file for number, file in enumerate(files) if (number % 10 == 0) == validation]
    joined = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in chosen)
    codes = torch.tensor([min(ord(character), CHARACTERS - 1) for character in joined], dtype=torch.uint8)
    return codes


def bits_per_character(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) / math.log(2.0)


def sample(codes: Tensor, length: int) -> Tensor:
    start = int(torch.randint(0, codes.numel() - length - 1, ()))
    return codes[start : start + length + 1].long()[None]


def train(options: argparse.Namespace) -> tuple[list[float], float]:
    """The loss of every step, and the mean loss on validation text."""
    torch.manual_seed(options.seed)
    model = ReformerLanguageModel(options.length, options.width, options.heads, options.depth, options.rounds)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    codes, losses = text(validation=False), []
    start = time.perf_counter()
    for step in range(1, options.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, step / options.warmup)
        loss = bits_per_character(model, sample(codes, options.length))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % options.report == 0:
            recent = sum(losses[-options.report :]) / options.report
            print(f"step {step}: {recent:.3f} bits per character, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()
    held_out = text(validation=True)
    with torch.no_grad():
        validation = [bits_per_character(model, sample(held_out, options.length)).item() for _ in range(8)]
    return losses, sum(validation) / len(validation)


def plot(losses: Sequence[float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.plot(range(1, len(losses) + 1), losses, linewidth=1)
    axis.set(xlabel="step", ylabel="bits per character")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m fusewright_bench.studies.reformer_language_model", description=__doc__
    )
    for name, default in {
        "length": 16384, "width": 128, "heads": 2, "depth": 4, "rounds": 2, "steps": 300, "warmup": 20, "report": 10,
        "seed": 0,
    }.items():  # fmt: skip
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--learning-rate", type=float, default=3e-3)
    made.add_argument("--output", type=Path, help="folder for reformer_language_model.md and .png")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    losses, validation = train(options)
    print(f"validation: {validation:.3f} bits per character")
    if options.output is None:
        return
    options.output.mkdir(parents=True, exist_ok=True)
    steps = range(options.report, len(losses) + 1, options.report)
    lines = ["| steps | bits per character |", "| --- | --- |"]
    lines += [f"| {end} | {sum(losses[end - options.report : end]) / options.report:.3f} |" for end in steps]
    lines += ["", f"Validation: {validation:.3f} bits per character."]
    (options.output / "reformer_language_model.md").write_text("\n".join(lines) + "\n")
    plot(losses, options.output / "reformer_language_model.png")


if __name__ == "__main__":
    main()
