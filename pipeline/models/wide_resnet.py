"""Wide ResNet for small images, WRN-depth-width: residual blocks that normalise and activate first, `width` times as wide.

Source: Zagoruyko and Komodakis 2016, "Wide residual networks", table 1 and section 2.4 (dropout), and its code,
github.com/szagoruyko/wide-residual-networks (ae6d0d0). 3x32x32, parameters with 10 and 100 classes:

    WRN-16-8     10,961,370   11,007,540   1,548M MACs
    WRN-28-2      1,467,610    1,479,220     214M
    WRN-28-5      9,132,634    9,161,524   1,318M
    WRN-28-10    36,479,194   36,536,884   5,243M

Initial weights are those of that code (models/utils.lua): convolutions are normal with variance 2 / fan-in, the last layer's
weights uniform in +-1/sqrt(fan-in), its bias 0. Only the batch norms' scales differ: 1, where Torch 7 drew them from U(0, 1).
"""

from typing import Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from pipeline.config import Section
from pipeline.errors import InputError
from pipeline.models import check_input

SMALLEST = 1  # pixels a side: every 3x3 convolution is padded, and each subsampling rounds up
DEPTHS = "must be 6n + 4 with n = 1, 2, ...: 16, 22, 28 and 40 are the published ones"


class Options(Section):
    """Options under `model`."""

    name: Literal["wide_resnet"]
    depth: int  # 6n + 4
    width: int = Field(ge=1)  # times the widths 16, 32, 64
    dropout: float = Field(ge=0, lt=1)  # between the two convolutions of a block; 0.3 as published for CIFAR, 0: none

    @field_validator("depth")
    @classmethod
    def _depth_is_6n_plus_4(cls, depth: int) -> int:
        if not possible(depth):
            raise PydanticCustomError("depth", DEPTHS)
        return depth


class Block(nn.Module):
    """BN, ReLU, 3x3 convolution, twice, beside a shortcut: (B, C, H, W) -> (B, D, H/stride, W/stride).

    The shortcut is x itself where the width stays, else a 1x1 convolution of the activated x.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        y = self.relu2(self.bn2(self.conv1(activated)))
        y = self.conv2(self.dropout(y))
        if self.shortcut is not None:
            x = self.shortcut(activated)
        return x + y


class WideResNet(nn.Module):
    """(B, C, H, W) -> (B, classes), with `n` blocks a stage; k in the shapes is `width`."""

    def __init__(self, channels: int, classes: int, n: int, width: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.layer1 = stage(16, 16 * width, 1, n, dropout)
        self.layer2 = stage(16 * width, 32 * width, 2, n, dropout)
        self.layer3 = stage(32 * width, 64 * width, 2, n, dropout)
        self.bn = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(64 * width, classes)
        nn.init.zeros_(self.fc.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.conv1(x))  # (B, C, 32, 32) -> (B, 16k, 32, 32)
        x = self.layer2(x)  # -> (B, 32k, 16, 16)
        x = self.layer3(x)  # -> (B, 64k, 8, 8)
        x = self.avgpool(self.relu(self.bn(x)))
        return self.fc(self.flatten(x))  # (B, 64k) -> (B, classes)


def stage(inputs: int, outputs: int, stride: int, n: int, dropout: float) -> nn.Sequential:
    """`n` blocks, of which the first changes the width and takes every `stride`-th pixel."""
    first = Block(inputs, outputs, stride, dropout)
    return nn.Sequential(first, *(Block(outputs, outputs, 1, dropout) for _ in range(n - 1)))


def build(*, input_shape: tuple[int, int, int], classes: int, depth: int, width: int, dropout: float) -> WideResNet:
    """WRN-`depth`-`width` for images (channels, height, width) of any size; `InputError` where depth is not 6n + 4."""
    check_input("wide_resnet", input_shape, classes, SMALLEST)
    if not possible(depth):
        raise InputError(f"wide_resnet: depth {depth} {DEPTHS}")
    return WideResNet(input_shape[0], classes, (depth - 4) // 6, width, dropout)


def possible(depth: int) -> bool:
    """Whether convolutions can be so many: one in front, two a block, n blocks in each of three stages, and a shortcut in each."""
    return depth >= 10 and depth % 6 == 4
