"""Time and memory of one causal attention, forward and backward, over the sequence length.

By the plain formula, dense, within a window, by LSH and linear.

The figure of the Reformer paper (Kitaev, Kaiser, Levskaya, 2020, figure 5). Time is the smallest of a few calls of each
method in turn; memory is the most that torch's allocator holds beyond the inputs. A length that would take a method
longer than ``--limit`` seconds, going by the length before, is left out for it.

``python -m fusewright_bench.studies.sequence_length --output FOLDER``
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusewright import functional
from fusewright_bench import environment, scaling
from fusewright_bench.case import DTYPES
from fusewright_bench.harness import synchronize
from fusewright_bench.memory import peak_memory_bytes

Method = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Point:
    method: str
    length: int
    seconds: float
    memory_bytes: int
    input_bytes: int


WINDOW = 256
_QUADRATIC = ("naive", "dense")


def methods(rounds: Sequence[int]) -> dict[str, Method]:
    made: dict[str, Method] = {"naive": _naive, "dense": _dense, f"window-{WINDOW}": _windowed, "linear": _linear}
    for count in rounds:
        made[f"LSH-{count}"] = _lsh(count)
    return made


def _naive(query_key: Tensor, value: Tensor) -> Tensor:
    logits = query_key @ query_key.mT / query_key.shape[-1] ** 0.5
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
    return torch.softmax(logits.masked_fill(hidden, -math.inf), -1) @ value


def _dense(query_key: Tensor, value: Tensor) -> Tensor:
    output = functional.scaled_dot_product_attention(query_key, query_key, value, is_causal=True)
    assert isinstance(output, Tensor)
    return output


def _windowed(query_key: Tensor, value: Tensor) -> Tensor:
    output = functional.scaled_dot_product_attention(query_key, query_key, value, window=(WINDOW, 0))
    assert isinstance(output, Tensor)
    return output


def _linear(query_key: Tensor, value: Tensor) -> Tensor:
    output = functional.linear_attention(query_key, query_key, value, is_causal=True)
    assert isinstance(output, Tensor)
    return output


def _lsh(rounds: int) -> Method:
    def attend(query_key: Tensor, value: Tensor) -> Tensor:
        output = functional.lsh_attention(query_key, value, n_hashes=rounds, is_causal=True, seed=0)
        assert isinstance(output, Tensor)
        return output

    return attend


def measure(options: argparse.Namespace, device: torch.device) -> list[Point]:
    points: list[Point] = []
    last: dict[str, tuple[int, float]] = {}
    for length in options.lengths:
        shape = (1, options.heads, length, options.width)
        generator = torch.Generator().manual_seed(0)
        leaves = [
            torch.randn(shape, generator=generator).to(device, DTYPES[options.dtype]).requires_grad_() for _ in range(2)
        ]
        grad_output = torch.randn(shape, generator=generator).to(leaves[0])
        calls = {}
        for name, method in methods(options.rounds).items():
            growth = 2.0 if name in _QUADRATIC else 1.0
            if name in last and last[name][1] * (length / last[name][0]) ** growth > options.limit:
                continue
            calls[name] = _call(method, leaves, grad_output)
        seconds = _best_times(calls, device, options.rounds_of_timing)
        input_bytes = sum(leaf.nbytes for leaf in leaves)
        for name, call in calls.items():
            points.append(Point(name, length, seconds[name], peak_memory_bytes(call, device), input_bytes))
            last[name] = (length, seconds[name])
            print(points[-1], flush=True)
    return points


def _call(method: Method, leaves: list[Tensor], grad_output: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(method(*leaves), leaves, grad_output)


def _best_times(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def table_of(points: Sequence[Point]) -> str:
    names = list(dict.fromkeys(point.method for point in points))
    found = {(point.method, point.length): point for point in points}
    lines = ["| L | " + " | ".join(names) + " | " + " | ".join(f"memory {name}" for name in names) + " |"]
    lines.append("| --- |" + " --- |" * (2 * len(names)))
    for length in dict.fromkeys(point.length for point in points):
        times = [_time_text(found.get((name, length))) for name in names]
        memory = [_memory_text(found.get((name, length))) for name in names]
        lines.append(f"| {length} | " + " | ".join(times + memory) + " |")
    curves = [[point for point in points if point.method == name] for name in names]
    times = [_power([(point.length, point.seconds) for point in curve]) for curve in curves]
    memory = [_power([(point.length, point.memory_bytes) for point in curve]) for curve in curves]
    lines.append("| fitted | " + " | ".join(times + memory) + " |")
    return "\n".join(lines)


def _power(points: Sequence[tuple[float, float]]) -> str:
    fitted = scaling.exponent(points)
    return "-" if fitted is None else f"L^{fitted:.2f}"


def _time_text(point: Point | None) -> str:
    if point is None:
        return "-"
    return f"{point.seconds * 1e3:.3g} ms" if point.seconds < 1.0 else f"{point.seconds:.3g} s"


def _memory_text(point: Point | None) -> str:
    if point is None:
        return "-"
    return f"{point.memory_bytes / 2**20:.3g} MiB ({point.memory_bytes / point.input_bytes:.1f} x inputs)"


def plot(points: Sequence[Point], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for name in dict.fromkeys(point.method for point in points):
        own = [point for point in points if point.method == name]
        lengths = [point.length for point in own]
        axes[0].plot(lengths, [point.seconds / point.length * 1e6 for point in own], marker="o", label=name)
        axes[1].plot(lengths, [point.memory_bytes / 2**20 for point in own], marker="o", label=name)
    for axis, title in zip(axes, ("time per position, us", "memory beyond the inputs, MiB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="sequence length", title=title)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=150)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m fusewright_bench.studies.sequence_length", description=__doc__)
    made.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(10, 21)])
    made.add_argument("--rounds", type=int, nargs="+", default=[2, 4, 8])
    made.add_argument("--heads", type=int, default=1)
    made.add_argument("--width", type=int, default=64)
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    made.add_argument("--limit", type=float, default=20.0, help="seconds of one call at most")
    made.add_argument("--rounds-of-timing", type=int, default=2)
    made.add_argument("--output", type=Path, help="folder for sequence_length.md, .json and .png")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    points = measure(options, device)
    print(table_of(points))
    if options.output is None:
        return
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "sequence_length.md").write_text(table_of(points) + "\n")
    described = {
        "environment": environment.capture(device, (torch.get_num_threads(),)),
        "points": [asdict(point) for point in points],
    }
    (options.output / "sequence_length.json").write_text(json.dumps(described, indent=1) + "\n")
    plot(points, options.output / "sequence_length.png")


if __name__ == "__main__":
    main()
