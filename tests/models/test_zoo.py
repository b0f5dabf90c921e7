from __future__ import annotations

import re
import subprocess
import sys

import pytest

from rtresnet.core.errors import InputError, UnknownNameError
from rtresnet.models import zoo


def test_names_are_those_of_the_paper_and_vgg() -> None:
    assert zoo.names() == [
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        *("resnet50-v1", "resnet101-v1", "resnet152-v1", "plain18", "plain34"),
        *("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet1202"),
        *("plain20", "plain32", "plain44", "plain56", "plain110", "plain1202"),
        *("vgg16", "vgg16_bn", "vgg19", "vgg19_bn"),
    ]


@pytest.mark.parametrize("name", zoo.names())
def test_every_name_leads_to_its_net(name: str) -> None:
    spec = zoo.spec(name)
    assert spec.name == name
    assert str(spec.depth) in name
    others = 3 if spec.family == "vgg" else 2  # the FC layers; the stem and the FC
    assert zoo.BLOCK_LAYERS[spec.block] * sum(spec.counts) + others == spec.depth
    assert len(spec.widths) == len(spec.counts)


@pytest.mark.parametrize(
    ("name", "block", "counts"),
    [
        ("resnet18", "basic", (2, 2, 2, 2)),
        ("resnet34", "basic", (3, 4, 6, 3)),
        ("plain34", "basic", (3, 4, 6, 3)),
        ("resnet50", "bottleneck", (3, 4, 6, 3)),
        ("resnet101", "bottleneck", (3, 4, 23, 3)),
        ("resnet152", "bottleneck", (3, 8, 36, 3)),
    ],
)
def test_imagenet_nets_are_those_of_table_1(name: str, block: str, counts: tuple[int, ...]) -> None:
    spec = zoo.spec(name)
    assert (spec.block, spec.counts, spec.family) == (block, counts, "imagenet")
    assert (spec.widths, spec.size, spec.num_classes) == ((64, 128, 256, 512), 224, 1000)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 6, 7, 9, 18, 200])
@pytest.mark.parametrize("kind", ["resnet", "plain"])
def test_every_depth_of_6n_plus_2_is_a_cifar_net(kind: str, n: int) -> None:
    spec = zoo.spec(f"{kind}{6 * n + 2}")
    assert (spec.family, spec.block, spec.counts) == ("cifar", "basic", (n, n, n))
    assert (spec.widths, spec.size, spec.num_classes) == ((16, 32, 64), 32, 10)


@pytest.mark.parametrize(
    "name",
    ["resnet2", "resnet0", "resnet19", "resnet21", "plain50", "plain101", "plain152", "resnet"],
)
def test_other_depths_are_unknown(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown model '{name}'"):
        zoo.spec(name)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("resnet51", "resnet50"),
        ("ResNet18", "resnet18"),
        ("resnet-34", "resnet34"),
        ("resent101", "resnet101"),
        ("plian20", "plain20"),
        ("resnet1203", "resnet1202"),
    ],
)
def test_a_misspelt_name_comes_with_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError, match=f"did you mean '{nearest}'"):
        zoo.spec(text)


@pytest.mark.parametrize("text", ["", "20", "🦊"])
def test_a_name_from_elsewhere_comes_with_the_table(text: str) -> None:
    with pytest.raises(UnknownNameError, match=r"known: resnet18, .*, vgg19_bn"):
        zoo.spec(text)


@pytest.mark.parametrize("text", ["resnet50 ", "xresnet50", "resnet50d", "resnet-1", "resnet5.0"])
def test_a_name_is_matched_whole(text: str) -> None:
    with pytest.raises(UnknownNameError):
        zoo.spec(text)


def test_the_shortcut_is_b_for_imagenet_and_a_for_cifar_unless_told() -> None:
    assert zoo.spec("resnet50").shortcut == "B"
    assert zoo.spec("resnet20").shortcut == "A"
    assert zoo.spec("plain20").shortcut is None
    assert [zoo.spec("resnet18", shortcut=option).shortcut for option in "ABC"] == ["A", "B", "C"]


def test_bottlenecks_stride_in_the_3x3_unless_told() -> None:
    assert zoo.spec("resnet50").stride_in == "3x3"
    assert zoo.spec("resnet50", stride_in="1x1").stride_in == "1x1"


@pytest.mark.parametrize("name", ["plain20", "plain34"])
@pytest.mark.parametrize("option", ["A", "B", "C"])
def test_a_plain_net_takes_no_shortcut(name: str, option: str) -> None:
    with pytest.raises(InputError, match=f"{name} is a plain net"):
        zoo.spec(name, shortcut=option)


def test_unknown_options_are_named() -> None:
    with pytest.raises(UnknownNameError, match=r"shortcut option 'D'.*A, B, C"):
        zoo.spec("resnet50", shortcut="D")
    with pytest.raises(UnknownNameError, match=r"stride position '2x2'"):
        zoo.spec("resnet50", stride_in="2x2")


@pytest.mark.parametrize(
    ("name", "shortcut", "stride_in", "full"),
    [
        ("resnet50-v1", "B", "1x1", "resnet50-v1"),
        ("resnet50-v1.5", "B", "3x3", "resnet50"),
        ("resnet34-A", "A", "3x3", "resnet34-A"),
        ("resnet34-b", "B", "3x3", "resnet34"),
        ("resnet34-C", "C", "3x3", "resnet34-C"),
        ("resnet20-A", "A", "3x3", "resnet20"),
        ("resnet101-C-v1", "C", "1x1", "resnet101-v1-C"),
    ],
)
def test_spec_suffix_selects_a_variant(name: str, shortcut: str, stride_in: str, full: str) -> None:
    spec = zoo.spec(name)
    assert (spec.shortcut, spec.stride_in, spec.name) == (shortcut, stride_in, full)
    assert zoo.spec(full) == spec


@pytest.mark.parametrize(
    "name",
    ["resnet34-v1", "plain20-v1", "plain20-A", "plain20-block1", "resnet50-block1",
     "resnet26-block3", "resnet18-block3"],
)  # fmt: skip
def test_spec_variant_that_the_net_lacks_is_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        zoo.spec(name)
    assert caught.value.fix is not None
    (nearest,) = re.findall(r"--model ([\w-]+)", caught.value.fix)
    assert zoo.spec(nearest)


@pytest.mark.parametrize("name", ["resnet50-", "resnet50-D", "resnet50-A-B", "resnet50_v1", "vgg11",
                                  "vgg16_v1", "VGG16", "resnet50-v2"])  # fmt: skip
def test_spec_unknown_suffix_is_unknown(name: str) -> None:
    with pytest.raises(UnknownNameError):
        zoo.spec(name)


def test_spec_name_and_argument_that_contradict_are_refused() -> None:
    assert zoo.spec("resnet34-A", shortcut="A").shortcut == "A"
    with pytest.raises(InputError):
        zoo.spec("resnet34-A", shortcut="C")


@pytest.mark.parametrize(("block", "counts"), [("block1", (6, 6, 6)), ("block3", (2, 2, 2))])
def test_spec_blocks_of_one_and_three_layers_keep_depth_and_cost(
    block: str, counts: tuple[int, ...]
) -> None:
    spec, basic = zoo.spec(f"resnet20-{block}"), zoo.spec("resnet20")
    assert (spec.depth, spec.counts) == (20, counts)
    assert zoo.cost(spec) == zoo.cost(basic)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("vgg16", 138_357_544), ("vgg16_bn", 138_365_992), ("vgg19", 143_667_240),
     ("vgg19_bn", 143_678_248)],
)  # fmt: skip
def test_cost_of_vgg_is_torchvisions(name: str, parameters: int) -> None:
    assert zoo.cost(zoo.spec(name)).parameters == parameters


def test_cost_fc_layers_of_vgg19_are_few_multiply_adds_and_most_parameters() -> None:
    cost = zoo.cost(zoo.spec("vgg19"))
    assert round(cost.multiply_adds / 1e9, 3) == 19.632
    assert round(100 * cost.fc_multiply_adds / cost.multiply_adds, 1) == 0.6
    assert round(100 * cost.fc_parameters / cost.parameters) == 86
    assert round(100 * zoo.cost(zoo.spec("resnet34")).multiply_adds / cost.multiply_adds, 1) == 18.7


def test_names_can_be_looked_up_without_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
from rtresnet.models import zoo
print(zoo.spec("resnet50").counts)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(3, 4, 6, 3)\n"
