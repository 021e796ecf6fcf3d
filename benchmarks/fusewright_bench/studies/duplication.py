"""The Reformer paper's duplication task: what an LSH-trained model loses when it is evaluated with fewer rounds.

A sequence is 0 w 0 w with random symbols w; the second w is to be predicted. One layer with shared queries and keys can
do it only by attending half a sequence back. A model is trained with full attention and with each number of rounds,
and each is evaluated with all of them. Kitaev, Kaiser, Levskaya, "Reformer: the efficient transformer", 2020, table 2.

``python -m fusewright_bench.studies.duplication --markdown FILE``
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fusewright.nn import LayerNorm, LearnedPositionalEmbedding, LSHSelfAttention, ReformerLayer, ReversibleSequence

FULL = 0  # rounds of full attention


class DuplicationModel(nn.Module):
    """One Reformer layer between an embedding and a linear classifier."""

    def __init__(self, length: int, symbols: int, width: int, heads: int, chunk_length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols + 1, width)
        self.position = LearnedPositionalEmbedding(length, width)
        layer = ReformerLayer(width, heads, 2 * width, is_causal=True, chunk_length=chunk_length)
        self.layers = ReversibleSequence([layer])
        self.norm, self.head = LayerNorm(width), nn.Linear(width, symbols + 1)
        self._length, self._chunk_length = length, chunk_length

    def attend_with(self, rounds: int) -> None:
        """Attention by so many rounds of hashing from now on, or in full."""
        (attention,) = (module for module in self.modules() if isinstance(module, LSHSelfAttention))
        attention.n_hashes = max(1, rounds)
        # One chunk holds the whole sequence: every position meets every earlier one.
        attention.chunk_length = self._length if rounds == FULL else self._chunk_length

    def forward(self, symbols: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.position(self.embedding(symbols)))))


def sequences(batch: int, length: int, symbols: int) -> Tensor:
    """(batch, length) of 0 w 0 w."""
    word = torch.randint(1, symbols + 1, (batch, length // 2 - 1))
    half = torch.cat([torch.zeros(batch, 1, dtype=torch.long), word], dim=1)
    return torch.cat([half, half], dim=1)


def second_half(model: DuplicationModel, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and targets of what is determined: the symbols of the second word."""
    start = batch.shape[1] // 2
    return model(batch)[:, start:-1].flatten(0, 1), batch[:, start + 1 :].flatten()


def train(rounds: int, options: argparse.Namespace) -> DuplicationModel:
    torch.manual_seed(options.seed)
    model = DuplicationModel(options.length, options.symbols, options.width, options.heads, options.chunk_length)
    model.attend_with(rounds)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98))
    start = time.perf_counter()
    for step in range(1, options.steps + 1):
        for group in optimizer.param_groups:
            decay = 0.5 * (1.0 + torch.cos(torch.tensor(torch.pi * step / options.steps)).item())
            group["lr"] = options.learning_rate * min(step / options.warmup, decay)
        logits, targets = second_half(model, sequences(options.batch, options.length, options.symbols))
        loss = nn.functional.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % options.report == 0:
            accuracy = (logits.argmax(-1) == targets).float().mean().item()
            seconds = time.perf_counter() - start
            print(
                f"{name_of(rounds)} step {step}: loss {loss:.3f}, accuracy {accuracy:.3f}, {seconds:.0f} s", flush=True
            )
    return model


@torch.no_grad()
def accuracy(model: DuplicationModel, rounds: int, options: argparse.Namespace) -> float:
    """Share of right symbols in percent, over fresh sequences."""
    model.attend_with(rounds)
    torch.manual_seed(options.seed + 1)
    right = total = 0
    for _ in range(options.evaluation_batches):
        logits, targets = second_half(model, sequences(options.batch, options.length, options.symbols))
        right += int((logits.argmax(-1) == targets).sum())
        total += targets.numel()
    return 100.0 * right / total


def name_of(rounds: int) -> str:
    return "full" if rounds == FULL else f"LSH-{rounds}"


def table_of(results: dict[int, dict[int, float]]) -> str:
    columns = list(next(iter(results.values())))
    lines = ["| trained with | " + " | ".join(f"evaluated {name_of(rounds)}" for rounds in columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for trained, row in results.items():
        lines.append(f"| {name_of(trained)} | " + " | ".join(f"{row[rounds]:.1f}" for rounds in columns) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m fusewright_bench.studies.duplication", description=__doc__)
    for name, default in {
        "length": 256, "symbols": 63, "width": 128, "heads": 4, "chunk_length": 32, "batch": 16, "steps": 4000,
        "warmup": 200, "report": 200, "evaluation_batches": 20, "seed": 0,
    }.items():  # fmt: skip
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    made.add_argument("--learning-rate", type=float, default=3e-3)
    made.add_argument("--train", type=int, nargs="+", default=[FULL, 4, 2, 1], help="rounds, 0 for full attention")
    made.add_argument("--evaluate", type=int, nargs="+", default=[FULL, 8, 4, 2, 1])
    made.add_argument("--markdown", type=Path)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    results: dict[int, dict[int, float]] = {}
    for rounds in options.train:
        model = train(rounds, options).eval()
        results[rounds] = {other: accuracy(model, other, options) for other in options.evaluate}
        print(table_of(results), flush=True)
        if options.markdown is not None:
            options.markdown.write_text(table_of(results) + "\n")


if __name__ == "__main__":
    main()
