from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtresnet.cli.main import main
from rtresnet.data.sources import open_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("train/a/1", "train/a/2", "train/b/1", "test/a/3", "test/b/2"):
        path = tmp_path / "photographs" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photographs"


def test_pack_says_what_it_made_and_how_it_is_used(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, record = tmp_path / "pack", tmp_path / "pack.json"
    assert main(["pack", str(folder), "--out", str(out), "--json", str(record)]) == 0
    printed, noted = capsys.readouterr()
    assert f"{out}: 5 images (train 3, test 2) of 2 classes" in printed
    assert f"next: rtresnet train --data shards:{out}" in printed
    assert noted == f"packing {folder}\n"
    result = json.loads(record.read_text())["result"]
    assert (result["images"], result["splits"], result["shards"], result["classes"]) == (
        5, {"train": 3, "test": 2}, 2, 2,
    )  # fmt: skip
    assert result["bytes"] == sum(path.stat().st_size for path in out.glob("*.tar"))
    assert open_source(result["data"]).fingerprint() == open_source(str(folder)).fingerprint()


@pytest.mark.parametrize(
    ("size", "shards"), [("1KB", 5), ("1KiB", 5), ("7 KB", 3), ("1GB", 2), ("2GiB", 2)]
)
def test_shards_are_as_large_as_asked_for(
    folder: Path, tmp_path: Path, size: str, shards: int
) -> None:
    out = tmp_path / "pack"
    assert main(["pack", str(folder), "--out", str(out), "--shard-size", size]) == 0
    assert len(list(out.glob("*.tar"))) == shards


@pytest.mark.parametrize("size", ["0MB", "512", "MB", "-1MB", "1.5GB", "5PB", "²MB"])
def test_a_size_that_is_none_is_refused(
    folder: Path, tmp_path: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pack"
    assert main(["pack", str(folder), "--out", str(out), f"--shard-size={size}"]) == 2
    assert f"--shard-size {size}: not a size; as in 512MB" in capsys.readouterr().err
    assert not out.exists()


def test_a_second_pack_needs_force(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pack", str(folder), "--out", str(tmp_path / "pack")]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "a pack already; replace it with --force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0


def test_a_killed_pack_is_told_and_begun_anew(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last image comes through a pipe that nobody writes to, so that the kill is in time."""
    last, out = folder / "test" / "b" / "3.jpg", tmp_path / "pack"
    content = (folder / "test" / "b" / "2.jpg").read_bytes()
    last.write_bytes(content)
    arguments = ["pack", str(folder), "--out", str(out), "--shard-size", "1KB"]
    # A pipe is no file, and would not be found: it takes the file's place once it was.
    code = (
        "import os, sys\n"
        "from rtresnet.workflows import pack as packing\n"
        "real = packing._images\n"
        "def images(files, root):\n"
        f"    if os.path.isfile({str(last)!r}):\n"
        f"        os.unlink({str(last)!r}); os.mkfifo({str(last)!r})\n"
        "    return real(files, root)\n"
        "packing._images = images\n"
        "from rtresnet.cli.main import main\n"
        f"sys.exit(main({arguments!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out.glob("train-*2.tar")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    last.unlink()
    last.write_bytes(content)
    left = {path.name for path in out.iterdir()}
    assert "unfinished" in left and "train-00000.tar" in left and "index.json" not in left

    assert main(["eval", "none.onnx", "--data", f"shards:{out}"]) == 2
    capsys.readouterr()
    with pytest.raises(Exception, match="packing was interrupted; run the same rtresnet pack"):
        open_source(f"shards:{out}")
    assert main(arguments) == 0
    assert open_source(f"shards:{out}").fingerprint() == open_source(str(folder)).fingerprint()
    assert not [path for path in out.iterdir() if path.name.startswith((".", "unfinished"))]
