"""Residual networks of bottlenecks that normalise and activate first, without a parameter in their shortcuts.

Sources: He et al. 2016, "Identity mappings in deep residual networks", as Jeong and Shin 2019, "Training CNNs with selective
allocation of channels", build it, github.com/jh-jeong/selective-convolution at 8aafd93 (models/resnet.py): every convolution but
the first has stride 1, average pooling halves the image between two stages, and a shortcut gets its new channels, which are
zero, behind its own. Convolutions start normal, of variance 2 / (kernel^2 * outputs).

    depth    stem        parameters
    164      cifar        1,661,274 with 10 classes, 1,684,404 with 100      239.3M MACs at 3x32x32
    50       imagenet    22,780,456 with 1000 classes                         3,498M MACs at 3x224x224
"""

from typing import Literal

from pydantic import field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from pipeline.config import Section
from pipeline.errors import InputError
from pipeline.layers import ChannelPad
from pipeline.models import check_input

# Blocks of each stage, where the stages are not equal.
STAGES = {50: [3, 4, 6, 3]}
DEPTHS = "must be 9n + 2 with n = 1, 2, ..., or 50: 164 is the published one for small images"

Stem = Literal["cifar", "tiny", "imagenet"]


class Options(Section):
    """Options under `model`."""

    name: Literal["resnet_preact"]
    depth: int  # 9n + 2, or 50
    stem: Stem  # 3x3 of stride 1, or of 2, to 16 channels; 7x7 of stride 2 and a pooling by 2, to 64

    @field_validator("depth")
    @classmethod
    def _depth_is_possible(cls, depth: int) -> int:
        if not possible(depth):
            raise PydanticCustomError("depth", DEPTHS)
        return depth


class Block(nn.Module):
    """BN, ReLU and convolution, three times (1x1, 3x3, 1x1), beside a shortcut: (B, C, H, W) -> (B, 4 width, H, W)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.pad = ChannelPad(0, 4 * width - inputs) if inputs != 4 * width else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu1(self.bn1(x)))
        y = self.conv2(self.relu2(self.bn2(y)))
        y = self.conv3(self.relu3(self.bn3(y)))
        if self.pad is not None:
            x = self.pad(x)
        return x + y


class ResNet(nn.Module):
    """(B, C, H, W) -> (B, classes). Stage i has bottlenecks of 2^i times the stem's channels."""

    def __init__(self, channels: int, classes: int, blocks: list[int], stem: Stem) -> None:
        super().__init__()
        kernel, stride, width = {"cifar": (3, 1, 16), "tiny": (3, 2, 16), "imagenet": (7, 2, 64)}[stem]
        self.conv1 = nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else None
        self.stages = nn.Sequential()
        inputs = width
        for i, count in enumerate(blocks, start=1):
            first = Block(inputs, width)
            self.stages.add_module(f"stage{i}", nn.Sequential(first, *(Block(4 * width, width) for _ in range(count - 1))))
            inputs = 4 * width
            if i < len(blocks):
                self.stages.add_module(f"pool{i}", nn.AvgPool2d(2))
                width *= 2
        self.bn = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)  # (B, C, 32, 32) -> (B, 16, 32, 32)
        if self.maxpool is not None:
            x = self.maxpool(x)
        x = self.relu(self.bn(self.stages(x)))  # -> (B, 256, 8, 8)
        x = self.flatten(self.avgpool(x))  # -> (B, 256)
        return self.fc(x)


def build(*, input_shape: tuple[int, int, int], classes: int, depth: int, stem: Stem) -> ResNet:
    """ResNet-`depth` for images (channels, height, width); `InputError` where the depth is not possible, or a side has fewer
    pixels than the poolings need: 4 with the cifar stem and three stages."""
    if not possible(depth):
        raise InputError(f"resnet_preact: depth {depth} {DEPTHS}")
    blocks = STAGES.get(depth, [(depth - 2) // 9] * 3)
    smallest = 2 ** (len(blocks) - 1)
    for _ in range({"cifar": 0, "tiny": 1, "imagenet": 2}[stem]):  # what the stem halves, it rounds up
        smallest = 2 * smallest - 1
    check_input("resnet_preact", input_shape, classes, smallest)
    return ResNet(input_shape[0], classes, blocks, stem)


def possible(depth: int) -> bool:
    """Whether it is 50, or that of three equal stages of three-layer blocks, a first and a last layer."""
    return depth in STAGES or (depth >= 11 and depth % 9 == 2)
