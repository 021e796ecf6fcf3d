"""The HTML report: what it holds, and in a real browser that it sorts, filters, copies, and fits a phone."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest

from fusewright_bench import scaling
from fusewright_bench.report import charts, csv_file, html_page, json_file, markdown, plots, svg
from fusewright_bench.results import COPY, Absence, Results, Row, Study

needs_browser = pytest.mark.skipif(chromium.PROGRAM is None, reason="neither chromium nor google-chrome is on the PATH")

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "<script>alert('\"&')</script>"


def example() -> Results:
    """Two providers over four lengths, time growing by a power of 2 and 1, beside a failure and hostile texts."""
    rows = []
    for length in (128, 256, 512, 1024):
        for provider, backend, time_us in (
            ("fusewright", "cpu", 3.0 * length),
            ("torch", "torch", 0.02 * length**2),
            (COPY, "torch", 1.0),
        ):
            row = Row(
                op="attention", shape=f"1x{length}", sizes=[1, length], dtype="float32", mode="fwd", threads=1,
                provider=provider, backend=backend, reproduce=f"fusewright bench --shape 1x{length}", flops=length**2,
                bytes=4 * length, time_us=time_us, rounds=10, tflops=length**2 * 1e-6 / time_us, gbps=0.004,
                roofline_percent=50.0, roofline_limit="memory", memory_level="L2", peak_memory_bytes=4 * length,
            )  # fmt: skip
            if provider != COPY:
                ratio = 0.02 * length**2 / time_us
                row.baseline, row.ratio, row.interval, row.verdict = "torch", ratio, [ratio, ratio], "SAME"
            rows.append(row)
    rows[0].notes = ["other work took 0.5 processors"]
    rows.append(
        Row("softmax", HOSTILE, [1], "bfloat16", "both", 2, HOSTILE, "none", HOSTILE, 1, 1, failure=f"broken {HOSTILE}")
    )
    roofline = {
        "bandwidth": [{"bytes": 1 << 28, "threads": 1, "copy_gbps": 20.0, "read_gbps": 25.0}],
        "peak": [{"unit": "matrix", "dtype": "float32", "threads": 1, "gflops": 100.0}],
    }
    environment = {
        "device": "abacus", "cpu_model": "abacus", "cores": 2, "isa": None, "commit": None,
        "versions": {"torch": "3.0"},
    }  # fmt: skip
    study = Study("attention", "sequence length", {f"1x{length}": length for length in (128, 256, 512, 1024)})
    return Results(
        environment, "fusewright bench", rows, [Absence("quack", "absent", "pip install quack")], roofline, [study]
    )


def test_the_page_is_whole_and_nothing_in_it_escapes() -> None:
    page = html_page.render(example())
    assert HOSTILE not in page and page.count("<script>") == 1
    assert not re.search(r"""(src|href)=["'](?!#)""", page) and "http" not in page and "@import" not in page
    assert "interrupted" in page and "Failed rows: 1" in page and "pip install quack" in page and "~" in page
    assert "$" not in re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)


RESULTS = [path for path in sorted((ROOT / "benchmarks/results").glob("*/*.json")) if '"cases"' in path.read_text()]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_on_record_still_read_and_render(path: Path) -> None:
    page = html_page.render(json_file.read(path))
    assert "<table" in page and "nan" not in page.replace("nano", "")


def test_exponents_are_found() -> None:
    assert scaling.exponent([(x, 7.0 * x**1.5) for x in (1, 2, 4, 8)]) == pytest.approx(1.5)
    # An overhead that rules the small sizes does not count.
    assert scaling.exponent([(2.0**n, 100.0 + 4.0**n) for n in range(12)]) == pytest.approx(2.0, abs=0.05)
    assert scaling.exponent([(1, 1), (2, 2)]) is None and scaling.exponent([(1, 0), (2, 1), (4, 2)]) is None
    (lines,) = [line for line in scaling.lines(example()) if line[5] == "torch"]
    assert lines[-2:] == ["n^2.00", "n^1.00"] and "n^2.00" in markdown.render(example())


def test_every_chart_is_drawn_twice(tmp_path: Path) -> None:
    made = [*charts.scaling_charts(example()), *charts.roofline_charts(example())]
    assert [chart.title.split(",")[0] for chart in made] == ["Time", "Memory", "Roofline: float32"]
    for chart in made:
        drawn = svg.render(chart)
        assert drawn.count("<title>") == sum(len(series.points) for series in chart.series) and "nan" not in drawn
    plots.write(example(), tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == len(made)


def test_csv_has_a_line_per_row(tmp_path: Path) -> None:
    csv_file.write(example(), tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(example().cases) and lines[0]["notes"] == '["other work took 0.5 processors"]'
    assert float(lines[0]["time_us"]) == 384.0 and lines[-1]["time_us"] == "" and HOSTILE in lines[-1]["failure"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    folder = tmp_path_factory.mktemp("page")
    html_page.write(example(), folder / "report.html")
    with chromium.Browser(folder / "profile") as opened:
        opened.open(folder / "report.html")
        yield opened


TIMES = "[...document.querySelectorAll('table.results')[0].tBodies[0].rows].map(row => row.cells[5].textContent)"
SHOWN = "[...document.querySelectorAll('table.results tbody tr')].filter(row => row.offsetParent !== null).length"


@needs_browser
def test_a_click_or_a_key_on_a_title_sorts(browser: chromium.Browser) -> None:
    browser.resize(1280, 900)
    title = "table.results th:nth-child(6) button"
    browser.click(title)
    ascending = browser.evaluate(TIMES)
    assert ascending[:4] == ["1.00 us"] * 4 and ascending[-1] == "21.0 ms"
    browser.evaluate(f"document.querySelector('{title}').focus()")
    browser.press("Enter", 13)
    assert browser.evaluate(TIMES) == sorted(ascending, key=lambda text: -ascending.index(text))
    assert browser.evaluate("document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "descending"


@needs_browser
def test_filters_and_search_hide_rows(browser: chromium.Browser) -> None:
    everything = browser.evaluate(SHOWN)
    choose = "(() => { const f = document.querySelector('.filters'); f.elements.%s.value = '%s';"
    choose += " f.dispatchEvent(new Event('input')); })()"
    browser.evaluate(choose % ("provider", "torch"))
    assert (everything, browser.evaluate(SHOWN)) == (13, 4)
    assert browser.evaluate("document.querySelector('.filters output').value") == "4 of 13 rows"
    browser.evaluate(choose % ("text", "other work"))
    assert browser.evaluate(SHOWN) == 0
    browser.evaluate(choose % ("provider", ""))
    assert browser.evaluate(SHOWN) == 1
    browser.click(".filters button[type=reset]")
    browser.evaluate("new Promise(done => setTimeout(done, 20))")
    assert browser.evaluate(SHOWN) == 13


@needs_browser
def test_a_command_is_copied(browser: chromium.Browser) -> None:
    browser.evaluate("navigator.clipboard.writeText = async text => { window.copied = text; }")
    browser.click(".copy")
    assert browser.evaluate("window.copied").startswith("fusewright bench --shape")
    assert browser.evaluate("document.querySelector('.copy').textContent") == "copied"


@needs_browser
def test_a_phone_never_scrolls_sideways(browser: chromium.Browser) -> None:
    browser.resize(360, 740, mobile=True)
    width = browser.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    browser.resize(1280, 900)
    assert width == [360, 360]


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(browser: chromium.Browser, scheme: str) -> None:
    browser.prefer(scheme)
    contrast = browser.evaluate(
        """(() => {
          const light = colour => {
            const [r, g, b] = colour.match(/\\d+/g).map(v => v / 255).map(
              v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const paper = light(getComputedStyle(document.body).backgroundColor);
          const ratio = one => { const [a, b] = [one, paper].sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); };
          const texts = ['body', '.legend', 'tr.ours .provider', '.detail'].map(s => document.querySelector(s));
          return [paper, Math.min(...texts.map(e => ratio(light(getComputedStyle(e).color))))];
        })()"""
    )
    assert (contrast[0] < 0.1) == (scheme == "dark") and contrast[1] >= 4.5
