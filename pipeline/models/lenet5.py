"""LeNet-5 in the forms that are in use: two 5x5 convolutions and two or three linear layers, without batch normalisation.

Source: LeCun et al. 1998, "Gradient-based learning applied to document recognition", section II.B, for the widths; Caffe's
examples/mnist/lenet.prototxt for its variant. The activations are ReLU and the poolings 2x2 maxima, as in Caffe's and as is usual
today (the paper: scaled tanh, trained averages, a second convolution that reads not all of the first's maps, 32x32 images); Caffe's
convolutions have no activation, here each has one. Initial weights are PyTorch's. 1x28x28 with 10 classes:

    classic    44,426 parameters   0.3M MACs    no padding
    padded     61,706              0.4M         2 pixels around the image: every map has the size that the paper's has
    caffe     431,080              2.3M         20-50-500 wide, no padding
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from pipeline.config import Section
from pipeline.models import check_input


@dataclass(frozen=True)
class Variant:
    """Filters of the convolutions, width of each hidden linear layer, pixels of zeros around the image."""

    filters: tuple[int, int]
    hidden: tuple[int, ...]
    padding: int


VARIANTS = {
    "classic": Variant((6, 16), (120, 84), 0),
    "padded": Variant((6, 16), (120, 84), 2),
    "caffe": Variant((20, 50), (500,), 0),
}


class Options(Section):
    """Options under `model`."""

    name: Literal["lenet5"]
    variant: Literal["classic", "padded", "caffe"]


class LeNet5(nn.Module):
    """(B, C, H, W) -> (B, classes)."""

    def __init__(self, channels: int, pixels: int, classes: int, variant: Variant) -> None:
        super().__init__()
        first, second = variant.filters
        self.conv1 = nn.Conv2d(channels, first, 5, padding=variant.padding)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten(1)
        self.classifier = nn.Sequential()
        features = second * pixels
        for width in variant.hidden:
            self.classifier.extend([nn.Linear(features, width), nn.ReLU()])
            features = width
        self.classifier.append(nn.Linear(features, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))  # (B, C, 28, 28) -> (B, 6, 12, 12)
        x = self.pool2(self.relu2(self.conv2(x)))  # -> (B, 16, 4, 4)
        return self.classifier(self.flatten(x))  # (B, 256) -> (B, classes)


def build(*, input_shape: tuple[int, int, int], classes: int, variant: str) -> LeNet5:
    """LeNet-5 for images (channels, height, width); `InputError` where a side has fewer than 16 pixels, or 12 if padded."""
    chosen = VARIANTS[variant]
    check_input("lenet5", input_shape, classes, 16 - 2 * chosen.padding)
    channels, height, width = input_shape
    pixels = side(height + 2 * chosen.padding) * side(width + 2 * chosen.padding)
    return LeNet5(channels, pixels, classes, chosen)


def side(size: int) -> int:
    """Pixels a side of the last map: twice a 5x5 convolution and a 2x2 pooling."""
    for _ in range(2):
        size = (size - 4) // 2
    return size
