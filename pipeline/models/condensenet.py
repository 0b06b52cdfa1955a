"""CondenseNet for small images: three dense blocks of growing growth whose 1x1 convolutions shall lose most of their inputs.

Sources: Huang et al. 2018, "CondenseNet: An efficient DenseNet using learned group convolutions", and its code,
github.com/ShichenLiu/CondenseNet at 833a91d; Jeong and Shin 2019, "Training CNNs with selective allocation of channels",
github.com/jh-jeong/selective-convolution at 8aafd93 (models/condensenet_sconv.py). This is the dense network that both train. Who
makes it smaller is a compress method: `lgc` in groups (CondenseNet-LGC), `selective` by closing channels (CondenseNet-SConv).
While it trains, no shuffle is needed: output o of a learned group convolution is of group o modulo 4.

    CondenseNet-182 (growth 12, groups 4), 3x32x32, 10 classes    13,792,906 parameters    1,615M MACs
    the same with its 1x1 convolutions in 4 groups                 4,221,946 parameters      494M MACs

Convolutions start normal, of variance 2 / (kernel^2 * outputs); biases at 0.
"""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, cat, nn

from pipeline.config import Section
from pipeline.errors import InputError
from pipeline.models import check_input

SMALLEST = 4  # pixels a side: two poolings by 2
DEPTHS = "must be 6n + 2 with n = 1, 2, ...: 86 and 182 are published ones"
EQUAL = "groups must divide growth: each 3x3 convolution makes growth channels in so many groups"


class Options(Section):
    """Options under `model`."""

    name: Literal["condensenet"]
    depth: int  # 6n + 2
    growth: int = Field(ge=1)  # channels that a layer of the first block adds; each later block has twice as much: 12 for 182
    groups: int = Field(ge=1)  # of the 3x3 convolutions; 4 as published
    dropout: float = Field(ge=0, lt=1)  # before each 1x1 convolution; 0.1 as published for CondenseNet-SConv, 0 for CondenseNet-LGC

    @field_validator("depth")
    @classmethod
    def _depth_is_6n_plus_2(cls, depth: int) -> int:
        if not possible(depth):
            raise PydanticCustomError("depth", DEPTHS)
        return depth

    @model_validator(mode="after")
    def _groups_are_equal(self) -> Self:
        if self.growth % self.groups:
            raise PydanticCustomError("groups", EQUAL)
        return self


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 convolution to 4k channels, BN, ReLU, 3x3 in groups to k, joined to the input: C -> C + k channels."""

    def __init__(self, inputs: int, growth: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.dropout(self.relu1(self.norm1(x))))
        y = self.conv2(self.relu2(self.norm2(y)))
        return cat([x, y], 1)


class CondenseNet(nn.Module):
    """(B, C, H, W) -> (B, classes), with `n` layers a block; shapes below are CondenseNet-182's."""

    def __init__(self, channels: int, classes: int, n: int, growth: int, groups: int, dropout: float) -> None:
        super().__init__()
        width = 2 * growth
        widths = [width, width + n * growth, width + 3 * n * growth, width + 7 * n * growth]
        self.conv0 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.block1 = block(widths[0], n, growth, groups, dropout)
        self.pool1 = nn.AvgPool2d(2)
        self.block2 = block(widths[1], n, 2 * growth, groups, dropout)
        self.pool2 = nn.AvgPool2d(2)
        self.block3 = block(widths[2], n, 4 * growth, groups, dropout)
        self.norm = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.classifier = nn.Linear(widths[3], classes)
        nn.init.zeros_(self.classifier.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.conv0(x))  # (B, C, 32, 32) -> (B, 384, 32, 32)
        x = self.block2(self.pool1(x))  # -> (B, 1104, 16, 16)
        x = self.block3(self.pool2(x))  # -> (B, 2544, 8, 8)
        x = self.avgpool(self.relu(self.norm(x)))
        return self.classifier(self.flatten(x))  # (B, 2544) -> (B, classes)


def block(inputs: int, n: int, growth: int, groups: int, dropout: float) -> nn.Sequential:
    """`n` dense layers."""
    return nn.Sequential(*(DenseLayer(inputs + i * growth, growth, groups, dropout) for i in range(n)))


def build(*, input_shape: tuple[int, int, int], classes: int, depth: int, growth: int, groups: int, dropout: float) -> CondenseNet:
    """CondenseNet-`depth` for images (channels, height, width); `InputError` where depth is not 6n + 2, the groups do not divide
    growth, or a side has fewer than 4 pixels."""
    check_input("condensenet", input_shape, classes, SMALLEST)
    if not possible(depth):
        raise InputError(f"condensenet: depth {depth} {DEPTHS}")
    if growth % groups:
        raise InputError(f"condensenet: growth {growth} with {groups} groups: {EQUAL}")
    return CondenseNet(input_shape[0], classes, (depth - 2) // 6, growth, groups, dropout)


def possible(depth: int) -> bool:
    """Whether a network of three equal blocks of two-layer units, a first and a last layer can be so deep."""
    return depth >= 8 and depth % 6 == 2
