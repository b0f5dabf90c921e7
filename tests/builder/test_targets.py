from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from rtresnet.builder import targets
from rtresnet.core import gpu_targets, hardware
from rtresnet.core.errors import InputError, UnavailableError, UnknownNameError
from rtresnet.core.sidecar import Profile


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The builders that this machine pretends to have; add to it."""
    modules: set[str] = set()
    for name in targets.BUILDERS.values():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(hardware, "installed", modules.__contains__)
    return modules


@pytest.mark.parametrize("text", ["", " , ", ("", ",")])
def test_a_target_that_names_nothing_is_not_the_default(text: str | tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="--target is empty"):
        targets.parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, ()),
        ((), ()),
        ("sm_86", ("sm_86",)),
        ("sm86", ("sm_86",)),
        ("SM_86", ("sm_86",)),
        ("Sm120", ("sm_120",)),
        (" sm_89 , sm_86 ", ("sm_89", "sm_86")),
        ("sm_86,sm86,SM_86,sm_89", ("sm_86", "sm_89")),
    ],
)
def test_targets_are_read(text: str | tuple[()] | None, expected: tuple[str, ...]) -> None:
    assert targets.parse(text) == expected


@pytest.mark.parametrize("text", ["sm_90", "sm90", "SM_90", "sm_86,sm_90"])
def test_sm_90_is_refused_with_the_reason_and_the_way_out(text: str) -> None:
    with pytest.raises(InputError, match=r"TensorRT-RTX.*sm_90") as caught:
        targets.parse(text)
    assert "H100" in str(caught.value) and "--builder tensorrt" in str(caught.value)


def test_an_unknown_target_lists_all_with_their_gpus_and_suggests_none() -> None:
    with pytest.raises(InputError, match="--target sm_88: not a known GPU") as caught:
        targets.parse("sm_88")
    for target in targets.RTX_TARGETS:
        assert f"{target} ({gpu_targets.SERVED[target]})" in str(caught.value)
    assert "did you mean" not in str(caught.value)  # the nearest name is another GPU


def test_parse_unknown_gpu_suggests_a_known_one_and_lists_all() -> None:
    with pytest.raises(InputError) as caught:
        targets.parse("RTX 9999")
    fix = caught.value.fix
    assert fix is not None and fix.startswith("did you mean 'RTX ") and "sm_75 (RTX 20, T4)" in fix


@pytest.mark.parametrize(
    ("name", "title"), [("H100", "H100 (sm_90)"), ("sm_90", "sm_90 (H100, H200)")]
)
def test_parse_target_without_rtx_has_one_parenthesis(name: str, title: str) -> None:
    with pytest.raises(InputError) as caught:
        targets.parse(name)
    assert caught.value.message.endswith(title)


@pytest.mark.parametrize("text", ["86", "ampere", "sm_", "sm_86;sm_89"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=rf"--target {text}: not a known .*; known: sm_75"):
        targets.parse(text)


def test_an_unknown_builder_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'rtx'"):
        targets.builder("rtxx")


@pytest.mark.usefixtures("with_gpu")
def test_auto_is_tensorrt_where_it_and_a_gpu_are(installed: set[str]) -> None:
    installed |= {"tensorrt", "tensorrt_rtx"}
    assert targets.builder().__name__ == "tensorrt"
    installed.remove("tensorrt")
    assert targets.builder().__name__ == "tensorrt_rtx"


@pytest.mark.usefixtures("without_gpu")
def test_auto_is_rtx_where_there_is_no_gpu(installed: set[str]) -> None:
    installed |= {"tensorrt", "tensorrt_rtx"}
    assert targets.builder().__name__ == "tensorrt_rtx"
    assert targets.available()


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("packages", [{"tensorrt"}, set()])
def test_tensorrt_without_a_gpu_is_refused(installed: set[str], packages: set[str]) -> None:
    installed |= packages
    with pytest.raises(UnavailableError, match="--builder rtx") as caught:
        targets.builder("tensorrt")
    assert caught.value.exit_code == 3
    assert not targets.available()


@pytest.mark.usefixtures("with_gpu")
@pytest.mark.parametrize(
    ("choice", "package"),
    [("auto", "tensorrt-rtx-cu13"), ("rtx", "tensorrt-rtx-cu13"), ("tensorrt", "tensorrt-cu13")],
)
def test_a_builder_that_is_not_installed_is_named_with_its_package(
    choice: str, package: str, installed: set[str]
) -> None:
    assert not installed
    with pytest.raises(UnavailableError, match=f"pip install {package}$") as caught:
        targets.builder(choice)
    assert caught.value.exit_code == 3
    assert not targets.available()


def test_the_names_are_those_of_the_installed_rtx() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    names = {name for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    assert {name.replace("_", "").upper() for name in targets.RTX_TARGETS} == names


def test_chosen_targets_reach_the_configuration() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    targets.apply(trt, config, ("sm_86", "sm_120"))
    chosen = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
    assert chosen == [trt.ComputeCapability.SM86, trt.ComputeCapability.SM120]


def test_no_target_leaves_the_configuration_alone() -> None:
    targets.apply(SimpleNamespace(), None, ())


def test_a_builder_for_its_own_gpu_takes_no_target() -> None:
    with pytest.raises(InputError, match=r"--target.*--builder rtx"):
        targets.apply(SimpleNamespace(), SimpleNamespace(), ("sm_86",))


def test_a_target_that_the_builder_refuses_is_named() -> None:
    trt = SimpleNamespace(ComputeCapability=SimpleNamespace(SM86=86))
    config = SimpleNamespace(set_compute_capability=lambda capability, index: False)
    with pytest.raises(InputError, match="sm_86"):
        targets.apply(trt, config, ("sm_86",))


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("RTX 4090", "sm_89"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "sm_89"),
        ("rtx3060", "sm_86"),
        ("RTX 2080 Ti", "sm_75"),
        ("NVIDIA GeForce RTX 2050", "sm_86"),
        ("RTX A1000 Laptop GPU", "sm_86"),
        ("NVIDIA RTX A3000", "sm_86"),
        ("NVIDIA RTX 4000 SFF Ada Generation", "sm_89"),
        ("RTX 3500 Ada Generation Laptop GPU", "sm_89"),
        ("RTX 500 Ada", "sm_89"),
        ("Tesla T4", "sm_75"),
        ("L4", "sm_89"),
        ("NVIDIA L40S", "sm_89"),
        ("NVIDIA A100-SXM4-80GB", "sm_80"),
        ("A10G", "sm_86"),
        ("RTX A6000", "sm_86"),
        ("NVIDIA RTX 6000 Ada Generation", "sm_89"),
        ("Quadro RTX 8000", "sm_75"),
        ("RTX 5090", "sm_120"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "sm_120"),
        ("GB10", "sm_121"),
        ("8.9", "sm_89"),
        ("12.0", "sm_120"),
    ],
)
def test_gpus_are_known_by_name(name: str, target: str) -> None:
    assert targets.parse(name, "rtx") == (target,)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("H100", "H100 (sm_90)"),
        ("NVIDIA H100 80GB HBM3", "sm_90"),
        ("H200", "sm_90"),
        ("B200", "sm_100"),
        ("sm_100", "sm_100"),
        ("Jetson AGX Orin", "sm_87"),
    ],
)
def test_a_gpu_that_rtx_does_not_serve_says_what_does(name: str, words: str) -> None:
    with pytest.raises(InputError, match="--builder tensorrt") as caught:
        targets.parse(["L4", name], "rtx")
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["V100", "Tesla P100-PCIE-16GB", "GTX 1080 Ti", "sm_61"])
def test_a_gpu_that_is_too_old_for_either_says_so(name: str) -> None:
    with pytest.raises(InputError, match=r"TensorRT-RTX.*TensorRT 11"):
        targets.parse(name, "rtx")


def test_all_and_several_options_are_one_list() -> None:
    assert targets.parse("all", "rtx") == targets.RTX_TARGETS
    assert targets.parse(["L4", "sm_86,sm_89"], "rtx") == ("sm_89", "sm_86")


@pytest.mark.usefixtures("without_gpu")
def test_current_without_a_gpu_is_a_lack_of_the_environment() -> None:
    with pytest.raises(UnavailableError, match=r"no GPU; .*--target") as caught:
        targets.parse("current")
    assert caught.value.exit_code == 3


@pytest.mark.usefixtures("with_gpu")
def test_current_is_the_gpu_in_the_machine() -> None:
    assert targets.parse("current", "rtx") == targets.parse("current", "tensorrt") == ("sm_89",)


@pytest.mark.usefixtures("with_gpu")
def test_tensorrt_builds_for_its_own_gpu_only() -> None:
    assert targets.parse("L40", "tensorrt") == ("sm_89",)
    with pytest.raises(InputError, match=r"sm_89, not for sm_86; .*--builder rtx"):
        targets.parse("sm_86", "tensorrt")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1:8:32", (1, 8, 32)),
        ("4:4:4", (4, 4, 4)),
        ("1:1:256", (1, 1, 256)),
        ("8", (8, 8, 8)),
        ("1", (1, 1, 1)),
    ],
)
def test_parse_profile_returns_the_batches(text: str, expected: tuple[int, int, int]) -> None:
    assert targets.parse_profile(text) == Profile(min=expected[0], opt=expected[1], max=expected[2])


def test_profile_as_text_parses_to_itself() -> None:
    assert str(targets.parse_profile("1:8:32")) == "1:8:32"
    assert str(targets.parse_profile("8")) == "8:8:8"
    assert str(targets.parse_profile(targets.DEFAULT_BATCH)) == targets.DEFAULT_BATCH


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "1:8", "1:2:3:4", "8:4:32", "1:64:32", "0:1:2", "1.5", "a:b:c", "1::3", "1,8"],
)
def test_parse_profile_of_anything_else_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match="MIN <= OPT <= MAX") as caught:
        targets.parse_profile(text)
    assert f"--batch {targets.DEFAULT_BATCH}" in str(caught.value)
    assert caught.value.exit_code == 2
