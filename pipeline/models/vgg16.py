"""VGG-16 for small images: thirteen convolutions with batch normalisation and two linear layers, no dropout.

Source: Ding et al. 2019, "ACNet", and KFLO's paper; the layers and PyTorch's initial weights are those of ACNet's code,
github.com/DingXiaoH/ACNet (748fb0c), base_model/vgg.py. 3x32x32: 14,986,698 parameters with 10 classes, 15,032,868 with 100;
313.5M MACs.
"""

from typing import Literal

from torch import Tensor, nn

from pipeline.config import Section
from pipeline.models import check_input

# Of the convolutions before each pooling.
WIDTHS = [[64, 64], [128, 128], [256, 256, 256], [512, 512, 512], [512, 512, 512]]
SMALLEST = 32  # pixels a side: five poolings by 2


class Options(Section):
    """Options under `model`."""

    name: Literal["vgg16"]


class VGG16(nn.Module):
    """(B, C, H, W) -> (B, classes)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*feature_layers(channels))
        self.avgpool = nn.AdaptiveAvgPool2d(1)  # does nothing at 32x32, the one size that the source has
        self.flatten = nn.Flatten(1)
        self.fc1 = nn.Linear(512, 512)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # (B, C, 32, 32) -> (B, 512, 1, 1)
        x = self.flatten(self.avgpool(x))  # -> (B, 512)
        return self.fc2(self.relu(self.fc1(x)))


def feature_layers(channels: int) -> list[nn.Module]:
    """Convolution, BN and ReLU at each width, pooling after each group: (B, channels, H, W) -> (B, 512, H/32, W/32)."""
    layers: list[nn.Module] = []
    for group in WIDTHS:
        for width in group:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return layers


def build(*, input_shape: tuple[int, int, int], classes: int) -> VGG16:
    """VGG-16 for images (channels, height, width); `InputError` where a side has fewer than 32 pixels."""
    check_input("vgg16", input_shape, classes, SMALLEST)
    return VGG16(input_shape[0], classes)
