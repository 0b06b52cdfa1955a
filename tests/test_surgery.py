"""Surgery's law: the smaller network computes what the whole one computes where each layer sees zeros in the channels that it
does not read. Over the zoo and over networks drawn at random; and what surgery cannot treat, it names."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ZOO, build, difference, draw_reads, drawn, masked, plain, programs, randomise, shape_of
from torch import Tensor, nn

from pipeline import models
from pipeline.channels import follow
from pipeline.errors import InputError
from pipeline.grouping import group_channels
from pipeline.layers import ChannelSelect, filtering_layers
from pipeline.overparameterize import overparameterize
from pipeline.structure import restructure, structure
from pipeline.surgery import drop, shrink

CLOSE = 1e-5  # of the largest |output|: fp32 sums in another order; what is wrong differs by more than 1e-2
SMALL = (3, 8, 8)
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
many = settings(few, max_examples=200)
every_network = pytest.mark.parametrize("name", ZOO)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that surgery could change."""
    modes = {name: (type(m), m.training, len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"structure": structure(model), "modes": modes, "tensors": tensors}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    tensors = zip(first["tensors"].items(), second["tensors"].items(), strict=True)
    equal = all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in tensors)
    return equal and all(first[key] == second[key] for key in ("structure", "modes"))


@pytest.mark.parametrize("expand", [False, True], ids=["plain", "kflo"])
@every_network
def test_law_on_the_zoo(name: str, expand: bool) -> None:
    shape, model = shape_of(name), build(name, expand)
    before = snapshot(model)
    reads = draw_reads(model, shape, seed=3)
    smaller = shrink(model, shape, reads)
    assert same(before, snapshot(model))
    assert difference(masked(model, reads), smaller, shape) < CLOSE
    assert difference(model, smaller, shape) > 0.01  # the masks matter
    again = draw_reads(smaller, shape, seed=4)
    smallest = shrink(smaller, shape, again)
    assert difference(masked(smaller, again), smallest, shape) < CLOSE
    assert not any(".layer.layer" in layer for layer, _ in filtering_layers(smallest))  # one select a layer, at most
    assert parameters(model) > parameters(smaller) > parameters(smallest)


@given(programs(), st.integers(0, 99), st.sampled_from([0.3, 0.6, 0.9]))
@many
def test_law_on_networks_drawn_at_random(program: dict[str, Any], seed: int, share: float) -> None:
    model = drawn(program)
    before = snapshot(model)
    reads = draw_reads(model, SMALL, seed, share)
    assert not follow(model, SMALL).untreated
    smaller = shrink(model, SMALL, reads)
    assert same(before, snapshot(model))
    assert difference(masked(model, reads), smaller, SMALL) < CLOSE
    assert difference(plain(smaller), shrink(plain(model), SMALL, reads), SMALL) < CLOSE
    again = draw_reads(smaller, SMALL, seed + 1, share)
    smallest = shrink(smaller, SMALL, again)
    assert difference(masked(smaller, again), smallest, SMALL) < CLOSE
    assert parameters(smallest) <= parameters(smaller) <= parameters(model)


@given(programs(), st.integers(0, 99))
@few
def test_structure_makes_the_same_modules_again(program: dict[str, Any], seed: int) -> None:
    smaller = shrink(model := drawn(program), SMALL, draw_reads(model, SMALL, seed))
    smaller = shrink(smaller, SMALL, draw_reads(smaller, SMALL, seed + 1))
    rebuilt = drawn({**program, "seed": 7})
    restructure(rebuilt, json.loads(json.dumps(structure(smaller))))
    assert structure(rebuilt) == structure(smaller)
    rebuilt.load_state_dict(smaller.state_dict())
    assert difference(smaller, rebuilt, SMALL) == 0
    described = [
        [(name, type(module).__name__, module.extra_repr()) for name, module in model.named_modules()]
        for model in (rebuilt, smaller)
    ]
    assert described[0] == described[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("expand", [False, True], ids=["plain", "kflo"])
def test_surgery_on_a_gpu_gives_the_same_network(expand: bool) -> None:
    name = "resnet"
    shape, model = shape_of(name), build(name, expand)
    first, second = draw_reads(model, shape, 3), {"fc": torch.arange(64) % 3 > 0}
    here = shrink(shrink(model, shape, first), shape, second)
    model.to("cuda")
    on_gpu = {layer: mask.to("cuda") for layer, mask in first.items()}
    there = shrink(shrink(model, shape, on_gpu), shape, second)
    assert {tensor.device.type for tensor in there.state_dict().values()} == {"cuda"}
    assert there(torch.randn(2, *shape, device="cuda")).isfinite().all()
    assert difference(here, there.cpu(), shape) == 0
    grouped = shrink(randomise(Grouped()).to("cuda"), SMALL, {"middle": mask(6, 0, 3, 4), "last": mask(9, 0, 4, 8)})
    assert grouped(torch.randn(2, *SMALL, device="cuda")).isfinite().all()


def test_parameters_fall_by_hand_count() -> None:
    """conv1 (3 -> 4), conv2 (4 -> 6, reads 2), linear (6 x 4 pixels -> 10, reads pixels of 5 channels)."""
    conv1, conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, bias=False)
    model = nn.Sequential(conv1, nn.BatchNorm2d(4), nn.ReLU(), conv2, nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(24, 10))
    randomise(model)
    pixels = torch.arange(24) // 4
    reads = {"3": torch.tensor([True, False, False, True]), "6": (pixels != 1) & (torch.arange(24) != 9)}
    smaller = shrink(model, SMALL, reads)
    # conv1: 2 filters and biases; its batch norm: 2 and 2; conv2: 5 filters of 2 channels; the linear layer does not read one
    # pixel of a channel whose others it reads, so that the channel stays and a select leaves the pixel out.
    assert parameters(smaller) == 2 * 27 + 2 + 2 * 2 + 5 * 2 * 9 + (5 * 4 - 1) * 10 + 10
    assert isinstance(smaller.get_submodule("6.select"), ChannelSelect)
    assert smaller.get_submodule("6.select").index.tolist() == [*range(5), *range(6, 20)]
    assert difference(masked(model, reads), smaller, SMALL) < CLOSE


def test_a_channel_goes_only_when_no_reader_of_an_add_wants_it() -> None:
    model = build("resnet", expand=False)
    ids = {name: mask for name, mask in draw_reads(model, shape_of("resnet"), 0, 2.0).items() if name.startswith("layer1")}
    assert set(ids) <= {"layer1.0.conv1", "layer1.0.conv2"}
    first_only = {"layer1.0.conv1": torch.arange(16) < 8}
    smaller = shrink(model, shape_of("resnet"), first_only)
    assert structure(smaller)["filtering"]["conv1"][1] == 16  # the shortcut still needs all of them
    assert structure(smaller)["filtering"]["layer1.0.conv1.layer"] == [8, 16, 1]
    everywhere = {name: torch.arange(16) < 8 for name in ("layer1.0.conv1", "layer2.0.conv1")}
    smaller = shrink(model, shape_of("resnet"), everywhere)
    assert structure(smaller)["filtering"]["conv1"][1] == 16  # the shortcut of layer2 leads to its second block's readers
    everywhere |= {"layer3.0.conv1": torch.arange(32) >= 16, "fc": torch.arange(64) >= 40}
    smaller = shrink(model, shape_of("resnet"), everywhere)
    assert difference(masked(model, everywhere), smaller, shape_of("resnet")) < CLOSE


@pytest.mark.parametrize(
    ("name", "arguments", "protect", "count"),
    [
        ("vgg16_bn", {"dropout": 0.5}, (), 33_593_386),
        ("resnet_imagenet", {"depth": 18, "stem": "imagenet"}, ("conv1", "layer1.*"), 2_937_546),
    ],
)
def test_halved_networks_have_the_published_numbers_of_parameters(
    name: str, arguments: dict[str, Any], protect: tuple[str, ...], count: int
) -> None:
    """Paper 003, tables 4.1 and 4.3."""
    shape = (3, 224, 224)
    with torch.device("meta"):
        model = models.build(name, input_shape=shape, classes=10, **arguments)
        channels = follow(model, shape)
    second = {channel for channel, group in group_channels(channels, 2, protect).items() if group == 1}
    assert parameters(shrink(model, shape, drop(channels, second))) == count


class Grouped(nn.Module):
    """A convolution of 3 groups (2 channels in, 3 out, each) between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.middle = nn.Conv2d(6, 9, 3, groups=3)
        self.last = nn.Conv2d(9, 4, 3)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.middle(self.norm(self.first(x)).relu()).relu())
        return self.head(torch.flatten(self.pool(x), 1))


def mask(count: int, *dropped: int) -> Tensor:
    return torch.tensor([index not in dropped for index in range(count)])


@pytest.mark.parametrize("expand", [False, True], ids=["plain", "kflo"])
@pytest.mark.parametrize(
    ("reads", "shape"),
    [
        ({"middle": mask(6, 2, 3), "last": mask(9, 3, 4, 5)}, [4, 6, 2]),  # the group in the middle
        ({"middle": mask(6, 0, 2, 4), "last": mask(9, 1, 4, 7)}, [3, 6, 3]),  # the same places of every group
        ({"middle": mask(6, 0, 3, 4), "last": mask(9, 0, 4, 8)}, [3, 6, 3]),  # different places
        ({"middle": mask(6, 0, 1, 2, 4), "last": mask(9, 0, 1, 2, 3, 6)}, [2, 4, 2]),
    ],
)
def test_groups_may_go_or_shrink_alike(reads: dict[str, Tensor], shape: list[int], expand: bool) -> None:
    model = Grouped()
    if expand:
        overparameterize(model, "kflo", width=2)
    randomise(model)
    if expand and reads["middle"].tolist() == mask(6, 0, 3, 4).tolist():
        with pytest.raises(InputError, match="groups of layer middle would keep different channels; collapse the network first"):
            shrink(model, SMALL, reads)
        return
    smaller = shrink(model, SMALL, reads)
    assert structure(smaller)["filtering"]["middle"] == shape
    assert difference(masked(model, reads), smaller, SMALL) < CLOSE


@pytest.mark.parametrize(
    ("reads", "shape"),
    [
        ({"middle": mask(6, 0)}, [6, 9, 3]),  # the groups stay equal
        ({"last": mask(9, 0)}, [6, 9, 3]),
        ({"last": mask(9, 0, 1, 2)}, [4, 6, 2]),  # what the first group reads goes with it
        ({"middle": mask(6, 0, 2, 3), "last": mask(9, 0, 4)}, [6, 9, 3]),  # the middle one reads zeros
        ({"middle": mask(6, 0, 1, 2, 4), "last": mask(9, 0, 4, 5, 7)}, [3, 6, 3]),
    ],
)
def test_groups_that_would_differ_keep_channels_or_read_zeros(reads: dict[str, Tensor], shape: list[int]) -> None:
    model = randomise(Grouped())
    smaller = shrink(model, SMALL, reads)
    assert structure(smaller)["filtering"]["middle"] == shape or structure(smaller)["filtering"]["middle.layer"] == shape
    assert difference(masked(model, reads), smaller, SMALL) < CLOSE


class Idle(nn.Module):
    """A branch whose reader may close it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 6, 1)
        self.last, self.head = nn.Conv2d(11, 4, 3), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.last(torch.cat([self.left(x), self.right(x)], 1))
        return self.head(x.mean((2, 3)))


def test_a_layer_that_nobody_reads_keeps_one_output() -> None:
    model = randomise(Idle())
    reads = {"last": torch.arange(11) >= 5}
    smaller = shrink(model, SMALL, reads)
    widths = structure(smaller)["filtering"]
    assert widths["left"] == [4, 1, 1] and widths["last.layer"] == [6, 4, 1] and widths["right"] == [4, 6, 1]
    assert difference(masked(model, reads), smaller, SMALL) < CLOSE


@pytest.mark.parametrize(
    ("reads", "names"),
    [
        ({"middle": mask(6, *range(6))}, "middle"),
        ({"last": mask(9, *range(9))}, "last"),
        ({"head": mask(4, *range(4))}, "head"),
        ({"first": mask(3, 0, 1, 2)}, "first"),
        ({"nowhere": mask(3)}, "nowhere"),
        ({"first": mask(4)}, "first that reads 4 channels"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_the_layers_name(reads: dict[str, Tensor], names: str) -> None:
    with pytest.raises(InputError, match=f"layer {names}"):
        shrink(randomise(Grouped()), SMALL, reads)


def test_frozen_parameters_stay_frozen() -> None:
    model = models.build("cifar_quick", input_shape=(1, 16, 16), classes=4)
    model.get_submodule("conv1").requires_grad_(False)
    smaller = shrink(model, (1, 16, 16), {"conv2": torch.arange(32) < 8})
    for name, parameter in smaller.named_parameters():
        assert parameter.requires_grad != name.startswith("conv1."), name
