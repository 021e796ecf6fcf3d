"""The gate on instruction counts: what it calls more, and that a machine without valgrind is told so."""

import json
from pathlib import Path

import pytest

from fusewright_bench.studies import instruction_count

OURS, TORCH = "softmax 64x1024 float32 fwd fusewright:cpu", "softmax 64x1024 float32 fwd torch"


@pytest.mark.parametrize(
    ("found", "verdict", "fails"), [(1000, "same", False), (1040, "MORE", True), (900, "fewer", False)]
)
def test_growth_beyond_the_tolerance_fails(found: int, verdict: str, fails: bool) -> None:
    lines, grown = instruction_count.judge({OURS: found, TORCH: 2000}, {OURS: 1000}, 0.03)
    assert lines == [
        [
            "softmax 64x1024 float32 fwd",
            f"{found:,}",
            "1,000",
            f"{found / 1000 - 1:+.1%}",
            f"{found / 2000:.2f}",
            verdict,
        ]
    ]
    assert bool(grown) == fails
    assert instruction_count.judge({OURS: found}, {}, 0.03)[0][0][-1] == "new"


def test_counts_are_kept_per_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kept.json"
    path.write_text(json.dumps({"another 1.0": {OURS: 5}}))
    monkeypatch.setattr(instruction_count, "absence", lambda: None)
    monkeypatch.setattr(instruction_count, "compiler", lambda: "g++ 99.1")
    monkeypatch.setattr(instruction_count, "count", lambda: {OURS: 1000})
    assert instruction_count.main(["--kept", str(path)]) == 0
    assert "no counts are on record for g++ 99.1" in capsys.readouterr().out
    assert instruction_count.main(["--kept", str(path), "--update"]) == 0
    assert json.loads(path.read_text()) == {"another 1.0": {OURS: 5}, "g++ 99.1": {OURS: 1000}}
    monkeypatch.setattr(instruction_count, "count", lambda: {OURS: 1100})
    assert instruction_count.main(["--kept", str(path)]) == 1
    monkeypatch.setattr(instruction_count, "absence", lambda: "no tool")
    assert instruction_count.main(["--kept", str(path)]) == 0 and "not counted: no tool" in capsys.readouterr().out
