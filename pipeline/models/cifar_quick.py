"""Cifar-quick with batch normalisation: three 5x5 convolutions and two linear layers.

Source: Caffe's cifar10_quick as Ding et al. 2019 (ACNet) and KFLO's paper train it, with BN after each convolution
and no convolution bias. 3x32x32: 117,034 parameters with 10 classes, 122,884 with 100; 10.8M MACs.
"""

from typing import Literal

from torch import Tensor, nn

from pipeline.config import Section
from pipeline.models import check_input

SMALLEST = 15  # pixels a side: 15 -> 7 -> 3 -> 1


class Options(Section):
    """Options under `model`."""

    name: Literal["cifar_quick"]


class CifarQuick(nn.Module):
    """(B, C, H, W) -> (B, classes)."""

    def __init__(self, channels: int, features: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(3, stride=2)
        self.conv2 = nn.Conv2d(32, 32, 5, padding=2, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.AvgPool2d(3, stride=2)
        self.conv3 = nn.Conv2d(32, 64, 5, padding=2, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.relu3 = nn.ReLU()
        self.pool3 = nn.AvgPool2d(3, stride=2)
        self.flatten = nn.Flatten(1)
        self.fc1 = nn.Linear(features, 64)
        self.relu4 = nn.ReLU()
        self.fc2 = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.bn1(self.conv1(x))))  # (B, C, 32, 32) -> (B, 32, 15, 15)
        x = self.pool2(self.relu2(self.bn2(self.conv2(x))))  # -> (B, 32, 7, 7)
        x = self.pool3(self.relu3(self.bn3(self.conv3(x))))  # -> (B, 64, 3, 3)
        x = self.flatten(x)  # -> (B, 576)
        return self.fc2(self.relu4(self.fc1(x)))


def build(*, input_shape: tuple[int, int, int], classes: int) -> CifarQuick:
    """Cifar-quick for images (channels, height, width); `InputError` where a side has fewer than 15 pixels."""
    check_input("cifar_quick", input_shape, classes, SMALLEST)
    channels, height, width = input_shape
    return CifarQuick(channels, 64 * side(height) * side(width), classes)


def side(size: int) -> int:
    """Pixels a side of the last map: three 3x3 poolings of stride 2, no padding."""
    for _ in range(3):
        size = (size - 3) // 2 + 1
    return size
