"""The end-to-end study at its smallest: torch's modules and ours from the same weights run the same curve."""

import pytest

from fusewright_bench.studies import end_to_end

SMALL = ["--steps", "3", "--width", "16", "--layers", "1", "--heads", "2", "--length", "32", "--batch", "2",
         "--new-tokens", "4", "--reversal-length", "6"]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["gpt", "bert", "encoder_decoder", "reformer", "rnn_encoder_decoder", "siamese", "tagger"]
)
def test_both_sides_run_the_same_curve(name):
    options = end_to_end.parser().parse_args(SMALL)
    results = end_to_end.run(end_to_end.tasks(options)[name], options)
    if name != "reformer":
        assert results["fusewright"].losses == pytest.approx(results["torch"].losses, rel=1e-4)
    for result in results.values():
        assert len(result.seconds) == 3 and result.peak_bytes > 0
        assert (result.tokens_per_second is None) == (name in ("bert", "siamese", "tagger"))
    rows = end_to_end.rows_of(name, results)
    assert len(rows) == len(results) and all(
        row.count("|") == end_to_end.HEADER.split("\n")[0].count("|") for row in rows
    )


def test_writes_a_table_and_a_plot(tmp_path):
    end_to_end.main([*SMALL, "--models", "tagger", "--threads", "1", "--output", str(tmp_path)])
    assert "| tagger | fusewright |" in (tmp_path / "end_to_end.md").read_text()
    assert (tmp_path / "end_to_end.png").stat().st_size > 0
    with pytest.raises(SystemExit, match="--models is other"):
        end_to_end.main(["--models", "other"])
