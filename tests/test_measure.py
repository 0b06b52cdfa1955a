"""Parameters and multiply-adds against formulas worked out by hand and against published counts."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from pipeline import models
from pipeline.measure import count, parameters, size_mb
from pipeline.overparameterize import collapse, overparameterize


def by_hand(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """MACs of convolutions, outputs * inputs / groups * kernel area at each output pixel, and of linear layers."""
    total = 0

    def add(module: Any, _: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            pixels = output.shape[2] * output.shape[3]
            total += pixels * module.out_channels * module.in_channels // module.groups * math.prod(module.kernel_size)
        elif isinstance(module, nn.Linear):
            total += module.in_features * module.out_features

    hooks = [module.register_forward_hook(add) for module in model.modules()]
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (nn.Conv2d(6, 8, 3, padding=1), 8 * 6 * 9 * 12 * 10),
        (nn.Conv2d(6, 8, 3, bias=False), 8 * 6 * 9 * 10 * 8),
        (nn.Conv2d(6, 9, 3, padding=1, groups=3), 9 * 2 * 9 * 12 * 10),
        (nn.Conv2d(6, 6, 5, padding=2, groups=6), 6 * 1 * 25 * 12 * 10),
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), 8 * 6 * 9 * 6 * 5),
        (nn.Conv2d(6, 8, 3, dilation=3), 8 * 6 * 9 * 6 * 4),
        (nn.Conv2d(6, 8, (1, 3), stride=(2, 1)), 8 * 6 * 3 * 6 * 8),
        (nn.Sequential(nn.Flatten(), nn.Linear(6 * 12 * 10, 7)), 7 * 6 * 12 * 10),
    ],
)
def test_layer_counts_what_its_formula_says(layer: nn.Module, macs: int) -> None:
    assert count(layer, (6, 12, 10))["macs"] == macs


def test_normalisation_activation_pooling_and_addition_count_nothing_and_are_known() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1))
    found = count(model, (4, 16, 16))
    assert found["macs"] == 0 and found["unsupported"] == {} and found["by_module"] == {}
    assert found["parameters"] == 8


@pytest.mark.parametrize(
    ("name", "published_parameters", "published_macs"),
    [
        ("resnet18", 11_689_512, 1_814_073_344),
        ("mobilenet_v2", 3_504_872, 300_774_272),
        ("densenet121", 7_978_856, 2_834_161_664),
    ],
)
def test_torchvision_networks_have_their_published_counts(name: str, published_parameters: int, published_macs: int) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    found = count(model.to_empty(device="cpu").eval(), (3, 224, 224))
    assert (found["parameters"], found["macs"]) == (published_parameters, published_macs)
    assert found["unsupported"] == {} and found["uncalled"] == []


@pytest.mark.parametrize(
    ("name", "arguments", "shape", "published_macs"),
    [
        ("cifar_quick", {}, (3, 32, 32), 10.8e6),
        ("resnet", {"depth": 32}, (3, 32, 32), 68.9e6),
        ("resnet", {"depth": 8}, (1, 8, 8), None),
        ("mininet", {"dropout": 0.5}, (3, 64, 64), None),
        ("vgg16_bn", {"dropout": 0.5}, (3, 32, 32), None),
        ("resnet_imagenet", {"depth": 50, "stem": "imagenet"}, (3, 64, 64), 334e6),
        ("alexnet", {"variant": "four_convolutions", "dropout": 0.5}, (3, 64, 64), None),
    ],
)
def test_networks_of_the_zoo_agree_with_the_formula_and_know_every_operation(
    name: str, arguments: dict[str, Any], shape: tuple[int, int, int], published_macs: float | None
) -> None:
    with torch.device("meta"):
        model = models.build(name, input_shape=shape, classes=10, **arguments)
    model = model.to_empty(device="cpu").eval()
    found = count(model, shape)
    assert found["macs"] == by_hand(model, shape)
    assert found["unsupported"] == {} and found["uncalled"] == []
    if published_macs is not None:
        assert found["macs"] == pytest.approx(published_macs, rel=5e-3)


def test_macs_of_modules_add_up_to_the_whole() -> None:
    model = models.build("cifar_quick", input_shape=(3, 32, 32), classes=10)
    found = count(model, (3, 32, 32))
    assert sum(found["by_module"].values()) == found["macs"]  # no layer of this network contains another
    assert found["by_module"]["conv1"] == 32 * 3 * 25 * 32 * 32
    assert found["by_module"]["fc2"] == 64 * 10


def test_over_parameterised_network_counts_the_macs_of_its_collapse_and_all_its_parameters() -> None:
    model = models.build("cifar_quick", input_shape=(3, 32, 32), classes=10)
    plain = count(model, (3, 32, 32))
    expanded = count(overparameterize(model, "kflo", depth=3, width=2), (3, 32, 32))
    assert expanded["macs"] == plain["macs"] and expanded["unsupported"] == {}
    assert expanded["by_module"] == plain["by_module"]
    assert expanded["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert expanded["parameters"] > 2 * plain["parameters"]
    assert parameters(collapse(model)) == plain["parameters"]  # and counting left it whole


class Involution(nn.Module):
    """A kernel made from each pixel, applied to its neighbourhood: unfold, multiply, sum (B, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.make = nn.Conv2d(channels, 9, 1)
        self.unfold = nn.Unfold(3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        kernel = self.make(x).view(batch, 1, 9, height, width)
        patches = self.unfold(x).view(batch, channels, 9, height, width)
        return (kernel * patches).sum(2)


def test_operation_without_a_counter_is_named_until_it_has_one() -> None:
    found = count(Involution(4), (4, 6, 6))
    assert found["macs"] == 9 * 4 * 36
    assert found["unsupported"] == {"aten::im2col": 1, "aten::mul": 1, "aten::sum": 1}

    def product(_: list[Any], outputs: list[Any]) -> int:
        return math.prod(outputs[0].type().sizes())

    handled = count(Involution(4), (4, 6, 6), {"aten::mul": product, "aten::sum": None, "aten::im2col": None})
    assert handled["macs"] == 9 * 4 * 36 + 4 * 9 * 36
    assert handled["unsupported"] == {}


def test_layer_that_is_never_called_is_named() -> None:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.forgotten = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    found = count(Forgetful(), (2, 4, 4))
    assert found["uncalled"] == ["forgotten"] and found["macs"] == 2 * 2 * 16


def test_counting_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count(model, (3, 8, 8))
    assert model.training and model[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_megabyte_is_a_million_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1_250_000))
    assert size_mb(tmp_path / "file") == 1.25
