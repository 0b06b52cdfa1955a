"""The ImageNet family of residual networks, with torchvision's parameter names, so that its weights can be loaded.

Source: He et al. 2016, "Deep residual learning for image recognition", table 1, with 1x1 convolutions where a shortcut changes
shape (option B); a bottleneck halves the image in its 3x3 convolution, as torchvision's, not in its first. The "cifar" stem
keeps small images at their resolution. Parameters and MACs with 200 classes (Tiny-ImageNet):

    depth           parameters    at 224x224    at 64x64      "cifar" stem    at 64x64
    18              11,279,112       1,814 M       148 M        11,271,432     2,222 M
    50              23,917,832       4,088 M       334 M        23,910,152     5,192 M
    101             42,909,960       7,800 M       637 M        42,902,280    10,040 M
"""

from typing import Literal

from torch import Tensor, nn

from pipeline.config import Section
from pipeline.models import check_input

# Of each depth: whether its blocks are bottlenecks, and how many there are in each stage.
STAGES: dict[int, tuple[bool, list[int]]] = {
    18: (False, [2, 2, 2, 2]),
    34: (False, [3, 4, 6, 3]),
    50: (True, [3, 4, 6, 3]),
    101: (True, [3, 4, 23, 3]),
    152: (True, [3, 8, 36, 3]),
}
SMALLEST = 1  # pixels a side: every convolution and the pooling are padded, so that a side never shrinks below 1


class Options(Section):
    """Options under `model`."""

    name: Literal["resnet_imagenet"]
    depth: Literal[18, 34, 50, 101, 152]
    stem: Literal["imagenet", "cifar"]  # 7x7 of stride 2 and a pooling by 2, or 3x3 of stride 1


class Basic(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, I, H, W) -> (B, width, H/stride, W/stride)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(inputs, width, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            x = self.downsample(x)
        return self.relu2(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: (B, I, H, W) -> (B, 4 width, H/stride, W/stride)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
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


class ResNet(nn.Module):
    """(B, C, H, W) -> (B, classes). Below, e is 4 for bottlenecks and 1 for basic blocks."""

    def __init__(self, channels: int, classes: int, depth: int, stem: Literal["imagenet", "cifar"]) -> None:
        super().__init__()
        bottleneck, (first, second, third, fourth) = STAGES[depth]
        e = 4 if bottleneck else 1
        kernel, stride, padding = {"imagenet": (7, 2, 3), "cifar": (3, 1, 1)}[stem]
        self.conv1 = nn.Conv2d(channels, 64, kernel, stride=stride, padding=padding, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else None
        self.layer1 = stage(bottleneck, first, 64, 64, stride=1)
        self.layer2 = stage(bottleneck, second, 64 * e, 128, stride=2)
        self.layer3 = stage(bottleneck, third, 128 * e, 256, stride=2)
        self.layer4 = stage(bottleneck, fourth, 256 * e, 512, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(512 * e, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # (B, C, 224, 224) -> (B, 64, 112, 112)
        if self.maxpool is not None:
            x = self.maxpool(x)  # -> (B, 64, 56, 56)
        x = self.layer1(x)  # -> (B, 64 e, 56, 56)
        x = self.layer2(x)  # -> (B, 128 e, 28, 28)
        x = self.layer3(x)  # -> (B, 256 e, 14, 14)
        x = self.layer4(x)  # -> (B, 512 e, 7, 7)
        x = self.flatten(self.avgpool(x))  # -> (B, 512 e)
        return self.fc(x)


def stage(bottleneck: bool, blocks: int, inputs: int, width: int, stride: int) -> nn.Sequential:
    """So many blocks, of which the first has the stride."""
    block, outputs = (Bottleneck, 4 * width) if bottleneck else (Basic, width)
    return nn.Sequential(block(inputs, width, stride), *(block(outputs, width, 1) for _ in range(blocks - 1)))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """A 1x1 convolution where the block changes the shape; None where the input itself is added."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


def build(*, input_shape: tuple[int, int, int], classes: int, depth: int, stem: Literal["imagenet", "cifar"]) -> ResNet:
    """The network for images (channels, height, width) of any size."""
    check_input("resnet_imagenet", input_shape, classes, SMALLEST)
    return ResNet(input_shape[0], classes, depth, stem)
