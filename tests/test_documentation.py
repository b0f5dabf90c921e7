"""Documentation: printed output, examples, links, options, docstrings and plain language."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

import rtresnet
from rtresnet.cli.commands import SUMMARIES
from rtresnet.cli.main import cli
from rtresnet.core import hardware

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NEEDED = ("tensorrt_rtx", "onnxruntime", "sklearn", "matplotlib")
PROCESSOR = re.compile(r".*, \d+ cores; ")
# Phrases that readers of English documentation stumble over, each with a plain alternative. They
# are expressions that no other project's documentation uses (see "Conventions" in CONTRIBUTING.md);
# common words are not banned. Add a pattern only if it is wrong in every sentence.
IDIOMS = {
    r"anew": "again",
    r"likewise": "also",
    r"beside": "next to, with",
    r"hand one another": "exchange",
    r"told apart|told of": "distinguished, reported",
    r"all the same": "nevertheless",
    r"what held": "the result",
    r"came undivided": "has no split",
    r"go on with an": "resume",
    r"judge the int8": "check the INT8 file",
    r"lay a plan": "create a repository",
    r"bound the latency on": "estimate the minimum latency on",
    r"chance alone": "expected from queueing theory",
    r"nobody('s| knows| reads| is told)": "name the component, or 'unknown'",
    r"does not raise|besides the weights": "say what happens",
    r"what batch norm knew|rounding is trained": "describe the computation",
    r"of everything random": "random seed",
    r"so many requests": "N requests",
    r"make one page": "create a report",
    r"what becomes of": "the result of",
    r"deliberately unaware|knows? nothing of|of which nothing is known": "does not use, is unknown",
    r"for the moment, the|no layers to be told": "state the condition",
    r"(make|makes) (it|one) (again|with)": "create it again with",
    r"says so": "reports this",
    r"nets nets|the the": "a repeated word",
}
OLD_NAMES = re.compile(
    r"\b(EnvironmentLack|GateMissed|UnknownName|Overloaded|cpu_form|whereabouts|"
    r"all_told|first_told|faithful)\b"
)

VAGUE = {"found", "held", "seen", "told", "there", "said", "asked", "wanted", "taken"}
"""Names that say nothing about a value."""

needs_all = pytest.mark.skipif(
    not all(map(hardware.installed, NEEDED)), reason=f"needs {', '.join(NEEDED)}"
)


@pytest.fixture(scope="module")
def docs() -> object:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return importlib.import_module("docs")


def first_words(text: str) -> set[str]:
    """Return the first word of each line, which does not depend on its figures.

    Rules of tables are left out, because their length depends on the figures, lines that begin with
    the name of a processor. Whether training uses bf16 depends on the processor too.
    """
    lines = (line for line in text.splitlines() if not PROCESSOR.match(line))
    words = {line.split()[0].strip(":") for line in lines if line.strip()}
    words = {
        "precision" if word in ("precision=bf16", "precision=fp32") else word for word in words
    }
    return {word for word in words if word.strip("─")}


@needs_all
@pytest.mark.slow
@pytest.mark.parametrize("which", ["readme", "docs"])
def test_console_blocks_print_what_is_shown(which: str, docs: object, tmp_path: Path) -> None:
    docs.save_scans(tmp_path / "scans")  # type: ignore[attr-defined]
    files = [ROOT / "README.md"] if which == "readme" else docs.pages()  # type: ignore[attr-defined]
    count = 0
    for file in files:
        for command, shown in docs.commands(file.read_text()):  # type: ignore[attr-defined]
            printed = docs.run(command, tmp_path)  # type: ignore[attr-defined]
            missing = first_words(shown) - first_words(printed)
            assert not missing, f"{file.name}: {command} no longer prints lines about {missing}"
            count += 1
    assert count >= 5


@needs_all
@pytest.mark.slow
def test_examples_run(tmp_path: Path) -> None:
    scripts = ["pipeline.py", *sorted(p.name for p in (ROOT / "examples").glob("*.py"))]
    scripts.remove("ray_serve.py")  # tests/serving/test_ray_serve.py runs it
    for name in dict.fromkeys(scripts):  # the others use what the first one writes
        done = subprocess.run(
            [sys.executable, ROOT / "examples" / name], cwd=tmp_path, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") >= 2, name


@needs_all
@pytest.mark.slow
def test_quickstart_reaches_its_accuracy_and_writes_its_page(docs: object, tmp_path: Path) -> None:
    docs.run("rtresnet quickstart --seconds 0.3", tmp_path)  # type: ignore[attr-defined]
    out = tmp_path / "runs" / "quickstart"
    result = json.loads((out / "quickstart.json").read_text())["result"]
    assert result["train"]["measured"]["test_top1"] >= 97
    assert [entry["precision"] for entry in result["export"]["onnx"]] == ["fp32", "fp16", "int8"]
    assert [plan["attested"]["dtypes"] for plan in result["export"]["plans"]] == [
        {"Float": 19}, {"Half": 19}, {"Int8": 19},
    ]  # fmt: skip
    assert all(result["compare"][p]["agreement"] > 0.98 for p in ("fp32", "fp16", "int8"))
    page = (out / "index.html").read_text()
    assert page.count("<svg") == 2 and "http://" not in re.sub(r'xmlns\S*="[^"]*"', "", page)
    assert len(page) < 2_000_000


def test_readme_is_short_and_names_every_command() -> None:
    assert len(README.splitlines()) <= 250
    for command in SUMMARIES:
        assert f"rtresnet {command}" in README, command


def test_links_between_pages_exist(docs: object) -> None:
    for file in [ROOT / "README.md", *docs.pages()]:  # type: ignore[attr-defined]
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_files_inlined_into_the_readme_are_current(docs: object) -> None:
    assert docs.static(README) == README  # type: ignore[attr-defined]


def test_page_for_a_package_index_has_no_pictures_and_no_links_into_the_repository(
    docs: object,
) -> None:
    markdown = pytest.importorskip("markdown_it")
    text = docs.package_page(README)  # type: ignore[attr-defined]
    inline = [t for token in markdown.MarkdownIt().parse(text) for t in token.children or ()]
    assert not [token for token in inline if token.type == "image"]
    links = [token.attrs["href"] for token in inline if token.type == "link_open"]
    assert links and all(link.startswith("https://") for link in links)
    assert text.count("```") == README.count("```") - 2  # without the tree of the code


def test_reference_pages_and_schemas_are_those_of_the_code(docs: object) -> None:
    pages = docs.reference_pages()  # type: ignore[attr-defined]
    old = [path.name for path, text in pages.items() if path.read_text() != text]
    assert not old, f"run: python benchmarks/docs.py --static ({', '.join(old)})"


def commands(group: click.Group, path: str = "rtresnet") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{path} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")


ALL = dict(commands(cli))


@pytest.mark.parametrize("name", ALL)
def test_help_has_an_example_and_every_option_a_sentence_and_its_default(name: str) -> None:
    command = ALL[name]
    assert name in (command.epilog or ""), "no example in the epilog"
    for option in command.params:
        if not isinstance(option, click.Option) or "--help" in option.opts:
            continue
        record = option.get_help_record(click.Context(command))
        if record is None:  # hidden
            continue
        text = record[1]
        assert re.match(r"[A-Za-z`\"'\d]", text), f"{option.opts}: {text}"
        assert not text.startswith(("Of ", "For each", "See ")), f"{option.opts}: {text}"
        assert "default: " in text or option.required, f"{option.opts} shows no default: {text}"


@pytest.mark.parametrize("name", [n for n in rtresnet.__all__ if n != "__version__"])
def test_public_names_are_documented(name: str) -> None:
    value = getattr(rtresnet, name)
    text = inspect.getdoc(value) or ""
    assert text, f"{name} has no docstring"
    if inspect.isfunction(value):
        parameters = inspect.signature(value).parameters
        assert not parameters or "Args:" in text, f"{name}: no Args"
        # Without input there is nothing that can be wrong with it.
        assert not parameters or "Raises:" in text, f"{name}: no Raises"
        returned = str(inspect.signature(value).return_annotation)
        assert returned == "None" or re.search(r"^(Returns|Yields):", text, re.M), (
            f"{name}: no Returns"
        )
        assert "dict[str, Any]" not in returned, name


def readable() -> list[Path]:
    """Return every file of this project that a person reads."""
    folders = ("rtresnet", "tests", "benchmarks", "docs", "examples")
    files = [p for f in folders for s in ("py", "md", "yml") for p in (ROOT / f).rglob(f"*.{s}")]
    return [*files, *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]


def test_texts_have_no_private_idioms_or_old_names() -> None:
    any_idiom = re.compile(rf"\b({'|'.join(IDIOMS)})\b", re.I)
    problems = []
    for path in readable():
        if path == Path(__file__) or {"results", "golden"} & set(path.parts):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            place = f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            match = any_idiom.search(line)
            if match:
                (plain, *_) = (
                    p for idiom, p in IDIOMS.items() if re.fullmatch(idiom, match[1], re.I)
                )
                problems.append(f"{place}\n    instead of {match[1]!r} write: {plain}")
            if path.suffix == ".py" and OLD_NAMES.search(line):
                problems.append(f"{place}\n    use the present name: git log -S NAME")
    assert not problems, "\n".join(problems)


def test_names_say_what_a_value_is() -> None:
    problems = []
    for folder in ("rtresnet", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            fields = {  # of files and results: their names stay
                id(entry.target)
                for node in nodes if isinstance(node, ast.ClassDef)
                for entry in node.body if isinstance(entry, ast.AnnAssign)
            }  # fmt: skip
            for node in nodes:
                name = (
                    node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                    else node.arg if isinstance(node, ast.arg)
                    else getattr(node, "name", None)
                )  # fmt: skip
                if name in VAGUE and id(node) not in fields:
                    line = getattr(node, "lineno", 0)
                    problems.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not problems, "\n".join(problems)


def test_module_docstrings_have_a_summary_line_that_ends_with_a_period() -> None:
    problems = []
    for path in (ROOT / "rtresnet").rglob("*.py"):
        summary, *rest = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines() or [""]
        if not summary.endswith(".") or (rest and rest[0]):
            problems.append(f"{path.relative_to(ROOT)}: {summary or 'no docstring'}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("command", "name", "alias"),
    [("predict", "--min-score", "--least-score"), ("profile", "--remeasure-peak", "--new-roof")],
)
def test_renamed_option_keeps_its_old_name_as_a_hidden_alias(
    command: str, name: str, alias: str
) -> None:
    entry = ALL[f"rtresnet {command}"]
    context = click.Context(entry)
    (option,) = (param for param in entry.params if name in param.opts)
    assert isinstance(option, click.Option) and alias in option.opts
    record = option.get_help_record(context)
    assert record is not None and name in record[0] and alias not in record[0]


@pytest.mark.parametrize(
    ("words", "typed", "expected"),
    [
        ([], "qu", {"quantize", "quickstart"}),
        (["eval", "--protocol"], "", {"center", "10-crop", "dense"}),
        (["eval"], "--rep", {"--report"}),
    ],
)
def test_shell_completion_offers_commands_options_and_choices(
    words: list[str], typed: str, expected: set[str]
) -> None:
    completion = ShellComplete(cli, {}, "rtresnet", "_RTRESNET_COMPLETE")
    assert {item.value for item in completion.get_completions(words, typed)} == expected
