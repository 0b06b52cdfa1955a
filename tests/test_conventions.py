"""Costs by others' conventions against their published figures and formulas by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import models
from pipeline.compress.diet import diet
from pipeline.conventions import activation_mb, condensenet_flops, thesis_flops
from pipeline.errors import InputError
from pipeline.involution import Involution
from pipeline.overparameterize import overparameterize

SHAPE = (3, 224, 224)
# Lee 2022, tables 4.1, 4.3 and 4.4: the network, what its diet leaves whole, and parameters, activations in MB and GFLOPs of both.
# The thesis cuts the last digit of some (its GFLOPs of RedNet-26 are 1.75 and 0.67, ResNet18's 52.06 MB).
THESIS: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[int, str, str], tuple[int, str, str]]] = {
    "vgg16_bn": ({"dropout": 0.5}, (), (134_309_962, "322.13", "15.540"), (33_593_386, "161.07", "3.925")),
    "resnet_imagenet": (
        {"depth": 18, "stem": "imagenet"},
        ("conv1", "layer1.*"),
        (11_181_642, "62.79", "1.827"),
        (2_937_546, "52.06", "0.916"),
    ),
    "rednet": (
        {"depth": 26, "width": 64, "zero_init": True},
        ("backbone.stem.*",),
        (7_204_656, "492.54", "1.756"),
        (1_835_542, "287.04", "0.675"),
    ),
}


def figures(model: nn.Module) -> tuple[int, str, str]:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, f"{activation_mb(model, SHAPE):.2f}", f"{thesis_flops(model, SHAPE) / 1e9:.3f}"


@pytest.mark.parametrize("name", list(THESIS))
def test_networks_of_the_thesis_and_their_diets_have_its_figures(name: str) -> None:
    arguments, protect, full, small = THESIS[name]
    with torch.device("meta"):
        model = models.build(name, input_shape=SHAPE, classes=10, **arguments)
    assert figures(model) == full
    assert figures(diet(model, SHAPE, score="first", protect=protect)[0]) == small


def test_diet_of_rednet_halves_189_entries_and_is_the_network_of_half_width() -> None:
    arguments, protect, *_ = THESIS["rednet"]
    with torch.device("meta"):
        model = models.build("rednet", input_shape=SHAPE, classes=10, **arguments)
        narrow = models.build("rednet", input_shape=SHAPE, classes=10, **{**arguments, "width": 32})
    small, facts = diet(model, SHAPE, score="first", protect=protect)
    shapes, wanted = ({name: t.shape for name, t in m.state_dict().items()} for m in (small, narrow))
    assert shapes == wanted
    changed = {name: (t.shape, shapes[name]) for name, t in model.state_dict().items() if t.shape != shapes[name]}
    assert (len(changed), len(shapes) - len(changed)) == (189, 62)
    ratios = {(axis, a / b) for full, cut in changed.values() for axis, (a, b) in enumerate(zip(full, cut, strict=True)) if a != b}
    assert ratios == {(0, 2.0), (1, 2.0)}
    stem = [f"backbone.stem.{layer}" for layer in ("0.conv", "1.conv1.conv", "1.conv2.conv", "4.conv")]
    assert facts["full_width"] == [*stem, "head.fc"]


@pytest.mark.parametrize("group", [0, 1])
def test_diet_of_two_networks_side_by_side_is_one_of_them(group: int) -> None:
    """An involution network whose halves know nothing of each other, cut by the method itself."""
    torch.manual_seed(4)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.involution, self.norm = nn.Conv2d(3, 64, 1), Involution(64, 3, 2), nn.BatchNorm2d(64)
            self.relu, self.pool, self.flatten, self.fc = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(64, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.flatten(self.pool(self.relu(self.norm(self.involution(self.first(x)))))))

    model = Net().eval()
    other = slice(32, 64) if group == 0 else slice(0, 32)
    with torch.no_grad():
        for conv in (model.involution.conv1.conv, model.involution.conv2.conv):
            o, i = (side // 2 for side in conv.weight.shape[:2])
            conv.weight[:o, i:] = conv.weight[o:, :i] = 0
        for tensor in (model.norm.running_mean, model.norm.running_var):
            assert tensor is not None
            tensor.uniform_(0.5, 1.5)
        model.fc.weight[:, other] = 0
        small, facts = diet(model, (3, 8, 8), select=group)
        assert facts["group"] == group and small.get_submodule("involution.conv2.conv").weight.shape == (18, 8, 1, 1)
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(small.eval()(x), model(x), rtol=1e-5, atol=1e-6)


def small_network() -> nn.Sequential:
    """For images of 2x6x6: counts that fit on a page."""
    up = nn.ConvTranspose2d(2, 3, 2, stride=2)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1), up,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Dropout(), nn.Linear(3, 5),
    )  # fmt: skip


def test_thesis_counts_as_it_says() -> None:
    grouped, norm, relu, pool = 4 * 36 * 1 * 9, 4 * 4 * 36, 4 * 36, 4 * 36
    pointwise, up, average, linear = 2 * 9 * 4, 2 * 9 * 3 * 4, 3 * 36, 3 * 5
    assert thesis_flops(small_network(), (2, 6, 6)) == grouped + norm + relu + pool + pointwise + up + average + linear


def test_condensenet_counts_as_it_says() -> None:
    model = small_network()
    del model[5]  # it knows no transposed convolution
    model[-1] = nn.Linear(2, 5)
    grouped, relu, pool, pointwise, average, linear = 4 * 36 * 9, 4 * 36, 4 * 9 * 4, 2 * 9 * 4, 2 * 9, 2 * 5 + 5
    assert condensenet_flops(model, (2, 6, 6)) == grouped + relu + pool + pointwise + average + linear


def test_activations_are_every_output_twice_in_float32() -> None:
    outputs = 3 * 4 * 36 + 4 * 9 + 2 * 9 + 3 * 36 + 3 + 3 + 5  # without the flattening
    assert activation_mb(small_network(), (2, 6, 6)) == outputs * 8 / 2**20
    assert activation_mb(nn.Sequential(nn.Conv2d(2, 4, 1), small_network()[1:4]), (2, 6, 6)) == (3 * 144 + 36) * 8 / 2**20


class Join(nn.Module):
    """A layer of CondenseNet after its 1x1 convolution has become a grouped one: C -> C + growth channels."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, groups=4, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(4 * growth), nn.ReLU()
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, groups=4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu1(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu2(self.norm2(y)))], 1)


def test_condensenet_lgc_182_has_its_published_flops() -> None:
    """513 M, of which 493.9 are convolutions and 17.9 ReLUs."""
    layers: list[nn.Module] = []
    width, pixels = 24, 1024
    convolutions, relus, pools = 24 * 3 * 9 * pixels, 0, 0
    with torch.device("meta"):
        layers.append(nn.Conv2d(3, width, 3, padding=1, bias=False))
        for growth in (12, 24, 48):
            for _ in range(30):
                layers.append(Join(width, growth))
                convolutions += (width * 4 * growth // 4 + 4 * growth * growth * 9 // 4) * pixels
                relus += (width + 4 * growth) * pixels
                width += growth
            layers += [nn.AvgPool2d(2)] if growth < 48 else [nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(8)]
            relus += width * pixels if growth == 48 else 0
            pools += width * pixels
            pixels //= 4
        model = nn.Sequential(*layers, nn.Flatten(1), nn.Linear(width, 10))
    assert (f"{convolutions / 1e6:.1f}", f"{relus / 1e6:.1f}", width) == ("493.9", "17.9", 2544)
    found = condensenet_flops(model, (3, 32, 32))
    assert found == convolutions + relus + pools + 25_450 and round(found / 1e6) == 513


@pytest.mark.parametrize("of", [thesis_flops, condensenet_flops])
def test_expanded_network_counts_as_the_one_it_becomes(of: Callable[[nn.Module, tuple[int, int, int]], int]) -> None:
    model = small_network()[:5]
    plain = of(model, (2, 6, 6))
    expanded = overparameterize(model, "kflo", depth=2, width=2.0)
    assert len(list(expanded.parameters())) > 6 and of(expanded, (2, 6, 6)) == plain


def test_modules_without_a_rule_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="thesis's convention of counting says nothing of SiLU"):
        thesis_flops(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU()), (3, 4, 4))
    with pytest.raises(InputError, match="CondenseNet's convention of counting says nothing of MaxPool2d"):
        condensenet_flops(nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2)), (3, 4, 4))
