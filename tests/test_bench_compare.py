"""``fusewright compare``: what it calls slower, what it refuses, and what it leaves as it was."""

import math
import random
from pathlib import Path

import pytest

from fusewright_bench import cli, compare, verdicts
from fusewright_bench.exit_codes import OK, SLOWER_FOUND, USAGE
from fusewright_bench.report import json_file
from fusewright_bench.results import Results, Row
from fusewright_bench.verdicts import SLOWER

MACHINE = {"device": "abacus", "cpu_model": "abacus", "cores": 2, "isa": "beads", "versions": {}}


def run_of(speed: float, seed: int, *, spread: float = 0.03, layout: float = 0.006) -> Results:
    """A run of five kernels, ``speed`` times as fast as the first ever: noise in every round, and a bias of the run, as
    another layout of the same tensors brings."""
    generator = random.Random(seed)

    def times(level: float) -> list[float]:
        bias = math.exp(generator.gauss(0.0, layout))
        return [level * bias * math.exp(generator.gauss(0.0, spread)) for _ in range(60)]

    rows = []
    for number in range(5):
        baseline, ours = times(2e-3), times(1e-3 / speed)
        comparison = verdicts.compare(baseline, ours)
        for provider, seconds in (("torch", baseline), ("fusewright", ours)):
            row = Row(
                "softmax", f"{number}x8", [number, 8], "float32", "fwd", 1, provider, "cpu", "", 1, 1,
                time_us=1e6 * sorted(seconds)[30], baseline="torch", ratio=comparison.ratio,
                interval=list(comparison.interval),
            )  # fmt: skip
            rows.append(row)
    return Results(MACHINE, "fusewright bench", rows, complete=True)


def test_the_same_code_is_never_slower_and_a_planted_tenth_always() -> None:
    for repetition in range(20):
        before, again = run_of(1.0, 3 * repetition), run_of(1.0, 3 * repetition + 1)
        planted = compare.changes(before, run_of(1 / 1.1, 3 * repetition + 2))
        assert not compare.any_slower(compare.changes(before, again))
        assert [change.verdict for change in planted if change.ratio] == [SLOWER] * 5


def test_a_baseline_that_moved_makes_nothing_slower() -> None:
    before, after = run_of(1.0, 0), run_of(1 / 1.2, 1)
    for row in after.cases:
        assert row.time_us
        row.time_us /= 1.5
    assert {change.verdict for change in compare.changes(before, after) if change.ratio} == {verdicts.UNCLEAR}
    assert {change.verdict for change in compare.changes(after, before) if change.ratio} == {verdicts.UNCLEAR}


def saved(results: Results, path: Path) -> str:
    json_file.write(results, path)
    return str(path)


def test_another_machine_is_refused_where_the_exit_code_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = saved(run_of(1.0, 0), tmp_path / "a.json")
    other = run_of(0.5, 1)
    other.environment = {**MACHINE, "cores": 64}
    there = saved(other, tmp_path / "b.json")
    assert cli.main(["compare", here, there]) == OK
    assert "not the same machine, cores: A has 2, B has 64" in capsys.readouterr().out
    assert cli.main(["compare", here, there, "--fail-on", "slower"]) == USAGE
    assert "one machine" in capsys.readouterr().err
    other.environment = {**MACHINE, "versions": {"torch": "4"}}
    assert cli.main(["compare", here, saved(other, tmp_path / "c.json"), "--fail-on", "slower"]) == SLOWER_FOUND
    assert "not the same software" in capsys.readouterr().out


def test_a_row_that_fails_now_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = run_of(1.0, 1)
    after.cases[1].time_us, after.cases[1].failure = None, "crashed: SIGSEGV"
    report = tmp_path / "report.md"
    paths = [saved(run_of(1.0, 0), tmp_path / "a.json"), saved(after, tmp_path / "b.json")]
    assert cli.main(["compare", *paths, "--markdown", str(report)]) == OK
    for text in (capsys.readouterr().out, report.read_text()):
        assert "failed in B: softmax 0x8 float32 fwd fusewright:cpu: crashed: SIGSEGV" in text
        assert "rows of A that B lacks: 1" in text and "geometric mean" in text


@pytest.mark.parametrize("content", ["{", '{"schema_version": 0, "cases": []}'])
def test_a_file_that_cannot_be_read_is_told_and_left_alone(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    assert cli.main(["compare", str(path), str(path)]) == USAGE
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--resume", str(path)])
    assert stop.value.code == USAGE and capsys.readouterr().err.count("old.json") >= 2
    assert path.read_text() == content and list(tmp_path.iterdir()) == [path]


def test_a_complete_run_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--resume", saved(run_of(1.0, 0), tmp_path / "a.json")])
    assert "this one is complete" in capsys.readouterr().err


def test_a_run_of_another_machine_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted = run_of(1.0, 0)
    interrupted.complete, interrupted.command = False, "fusewright bench --op softmax --shape 8x32 --device cpu"
    path = saved(interrupted, tmp_path / "a.json")
    with pytest.raises(SystemExit):
        cli.main(["bench", "--resume", path, "--supervised", str(tmp_path / "step"), path])
    assert "not the same machine, device: A has abacus" in capsys.readouterr().err
    assert len(json_file.read(Path(path)).cases) == len(interrupted.cases)
