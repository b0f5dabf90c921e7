"""Runs the commands in README.md and docs/, and writes what they print into these files.

    python benchmarks/docs.py                # everything
    python benchmarks/docs.py --static       # only tables and examples

Every console block, table and example in the documentation comes from here.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from common import RESULTS
from PIL import Image
from sklearn.datasets import load_digits

import rtresnet
from rtresnet.core.serialization import json_schema

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser import Browser, wait_for  # noqa: E402

README = ROOT / "README.md"
DOCS = ROOT / "docs"
TABLES = {"engines table": "engines"}  # marker in the README: file in benchmarks/results
EXAMPLES = ("pipeline.py", "serve_threads.py")
# "console commands": the commands run, and their output is not shown
BLOCK = re.compile(r"```(console(?: commands)?)\n(.*?)```", re.DOTALL)
SCREENSHOTS = {
    # name: (page below the session's folder, width, height)
    "report": ("report.html", 1200, 830),
    "training": ("runs/resnet20-digits/index.html", 1200, 760),
    "quickstart": ("runs/quickstart/index.html", 1200, 760),
    "evaluation": ("evaluation/index.html", 1200, 1150),
    "data": ("data/index.html", 1200, 1400),
}


def pages() -> list[Path]:
    """Return the documentation's pages in the order of the navigation."""
    names = re.findall(r": ([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    return [DOCS / name for name in names]


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Return (command, what it prints) of every console block."""
    for _, block in BLOCK.findall(text):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            yield command, shown


def run(command: str, folder: Path) -> str:
    """Run `rtresnet ...`; return both streams as a terminal shows them.

    Raises:
        RuntimeError: The exit code is not 0.
    """
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], cwd=folder, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stdout}")
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip("\n")


def save_scans(folder: Path) -> None:
    """Write what the session's `predict` reads: 20 of scikit-learn's scans as image files."""
    folder.mkdir()
    for number, scan in enumerate(load_digits().images[:20]):
        Image.fromarray((scan * 15.9).astype("uint8")).save(folder / f"{number:02d}.png")


def with_output(text: str, folder: Path) -> str:
    """Return the text with every console block's commands run in `folder`, and their output."""

    def replace(block: re.Match[str]) -> str:
        parts = []
        for command, _ in commands(block[0]):
            output = run(command, folder)
            parts.append(f"$ {command}\n" + (f"{output}\n" if block[1] == "console" else ""))
        return f"```{block[1]}\n" + "".join(parts) + "```"

    return BLOCK.sub(replace, text)


def between(text: str, marker: str, content: str) -> str:
    """Replace what stands between `<!-- marker -->` and `<!-- end marker -->`."""
    begin, end = f"<!-- {marker} -->", f"<!-- end {marker} -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{content.strip()}\n{end}{rest.partition(end)[2]}"


def static(text: str) -> str:
    """Return the README with the tables of benchmarks/results and the examples."""
    for marker, file in TABLES.items():
        text = between(text, marker, (RESULTS / f"{file}.md").read_text())
    for name in EXAMPLES:
        code = (ROOT / "examples" / name).read_text()
        text = between(text, f"example {name}", f"```python\n{code}```")
    return text


API_HEAD = """# Python API

Import everything from `rtresnet`, for example `rtresnet.build`. The headings below show the modules
that define the names; these can change. `import rtresnet` loads no other module; each name is
loaded on first use. Configs and results are frozen dataclasses. An invalid config raises
`InputError` when it is created.
"""
LINT_HEAD = """# Lint rules

`rtresnet lint FILE.onnx` checks a quantized ONNX file from any tool for problems in TensorRT. It
needs neither a GPU nor TensorRT.

- Error: TensorRT rejects the file, computes different values than ONNX Runtime, or runs a layer in
  float although the file specifies INT8.
- Warning: the file loses speed or accuracy.

The exit code is 1 if there is an error or a warning. `--fix OUT.onnx` repairs what can be repaired
without changing one bit of the outputs.

| rule | severity | problem | fix |
|---|---|---|---|"""


def reference_pages() -> dict[Path, str]:
    """Return pages and schemas that are made from the code, by path."""
    files = {
        DOCS / "reference" / "api.md": _api_page(),
        DOCS / "reference" / "lint.md": _lint_page(),
        DOCS / "generated" / "gpu-rates.md": _rates_table(),
        DOCS / "generated" / "fp8-modelopt.md": _fp8_table(),
        DOCS / "generated" / "package.md": package_page(README.read_text()),
    }
    for name in rtresnet.__all__:
        if name.endswith("Result") or name == "Sidecar":
            schema = json_schema(getattr(rtresnet, name))
            files[DOCS / "schema" / f"{name}.json"] = json.dumps(schema, indent=1) + "\n"
    return files


API_GROUPS = {
    "Load and run": ("runtime.session", "workflows.loading", "runtime.batcher", "runtime.cuda",
                     "core.preprocess", "workflows.input_spec"),
    "Train": ("workflows.data", "workflows.pack", "workflows.train",
              "workflows.train_job", "workflows.weights"),
    "Export and quantize": ("workflows.export", "workflows.adopt", "workflows.quantize",
                            "workflows.lint", "workflows.embedded"),
    "Build": ("workflows.build",),
    "Evaluate": ("workflows.evaluate", "workflows.compare", "workflows.check"),
    "Predict": ("workflows.predict", "workflows.predictor", "workflows.explain"),
    "Benchmark": ("workflows.benchmark", "workflows.benchmark_search", "workflows.profile",
                  "workflows.estimate", "workflows.advisor"),
    "Deploy": ("workflows.serve", "serving.config", "workflows.package",
               "workflows.package_server"),
    "Inspect and report": ("workflows.inspect", "core.sidecar", "core.artifacts",
                           "workflows.models", "workflows.doctor", "reporting.report"),
    "Studies and quickstart": ("workflows.study", "workflows.study_analysis",
                               "workflows.study_detection",
                               "workflows.quickstart"),
    "Detection": ("workflows.detect_train", "workflows.detect_evaluate",
                  "workflows.detect_predict", "workflows.detect_compare", "workflows.detect_check"),
    "Progress and errors": ("core.reporter", "core.errors"),
}  # fmt: skip


def _api_page() -> str:
    assert {m for group in API_GROUPS.values() for m in group} == set(rtresnet._MODULES)
    lines = API_HEAD.splitlines()
    for group, modules in API_GROUPS.items():
        lines += ["", f"## {group}", ""]
        for module in modules:
            lines += [f"::: rtresnet.{module}.{name}" for name in rtresnet._MODULES[module].split()]
    return "\n".join(lines) + "\n"


def package_page(readme: str) -> str:
    """Return the README for a package index, without pictures and links into the repository.

    Leaves out pictures, markers, and lines that are only a link; of a link to a file of the
    repository it keeps the text.
    """
    text = re.sub(r"^## Links\n.*?(?=^rtresnet implements)", "", readme, flags=re.M | re.S)
    text = re.sub(r"^(!\[[^\]]*\]\([^)]*\)|<!--.*-->)\n+", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\[[^\]]*\]\([^)]*\)\.\n", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


def _rates_table() -> str:
    from rtresnet.bench.roofline import GPUS

    rows = ["| GPU | FP32 | FP16 | BF16 | INT8 | FP8 | GB/s | L2 MB | source | parts |",
            "|---" * 10 + "|"]  # fmt: skip
    for gpu in GPUS:
        figures = (gpu.fp32, gpu.fp16, gpu.bf16, gpu.int8, gpu.fp8, gpu.bandwidth, gpu.l2)
        cells = ["-" if figure is None else f"{figure:,g}" for figure in figures]
        rows.append(f"| {' | '.join([gpu.name, *cells, gpu.source, str(gpu.parts)])} |")
    return "\n".join(rows) + "\n"


def _fp8_table() -> str:
    """Return the agreement of FP8 files by rtresnet and by ModelOpt, per net and images."""
    columns = {
        "rtresnet, auto": "rtresnet, all but the first",
        "rtresnet, auto, from 32 channels": "rtresnet, `--fp8-min-channels 32`",
        "ModelOpt, max": "ModelOpt, `max`",
        "ModelOpt, entropy": "ModelOpt, `entropy`",
    }
    agreement: dict[tuple[str, int], dict[str, float]] = {}
    for entry in json.loads((RESULTS / "quantize-fp8.json").read_text())["results"]:
        agreement.setdefault((entry["net"], entry["n"]), {})[entry["by"]] = entry["agreement"]
    rows = [f"| net | images | {' | '.join(columns.values())} |", "|---" * 6 + "|"]
    for (net, n), values in agreement.items():
        cells = " | ".join(f"{values[by]:.2f} %" for by in columns)
        rows.append(f"| {net} | {n:,} | {cells} |")
    return "\n".join(rows) + "\n"


def _lint_page() -> str:
    from rtresnet.quantization.lint_rules import RULES

    rows = [
        f"| `{rule}` | {severity} | {problem} | {fix} |"
        for rule, (severity, problem, fix) in RULES.items()
    ]
    return "\n".join([*LINT_HEAD.splitlines(), *rows]) + "\n"


def as_in_a_terminal(line: str) -> str:
    """Wrap a line of text at 80 columns."""
    return "\n".join(textwrap.wrap(line, 80)) if len(line) > 80 else line


def chromium() -> str:
    """Return the path of Chromium."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("chromium is not installed: apt-get install chromium")
    return path


def picture(browser: Browser, url: str, width: int, height: int) -> None:
    """Open a page of this size."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.call("Emulation.setDeviceMetricsOverride", **size)
    browser.call("Emulation.setScrollbarsHidden", hidden=True)
    browser.call("Page.navigate", url=url)
    wait_for(lambda: browser.evaluate("document.readyState") == "complete")


def save_picture(browser: Browser, name: str) -> None:
    """Save what the browser shows as a picture of the documentation."""
    data = browser.call("Page.captureScreenshot", format="png")["data"]
    (DOCS / "assets" / f"{name}.png").write_bytes(base64.b64decode(data))


def show_server(browser: Browser, folder: Path) -> None:
    """Open the page of a running server, and classify an image on it."""
    image = folder / "digit.png"
    with Image.open(folder / "scans" / "03.png") as scan:
        scan.resize((256, 256), Image.Resampling.NEAREST).save(image)
    command = [sys.executable, "-m", "rtresnet", "serve", "engines/resnet20-int8.onnx", "--no-grpc"]
    url = "http://127.0.0.1:8000"
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, cwd=folder, stdout=quiet, stderr=quiet)

    def answers() -> bool:
        try:
            return bool(urllib.request.urlopen(f"{url}/v2/health/ready").status == 200)
        except OSError:
            return False

    try:
        wait_for(answers)
        for _ in range(200):  # so that the page has a rate and a histogram
            urllib.request.urlopen(f"{url}/v1/classify", image.read_bytes()).read()
        picture(browser, url, 1100, 1120)
        wait_for(lambda: bool(browser.evaluate("document.querySelector('#chain').innerText")))
        browser.choose_file("#file", image)
        shown = "document.querySelector('#classes').innerText"
        wait_for(lambda: "%" in (browser.evaluate(shown) or ""))
        wait_for(lambda: browser.evaluate("document.querySelector('#total').innerText") == "201")
        save_picture(browser, "serve")
    finally:
        server.terminate()
        server.wait()


def take_screenshots(folder: Path) -> None:
    """Take the documentation's pictures of the pages in a session's folder."""
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(chromium(), Path(profile))
        try:
            for name, (page, width, height) in SCREENSHOTS.items():
                picture(browser, (folder / page).as_uri(), width, height)
                save_picture(browser, name)
            show_server(browser, folder)
        finally:
            browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--static", action="store_true", help="run no command")
    options = parser.parse_args()
    readme = static(README.read_text())
    if not options.static:
        with tempfile.TemporaryDirectory() as folder:
            readme = with_output(readme, Path(folder))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_scans(folder / "scans")
            for page in pages():
                text = page.read_text()
                if "```console" in text:
                    page.write_text(with_output(text, folder))
            shown = run("rtresnet quickstart", folder)
            shown = shown[shown.index(" precision  ONNX") :]
            table = "```text\n" + "\n".join(map(as_in_a_terminal, shown.splitlines())) + "\n```\n"
            readme = between(readme, "quickstart table", table)
            (DOCS / "generated").mkdir(exist_ok=True)
            (DOCS / "generated" / "quickstart.md").write_text(table)
            take_screenshots(folder)
    README.write_text(readme)
    for path, text in reference_pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
