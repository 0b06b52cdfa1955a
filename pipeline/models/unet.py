"""U-Net with batch normalisation and the parameter names of milesial/Pytorch-UNet, so that its weights can be loaded.

Source: Ronneberger et al. 2015, "U-Net: Convolutional Networks for Biomedical Image Segmentation", figure 1, as
milesial/Pytorch-UNet at 21d7850 (unet/unet_parts.py, unet_model.py) pads it: an output pixel for each pixel of the image.
Parameters with 3 channels and one class:

    up            width 64      width 32
    transposed  31,037,633     7,763,041
    bilinear    17,262,977     4,318,401
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config import Section
from pipeline.models import check_input

SMALLEST = 16  # pixels a side: four poolings by 2


class Options(Section):
    """Options under `model`."""

    name: Literal["unet"]
    width: int = Field(ge=1)  # channels at full resolution; 64 as published
    up: Literal["transposed", "bilinear"]  # how the decoder enlarges: by learned kernels, or by interpolation


class DoubleConv(nn.Module):
    """Twice 3x3 convolution, batch norm and ReLU: (B, I, H, W) -> (B, O, H, W)."""

    def __init__(self, inputs: int, middle: int, outputs: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(inputs, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Down(nn.Module):
    """(B, I, H, W) -> (B, O, H // 2, W // 2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(inputs, outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class Up(nn.Module):
    """x (B, X, h, w) and the encoder's skip (B, S, H, W) -> (B, O, H, W), where the skip is 2h or 2h + 1 pixels high.

    A skip of odd size is met by zeros below and to the right. They are chosen when the network is built, since a traced
    network cannot look at sizes.
    """

    def __init__(self, inputs: int, skip: int, outputs: int, size: tuple[int, int], bilinear: bool) -> None:
        super().__init__()
        self.up: nn.Module
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(inputs + skip, (inputs + skip) // 2, outputs)
        else:
            self.up = nn.ConvTranspose2d(inputs, skip, 2, stride=2)
            self.conv = DoubleConv(2 * skip, outputs, outputs)
        below, right = (side % 2 for side in size)
        self.pad = nn.ZeroPad2d((0, right, 0, below)) if below or right else None

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)  # (B, X, h, w) -> (B, X or S, 2h, 2w)
        if self.pad is not None:
            x = self.pad(x)
        return self.conv(torch.cat([skip, x], 1))


class OutConv(nn.Module):
    """A 1x1 convolution: (B, I, H, W) -> (B, classes, H, W)."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class UNet(nn.Module):
    """(B, C, H, W) -> (B, classes, H, W), for images of the one `size` (H, W)."""

    def __init__(self, channels: int, classes: int, width: int, size: tuple[int, int], bilinear: bool) -> None:
        super().__init__()
        # Interpolation keeps the channels, so that the decoder hands on half as many.
        thin = 2 if bilinear else 1
        sizes = [(size[0] >> level, size[1] >> level) for level in range(4)]
        self.inc = DoubleConv(channels, width, width)
        self.down1 = Down(width, 2 * width)
        self.down2 = Down(2 * width, 4 * width)
        self.down3 = Down(4 * width, 8 * width)
        self.down4 = Down(8 * width, 16 * width // thin)
        self.up1 = Up(16 * width // thin, 8 * width, 8 * width // thin, sizes[3], bilinear)
        self.up2 = Up(8 * width // thin, 4 * width, 4 * width // thin, sizes[2], bilinear)
        self.up3 = Up(4 * width // thin, 2 * width, 2 * width // thin, sizes[1], bilinear)
        self.up4 = Up(2 * width // thin, width, width, sizes[0], bilinear)
        self.outc = OutConv(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)  # (B, C, H, W) -> (B, width, H, W)
        x2 = self.down1(x1)  # -> (B, 2 width, H/2, W/2)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x = self.down4(x4)  # -> (B, 16 width, H/16, W/16), bilinear half as many channels
        x = self.up1(x, x4)
        x = self.up2(x, x3)
        x = self.up3(x, x2)
        x = self.up4(x, x1)  # -> (B, width, H, W)
        return self.outc(x)


def build(*, input_shape: tuple[int, int, int], classes: int, width: int, up: Literal["transposed", "bilinear"]) -> UNet:
    """U-Net for images (channels, height, width) of any size from 16x16."""
    check_input("unet", input_shape, classes, SMALLEST)
    return UNet(input_shape[0], classes, width, input_shape[1:], up == "bilinear")
