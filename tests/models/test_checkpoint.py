from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rtresnet.core import artifacts, atomic_io
from rtresnet.core.errors import ArtifactError, InputError, UnavailableError, UnknownNameError
from rtresnet.core.preprocess import IMAGENET_MEAN, Preprocess
from rtresnet.core.reporter import LogReporter, Update
from rtresnet.core.sidecar import Weights
from rtresnet.models import download as public
from rtresnet.models import zoo
from rtresnet.models.checkpoint import Checkpoint, load, save, untrained
from rtresnet.models.foreign import find_naming, recognize
from rtresnet.models.resnet import BasicBlock, ResNet

State = dict[str, Tensor]
SMALL = Preprocess.for_size(32)


def ours(name: str = "resnet8", **variant: str) -> Checkpoint:
    return untrained(zoo.spec(name, **variant), SMALL)  # type: ignore[arg-type]


def weights(name: str = "resnet8", classes: int = 10, **variant: str) -> State:
    """Return a net's tensors under our names, which are torchvision's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        spec = zoo.spec(name, **variant)  # type: ignore[arg-type]
        return dict(zoo.build(spec, classes).state_dict())


def written(path: Path, payload: object) -> Path:
    torch.save(payload, path)
    return path


def refusal(path: Path, **kwargs: Any) -> str:
    """Return the error message with which a file is rejected; it names the file."""
    with pytest.raises(ArtifactError) as caught:
        load(path, **kwargs)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


# --- save and load


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("resnet8", {}),
        ("resnet8", {"shortcut": "C"}),
        ("plain8", {}),
        ("resnet20", {"shortcut": "B"}),
    ],
)
def test_a_checkpoint_comes_back_to_the_bit(
    tmp_path: Path, name: str, variant: dict[str, str]
) -> None:
    saved = dataclasses.replace(
        ours(name, **variant),
        training={"epoch": 3, "momentum": [torch.arange(3.0)], "recipe": {"lr": 0.1}},
        measured={"accuracy": {"n": 10, "top1": 9, "top5": None}},
    )
    save(tmp_path / "net.pt", saved)
    loaded = load(tmp_path / "net.pt")
    assert_same(loaded.state, saved.state)
    assert torch.equal(loaded.training.pop("momentum")[0], torch.arange(3.0))
    assert loaded.training == {"epoch": 3, "recipe": {"lr": 0.1}}
    assert (loaded.model, loaded.input, loaded.weights) == (saved.model, saved.input, saved.weights)
    assert loaded.measured == saved.measured
    assert loaded.spec == zoo.spec(name, **variant)  # type: ignore[arg-type]


def test_the_loaded_net_gives_the_same_logits(tmp_path: Path) -> None:
    saved = ours()
    save(tmp_path / "net.pt", saved)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "net.pt").net()(images), saved.net()(images))


def test_a_loaded_net_is_in_evaluation_mode() -> None:
    assert not any(module.training for module in ours().net().modules())


def test_saving_writes_a_sidecar_that_verifies(tmp_path: Path) -> None:
    saved = dataclasses.replace(ours(), measured={"accuracy": {"n": 10}})
    path = tmp_path / "net.pt"
    returned = save(path, saved)
    assert returned == artifacts.verify(path)
    assert (returned.kind, returned.file, returned.precision) == ("checkpoint", "net.pt", "fp32")
    assert (returned.model, returned.input) == (saved.model, saved.input)
    assert returned.weights.origin == "untrained"
    assert returned.measured == {"accuracy": {"n": 10}}


def test_class_names_and_input_contract_travel_with_the_file(tmp_path: Path) -> None:
    model = dataclasses.replace(ours().model, classes=("chat", "chien", "猫"))
    contract = Preprocess(size=48, resize=50, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    state = weights(classes=3)
    save(tmp_path / "net.pt", dataclasses.replace(ours(), model=model, input=contract, state=state))
    loaded = load(tmp_path / "net.pt")
    assert loaded.model.classes == ("chat", "chien", "猫")
    assert loaded.input == contract
    assert loaded.net()(torch.zeros(1, 3, 48, 48)).shape == (1, 3)


def test_trained_weights_are_known_by_the_hash_of_their_file(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save(path, dataclasses.replace(ours(), weights=Weights(origin="trained")))
    result = load(path).weights
    assert result == Weights(origin="trained", sha256=atomic_io.sha256(path), source=str(path))


def test_a_file_that_is_not_the_one_of_its_sidecar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    save(path, ours())
    written(path, weights("resnet20"))
    assert "match its sidecar" in refusal(path)


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    save(path, ours())
    unpicklable = dataclasses.replace(ours(), training={"hook": lambda: None})
    with pytest.raises(Exception, match=r"lambda|pickle"):
        save(path, unpicklable)
    assert_same(load(path).state, ours().state)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["net.pt", "net.pt.json"]


def test_a_full_disk_is_an_os_error_that_names_the_file(small_disk: Path) -> None:
    path = small_disk / "net.pt"
    path.write_bytes(b"old")
    with pytest.raises(OSError) as caught:
        save(path, ours())
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in small_disk.iterdir()] == ["net.pt"]


# --- files that are broken or hostile


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    refusal(written(tmp_path / "zip.pt", {"state_dict": weights() | {"x": Evil(ran)}}))
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil(ran), protocol=2))
    refusal(tmp_path / "bare.pt")
    legacy = tmp_path / "legacy.pt"
    torch.save({"x": Evil(ran)}, legacy, _use_new_zipfile_serialization=False)
    refusal(legacy)
    assert not ran.exists()


def test_a_whole_pickled_module_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    path = written(tmp_path / "module.pt", zoo.build(zoo.spec("resnet8")))
    assert "save model.state_dict() instead" in refusal(path)


@pytest.mark.parametrize("keep", [0.999, 0.9, 0.5, 0.01])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    path = written(tmp_path / "net.pt", weights())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert "truncated" in refusal(path)


def test_a_truncated_checkpoint_of_ours_says_how_much_is_there(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    size = save(path, ours()).bytes
    path.write_bytes(path.read_bytes()[:1000])
    assert f"(1000 bytes instead of {size}): truncated" in refusal(path)


@pytest.mark.parametrize("content", [b"hello", b"\0" * 1000, b"PK\x03\x04", b"<html></html>"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(content)
    assert "not a valid checkpoint" in refusal(path)


@pytest.fixture
def safetensors(tmp_path: Path) -> Callable[..., Path]:
    """safetensors(state, name="net.safetensors", **metadata): a file in that format."""
    library = pytest.importorskip("safetensors.torch")

    def write(state: State, name: str = "net.safetensors", **metadata: str) -> Path:
        library.save_file(state, tmp_path / name, metadata or None)
        return tmp_path / name

    return write


def test_load_safetensors_reads_a_foreign_checkpoint(safetensors: Callable[..., Path]) -> None:
    state = weights("resnet18", 7)
    path = safetensors(state, format="pt", made_by="rtresnet 1")
    loaded = load(path)
    assert loaded.spec == zoo.spec("resnet18") and loaded.model.classes == tuple("0123456")
    assert loaded.weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_same(loaded.state, state)
    assert artifacts.kind_of(path) == "checkpoint"


def test_load_safetensors_naming_another_net_is_refused(
    safetensors: Callable[..., Path],
) -> None:
    message = refusal(safetensors(weights("resnet50"), architecture="resnetaa50"))
    assert "resnetaa50" in message and "resnet50" in message


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.01])
def test_load_safetensors_truncated_is_refused(
    safetensors: Callable[..., Path], keep: float
) -> None:
    path = safetensors(weights())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert "truncated" in refusal(path)


def _safetensors_bytes(header: object, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize("data", [
    b"hello", b"PK\x03\x04" * 100, b"\0" * 1000, b"\x80\x04" + b"." * 50,
    _safetensors_bytes({}, 1 << 62),
    _safetensors_bytes({"fc.weight": ONE}),
    _safetensors_bytes({"fc.weight": ONE | {"data_offsets": [0, 1 << 40]}}) + b"1234",
    _safetensors_bytes({"fc.weight": ONE | {"shape": [1 << 62, 1 << 62]}}) + b"1234",
    _safetensors_bytes({"a": ONE, "b": ONE}) + b"1234",
    _safetensors_bytes({"fc.weight": ONE | {"dtype": "OBJECT"}}) + b"1234",
    _safetensors_bytes({"__metadata__": {"arch": 3}, "fc.weight": ONE}) + b"1234",
])  # fmt: skip
def test_load_safetensors_hostile_file_is_refused(tmp_path: Path, data: bytes) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "net.safetensors"
    path.write_bytes(data)
    assert "not a valid safetensors file" in refusal(path)


def test_load_safetensors_not_finite_is_refused(safetensors: Callable[..., Path]) -> None:
    state = weights()
    state["fc.bias"][0] = float("nan")
    assert "fc.bias" in refusal(safetensors(state))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", ["fc.bias", "bn1.num_batches_tracked"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_load_eight_bit_floats_are_refused(
    safetensors: Callable[..., Path], tmp_path: Path, suffix: str, name: str, dtype: torch.dtype
) -> None:
    state = weights()
    state[name] = state[name].to(dtype)
    if suffix == ".pt":
        torch.save(state, tmp_path / "net.pt")
    else:
        safetensors(state)
    assert f"{name} is {dtype}" in refusal(tmp_path / f"net{suffix}")


def test_load_safetensors_without_the_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "net.safetensors").write_bytes(b"anything")
    with pytest.raises(UnavailableError) as caught:
        load(tmp_path / "net.safetensors")
    assert caught.value.fix == "pip install 'rtresnet[train]'"


def test_save_to_safetensors_keeps_the_weights_and_what_they_mean(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    saved = ours()
    save(tmp_path / "net.safetensors", saved)
    loaded = load(tmp_path / "net.safetensors")
    assert_same(loaded.state, saved.state)
    assert (loaded.model, loaded.input) == (saved.model, saved.input)


@pytest.mark.parametrize("name", ["net.onnx", "net.plan"])
def test_another_artifact_is_named_as_no_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"bytes")
    assert "not a checkpoint" in refusal(tmp_path / name)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.pt").touch()
    assert "is empty" in refusal(tmp_path / "net.pt")


def test_a_missing_file_comes_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.pt: no such file; .*rtresnet train"):
        load(tmp_path / "gone.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    state = weights()
    state["layer2.0.bn1.running_var"][3] = value
    assert "layer2.0.bn1.running_var" in refusal(written(tmp_path / "foreign.pt", state))
    save(tmp_path / "ours.pt", dataclasses.replace(ours(), state=state))
    assert "layer2.0.bn1.running_var" in refusal(tmp_path / "ours.pt")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rtresnet": 99}, "format 99"),
        ({"model": {"architecture": "resnet8"}}, "classes"),
        (
            {
                "model": {
                    "architecture": "resnet8",
                    "classes": ["a"],
                    "shortcut": "A",
                    "stride_in": "3x3",
                    "flavour": "vanilla",
                }
            },
            "flavour",
        ),
        ({"weights": {"origin": 3}}, "origin"),
        ({"input": {"size": 0, "resize": 0}}, "size 0"),
        (
            {"model": {"architecture": "vgg", "classes": ["a"], "shortcut": "A"}},
            "stride_in",
        ),
    ],
)
def test_a_checkpoint_of_ours_that_makes_no_sense_is_refused(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    path = tmp_path / "net.pt"
    save(path, ours())
    payload = torch.load(path, weights_only=True) | change
    assert says in refusal(written(tmp_path / "odd.pt", payload))


@pytest.mark.parametrize("part", ["model", "input", "weights", "state", "training", "measured"])
def test_a_checkpoint_of_ours_without_a_part_is_refused(tmp_path: Path, part: str) -> None:
    path = tmp_path / "net.pt"
    save(path, ours())
    payload = torch.load(path, weights_only=True)
    del payload[part]
    assert f"'{part}'" in refusal(written(tmp_path / "odd.pt", payload))


def test_a_checkpoint_with_a_net_this_version_does_not_know_is_refused_by_its_file(
    tmp_path: Path,
) -> None:
    model = dataclasses.replace(ours().model, architecture="wide50")
    path = tmp_path / "net.pt"
    save(path, dataclasses.replace(ours(), model=model))
    assert "wide50" in refusal(path)


# --- foreign files


def torchvision_names(counts: tuple[int, ...], convolutions: int, projected: set[int]) -> set[str]:
    """Return the names in torchvision's files, written out from its documentation."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{part}" for part in norm}
    for stage, count in enumerate(counts, 1):
        for block in range(count):
            prefix = f"layer{stage}.{block}"
            for index in range(1, convolutions + 1):
                names.add(f"{prefix}.conv{index}.weight")
                names |= {f"{prefix}.bn{index}.{part}" for part in norm}
            if block == 0 and stage in projected:
                names.add(f"{prefix}.downsample.0.weight")
                names |= {f"{prefix}.downsample.1.{part}" for part in norm}
    return names


@pytest.mark.parametrize(
    ("name", "counts", "convolutions", "projected", "entries"),
    [
        ("resnet18", (2, 2, 2, 2), 2, {2, 3, 4}, 122),
        ("resnet34", (3, 4, 6, 3), 2, {2, 3, 4}, 218),
        ("resnet50", (3, 4, 6, 3), 3, {1, 2, 3, 4}, 320),
        ("resnet101", (3, 4, 23, 3), 3, {1, 2, 3, 4}, 626),
    ],
)
def test_our_names_are_torchvisions(
    name: str, counts: tuple[int, ...], convolutions: int, projected: set[int], entries: int
) -> None:
    expected = torchvision_names(counts, convolutions, projected)
    assert len(expected) == entries
    assert set(zoo.build(zoo.spec(name), device="meta").state_dict()) == expected


def test_torchvisions_file_is_recognized(tmp_path: Path) -> None:
    state = weights("resnet18", 7)
    path = written(tmp_path / "resnet18.pth", state)
    loaded = load(path)
    assert loaded.spec == zoo.spec("resnet18")
    assert loaded.model.classes == tuple("0123456")
    assert loaded.input == Preprocess(size=224, resize=256)
    assert loaded.input.mean == IMAGENET_MEAN
    assert loaded.weights == Weights(
        origin="file", sha256=hashlib.sha256(path.read_bytes()).hexdigest(), source=str(path)
    )
    assert_same(loaded.state, state)


def renamed(state: State, *changes: tuple[str, str], prefix: str = "") -> State:
    def rename(name: str) -> str:
        for old, new in changes:
            name = name.replace(old, new)
        return prefix + name

    return {rename(name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("name", "variant", "disguise"),
    [
        ("resnet20", {}, lambda s: renamed(s, prefix="module.")),
        ("resnet20", {}, lambda s: renamed(s, prefix="_orig_mod.")),
        ("resnet20", {}, lambda s: renamed(s, prefix="module._orig_mod.")),
        ("resnet20", {}, lambda s: {"state_dict": renamed(s, prefix="model.")}),
        ("resnet20", {}, lambda s: {"model": renamed(s, prefix="backbone.")}),
        ("resnet20", {}, lambda s: renamed(s, ("fc.", "linear."))),
        ("resnet20", {}, lambda s: renamed(s, ("fc.", "classifier."))),
        ("resnet20", {}, lambda s: {"state_dict": s, "epoch": 200, "best_prec1": 91.7}),
        ("resnet20", {}, lambda s: {"model_state_dict": s, "optimizer": {"lr": 0.1}}),
        ("resnet20", {}, lambda s: {"state_dict": {"model": s}}),
        (
            "resnet20",
            {},
            lambda s: {"state_dict": renamed(s, ("fc.", "linear."), prefix="module.")},
        ),
        (
            "resnet26",
            {"shortcut": "B"},
            lambda s: {
                "net": renamed(
                    s, ("fc.", "linear."), (".downsample.", ".shortcut."), prefix="module."
                ),
                "acc": 93.02,
                "epoch": 199,
            },
        ),
        ("resnet20", {"shortcut": "C"}, lambda s: renamed(s, prefix="module.")),
    ],
    ids=range(13),
)
def test_a_public_checkpoint_is_recognized_whatever_it_is_wrapped_in(
    tmp_path: Path, name: str, variant: dict[str, str], disguise: Callable[[State], object]
) -> None:
    state = weights(name, **variant)
    loaded = load(written(tmp_path / "foreign.th", disguise(state)))
    assert loaded.spec == zoo.spec(name, **variant)  # type: ignore[arg-type]
    assert_same(loaded.state, state)


def test_files_from_before_the_batch_counter_are_read(tmp_path: Path) -> None:
    state = weights()
    old = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    loaded = load(written(tmp_path / "old.th", old))
    assert_same(loaded.state, state)


def test_half_precision_weights_become_a_float32_net(tmp_path: Path) -> None:
    state = {name: t.half() if t.is_floating_point() else t for name, t in weights().items()}
    net = load(written(tmp_path / "half.pt", state)).net()
    assert net.fc.weight.dtype == torch.float32
    assert torch.equal(net.fc.weight, state["fc.weight"].float())


def test_the_input_contract_of_a_foreign_file_can_be_given(tmp_path: Path) -> None:
    path = written(tmp_path / "foreign.pt", weights())
    assert load(path).input == Preprocess(size=32, resize=32)
    contract = Preprocess(size=40, resize=44, mean=(0, 0, 0), std=(1, 1, 1))
    assert load(path, input=contract).input == contract


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"state_dict": {}},
        [1, 2],
        torch.zeros(3),
        {"epoch": 3, "lr": 0.1},
        {"features.0.weight": torch.zeros(64, 3, 3, 3), "head.weight": torch.zeros(2, 2)},
    ],
    ids=range(6),
)
def test_load_file_without_a_net_is_refused(tmp_path: Path, payload: object) -> None:
    assert "not a residual net or VGG" in refusal(written(tmp_path / "other.pt", payload))


def test_a_refused_file_is_told_by_what_was_found_in_it(tmp_path: Path) -> None:
    state = {f"features.{index}.weight": torch.zeros(1) for index in range(9)}
    assert "features.0.weight" in refusal(written(tmp_path / "vgg.pt", state))


def test_blocks_of_no_net_in_the_zoo_are_refused(tmp_path: Path) -> None:
    state = {n: t for n, t in weights("resnet18", 2).items() if not n.startswith("layer3.1")}
    assert "rtresnet models" in refusal(written(tmp_path / "resnet17.pt", state))


# --- nets with the same tensors: a name decides


@pytest.fixture
def anonymous(tmp_path: Path) -> Path:
    """resnet50's tensors, few classes, in a file that does not name them."""
    return written(tmp_path / "best.pth", weights("resnet50", classes=2))


def assumed_nets(loaded: Checkpoint) -> list[str]:
    """Return assumptions about the net, not about its input."""
    return [entry for entry in loaded.assumed if entry.startswith("model: ")]


def named_by_key(path: Path, name: str) -> Path:
    state = torch.load(path, weights_only=True)
    return written(path, {"arch": name, "state_dict": state})


def named_by_arguments(path: Path, name: str) -> Path:
    state = torch.load(path, weights_only=True)
    return written(path, {"args": {"model": f"{name}.a1h_in1k"}, "state_dict": state})


def named_by_config(path: Path, name: str) -> Path:
    text = json.dumps({"architecture": name, "num_classes": 2})
    path.with_name("config.json").write_text(text)
    return path


def named_by_pretrained_cfg(path: Path, name: str) -> Path:
    text = json.dumps({"pretrained_cfg": {"architecture": name}})
    path.with_name("config.json").write_text(text)
    return path


def named_by_file(path: Path, name: str) -> Path:
    return path.rename(path.with_name(f"my{name}_a1h-4cf422b3.pth"))


WAYS = [named_by_key, named_by_arguments, named_by_config, named_by_pretrained_cfg, named_by_file]


@pytest.mark.parametrize("name_it", WAYS)
@pytest.mark.parametrize("model", [None, "resnet50"])
def test_load_with_another_nets_name_refuses_resnet50s_tensors(
    anonymous: Path, name_it: Callable[[Path, str], Path], model: str | None
) -> None:
    path = name_it(anonymous, "resnetaa50")
    message = refusal(path, model=model)
    assert "resnetaa50" in message and "resnet50" in message


@pytest.mark.parametrize("name_it", WAYS)
def test_load_with_a_name_of_the_zoo_assumes_nothing(
    anonymous: Path, name_it: Callable[[Path, str], Path]
) -> None:
    loaded = load(name_it(anonymous, "resnet50"))
    assert loaded.spec.name == "resnet50" and assumed_nets(loaded) == []


def test_load_without_a_name_records_the_assumed_net(anonymous: Path) -> None:
    loaded = load(anonymous)
    (entry,) = assumed_nets(loaded)
    assert entry.startswith("model: resnet50")
    copy = anonymous.with_name("copy.pt")
    assert save(copy, loaded).assumed == loaded.assumed
    assert load(copy).assumed == loaded.assumed
    assert assumed_nets(load(anonymous, model="resnet50")) == []  # the caller states it


def test_load_with_a_declared_name_of_another_depth_is_refused(anonymous: Path) -> None:
    message = refusal(named_by_key(anonymous, "resnet101"))
    assert "resnet101" in message


@pytest.mark.parametrize("name", ["resnet101-distilled", "resnet", "resnet-4118986f", "explain50"])
def test_load_with_a_file_name_that_decides_nothing_assumes_the_net(
    anonymous: Path, name: str
) -> None:
    assert assumed_nets(load(anonymous.rename(anonymous.with_name(f"{name}.pth"))))


V1_NAMES = ["resnet50_v1", "resnet50-v1", "resnet50v1", "resnet50_caffe", "msra_resnet50",
            "resnet50_caffe-788b5fa3"]  # fmt: skip
V1_5_NAMES = ["resnet50_v1.5", "gluon_resnet50_v1b", "resnet50_IMAGENET1K_V1", "resnet50-0676ba61"]


@pytest.mark.parametrize(
    ("name", "stride"),
    [*((name, "1x1") for name in V1_NAMES), *((name, "3x3") for name in V1_5_NAMES)],
)
def test_find_naming_stride_of_bottlenecks(tmp_path: Path, name: str, stride: str) -> None:
    for naming in (
        find_naming(tmp_path / "net.pth", {"arch": name}),
        find_naming(tmp_path / "net.pth", {"args": {"model": name}}),
    ):
        assert naming is not None and naming.names == ("resnet50",) and naming.is_declared
        assert naming.stride_in == stride
    of_file = find_naming(tmp_path / f"{name}.pth", {})
    assert of_file is not None and not of_file.is_declared
    assert of_file.stride_in == (None if "IMAGENET" in name else stride)
    assert find_naming(tmp_path / "resnet50.pth", {}).stride_in is None  # type: ignore[union-attr]


@pytest.mark.parametrize("key", ["stride_in_1x1", "downsample_in_bottleneck"])
def test_find_naming_reads_the_stride_of_a_config(tmp_path: Path, key: str) -> None:
    text = json.dumps({"architecture": "resnet50", "config": {key: True}})
    (tmp_path / "config.json").write_text(text)
    naming = find_naming(tmp_path / "net.pth", {})
    assert naming is not None and naming.stride_in == "1x1"


def test_load_with_a_v1_name_gives_v1(anonymous: Path) -> None:
    path = named_by_key(anonymous, "resnet50_caffe")
    loaded = load(path)
    assert loaded.spec.name == "resnet50-v1" and assumed_nets(loaded) == []
    assert refusal(path, model="resnet50").endswith("--model resnet50-v1")


def test_load_bottlenecks_without_stated_stride_records_the_assumption(anonymous: Path) -> None:
    """torchvision's names say nothing of v1 and v1.5, and the logits differ by a quarter."""
    path = anonymous.rename(anonymous.with_name("resnet50.pth"))
    (entry,) = assumed_nets(load(path))
    assert "v1.5" in entry and "resnet50-v1" in entry
    one, other = load(path, model="resnet50"), load(path, model="resnet50-v1")
    assert assumed_nets(one) == assumed_nets(other) == []
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert not torch.allclose(one.net()(images), other.net()(images), rtol=0.01)


def test_load_v1_is_recorded_in_sidecar_and_copy(anonymous: Path) -> None:
    copy = anonymous.with_name("copy.pt")
    sidecar = save(copy, load(anonymous, model="resnet50-v1"))
    assert (sidecar.model.architecture, sidecar.model.stride_in) == ("resnet50-v1", "1x1")
    assert load(copy).spec == zoo.spec("resnet50-v1")
    assert load(copy, model="resnet50").spec.stride_in == "1x1"  # the file knows
    assert "resnet50-v1" in refusal(copy, model="resnet50-v1.5")


def test_load_sidecar_of_a_foreign_file_states_v1(anonymous: Path) -> None:
    made = save(anonymous.with_name("x.pt"), load(anonymous, model="resnet50-v1"))
    data = anonymous.read_bytes()
    artifacts.publish(anonymous, lambda path: path.write_bytes(data), made)
    loaded = load(anonymous)
    assert loaded.spec.name == "resnet50-v1" and assumed_nets(loaded) == []


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn", "vgg19"])
def test_load_torchvisions_vgg(tmp_path: Path, name: str) -> None:
    net = zoo.build(zoo.spec(name), 3, device="meta")
    state = {n: torch.zeros(()).expand(t.shape) for n, t in net.state_dict().items()}
    assert {"features.0.weight", "classifier.0.weight", "classifier.6.bias"} <= set(state)
    loaded = load(written(tmp_path / "net.pth", state))
    assert loaded.spec == zoo.spec(name) and len(loaded.model.classes) == 3


def test_load_old_checkpoint_of_option_c_gets_its_new_name(tmp_path: Path) -> None:
    """Before names had suffixes, the architecture of resnet20-C was written as resnet20."""
    save(tmp_path / "net.pt", ours("resnet20-C"))
    payload = torch.load(tmp_path / "net.pt", weights_only=True)
    payload["model"]["architecture"] = "resnet20"
    old = written(tmp_path / "old.pt", payload)
    assert load(old).spec == load(old, model="resnet20").spec == zoo.spec("resnet20-C")
    assert refusal(old, model="resnet20-A").endswith("--model resnet20-C")


def test_load_with_a_plain_nets_name_gives_the_plain_net(tmp_path: Path) -> None:
    path = written(tmp_path / "net.pt", {"arch": "plain8", "state_dict": weights("plain8")})
    assert load(path).spec == load(path, model="plain8").spec == zoo.spec("plain8")
    assert refusal(path, model="resnet8").endswith("--model plain8")


# --- --model


def test_the_right_model_is_accepted(tmp_path: Path) -> None:
    foreign = written(tmp_path / "foreign.pt", weights())
    assert load(foreign, model="resnet8").spec.name == "resnet8"
    save(tmp_path / "ours.pt", ours())
    assert load(tmp_path / "ours.pt", model="resnet8").spec.name == "resnet8"


def test_tensors_that_fit_a_plain_net_too_are_taken_as_told(tmp_path: Path) -> None:
    path = written(tmp_path / "foreign.pt", weights("plain8"))
    assert load(path).spec == zoo.spec("resnet8")
    assert load(path, model="plain8").spec == zoo.spec("plain8")


def test_the_model_keeps_the_shortcut_option_the_tensors_show(tmp_path: Path) -> None:
    path = written(tmp_path / "foreign.pt", weights("resnet8", shortcut="C"))
    assert load(path, model="resnet8").spec == zoo.spec("resnet8", shortcut="C")


def test_a_wrong_model_is_refused_with_tensors_shapes_and_the_model_that_fits(
    tmp_path: Path,
) -> None:
    foreign = written(tmp_path / "foreign.pt", weights("resnet20"))
    save(tmp_path / "ours.pt", ours("resnet20"))
    for path in (foreign, tmp_path / "ours.pt"):
        message = refusal(path, model="resnet18")
        assert "does not fit resnet18" in message
        assert "conv1.weight is [16, 3, 3, 3] instead of [64, 3, 7, 7]" in message
        assert message.endswith("it fits --model resnet20")
        message = refusal(path, model="resnet8")
        assert "layer1.1.conv1.weight [16, 16, 3, 3] is unknown" in message
        assert message.endswith("it fits --model resnet20")


def test_missing_tensors_are_told_with_their_shapes(tmp_path: Path) -> None:
    message = refusal(written(tmp_path / "net.pt", weights("resnet8")), model="resnet14")
    assert "layer1.1.conv1.weight [16, 16, 3, 3] is missing" in message
    assert message.endswith("it fits --model resnet8")


def test_a_head_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    state = weights() | {"fc.bias": torch.zeros(3)}
    message = refusal(written(tmp_path / "net.pt", state))
    assert "fc.bias is [3] instead of [10]" in message


def test_tensors_the_net_does_not_have_are_told(tmp_path: Path) -> None:
    state = weights() | {"layer1.0.se.weight": torch.zeros(4, 16)}
    assert "layer1.0.se.weight [4, 16] is unknown" in refusal(written(tmp_path / "se.pt", state))


def test_an_unknown_model_comes_with_the_nearest(tmp_path: Path) -> None:
    path = written(tmp_path / "net.pt", weights())
    with pytest.raises(UnknownNameError, match="did you mean 'resnet50'"):
        load(path, model="resnet51")


def test_the_model_that_is_said_to_fit_does_fit(tmp_path: Path) -> None:
    save(tmp_path / "plain.pt", ours("plain8"))
    message = refusal(tmp_path / "plain.pt", model="resnet50")
    advice = message.rpartition("--model ")[2]
    assert load(tmp_path / "plain.pt", model=advice).spec == zoo.spec("plain8")


# --- recognize

RECOGNIZABLE = [
    (name, option)
    for name in (*zoo.names(), "resnet20-block1", "resnet20-block3")
    if "1202" not in name
    for option in (("A", "B", "C") if name.startswith("resnet") else (None,))
]


@pytest.mark.parametrize(("name", "option"), RECOGNIZABLE)
def test_every_net_of_the_zoo_is_recognized(name: str, option: str | None) -> None:
    spec = zoo.spec(name, shortcut=option)
    state = zoo.build(spec, device="meta").state_dict()
    if name.startswith("plain"):  # its tensors are those of its residual net with option A
        spec = zoo.spec(f"resnet{spec.depth}", shortcut="A")
    if name.endswith("-v1"):  # its tensors are those of v1.5
        spec = zoo.variant(spec, stride_in="3x3")
    assert recognize(state) == spec


def test_no_tensors_are_no_net() -> None:
    assert recognize({}) is None


@pytest.mark.parametrize("blocks", [8, 16, 25])
def test_a_cifar_net_of_a_depth_that_imagenet_has_taken_is_no_net_of_the_zoo(blocks: int) -> None:
    """6 * 8 + 2 is 50, but that name is the ImageNet net's."""
    with torch.device("meta"):
        net = ResNet(
            block=BasicBlock,
            counts=(blocks,) * 3,
            widths=(16, 32, 64),
            stem="cifar",
            shortcut="A",
            stride_in="3x3",
            num_classes=10,
        )
    spec = recognize(net.state_dict())
    assert spec is None or spec.counts == (blocks,) * 3


# --- untrained weights


@pytest.mark.parametrize("name", ["resnet50", "resnet152"])
def test_an_untrained_deep_net_gives_logits_of_sane_size(name: str) -> None:
    """Without statistics in its batch norms, the logits of ResNet-152 are in the millions."""
    made = untrained(zoo.spec(name), Preprocess.for_size(64))
    with torch.inference_mode():
        logits = made.net()(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    assert logits.shape == (4, 1000)
    assert torch.isfinite(logits).all()
    assert 0.01 < logits.std() < 10


def test_untrained_weights_say_so_and_follow_from_the_seed() -> None:
    before = torch.random.get_rng_state()
    first, same, other = ours(), ours(), untrained(zoo.spec("resnet8"), SMALL, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.weights == Weights(origin="untrained")
    assert_same(first.state, same.state)
    assert not torch.equal(first.state["conv1.weight"], other.state["conv1.weight"])


# --- downloads


def hashed(folder: Path, stem: str, content: bytes) -> Path:
    """Return a file whose name carries its hash, as the published ones."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    path.write_bytes(content)
    return path


def test_a_download_is_checked_and_kept(tmp_path: Path) -> None:
    source = hashed(tmp_path / "mirror", "net", b"weights" * 1000)
    cache = tmp_path / "deep" / "cache"
    path = public.download(source.as_uri(), cache)
    assert path == cache / source.name
    assert path.read_bytes() == source.read_bytes()
    assert list(cache.iterdir()) == [path]


def test_download_reports_progress_in_bytes(tmp_path: Path) -> None:
    source = hashed(tmp_path / "mirror", "net", b"weights" * 300_000)
    calls: list[tuple[float | None, float | None]] = []

    class Recorder(LogReporter):
        @contextlib.contextmanager
        def progress(self, description: str, total: float | None = None) -> Iterator[Update]:
            def update(
                completed: float | None = None,
                description: str | None = None,
                total: float | None = None,
            ) -> None:
                calls.append((completed, total))

            yield update

    public.download(source.as_uri(), tmp_path / "cache", Recorder())
    assert calls[0] == (0, 2_100_000) and calls[-1] == (2_100_000, None) and len(calls) > 2


def test_download_server_that_stops_answering_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and says nothing
        url = f"http://127.0.0.1:{server.getsockname()[1]}/net-01234567.pth"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with pytest.raises(InputError) as caught:
            public.download(url, tmp_path / "cache")
    assert caught.value.fix is not None and "--weights FILE" in caught.value.fix
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_second_download_needs_no_network(tmp_path: Path) -> None:
    source = hashed(tmp_path / "mirror", "net", b"weights")
    first = public.download(source.as_uri(), tmp_path / "cache")
    source.unlink()
    assert public.download(source.as_uri(), tmp_path / "cache") == first


def test_a_damaged_file_in_the_cache_is_fetched_anew(tmp_path: Path) -> None:
    source = hashed(tmp_path / "mirror", "net", b"weights")
    path = public.download(source.as_uri(), tmp_path / "cache")
    path.write_bytes(b"weig")
    public.download(source.as_uri(), tmp_path / "cache")
    assert path.read_bytes() == b"weights"


def test_bytes_that_do_not_match_the_name_are_refused_and_not_kept(tmp_path: Path) -> None:
    source = hashed(tmp_path / "mirror", "net", b"weights")
    source.write_bytes(b"please log in to the wireless network")
    with pytest.raises(InputError) as caught:
        public.download(source.as_uri(), tmp_path / "cache")
    actual = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    assert actual in str(caught.value)
    assert source.stem.split("-")[1] in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_that_cannot_be_reached_comes_with_where_to_put_it(tmp_path: Path) -> None:
    url = (tmp_path / "mirror" / "net-01234567.pth").as_uri()
    with pytest.raises(InputError) as caught:
        public.download(url, tmp_path / "cache")
    assert url in str(caught.value)
    assert str(tmp_path / "cache" / "net-01234567.pth") in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_name_without_a_hash_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(b"weights")
    with pytest.raises(InputError, match="no hash"):
        public.download((tmp_path / "net.pth").as_uri(), tmp_path / "cache")


def test_the_imagenet_weights_come_from_the_mirror_and_then_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = weights("resnet18", 5)
    draft = written(tmp_path / "draft.pth", state)
    source = hashed(tmp_path / "mirror", "resnet18", draft.read_bytes())
    monkeypatch.setitem(public.IMAGENET_FILES, "resnet18", source.name)
    monkeypatch.setenv("RTRESNET_WEIGHTS_URL", source.parent.as_uri() + "/")
    monkeypatch.setenv("RTRESNET_CACHE", str(tmp_path / "cache"))
    result = public.imagenet("resnet18")
    digest = hashlib.sha256(draft.read_bytes()).hexdigest()
    assert result.spec == zoo.spec("resnet18")
    assert result.input == Preprocess(size=224, resize=256)
    assert result.weights == Weights(origin="imagenet", sha256=digest, source=source.name)
    assert_same(result.state, state)
    source.unlink()
    assert public.imagenet("resnet18").weights == result.weights


def test_published_files_carry_their_hash_in_their_name() -> None:
    for architecture, name in public.IMAGENET_FILES.items():
        assert zoo.spec(architecture).family in ("imagenet", "vgg")
        assert name.startswith(architecture + "-")
        assert len(name.removesuffix(".pth").split("-")[1]) == 8


@pytest.mark.parametrize("name", ["resnet20", "plain34"])
def test_a_net_without_published_weights_is_told_which_have_some(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}; .*resnet18.*resnet152"):
        public.imagenet(name)


@pytest.mark.parametrize("state", [[1, 2], {"fc.weight": 3}, None])
def test_a_checkpoint_whose_state_is_no_dict_of_tensors_is_refused(
    tmp_path: Path, state: object
) -> None:
    save(tmp_path / "net.pt", ours())
    payload = torch.load(tmp_path / "net.pt", weights_only=True)
    payload["state"] = state
    assert "broken checkpoint" in refusal(written(tmp_path / "odd.pt", payload))
