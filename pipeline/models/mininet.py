"""MiniNet: an AlexNet of four narrow convolutions (32-64-64-64), the small network of the partial-restart paper.

Source: the paper's own code, github.com/sjtu-cs222/Group_36 at 43e8da4. Convolutions have biases and there is no batch
normalisation. 3x224x224 with 10 classes: 1,322,058 parameters.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline.config import Section
from pipeline.models import check_input

SMALLEST = 63  # pixels a side: 63 -> 15 -> 7 -> 3 -> 1


class Options(Section):
    """Options under `model`."""

    name: Literal["mininet"]
    dropout: float = Field(ge=0, lt=1)  # before the first linear layer; 0.5 as published


class MiniNet(nn.Module):
    """(B, C, H, W) -> (B, classes)."""

    def __init__(self, channels: int, features: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 11, stride=4, padding=2)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(3, stride=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(3, stride=2)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1)
        self.relu4 = nn.ReLU()
        self.pool3 = nn.MaxPool2d(3, stride=2)
        self.flatten = nn.Flatten(1)
        self.dropout = nn.Dropout(dropout)
        self.fc1 = nn.Linear(features, 512)
        self.relu5 = nn.ReLU()
        self.fc2 = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))  # (B, C, 224, 224) -> (B, 32, 27, 27)
        x = self.pool2(self.relu2(self.conv2(x)))  # -> (B, 64, 13, 13)
        x = self.relu3(self.conv3(x))
        x = self.pool3(self.relu4(self.conv4(x)))  # -> (B, 64, 6, 6)
        x = self.dropout(self.flatten(x))  # -> (B, 2304)
        return self.fc2(self.relu5(self.fc1(x)))


def build(*, input_shape: tuple[int, int, int], classes: int, dropout: float) -> MiniNet:
    """MiniNet for images (channels, height, width); `InputError` where a side has fewer than 63 pixels."""
    check_input("mininet", input_shape, classes, SMALLEST)
    channels, height, width = input_shape
    return MiniNet(channels, 64 * side(height) * side(width), classes, dropout)


def side(size: int) -> int:
    """Pixels a side of the last map: an 11x11 convolution of stride 4, then three 3x3 poolings of stride 2."""
    size = (size + 2 * 2 - 11) // 4 + 1
    for _ in range(3):
        size = (size - 3) // 2 + 1
    return size
