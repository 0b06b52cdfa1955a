"""DenseNet with bottlenecks: of three equal blocks for small images, and of four for ImageNet.

Sources: Huang et al. 2017, "Densely connected convolutional networks", table 1; the networks of Jeong and Shin 2019, "Training
CNNs with selective allocation of channels", github.com/jh-jeong/selective-convolution at 8aafd93 (models/densenet.py);
torchvision's, with its parameter names, so that its weights can be loaded. With compression 1, nothing but a pooling stands
between two blocks.

    depth growth compression stem                    parameters with 10, 100 and 200 classes     MACs
    40    12     1           cifar (3x32x32)           211,978      233,668      257,768          71.3M
    100   12     1           cifar                     995,698    1,049,788    1,109,888         286.4M
    121   32     0.5         torchvision (3x224x224)   7,978,856 with 1000 classes                 2834M
    121   32     0.5         imagenet                  7,978,728: no batch norm in the stem        2834M

torchvision's others: 169 and 201 of growth 32, and 161 of growth 48. Convolutions start as in that repository: normal, of variance
2 / (kernel^2 * outputs); biases at 0.
"""

from collections import OrderedDict
from typing import Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, cat, nn

from pipeline.config import Section
from pipeline.errors import InputError
from pipeline.models import check_input

# Layers of each block, where the blocks are not equal.
BLOCKS = {121: [6, 12, 24, 16], 161: [6, 12, 36, 24], 169: [6, 12, 32, 32], 201: [6, 12, 48, 32]}
DEPTHS = "must be 6n + 4 with n = 1, 2, ..., or 121, 161, 169 or 201: 40 and 100 are the published ones for small images"

Stem = Literal["cifar", "tiny", "imagenet", "torchvision"]


class Options(Section):
    """Options under `model`."""

    name: Literal["densenet"]
    depth: int  # 6n + 4, or one of torchvision's
    growth: int = Field(ge=1)  # channels that a layer adds; the first convolution makes twice as many
    compression: float = Field(gt=0, le=1)  # share of the channels that go from a block to the next
    stem: Stem  # 3x3 of stride 1, or of 2; 7x7 of stride 2 and a pooling by 2, without or with batch norm and ReLU between them

    @field_validator("depth")
    @classmethod
    def _depth_is_possible(cls, depth: int) -> int:
        if not possible(depth):
            raise PydanticCustomError("depth", DEPTHS)
        return depth


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 convolution to 4k channels, BN, ReLU, 3x3 to k, joined to the input: (B, C, H, W) -> (B, C + k, H, W)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu1(self.norm1(x)))
        y = self.conv2(self.relu2(self.norm2(y)))
        return cat([x, y], 1)


class DenseNet(nn.Module):
    """(B, C, H, W) -> (B, classes)."""

    def __init__(self, channels: int, classes: int, blocks: list[int], growth: int, compression: float, stem: Stem) -> None:
        super().__init__()
        width = 2 * growth
        self.features = nn.Sequential(first_layers(channels, width, stem))
        for i, layers in enumerate(blocks, start=1):
            dense = {f"denselayer{j + 1}": DenseLayer(width + j * growth, growth) for j in range(layers)}
            self.features.add_module(f"denseblock{i}", nn.Sequential(OrderedDict(dense)))
            width += layers * growth
            if i < len(blocks):
                outputs = int(compression * width)
                self.features.add_module(f"transition{i}", transition(width, outputs))
                width = outputs
        self.features.add_module("norm5", nn.BatchNorm2d(width))  # torchvision's name, after its four blocks
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.classifier = nn.Linear(width, classes)
        nn.init.zeros_(self.classifier.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.features(x))  # depth 40: (B, C, 32, 32) -> (B, 240, 8, 8); 121: (B, C, 224, 224) -> (B, 1024, 7, 7)
        x = self.flatten(self.avgpool(x))
        return self.classifier(x)


def first_layers(channels: int, width: int, stem: Stem) -> OrderedDict[str, nn.Module]:
    """What stands before the first block: (B, channels, H, W) -> (B, width, H', W')."""
    kernel, stride = {"cifar": (3, 1), "tiny": (3, 2)}.get(stem, (7, 2))
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv0"] = nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)
    if stem == "torchvision":
        layers["norm0"], layers["relu0"] = nn.BatchNorm2d(width), nn.ReLU()
    if kernel == 7:
        layers["pool0"] = nn.MaxPool2d(3, stride=2, padding=1)
    return layers


def transition(inputs: int, outputs: int) -> nn.Sequential:
    """Average pooling by 2, behind BN, ReLU and a 1x1 convolution where the width changes."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if inputs != outputs:
        layers["norm"], layers["relu"] = nn.BatchNorm2d(inputs), nn.ReLU()
        layers["conv"] = nn.Conv2d(inputs, outputs, 1, bias=False)
    layers["pool"] = nn.AvgPool2d(2)
    return nn.Sequential(layers)


def build(*, input_shape: tuple[int, int, int], classes: int, depth: int, growth: int, compression: float, stem: Stem) -> DenseNet:
    """DenseNet-`depth` for images (channels, height, width); `InputError` where the depth is not possible, or a side has fewer
    pixels than the poolings need: 4 with the cifar stem and three blocks, 29 as torchvision's."""
    if not possible(depth):
        raise InputError(f"densenet: depth {depth} {DEPTHS}")
    blocks = BLOCKS.get(depth, [(depth - 4) // 6] * 3)
    smallest = 2 ** (len(blocks) - 1)
    for _ in range({"cifar": 0, "tiny": 1}.get(stem, 2)):  # what the stem halves, it rounds up
        smallest = 2 * smallest - 1
    check_input("densenet", input_shape, classes, smallest)
    return DenseNet(input_shape[0], classes, blocks, growth, compression, stem)


def possible(depth: int) -> bool:
    """Whether it is one of torchvision's, or that of three equal blocks of two-layer bottlenecks."""
    return depth in BLOCKS or (depth >= 10 and depth % 6 == 4)
