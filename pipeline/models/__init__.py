"""The network zoo. One file is one network, which reads top to bottom on its own and holds

    Options      its part of params.yaml: `name` and the network's own arguments
    build        build(input_shape=(channels, height, width), classes=..., **arguments): a module
                 (B, channels, height, width) -> (B, classes)

A network is imported by name when asked for, so nothing depends on the others. To add one, add a file.
What surgery asks of a network: torch.fx can trace it; every layer is a module, called once, that works out of place;
residual branches join as `x + y`; channels are added by `ChannelPad` and pixels dropped by slicing.
"""

from typing import Any

from torch import nn

from pipeline import methods
from pipeline.config import parse
from pipeline.errors import InputError


def build(name: str, *, input_shape: tuple[int, int, int], classes: int, **arguments: Any) -> nn.Module:
    """The network `name`, freshly initialised, for images of `input_shape` (channels, height, width).

    `arguments` are all fields of the network's `Options` besides `name`. A network or argument that does not exist, an argument
    that is missing or has a value that is not allowed, and images too small for the network raise `InputError`.
    """
    network = methods.load("models", name)
    chosen = parse("model", {"name": name, **arguments}, network.Options)
    return network.build(input_shape=input_shape, classes=classes, **chosen.model_dump(exclude={"name"}))


def check_input(name: str, input_shape: tuple[int, int, int], classes: int, smallest: int) -> None:
    """Raise `InputError` where a side of `input_shape` has fewer than `smallest` pixels or a number is not positive."""
    if len(input_shape) != 3 or min(*input_shape, classes) < 1:
        raise InputError(
            f"{name}: input_shape {tuple(input_shape)} with {classes} classes is not possible; "
            "input_shape is (channels, height, width), and each of them and the classes must be at least 1"
        )
    _, height, width = input_shape
    if min(height, width) < smallest:
        raise InputError(
            f"{name}: images of {height}x{width} pixels are too small; the smallest are {smallest}x{smallest}: "
            "enlarge them (data.image_size, or data.crop, in params.yaml) or choose another network"
        )
