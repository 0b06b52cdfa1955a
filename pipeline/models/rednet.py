"""RedNet: ResNet's bottlenecks with a 7x7 involution in place of the 3x3 convolution. Parameter names are those of the authors'
mmcls checkpoints, so that their weights can be loaded.

Source: Li et al. 2021, "Involution: Inverting the Inherence of Convolution for Visual Recognition", section 4, and
d-li14/involution at 21c3158, cls/mmcls/models/backbones/rednet.py. At 3x224x224, MACs of the taps included:

    depth    1000 classes    10 classes    MACs with 10 classes
    26          9,233,166     7,204,656                 1,683 M
    38         12,386,986    10,358,476                 2,165 M
    50         15,540,806    13,512,296                 2,646 M
    101        25,652,950    23,624,440                 4,657 M
    152        33,984,582    31,956,072                 6,677 M
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline.config import Section
from pipeline.errors import InputError
from pipeline.involution import ConvNorm, Involution
from pipeline.models import check_input

BLOCKS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # in each stage
SMALLEST = 29  # pixels a side: of the 8 that the stem leaves, the stages leave 1


class Options(Section):
    """Options under `model`."""

    name: Literal["rednet"]
    depth: Literal[26, 38, 50, 101, 152]
    width: int = Field(ge=16, multiple_of=16)  # channels of the first stage's involutions, 64 as published; the stem stays
    zero_init: bool  # the last batch norm of every block starts at 0, so that a block starts as its shortcut; published: true


class Bottleneck(nn.Module):
    """1x1, involution and 1x1 beside a shortcut: (B, I, H, W) -> (B, 4 width, H/stride, W/stride)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = Involution(width, 7, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = shortcut(inputs, 4 * width, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.downsample is not None:
            x = self.downsample(x)
        return self.relu3(x + y)


class Backbone(nn.Module):
    """(B, C, H, W) -> (B, 32 width, H/32, W/32)."""

    def __init__(self, channels: int, depth: int, width: int) -> None:
        super().__init__()
        first, second, third, fourth = BLOCKS[depth]
        stem = [ConvNorm(channels, 32, 3, stride=2), Involution(32, 3, 1), nn.BatchNorm2d(32), nn.ReLU(), ConvNorm(32, 64, 3)]
        self.stem = nn.Sequential(*stem)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = stage(first, 64, width, stride=1)
        self.layer2 = stage(second, 4 * width, 2 * width, stride=2)
        self.layer3 = stage(third, 8 * width, 4 * width, stride=2)
        self.layer4 = stage(fourth, 16 * width, 8 * width, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.stem(x))  # (B, C, 224, 224) -> (B, 64, 112, 112) -> (B, 64, 56, 56)
        x = self.layer1(x)  # -> (B, 4 width, 56, 56)
        x = self.layer2(x)  # -> (B, 8 width, 28, 28)
        x = self.layer3(x)  # -> (B, 16 width, 14, 14)
        return self.layer4(x)  # -> (B, 32 width, 7, 7)


class Neck(nn.Module):
    """Averages the pixels: (B, C, H, W) -> (B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.flatten(self.gap(x))


class Head(nn.Sequential):
    """(B, features) -> (B, classes)."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(features, classes)


class RedNet(nn.Module):
    """(B, C, H, W) -> (B, classes)."""

    def __init__(self, channels: int, classes: int, depth: int, width: int, zero_init: bool) -> None:
        super().__init__()
        self.backbone = Backbone(channels, depth, width)
        self.neck = Neck()
        self.head = Head(32 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Bottleneck) and zero_init:
                nn.init.zeros_(module.bn3.weight)
        nn.init.normal_(self.head.fc.weight, std=0.01)
        nn.init.zeros_(self.head.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.backbone(x)))  # (B, C, 224, 224) -> (B, 32 width, 7, 7) -> (B, 32 width) -> (B, classes)


def stage(blocks: int, inputs: int, width: int, stride: int) -> nn.Sequential:
    """So many blocks, of which the first has the stride."""
    return nn.Sequential(Bottleneck(inputs, width, stride), *(Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """A 1x1 convolution where the block changes the shape; None where the input itself is added."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


def build(*, input_shape: tuple[int, int, int], classes: int, depth: int, width: int, zero_init: bool) -> RedNet:
    """RedNet-`depth` for images (channels, height, width); `InputError` where a side is not 32n or up to 3 pixels less."""
    check_input("rednet", input_shape, classes, SMALLEST)
    _, height, width_pixels = input_shape
    if any(-(-side // 4) % 8 for side in (height, width_pixels)):  # the stem rounds up, twice by 2
        raise InputError(
            f"rednet: images of {height}x{width_pixels} pixels do not divide by the strides of its involutions; each side must be "
            "a multiple of 32, or up to 3 less: change it (data.image_size, or data.crop, in params.yaml)"
        )
    return RedNet(input_shape[0], classes, depth, width, zero_init)
