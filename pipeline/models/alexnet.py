"""AlexNet for 224x224 images: torchvision's, and the one of four convolutions of the partial-restart paper.

Sources: Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks", as torchvision has it, with its
parameter names, so that its weights can be loaded; the paper's own code, github.com/sjtu-cs222/Group_36 at 43e8da4, which leaves
out one 3x3 convolution (Restart/alexnet_cifar10_own_restart.py). Initial weights are PyTorch's, as theirs. 3x224x224, 10 classes:

    torchvision           convolutions 64-192-384-256-256    57,044,810 parameters    710M MACs
    four_convolutions     convolutions 64-192-384-256        56,454,730 parameters    610M MACs

The paper's "pre-trained AlexNet" (Fine_Tune/alexnet_cifar10_train_baseline.py) is torchvision's: `features` with the ImageNet
weights, all three layers of `classifier` new, dropout as torchvision's, and every layer trained. Here: a `train.start` with
torchvision's file and `train.start_layers: ["features.*"]`.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline.config import Section
from pipeline.models import check_input

# Of the 3x3 convolutions.
WIDTHS = {"torchvision": [384, 256, 256], "four_convolutions": [384, 256]}
SMALLEST = 63  # pixels a side: 63 -> 15 -> 7 -> 3 -> 1


class Options(Section):
    """Options under `model`."""

    name: Literal["alexnet"]
    variant: Literal["torchvision", "four_convolutions"]
    dropout: float = Field(ge=0, lt=1)  # before the first and the second linear layer; 0.5 as published


class AlexNet(nn.Module):
    """(B, C, H, W) -> (B, classes)."""

    def __init__(self, channels: int, classes: int, variant: str, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(*feature_layers(channels, WIDTHS[variant]))
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))  # does nothing at 224x224: any other size is brought to 6x6
        self.flatten = nn.Flatten(1)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))  # (B, C, 224, 224) -> (B, 256, 6, 6)
        return self.classifier(self.flatten(x))  # (B, 9216) -> (B, classes)


def feature_layers(channels: int, widths: list[int]) -> list[nn.Module]:
    """Convolutions, ReLUs and three poolings: (B, channels, H, W) -> (B, 256, H', W'), 6x6 of 224x224."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)]
    inputs = 192
    for width in widths:
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
        inputs = width
    return [*layers, nn.MaxPool2d(3, stride=2)]


def build(*, input_shape: tuple[int, int, int], classes: int, variant: str, dropout: float) -> AlexNet:
    """AlexNet for images (channels, height, width); `InputError` where a side has fewer than 63 pixels."""
    check_input("alexnet", input_shape, classes, SMALLEST)
    return AlexNet(input_shape[0], classes, variant, dropout)
