"""VGG-16 with batch normalisation and torchvision's parameter names, so that its weights can be loaded.

Source: Simonyan and Zisserman 2015, "Very deep convolutional networks for large-scale image recognition", table 1, D;
the BN after each (biased) convolution, the adaptive pooling and the initial weights are torchvision's. 3x224x224 with
10 classes: 134,309,962 parameters, 15.466G MACs.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline.config import Section
from pipeline.models import check_input

# Of the convolutions before each pooling.
WIDTHS = [[64, 64], [128, 128], [256, 256, 256], [512, 512, 512], [512, 512, 512]]
SMALLEST = 32  # pixels a side: five poolings by 2


class Options(Section):
    """Options under `model`."""

    name: Literal["vgg16_bn"]
    dropout: float = Field(ge=0, lt=1)  # after each hidden linear layer; 0.5 as published


class VGG16(nn.Module):
    """(B, C, H, W) -> (B, classes)."""

    def __init__(self, channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(*feature_layers(channels))
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))  # does nothing at 224x224: any other size is brought to 7x7
        self.flatten = nn.Flatten(1)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4096, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))  # (B, C, 224, 224) -> (B, 512, 7, 7)
        return self.classifier(self.flatten(x))  # (B, 25088) -> (B, classes)


def feature_layers(channels: int) -> list[nn.Module]:
    """Convolution, BN and ReLU at each width, pooling after each group: (B, channels, H, W) -> (B, 512, H/32, W/32)."""
    layers: list[nn.Module] = []
    for group in WIDTHS:
        for width in group:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return layers


def build(*, input_shape: tuple[int, int, int], classes: int, dropout: float) -> VGG16:
    """VGG-16 for images (channels, height, width); `InputError` where a side has fewer than 32 pixels."""
    check_input("vgg16_bn", input_shape, classes, SMALLEST)
    return VGG16(input_shape[0], classes, dropout)
