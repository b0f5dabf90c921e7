from __future__ import annotations

import errno
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtresnet.core import atomic_io
from rtresnet.core.errors import DataError, InputError
from rtresnet.core.preprocess import UINT8, Preprocess
from rtresnet.data import loader, shards
from rtresnet.data.decode import CorruptImage
from rtresnet.data.shards import PackIndex
from rtresnet.data.sources import Source, open_source
from rtresnet.workflows import pack as packing
from rtresnet.workflows.pack import PackConfig

STRANGE = ("dogs/new\nline.jpg", "dogs/" + os.fsdecode(b"caf\xe9.png"), f"cats/{'long' * 60}.jpg",
           "cats/deep/er/ünï.jpg")  # fmt: skip


def pack(
    source: str,
    out: Path,
    *,
    shard_bytes: int = 512 << 20,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda line: None,
) -> PackIndex:
    """Pack a folder and return the index."""
    return packing._pack(
        source, out, PackConfig(shard_size=shard_bytes, force=force), progress, warn
    )


def photographs(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    return root


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    train = [f"train/{label}/{index}.jpg" for label in ("cats", "dogs") for index in range(6)]
    test = [f"val/{label}/{index}.jpg" for label in ("cats", "dogs") for index in range(2)]
    return photographs(tmp_path / "photographs", *train, *test)


@pytest.fixture
def packed(divided: Path, tmp_path: Path) -> Path:
    """A pack of several shards."""
    pack(str(divided), tmp_path / "pack", shard_bytes=8000)
    return tmp_path / "pack"


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_source(f"shards:{folder}")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_same(folder: Source, pack: Source) -> None:
    assert len(folder) == len(pack)
    assert (folder.classes, folder.splits) == (pack.classes, pack.splits)
    assert pack.labels.dtype == np.int64 and np.array_equal(folder.labels, pack.labels)
    assert folder.fingerprint() == pack.fingerprint()
    for index in range(len(folder)):
        for at_least in (None, 15):
            assert np.array_equal(folder.image(index, at_least), pack.image(index, at_least))


@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_a_pack_is_the_folder_it_was_made_of(divided: Path, packed: Path, split: str) -> None:
    assert len(list(packed.glob("train-*.tar"))) > 1
    check_same(open_source(str(divided), split), open_source(f"shards:{packed}", split))


def test_an_undivided_folder_stays_undivided(tmp_path: Path) -> None:
    root = photographs(tmp_path / "p", "a/1.jpg", "a/2.png", "b/1.jpg")
    pack(f"folder:{root}", tmp_path / "pack")
    assert sorted(p.name for p in (tmp_path / "pack").iterdir()) == [
        "all-00000.tar", "index.json", "index.npz",
    ]  # fmt: skip
    for split in ("train", "test", "all"):
        check_same(open_source(str(root), split), open_source(f"shards:{tmp_path / 'pack'}", split))


def test_a_folder_with_train_alone_is_packed_as_it_is_opened(tmp_path: Path) -> None:
    root = photographs(tmp_path / "p", "train/train/1.jpg", "train/b/1.jpg")
    pack(str(root), tmp_path / "pack")
    check_same(open_source(str(root)), open_source(f"shards:{tmp_path / 'pack'}"))
    assert members(tmp_path / "pack") == ["b/1.jpg", "train/1.jpg"]


def members(folder: Path) -> list[str]:
    names = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
            names += tar.getnames()
    return names


def test_shards_are_plain_tar_files_with_the_files_own_bytes(divided: Path, packed: Path) -> None:
    path = packed / "train-00000.tar"
    with tarfile.open(path) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            assert content.read() == (divided / "train" / member.name).read_bytes()
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
    done = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cats/0.jpg\ncats/1.jpg\n") and not done.stderr


def test_any_name_that_a_file_can_have_is_kept(tmp_path: Path) -> None:
    root = photographs(tmp_path / "p", "cats/1.jpg", *STRANGE)
    pack(str(root), tmp_path / "pack")
    check_same(open_source(str(root)), open_source(f"shards:{tmp_path / 'pack'}"))
    assert sorted(members(tmp_path / "pack")) == sorted(["cats/1.jpg", *STRANGE])


def test_the_same_images_make_the_same_shards(divided: Path, tmp_path: Path) -> None:
    results = []
    for out in (tmp_path / "one", tmp_path / "two"):
        pack(str(divided), out, shard_bytes=8000)
        results.append([path.read_bytes() for path in sorted(out.glob("*.tar"))])
        results[-1].append((out / "index.npz").read_bytes())
        os.utime(divided / "train" / "cats" / "0.jpg", (0, 0))
    assert results[0] == results[1]


def test_a_shard_holds_as_much_as_it_may_and_at_least_one_image(
    divided: Path, tmp_path: Path
) -> None:
    index = pack(str(divided), tmp_path / "one", shard_bytes=1)
    assert len(index["shards"]) == 16
    index = pack(str(divided), tmp_path / "few", shard_bytes=8000)
    assert all(shard["bytes"] <= 8000 for shard in index["shards"])


def test_progress_reaches_the_end(divided: Path, tmp_path: Path) -> None:
    observed: list[tuple[int, int]] = []
    pack(
        str(divided), tmp_path / "pack", progress=lambda done, total: observed.append((done, total))
    )
    assert observed == [(done, 16) for done in range(1, 17)]


def test_threads_and_forks_read_what_one_reads(packed: Path) -> None:
    source = open_source(f"shards:{packed}")
    alone = [source.image(index).tobytes() for index in range(len(source))]
    order = list(range(len(source))) * 4
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda index: source.image(index).tobytes(), order))
    assert together == [alone[index] for index in order]
    child = os.fork()
    if child == 0:  # pragma: no cover
        same = all(source.image(i).tobytes() == alone[i] for i in reversed(range(len(source))))
        os._exit(0 if same else 1)
    assert all(source.image(i).tobytes() == alone[i] for i in range(len(source)))
    assert os.waitpid(child, 0)[1] == 0


# --- damage


def test_a_broken_image_is_packed_and_named_by_whoever_reads_it(tmp_path: Path) -> None:
    root = photographs(tmp_path / "p", "a/1.jpg", "a/2.jpg", "b/1.jpg")
    (root / "a" / "2.jpg").write_bytes(b"")
    pack(str(root), tmp_path / "pack")
    source = open_source(f"shards:{tmp_path / 'pack'}")
    for _ in range(2):
        with pytest.raises(CorruptImage, match=r"all-00000\.tar: a/2\.jpg: not an image"):
            source.image(1)
    assert source.image(2).shape == (30, 40, 3)


def test_a_truncated_a_longer_and_a_missing_shard_are_named(packed: Path) -> None:
    path = packed / "train-00001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-512])
    assert f"{path}: truncated ({len(whole) - 512} of {len(whole)} bytes)" in refusal(packed)
    path.write_bytes(whole + b"x")
    assert f"{path}: replaced" in refusal(packed)
    path.unlink()
    assert f"{path}: No such file" in refusal(packed)


def test_a_shard_that_shrinks_while_it_is_read_is_an_error_of_the_data(packed: Path) -> None:
    source = open_source(f"shards:{packed}", "test")
    os.truncate(packed / "test-00000.tar", 600)
    with pytest.raises(DataError, match=r"test-00000\.tar: truncated while") as caught:
        source.image(0)
    assert not isinstance(caught.value, CorruptImage)


def test_a_shard_that_vanishes_before_it_is_read_is_named(packed: Path) -> None:
    source = open_source(f"shards:{packed}", "test")
    (packed / "test-00000.tar").unlink()
    with pytest.raises(DataError, match=r"test-00000\.tar: No such file"):
        source.image(0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda index: index.update(version=2),
            "has version 2, but this version of rtresnet reads 1",
        ),
        (lambda index: index.update(format="webdataset"), "not an index of shards"),
        (lambda index: index.pop("classes"), "`classes`"),
        (lambda index: index.update(classes=["cats"]), "does not match"),
        (lambda index: index.update(classes=[1, 2]), "classes["),
        (lambda index: index.update(splits={"train": 12, "test": 5}), "does not match"),
        (lambda index: index.update(splits={"test": 4, "train": 12}), "splits are test, train"),
        (
            lambda index: index.update(splits={"train": -1, "test": 17}),
            "splits[",
        ),
        (lambda index: index["shards"].pop(), "does not match"),
        (
            lambda index: index["shards"][0].update(bytes="many"),
            "shards[0].bytes",
        ),
        (lambda index: index["shards"][0].pop("file"), "`file`"),
        (lambda index: index.update(table_sha256="0"), "does not match the table"),
        (lambda index: index.pop("table_sha256"), "`table_sha256`"),
    ],
)
def test_an_edited_index_is_refused(
    packed: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    path = packed / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    assert says in refusal(packed)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 1}'])
def test_an_index_that_is_none_is_refused_by_name(packed: Path, content: bytes) -> None:
    (packed / "index.json").write_bytes(content)
    assert str(packed / "index.json") in refusal(packed)


def test_a_damaged_or_missing_table_is_refused_by_name(packed: Path) -> None:
    path = packed / "index.npz"
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[:100] + b"x" + whole[101:]):
        path.write_bytes(content)
        assert f"{path}: does not match the table" in refusal(packed)
    path.unlink()
    assert f"{path}: No such file" in refusal(packed)


def test_a_folder_that_is_no_pack_is_told_so(tmp_path: Path) -> None:
    assert "rtresnet pack FOLDER --out DIR" in refusal(tmp_path)
    assert "no such folder" in refusal(tmp_path / "gone")


# --- what is not packed, and where


def test_what_the_folder_source_refuses_is_not_packed(tmp_path: Path) -> None:
    root = photographs(tmp_path / "p", "a/1.jpg")
    (root / "b").mkdir()
    with pytest.raises(DataError, match="b: the class has no image"):
        pack(str(root), tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_arrays_are_not_packed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder of images"):
        pack("synthetic:4", tmp_path / "pack")


def test_a_pack_is_not_packed_again(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder of images"):
        pack(f"shards:{packed}", tmp_path / "again")


def test_a_file_that_cannot_be_read_is_named_and_nothing_is_left(
    divided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = divided / "val" / "dogs" / "1.jpg"
    source = open_source(str(divided), "test")
    monkeypatch.setattr(
        packing, "open_source", lambda spec, split: source if split == "test" else train
    )
    train = open_source(str(divided), "train")
    gone.unlink()
    with pytest.raises(DataError, match=r"val/dogs/1\.jpg: No such file"):
        pack(str(divided), tmp_path / "pack", shard_bytes=8000)
    assert not (tmp_path / "pack").exists()


def test_a_pack_within_the_folder_would_be_a_class_of_it(divided: Path) -> None:
    with pytest.raises(InputError, match="would become a class"):
        pack(str(divided), divided / "pack")
    assert not (divided / "pack").exists()


def test_a_finished_pack_is_replaced_by_force_alone(divided: Path, packed: Path) -> None:
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    with pytest.raises(InputError, match="replace it with --force"):
        pack(str(divided), packed)
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before
    (packed / "notes.txt").touch()
    pack(str(divided), packed, force=True)
    assert sorted(path.name for path in packed.iterdir()) == [
        "index.json", "index.npz", "notes.txt", "test-00000.tar", "train-00000.tar",
    ]  # fmt: skip
    check_same(open_source(str(divided)), open_source(f"shards:{packed}"))


@pytest.mark.parametrize("name", ["train-00000.tar", "index.json"])
@pytest.mark.parametrize("force", [False, True])
def test_other_peoples_files_are_never_replaced(
    divided: Path, tmp_path: Path, name: str, force: bool
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / name).write_text("{}")
    with pytest.raises(InputError, match=rf"{name}: .*belong to a pack"):
        pack(str(divided), tmp_path / "theirs", force=force)
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == [name]


def test_a_full_disk_leaves_no_index_and_no_shards(
    divided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full says what a full disk says."""
    real = atomic_io.secrets.token_hex

    def full(count: int) -> str:
        name = real(count)
        if (out / "train-00001.tar").exists():
            (out / f".train-00002.tar.{name}.tmp").symlink_to("/dev/full")
        return name

    out = tmp_path / "pack"
    monkeypatch.setattr(atomic_io.secrets, "token_hex", full)
    with pytest.raises(OSError) as caught:
        pack(str(divided), out, shard_bytes=8000)
    assert (caught.value.errno, caught.value.filename) == (
        errno.ENOSPC, str(out / "train-00002.tar"),
    )  # fmt: skip
    assert not out.exists()


def test_interrupted_by_a_person_nothing_is_left(divided: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(str(divided), tmp_path / "pack", shard_bytes=8000, progress=stop)
    assert not (tmp_path / "pack").exists()


def test_the_index_of_many_images_opens_fast_because_names_are_not_split(packed: Path) -> None:
    source = open_source(f"shards:{packed}")
    source.image(0)
    assert isinstance(source, shards.Shards) and "_named" not in vars(source)


def test_image_of_transparent_file_is_the_same_from_folder_shards_and_batches(
    tmp_path: Path,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    for label in ("cats", "dogs"):
        (tmp_path / "photographs" / label).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "photographs" / label / "a.png")
    share = pixels[..., 3:] / 255
    expected = pixels[..., :3] * share + 255 * (1 - share)
    pack(str(tmp_path / "photographs"), tmp_path / "pack")
    contract = Preprocess.for_size(32, layout=UINT8)
    for name in (str(tmp_path / "photographs"), f"shards:{tmp_path / 'pack'}"):
        source = open_source(name)
        ((batch, _),) = loader.batches(source, contract, 2)
        for image in (source.image(0), source.image(1, at_least=8), *batch):
            assert np.abs(image - expected).max() < 2
