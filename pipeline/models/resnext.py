"""ResNeXt for small images: bottlenecks whose 3x3 convolution works in groups, and shortcuts without a parameter.

Sources: Xie et al. 2017, "Aggregated residual transformations for deep neural networks", as Jeong and Shin 2019, "Training CNNs
with selective allocation of channels", build it, github.com/jh-jeong/selective-convolution at 8aafd93 (models/resnext.py):
normalisation and activation come before every convolution, average pooling halves the image between two stages, and a shortcut
gets its new channels, which are zero, behind its own. Convolutions start normal, of variance 2 / (kernel^2 * outputs).
ResNeXt-29, 8x64d, 3x32x32, 10 classes: 33,751,370 parameters, 4,901M MACs.
"""

from typing import Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from pipeline.config import Section
from pipeline.errors import InputError
from pipeline.layers import ChannelPad
from pipeline.models import check_input

DEPTHS = "must be 9n + 2 with n = 1, 2, ...: 29 is the published one"

Stem = Literal["cifar", "tiny"]


class Options(Section):
    """Options under `model`."""

    name: Literal["resnext"]
    depth: int  # 9n + 2
    cardinality: int = Field(ge=1)  # groups of every 3x3 convolution
    width: int = Field(ge=1)  # channels of each group in the first stage; each later stage has twice as many
    stem: Stem  # a first convolution of stride 1, or of 2

    @field_validator("depth")
    @classmethod
    def _depth_is_9n_plus_2(cls, depth: int) -> int:
        if not possible(depth):
            raise PydanticCustomError("depth", DEPTHS)
        return depth


class Block(nn.Module):
    """BN, ReLU and convolution, three times (1x1, 3x3 in groups, 1x1), beside a shortcut: (B, C, H, W) -> (B, outputs, H, W)."""

    def __init__(self, inputs: int, inner: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(inner)
        self.relu3 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.pad = ChannelPad(0, outputs - inputs) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu1(self.bn1(x)))
        y = self.conv2(self.relu2(self.bn2(y)))
        y = self.conv3(self.relu3(self.bn3(y)))
        if self.pad is not None:
            x = self.pad(x)
        return x + y


class ResNeXt(nn.Module):
    """(B, C, H, W) -> (B, classes), with `n` blocks a stage."""

    def __init__(self, channels: int, classes: int, n: int, cardinality: int, width: int, stem: Stem) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, stride=2 if stem == "tiny" else 1, padding=1, bias=False)
        self.layer1 = stage(64, cardinality * width, 256, n, cardinality)
        self.pool1 = nn.AvgPool2d(2)
        self.layer2 = stage(256, cardinality * width * 2, 512, n, cardinality)
        self.pool2 = nn.AvgPool2d(2)
        self.layer3 = stage(512, cardinality * width * 4, 1024, n, cardinality)
        self.bn = nn.BatchNorm2d(1024)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(1024, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.conv1(x))  # (B, C, 32, 32) -> (B, 256, 32, 32)
        x = self.layer2(self.pool1(x))  # -> (B, 512, 16, 16)
        x = self.layer3(self.pool2(x))  # -> (B, 1024, 8, 8)
        x = self.avgpool(self.relu(self.bn(x)))
        return self.fc(self.flatten(x))  # (B, 1024) -> (B, classes)


def stage(inputs: int, inner: int, outputs: int, n: int, groups: int) -> nn.Sequential:
    """`n` blocks, of which the first widens."""
    first = Block(inputs, inner, outputs, groups)
    return nn.Sequential(first, *(Block(outputs, inner, outputs, groups) for _ in range(n - 1)))


def build(*, input_shape: tuple[int, int, int], classes: int, depth: int, cardinality: int, width: int, stem: Stem) -> ResNeXt:
    """ResNeXt-`depth`, `cardinality`x`width`d, for images (channels, height, width); `InputError` where depth is not 9n + 2, or a
    side has fewer than 4 pixels, with the tiny stem 7."""
    check_input("resnext", input_shape, classes, 7 if stem == "tiny" else 4)
    if not possible(depth):
        raise InputError(f"resnext: depth {depth} {DEPTHS}")
    return ResNeXt(input_shape[0], classes, (depth - 2) // 9, cardinality, width, stem)


def possible(depth: int) -> bool:
    """Whether a network of three equal stages of three-layer blocks, a first and a last layer can be so deep."""
    return depth >= 11 and depth % 9 == 2
