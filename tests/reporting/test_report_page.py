from __future__ import annotations

import csv
import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from rtresnet.cli.main import main
from rtresnet.reporting import pages, plots, report, report_tables, results
from rtresnet.reporting.tables import DataTable
from tests.reporting.conftest import measured_in, searched

PHONE = 390


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the files that `measured` holds."""
    return report.html(results.gather(measured_in(tmp_path_factory.mktemp("measured"))))


def marks(text: str, name: str) -> list[str]:
    return re.findall(rf'id="({name}-\d+(?:-\d+)?)"', text)


def test_plots_have_a_mark_for_every_datum(text: str) -> None:
    assert marks(text, "artifact") == [f"artifact-{index}" for index in range(4)]
    assert len(marks(text, "tail")) == len(marks(text, "histogram")) == 4
    assert len(marks(text, "batch")) == 8  # latency and throughput
    assert marks(text, "stage") == ["stage-0-0", "stage-0-1", "stage-1-0", "stage-1-1"]


def test_the_values_are_those_of_the_files(text: str, measured: list[Path]) -> None:
    gathered = results.gather(measured)
    for _, entry in gathered.timings:
        for name in ("median", "p99", "images_per_second"):
            assert f'data-v="{entry["latency"][name]!r}"' in text
    for value in ("91.50", "91.25", "90.00", "80.00", "98.44"):
        assert f">{value}</td>" in text
    assert 'data-v="98.4375"' in text


def test_the_summary_says_what_is_gained_and_lost(measured: list[Path]) -> None:
    gathered = results.gather(measured)
    lines = report_tables.summary(gathered)
    assert len(lines) == 3
    assert "1.60 times as fast as net-fp32.onnx, with -0.25 points of top-1" in lines[0]
    assert "2.67 times as fast as net-fp32.onnx, with -1.50 points of top-1" in lines[1]


def test_summary_calls_a_difference_only_what_bench_calls_one(
    measured: list[Path], tmp_path: Path
) -> None:
    """A ratio of 1.02 within the noise is no gain; bench and the page must agree on that."""
    for path in measured:
        document = json.loads(path.read_text())
        if document["verb"] != "bench":
            continue
        for entry in document["result"]["results"]:
            verdict = "no difference shown" if "fp16" in entry["measured"] else "faster"
            entry["comparison"] = {"verdict": verdict, "low": 0.99, "high": 1.02}
            entry["speed"] = 1.0 if "fp32" in entry["measured"] else entry["speed"]
        path.write_text(json.dumps(document))
    lines = report_tables.summary(results.gather(measured))
    assert "no difference shown from net-fp32.onnx" in lines[0]
    assert "times as fast" not in lines[0] and "times as fast" in lines[1]


def test_it_is_small_self_contained_and_escaped(text: str) -> None:
    assert len(text) < 2_000_000
    assert set(re.findall(r'(?:src|href)="([^"#]*)"', text)) <= {"data:,"}
    assert not re.search(r"https?://", re.sub(r'xmlns\S*="[^"]*"', "", text))
    assert "a&lt;b&gt;.onnx" in text and "a<b>" not in text
    assert "/somewhere/else" not in text and "npz:images.npz" in text


def test_html_dollar_signs_in_names_are_no_formula(measured: list[Path], tmp_path: Path) -> None:
    for path in measured:
        path.write_text(path.read_text().replace("net-", r"$\\bad$-"))
    page = report.html(results.gather(measured))
    assert page.count(r"$\bad$-fp32.onnx (n=200)") == 1  # a label of a figure


def test_tradeoff_has_its_legend_outside_the_axes(
    measured: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    svg = plots.svg
    monkeypatch.setattr(
        plots, "svg", lambda figure, label: drawn.append(figure) or svg(figure, label)
    )
    plots.tradeoff(results.gather(measured), 1)
    ((axes,), (legend,)) = drawn[0].axes, drawn[0].legends
    assert axes.get_legend() is None
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_the_same_files_give_the_same_page(measured: list[Path]) -> None:
    assert report.html(results.gather(measured)) == report.html(results.gather(measured))


def test_latency_alone_makes_a_page_too(measured: list[Path]) -> None:
    gathered = results.gather(measured[:1])
    text = report.html(gathered)
    assert not marks(text, "artifact") and marks(text, "tail")
    assert any("Accuracy is unknown" in line for line in report_tables.remarks(gathered))


def test_searches_have_their_curve_and_their_answer(
    measured: list[Path], write: Callable[..., Path], browser: Callable[..., str]
) -> None:
    files = [
        write("bench-find", searched(*kind), kind[0]) for kind in (("batch", 4), ("qps", None))
    ]
    gathered = results.gather([*measured, *files])
    text = report.html(gathered)
    assert marks(text, "search") == ["search-0", "search-1"] * 2  # a figure a kind of load
    assert "images per batch" in text and "requests per second" in text
    rows = report_tables.tables(gathered)["searches"].rows
    assert rows[0] == ("net-fp32.onnx", "images per batch", 10.0, 4, 8.75, 125.5, 100)
    assert rows[2] == ("net-fp32.onnx", "requests/s", 10.0, None, None, None, None)
    assert "### Largest load within a latency bound" in report.markdown(gathered)
    assert "other processes used 1.50 of 4 cores" in gathered.notes
    assert browser(text).count("<svg") == text.count("<svg")
    alone = report.html(results.gather(files))
    assert marks(alone, "search") and "net-int8.onnx" in alone


def test_artifacts_alone_make_a_page_too(engines: Path) -> None:
    text = report.html(results.gather([engines]))
    assert "resnet8-int8.onnx" in text and "checkpoint" in text and "<svg" not in text


def test_markdown_has_the_same_tables(measured: list[Path]) -> None:
    gathered = results.gather(measured)
    text = report.markdown(gathered)
    for table in report_tables.tables(gathered).values():
        assert f"### {table.title}" in text
    rows = [line for line in text.splitlines() if line.startswith("| net-int8.onnx")]
    assert any("| 90.00 |" in row and "| 98.44 |" in row for row in rows)
    widths = {row.count(" | ") for row in rows if "98.44" in row}
    (heading,) = [line for line in text.splitlines() if line.startswith("| artifact | precision")]
    assert widths == {heading.count(" | ")}
    table = DataTable(headings=["a|b"], rows=[["<x>|y"]])
    assert pages.markdown(table) == "| a\\|b |\n|---|\n| &lt;x>\\|y |"


def test_a_browser_renders_it_and_copies_its_tables(text: str, browser: Callable[..., str]) -> None:
    probe = """<script>
    const report = document.createElement("pre");
    report.id = "report";
    report.textContent = csv(document.querySelector("table"));
    report.dataset.svgs = document.querySelectorAll("svg").length;
    report.dataset.shown = [...document.querySelectorAll("svg")]
      .filter(svg => svg.getBoundingClientRect().height > 50).length;
    for (const name of ["artifact", "tail", "histogram", "batch", "stage"])
      report.dataset[name] = [...document.querySelectorAll(`svg [id^="${name}-"]`)]
        .filter(mark => mark.getBoundingClientRect().width > 0).length;
    report.dataset.buttons = [...document.querySelectorAll("button.copy")]
      .filter(button => getComputedStyle(button).display !== "none").length;
    document.body.append(report);
    </script></body>"""
    dom = browser(text.replace("</body>", probe))
    (report,) = re.findall(r'<pre id="report"([^>]*)>(.*?)</pre>', dom, re.DOTALL)
    figures = dict(re.findall(r'data-(\w+)="(\d+)"', report[0]))
    assert figures["svgs"] == figures["shown"] == "6"
    drawn = {
        name: int(figures[name]) for name in ("artifact", "tail", "histogram", "batch", "stage")
    }
    assert drawn == {"artifact": 4, "tail": 4, "histogram": 4, "batch": 8, "stage": 4}
    assert int(figures["buttons"]) == text.count('class="copy"') > 2
    lines = html.unescape(report[1]).splitlines()
    assert lines[0].startswith("artifact,precision,top-1 %")
    assert '"ms, batch 1"' in lines[0]
    assert len(lines) == 5 and lines[3].startswith("net-int8.onnx,int8,90.0,846,98.4375,")


@pytest.mark.parametrize("width", [PHONE, 320, 768])
def test_nothing_sticks_out_of_a_phone(width: int, text: str, browser: Callable[..., str]) -> None:
    # A window cannot be made as narrow as a phone, but a frame can.
    host = (
        f'<body><iframe style="border:0;width:{width}px;height:800px" '
        f'srcdoc="{html.escape(text)}"></iframe><script>onload = () => {{'
        'const page = document.querySelector("iframe").contentDocument.documentElement;'
        'document.body.dataset.measured = page.scrollWidth + " of " + page.clientWidth;'
        "}</script></body>"
    )
    assert f'data-measured="{width} of {width}"' in browser(host)


LUMINANCE = """<script>
const channel = value =>
  (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const luminance = color => {
  const [r, g, b] = color.match(/[0-9.]+/g).map(Number).map(channel);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const style = getComputedStyle(document.body);
const [text, back] = [luminance(style.color), luminance(style.backgroundColor)];
document.body.dataset.dark = back < 0.1;
document.body.dataset.contrast =
  ((Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05)).toFixed(1);
</script></body>"""


@pytest.mark.parametrize("dark", [True, False])
def test_it_is_readable_in_dark_mode_and_in_light(
    dark: bool, text: str, browser: Callable[..., str]
) -> None:
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    dom = browser(text.replace("</body>", LUMINANCE), scheme)
    assert f'data-dark="{str(dark).lower()}"' in dom
    (contrast,) = re.findall(r'data-contrast="([0-9.]+)"', dom)
    assert float(contrast) > 7  # WCAG 2.2, AAA for text


def test_it_prints(text: str, browser: Callable[..., str], tmp_path: Path) -> None:
    paper = tmp_path / "page.pdf"
    browser(text, f"--print-to-pdf={paper}")
    data = paper.read_bytes()
    pages = len(re.findall(rb"/Type\s*/Page\b", data))
    assert data.startswith(b"%PDF") and 1 <= pages <= 12


def test_the_page_of_a_real_nets_three_precisions_shows_their_numbers(
    engines: Path,
    tints: str,
    tmp_path: Path,
    browser: Callable[..., str],
    brief_measurements: None,
) -> None:
    files = [str(engines / f"resnet8{part}.onnx") for part in ("", "-fp16", "-int8")]
    bench, out = tmp_path / "bench.json", tmp_path / "report.html"
    accuracy = [tmp_path / f"{number}.json" for number in range(3)]
    assert main(["bench", *files, "--queries", "60", "--json", str(bench)]) == 0
    for file, place in zip(files, accuracy, strict=True):
        assert main(["eval", file, "--data", tints, "--json", str(place)]) == 0
    profile = tmp_path / "profile.json"
    assert main(["profile", files[0], "--seconds", "0.1", "--json", str(profile)]) == 0
    arguments = [str(engines), str(bench), *map(str, accuracy), str(profile)]
    assert main(["report", *arguments, "--out", str(out)]) == 0
    page = out.read_text()
    assert len(page) < 2_000_000
    probe = """<script>
    const report = document.createElement("pre");
    report.id = "report";
    report.textContent = csv(document.querySelector("table"));
    document.body.append(report);
    </script></body>"""
    dom = browser(page.replace("</body>", probe))
    (text,) = re.findall(r'<pre id="report">(.*?)</pre>', dom, re.DOTALL)
    rows = {row["artifact"]: row for row in csv.DictReader(html.unescape(text).splitlines())}
    results = json.loads(bench.read_text())["result"]["results"]
    for entry in results:
        assert f'data-v="{entry["latency"]["median"]!r}"' in dom
        if entry["batch"] == 1:
            shown = rows[Path(entry["measured"]).name]["ms, batch 1"]
            assert float(shown) == pytest.approx(entry["latency"]["median"])
    for file, place in zip(files, accuracy, strict=True):
        reference = json.loads(place.read_text())["result"]["top1_percent"]
        assert float(rows[Path(file).name]["top-1 %"]) == pytest.approx(reference)
    assert len(re.findall(r'id="artifact-\d+"', dom)) == 3
