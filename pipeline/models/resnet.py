"""ResNet for small images, depth 6n + 2, with shortcuts that have no parameters (option A).

Source: He et al. 2016, "Deep residual learning for image recognition", section 4.2; weights drawn as in He et al. 2015.
3x32x32 with 10 classes: ResNet-32 464,154 parameters and 68.9M MACs, ResNet-110 1,727,962 and 252.9M.
"""

from typing import Literal

from pydantic import field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from pipeline.config import Section
from pipeline.errors import InputError
from pipeline.layers import ChannelPad
from pipeline.models import check_input

SMALLEST = 1  # pixels a side: every convolution is padded, and each subsampling rounds up
DEPTHS = "must be 6n + 2 with n = 1, 2, ...: 20, 32, 44, 56 and 110 are the published ones"


class Options(Section):
    """Options under `model`."""

    name: Literal["resnet"]
    depth: int  # 6n + 2

    @field_validator("depth")
    @classmethod
    def _depth_is_6n_plus_2(cls, depth: int) -> int:
        if not possible(depth):
            raise PydanticCustomError("depth", DEPTHS)
        return depth


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, C, H, W) -> (B, C, H, W), or (B, 2C, H/2, W/2) where `halve` is set.

    A halving block's shortcut takes every second pixel and surrounds the channels with zeros, C/2 on either side.
    """

    def __init__(self, inputs: int, outputs: int, halve: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2 if halve else 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pad = ChannelPad(outputs // 4, outputs // 4) if halve else None
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.pad is not None:
            x = self.pad(x[:, :, ::2, ::2])
        return self.relu2(x + y)


class ResNet(nn.Module):
    """(B, C, H, W) -> (B, classes), with `n` blocks a stage."""

    def __init__(self, channels: int, classes: int, n: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = stage(16, 16, n)
        self.layer2 = stage(16, 32, n)
        self.layer3 = stage(32, 64, n)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # (B, C, 32, 32) -> (B, 16, 32, 32)
        x = self.layer1(x)
        x = self.layer2(x)  # -> (B, 32, 16, 16)
        x = self.layer3(x)  # -> (B, 64, 8, 8)
        x = self.flatten(self.avgpool(x))  # -> (B, 64)
        return self.fc(x)


def stage(inputs: int, outputs: int, n: int) -> nn.Sequential:
    """`n` blocks, of which the first halves the image where the width changes."""
    first = Block(inputs, outputs, halve=inputs != outputs)
    return nn.Sequential(first, *(Block(outputs, outputs, halve=False) for _ in range(n - 1)))


def build(*, input_shape: tuple[int, int, int], classes: int, depth: int) -> ResNet:
    """ResNet-`depth` for images (channels, height, width) of any size; `InputError` where depth is not 6n + 2."""
    check_input("resnet", input_shape, classes, SMALLEST)
    if not possible(depth):
        raise InputError(f"resnet: depth {depth} {DEPTHS}")
    return ResNet(input_shape[0], classes, n=(depth - 2) // 6)


def possible(depth: int) -> bool:
    """Whether a network of three equal stages of two-layer blocks, a first and a last layer can be so deep."""
    return depth >= 8 and depth % 6 == 2
