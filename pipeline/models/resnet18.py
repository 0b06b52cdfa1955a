"""ResNet-18 with torchvision's parameter names, so that its weights can be loaded.

Source: He et al. 2016, "Deep residual learning for image recognition", table 1, with 1x1 convolutions where a shortcut
changes shape (option B). 3x224x224 with 10 classes: 11,181,642 parameters, 1.814G MACs. The "cifar" stem keeps small
images at their resolution. 3x64x64 with 200 classes: 11,271,432 parameters, 2.222G MACs.
"""

from typing import Literal

from torch import Tensor, nn

from pipeline.config import Section
from pipeline.models import check_input

SMALLEST = 1  # pixels a side: every convolution and the pooling are padded, so that a side never shrinks below 1


class Options(Section):
    """Options under `model`."""

    name: Literal["resnet18"]
    stem: Literal["imagenet", "cifar"]  # 7x7 of stride 2 and a pooling by 2, or 3x3 of stride 1


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, I, H, W) -> (B, O, H/stride, W/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            x = self.downsample(x)
        return self.relu2(x + y)


class ResNet18(nn.Module):
    """(B, C, H, W) -> (B, classes)."""

    def __init__(self, channels: int, classes: int, stem: Literal["imagenet", "cifar"]) -> None:
        super().__init__()
        kernel, stride, padding = {"imagenet": (7, 2, 3), "cifar": (3, 1, 1)}[stem]
        self.conv1 = nn.Conv2d(channels, 64, kernel, stride=stride, padding=padding, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else None
        self.layer1 = nn.Sequential(Block(64, 64, stride=1), Block(64, 64, stride=1))
        self.layer2 = nn.Sequential(Block(64, 128, stride=2), Block(128, 128, stride=1))
        self.layer3 = nn.Sequential(Block(128, 256, stride=2), Block(256, 256, stride=1))
        self.layer4 = nn.Sequential(Block(256, 512, stride=2), Block(512, 512, stride=1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(512, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # (B, C, 224, 224) -> (B, 64, 112, 112)
        if self.maxpool is not None:
            x = self.maxpool(x)  # -> (B, 64, 56, 56)
        x = self.layer1(x)
        x = self.layer2(x)  # -> (B, 128, 28, 28)
        x = self.layer3(x)  # -> (B, 256, 14, 14)
        x = self.layer4(x)  # -> (B, 512, 7, 7)
        x = self.flatten(self.avgpool(x))  # -> (B, 512)
        return self.fc(x)


def build(*, input_shape: tuple[int, int, int], classes: int, stem: Literal["imagenet", "cifar"]) -> ResNet18:
    """ResNet-18 for images (channels, height, width) of any size."""
    check_input("resnet18", input_shape, classes, SMALLEST)
    return ResNet18(input_shape[0], classes, stem)
