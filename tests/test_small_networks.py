"""The networks for small images against their published equations, weights and layers, written out by hand."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import randomise
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline import models
from pipeline.models.wide_resnet import Block


def activated(x: Tensor, bn: nn.Module) -> Tensor:
    """ReLU of Ioffe and Szegedy 2015, algorithm 2."""
    mean, variance = bn.get_buffer("running_mean"), bn.get_buffer("running_var")
    scale = bn.get_parameter("weight") / (variance + 1e-5).sqrt()
    return (x * scale[:, None, None] + (bn.get_parameter("bias") - mean * scale)[:, None, None]).clamp(min=0)


def convolved(x: Tensor, layer: nn.Module, stride: int) -> Tensor:
    """3x3 or 1x1, the image padded so that every pixel (every second, at stride 2) is a centre."""
    weight = layer.get_parameter("weight")
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(8, 8, 1), (8, 16, 1), (8, 16, 2)])
def test_wide_resnet_block_is_the_published_equation(inputs: int, outputs: int, stride: int) -> None:
    block: Any = randomise(Block(inputs, outputs, stride, dropout=0.4)).eval()
    x = torch.randn(3, inputs, 7, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = activated(x, block.bn1)
        y = convolved(activated(convolved(first, block.conv1, stride), block.bn2), block.conv2, 1)
        shortcut = x if inputs == outputs else convolved(first, block.get_submodule("shortcut"), stride)
        torch.testing.assert_close(block(x), y + shortcut, rtol=1e-5, atol=1e-5)


def test_a_wide_resnet_ends_with_a_batch_norm_and_averages_its_relu() -> None:
    model: Any = randomise(models.build("wide_resnet", input_shape=(3, 9, 7), classes=5, depth=10, width=1, dropout=0.3)).eval()
    x = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model.layer3(model.layer2(model.layer1(convolved(x, model.conv1, 1))))
        assert y.shape == (2, 64, 3, 2)
        features = activated(y, model.bn).sum((2, 3)) / 6
        torch.testing.assert_close(model(x), features @ model.fc.weight.T + model.fc.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_acts_between_the_convolutions_of_a_block_and_not_at_0(dropout: float) -> None:
    block: Any = randomise(Block(8, 8, 1, dropout)).train()
    x, seen = torch.randn(16, 8, 6, 6), []
    block.conv2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block.relu2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.manual_seed(0)
    block(x)
    before, after = seen
    kept = (after != 0) & (before > 0)
    torch.testing.assert_close(after[kept], before[kept] / (1 - dropout))
    share = float(kept.sum() / (before > 0).sum())
    assert share == 1 if dropout == 0 else share == pytest.approx(1 - dropout, abs=0.05)


@pytest.mark.parametrize("depth", [8, 14, 20, 56])
def test_resnet_has_as_many_layers_as_its_depth(depth: int) -> None:
    with torch.device("meta"):
        model = models.build("resnet", input_shape=(3, 32, 32), classes=10, depth=depth)
    assert len([m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]) == depth


@pytest.mark.parametrize("depth", [10, 16, 28])
def test_a_wide_resnet_has_as_many_convolutions_as_its_depth(depth: int) -> None:
    for width in (1, 2):
        with torch.device("meta"):
            model = models.build("wide_resnet", input_shape=(3, 32, 32), classes=10, depth=depth, width=width, dropout=0.0)
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == depth - (width == 1)  # the first stage of WRN-depth-1 is as wide as what it reads
        assert all(m.bias is None for m in convolutions)


def test_a_wide_resnet_starts_with_the_published_weights() -> None:
    torch.manual_seed(0)
    model = models.build("wide_resnet", input_shape=(3, 32, 32), classes=100, depth=10, width=4, dropout=0.0)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 2000]
    assert len(convolutions) == 6 + 2  # two a block, and the shortcuts of the last two stages
    for conv in convolutions:
        std = (2 / (conv.in_channels * conv.kernel_size[0] ** 2)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(std, rel=0.08)
    last = model.get_submodule("fc")
    assert isinstance(last, nn.Linear) and not last.bias.any()
    assert 0.95 / 16 < last.weight.abs().max().item() <= 1 / 16  # uniform below 1 / sqrt(256)
    assert last.weight.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("variant", "count", "mega"), [("classic", 44_426, 0.28164), ("padded", 61_706, 0.41652), ("caffe", 431_080, 2.293)]
)
def test_lenet5_has_the_published_size(variant: str, count: int, mega: float) -> None:
    with torch.device("meta"):
        model = models.build("lenet5", input_shape=(1, 28, 28), classes=10, variant=variant)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 1, 28, 28))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert counter.get_total_flops() == pytest.approx(2e6 * mega)


@pytest.mark.parametrize("variant", ["classic", "padded", "caffe"])
def test_lenet5_is_relu_and_maximum_of_each_convolution(variant: str) -> None:
    model: Any = randomise(models.build("lenet5", input_shape=(1, 20, 24), classes=10, variant=variant)).eval()
    x = torch.randn(2, 1, 20, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = F.pad(x, (2, 2, 2, 2)) if variant == "padded" else x
        for layer in (model.conv1, model.conv2):
            y = F.conv2d(y, layer.weight, layer.bias).clamp(min=0)
            y = torch.stack([y[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)
        y = y.flatten(1)
        linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        assert [layer.out_features for layer in linear] == ([500, 10] if variant == "caffe" else [120, 84, 10])
        for layer in linear[:-1]:
            y = (y @ layer.weight.T + layer.bias).clamp(min=0)
        y = y @ linear[-1].weight.T + linear[-1].bias
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_vgg16_has_the_layers_of_acnets_code() -> None:
    with torch.device("meta"):
        model = models.build("vgg16", input_shape=(3, 32, 32), classes=10)
    found = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            assert (layer.kernel_size, layer.stride, layer.padding, layer.bias) == ((3, 3), (1, 1), (1, 1), None)
            found.append(layer.out_channels)
        elif isinstance(layer, nn.MaxPool2d):
            found.append("pool")
        assert not isinstance(layer, nn.Dropout)
    pooled = [64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool"]
    assert found == pooled
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) == 13
