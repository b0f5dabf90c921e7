from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from rtresnet.models import zoo
from rtresnet.models.nets import multiply_adds
from rtresnet.models.resnet import (
    Add,
    BasicBlock,
    Bottleneck,
    PadShortcut,
    ResNet,
)

# name, shortcut, parameters. Counted by hand from table 1 and section 4.2 of the paper.
PARAMETERS = [
    ("resnet18", "A", 11_515_688),
    ("resnet18", "B", 11_689_512),
    ("resnet18", "C", 12_043_816),
    ("resnet34", "A", 21_623_848),
    ("resnet34", "B", 21_797_672),
    ("resnet34", "C", 22_716_840),
    ("resnet50", "B", 25_557_032),
    ("resnet101", "B", 44_549_160),
    ("resnet152", "B", 60_192_808),
    ("plain18", None, 11_515_688),
    ("plain34", None, 21_623_848),
    ("resnet20", "A", 269_722),
    ("resnet32", "A", 464_154),
    ("resnet44", "A", 658_586),
    ("resnet56", "A", 853_018),
    ("resnet110", "A", 1_727_962),
    ("resnet1202", "A", 19_421_274),
]

# name, stride position, multiply-adds in units of 1e9, to two decimals.
MULTIPLY_ADDS = [
    ("resnet18", "3x3", 1.81),
    ("resnet34", "3x3", 3.66),
    ("resnet50", "1x1", 3.86),
    ("resnet50", "3x3", 4.09),
    ("resnet101", "1x1", 7.57),
    ("resnet101", "3x3", 7.80),
    ("resnet152", "1x1", 11.28),
    ("resnet152", "3x3", 11.51),
]


@functools.cache
def meta(name: str, shortcut: str | None = None, stride_in: str | None = None) -> ResNet:
    """Return the net without memory for its parameters."""
    return zoo.build(zoo.spec(name, shortcut=shortcut, stride_in=stride_in), device="meta")


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def cifar(depth: int, shortcut: str | None = "A") -> ResNet:
    """Return a CIFAR net with weights, the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = "resnet" if shortcut else "plain"
        return zoo.build(zoo.spec(f"{kind}{depth}", shortcut=shortcut)).eval()


# --- the paper's tables


@pytest.mark.parametrize(("name", "shortcut", "expected"), PARAMETERS)
def test_parameters_are_those_of_the_paper(name: str, shortcut: str | None, expected: int) -> None:
    assert parameters(meta(name, shortcut)) == expected


@pytest.mark.parametrize("stride_in", ["1x1", "3x3"])
def test_where_a_bottleneck_strides_costs_no_parameter(stride_in: str) -> None:
    assert parameters(meta("resnet50", "B", stride_in)) == 25_557_032


@pytest.mark.parametrize("depth", [8, 20, 32, 44, 56, 110, 1202])
def test_a_residual_cifar_net_has_exactly_the_plain_nets_parameters(depth: int) -> None:
    residual, plain = meta(f"resnet{depth}").state_dict(), meta(f"plain{depth}").state_dict()
    assert list(residual) == list(plain)
    assert all(residual[name].shape == plain[name].shape for name in plain)


@pytest.mark.parametrize("name", ["18", "34"])
def test_option_a_has_exactly_the_plain_nets_parameters_on_imagenet(name: str) -> None:
    residual, plain = meta(f"resnet{name}", "A"), meta(f"plain{name}")
    assert list(residual.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(("name", "stride_in", "expected"), MULTIPLY_ADDS)
def test_multiply_adds_are_those_of_the_paper(name: str, stride_in: str, expected: float) -> None:
    counted = multiply_adds(meta(name, None, stride_in), 224)
    assert round(counted / 1e9, 2) == expected


def test_the_18_and_34_layer_nets_cost_what_the_paper_prints() -> None:
    for name, printed in (("plain18", 1.8), ("plain34", 3.6), ("resnet18", 1.8)):
        shortcut = "A" if name.startswith("resnet") else None
        assert round(multiply_adds(meta(name, shortcut), 224) / 1e9, 1) == printed


def test_option_a_costs_no_multiply_add_and_option_c_more_than_b() -> None:
    costs = [multiply_adds(meta("resnet18", option), 224) for option in "ABC"]
    assert costs[0] == multiply_adds(meta("plain18"), 224)
    assert costs[0] < costs[1] < costs[2]


def test_multiply_adds_of_a_convolution_and_a_linear_layer_are_counted_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(8 * 25, 7))
    assert multiply_adds(net, 10) == 25 * 8 * 3 * 9 + 8 * 25 * 7


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in zoo.names() if "1202" not in name),
        ("resnet8", {}),
        *(("resnet18", {"shortcut": option}) for option in "AC"),
        *(("resnet50", {"shortcut": option, "stride_in": "1x1"}) for option in "ABC"),
        ("resnet20", {"shortcut": "B"}),
        ("resnet20", {"shortcut": "C"}),
        ("resnet20-block1", {}),
        ("resnet20-block3", {"shortcut": "B"}),
    ],
)
def test_cost_from_the_table_equals_the_counted_net(name: str, options: dict[str, str]) -> None:
    spec = zoo.spec(name, **options)
    net = zoo.build(spec, device="meta")
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    assert zoo.cost(spec) == zoo.Cost(
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        multiply_adds=multiply_adds(net, spec.size),
        fc_parameters=sum(p.numel() for layer in linear for p in layer.parameters()),
        fc_multiply_adds=sum(layer.weight.numel() for layer in linear),
    )


def test_counting_leaves_no_trace_in_the_net() -> None:
    net = cifar(8).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert multiply_adds(net, 32) == multiply_adds(meta("resnet8"), 32)
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("name", [name for name in zoo.names() if "1202" not in name])
def test_a_name_counts_the_weighted_layers(name: str) -> None:
    """Section 3.3: convolutions and the FC; projection shortcuts are not counted."""
    weighted = [
        module
        for path, module in meta(name).named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in path
    ]
    assert len(weighted) == zoo.spec(name).depth


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20", "plain34"])
def test_convolutions_have_no_bias_and_are_followed_by_bn(name: str) -> None:
    net = meta(name)
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(module.bias is None for module in convolutions)
    assert [m.out_channels for m in convolutions] == [m.num_features for m in norms]


# --- structure


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("resnet18", 224, [(64, 56), (128, 28), (256, 14), (512, 7)]),
        ("plain34", 224, [(64, 56), (128, 28), (256, 14), (512, 7)]),
        ("resnet50", 224, [(256, 56), (512, 28), (1024, 14), (2048, 7)]),
        ("resnet20", 32, [(16, 32), (32, 16), (64, 8)]),
        ("plain20", 32, [(16, 32), (32, 16), (64, 8)]),
    ],
)
def test_stages_have_the_papers_sizes(
    name: str, size: int, expected: list[tuple[int, int]]
) -> None:
    net, observed = meta(name), []
    hooks = [
        getattr(net, stage).register_forward_hook(
            lambda _, __, out: observed.append((out.shape[1], out.shape[2], out.shape[3]))
        )
        for stage in net.stages
    ]
    net(torch.zeros(2, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    assert observed == [(channels, side, side) for channels, side in expected]


@pytest.mark.parametrize(
    ("name", "shortcut", "size"),
    [
        ("resnet18", "A", 64),
        ("resnet18", "C", 65),
        ("resnet50", "B", 224),
        ("resnet50", "A", 97),
        ("plain18", None, 96),
        ("resnet20", "A", 33),
        ("resnet20", "B", 40),
        ("plain20", None, 32),
    ],
)
def test_logits_are_a_row_an_image_at_any_size(name: str, shortcut: str | None, size: int) -> None:
    net = meta(name, shortcut)
    classes = zoo.spec(name).num_classes
    assert net(torch.zeros(3, 3, size, size, device="meta")).shape == (3, classes)


def test_the_number_of_classes_can_be_chosen() -> None:
    net = zoo.build(zoo.spec("resnet8"), 37, device="meta")
    assert net(torch.zeros(1, 3, 32, 32, device="meta")).shape == (1, 37)


@pytest.mark.parametrize(("stride_in", "first", "second"), [("1x1", 2, 1), ("3x3", 1, 2)])
def test_a_bottleneck_strides_where_it_is_told(stride_in: str, first: int, second: int) -> None:
    block = meta("resnet50", None, stride_in).get_submodule("layer2.0")
    assert isinstance(block, Bottleneck)
    assert block.conv1.stride == (first, first)
    assert block.conv2.stride == (second, second)
    assert block.conv3.stride == (1, 1)


def test_only_the_first_block_of_a_later_stage_strides() -> None:
    net = meta("resnet34")
    for stage in net.stages:
        blocks = list(getattr(net, stage))
        strides = [block.conv1.stride[0] for block in blocks]
        assert strides == [1 if stage == "layer1" else 2] + [1] * (len(blocks) - 1)


def test_option_b_projects_only_where_dimensions_change() -> None:
    names = {name for name, module in meta("resnet18", "B").named_modules() if "downsample" in name}
    assert {name for name in names if name.endswith("downsample")} == {
        f"layer{stage}.0.downsample" for stage in (2, 3, 4)
    }
    bottlenecks = dict(meta("resnet50", "B").named_modules())
    assert "layer1.0.downsample.0" in bottlenecks  # 64 to 256 channels at stride 1
    assert "layer1.1.downsample.0" not in bottlenecks


def test_option_c_projects_everywhere() -> None:
    net = meta("resnet18", "C")
    for stage in net.stages:
        assert all(isinstance(block.downsample[0], nn.Conv2d) for block in getattr(net, stage))


def test_a_plain_net_adds_nothing() -> None:
    assert not any(isinstance(module, Add | PadShortcut) for module in meta("plain20").modules())
    residual = [module for module in meta("resnet20").modules() if isinstance(module, Add)]
    assert len(residual) == 9


# --- what the shortcuts compute


def test_option_a_takes_every_second_pixel_and_fills_new_channels_with_zeros() -> None:
    x = torch.arange(2 * 4 * 6 * 6, dtype=torch.float32).reshape(2, 4, 6, 6) + 1
    out = PadShortcut(4, 8, 2)(x)
    assert out.shape == (2, 8, 3, 3)
    for image in range(2):
        for channel in range(8):
            for row in range(3):
                for column in range(3):
                    old = channel - 2
                    expected = x[image, old, 2 * row, 2 * column] if 0 <= old < 4 else 0
                    assert out[image, channel, row, column] == expected


def test_option_a_rounds_odd_sizes_up_as_the_convolution_does() -> None:
    block = BasicBlock(4, 8, 2, "A", "3x3").eval()
    assert block(torch.randn(1, 4, 7, 9)).shape == (1, 8, 4, 5)


def test_option_a_has_no_parameters_and_no_buffers() -> None:
    assert PadShortcut(16, 32, 2).state_dict() == {}


def silent(block: nn.Module) -> nn.Module:
    """Return the block with a residual branch that gives zero: what is left is the shortcut."""
    last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
    nn.init.zeros_(last.weight)  # type: ignore[arg-type, union-attr]
    return block.eval()


@pytest.mark.parametrize("option", ["A", "B"])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_a_shortcut_between_equal_dimensions_is_the_identity(
    kind: type[BasicBlock] | type[Bottleneck], option: str
) -> None:
    width = 8
    block = silent(kind(width * kind.expansion, width, 1, option, "3x3"))
    x = torch.randn(2, width * kind.expansion, 5, 5)
    assert torch.equal(block(x), x.relu())


def test_the_shortcut_is_added_before_the_last_relu() -> None:
    block = silent(BasicBlock(4, 8, 2, "A", "3x3"))
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), PadShortcut(4, 8, 2)(x).relu())


def test_a_silent_plain_block_passes_nothing() -> None:
    block = silent(BasicBlock(4, 4, 1, None, "3x3"))
    assert block(torch.randn(1, 4, 5, 5)).abs().max() == 0


def test_a_projection_is_a_strided_1x1_convolution_with_bn() -> None:
    block = silent(BasicBlock(4, 8, 2, "B", "3x3"))
    x = torch.randn(2, 4, 6, 6)
    projection, norm = block.downsample  # type: ignore[misc]
    expected = norm(nn.functional.conv2d(x[:, :, ::2, ::2], projection.weight))
    assert torch.allclose(block(x), expected.relu(), atol=1e-6)


def test_a_basic_block_is_two_convolutions_plus_its_input() -> None:
    torch.manual_seed(0)
    block = BasicBlock(6, 6, 1, "A", "3x3").eval()
    x = torch.randn(2, 6, 5, 5)
    inner = nn.functional.conv2d(x, block.conv1.weight, padding=1) / math.sqrt(1 + 1e-5)
    inner = nn.functional.conv2d(inner.relu(), block.conv2.weight, padding=1)
    assert torch.allclose(block(x), (inner / math.sqrt(1 + 1e-5) + x).relu(), atol=1e-5)


def test_the_sum_is_a_module_with_a_name() -> None:
    names = dict(cifar(8).named_modules())
    assert isinstance(names["layer2.0.add"], Add)
    assert torch.equal(Add()(torch.tensor(2.0), torch.tensor(3.0)), torch.tensor(5.0))


@pytest.mark.parametrize("shortcut", ["A", "B", "C", None])
def test_images_of_a_batch_do_not_see_each_other(shortcut: str | None) -> None:
    net, x = cifar(8, shortcut), torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        together, separate = net(x), torch.cat([net(image[None]) for image in x])
    assert together.shape == (3, 10)
    assert torch.allclose(together, separate, rtol=1e-4, atol=1e-4)


# --- initialization


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_convolutions_start_as_he_et_al_say(name: str) -> None:
    """Normal with variance 2 / n, n = k * k * channels out; section 3.4, reference 13."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = zoo.build(zoo.spec(name))
    checked = 0
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() >= 2000:
            kernel = module.kernel_size[0]
            expected = math.sqrt(2 / (kernel * kernel * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.08)
            assert abs(module.weight.mean().item()) < 0.1 * expected
            checked += 1
    assert checked >= 18


def test_bn_starts_as_the_identity_and_the_fc_without_bias() -> None:
    net = cifar(20)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert (net.fc.bias == 0).all()
    assert net.fc.weight.std() > 0


def test_the_seed_decides_the_weights() -> None:
    one, two = cifar(8).state_dict(), cifar(8).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
