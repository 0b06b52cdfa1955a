"""Networks for the laws: the whole zoo, at widths that a CPU can bear, and networks drawn at random."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline import models
from pipeline.channels import follow
from pipeline.grouping import group_channels
from pipeline.involution import Involution
from pipeline.layers import ChannelPad, filtering_layers
from pipeline.overparameterize import collapse, overparameterize
from pipeline.surgery import Shape, drop, shrink

CLASSES = 10
# Arguments, pixels a side, and by how much the widths are divided before any test: published widths would take gigabytes.
ZOO: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "alexnet": ("alexnet", {"variant": "torchvision", "dropout": 0.5}, 63, 16),
    "cifar_quick": ("cifar_quick", {}, 16, 1),
    "condensenet": ("condensenet", {"depth": 14, "growth": 4, "groups": 4, "dropout": 0.1}, 8, 1),
    "densenet": ("densenet", {"depth": 10, "growth": 4, "compression": 1.0, "stem": "cifar"}, 8, 1),
    "densenet-bc": ("densenet", {"depth": 16, "growth": 4, "compression": 0.5, "stem": "tiny"}, 9, 1),
    "lenet5": ("lenet5", {"variant": "classic"}, 20, 1),
    "mininet": ("mininet", {"dropout": 0.5}, 63, 2),
    "rednet": ("rednet", {"depth": 26, "width": 32, "zero_init": False}, 32, 1),
    "resnet": ("resnet", {"depth": 8}, 8, 1),
    "resnet18": ("resnet_imagenet", {"depth": 18, "stem": "cifar"}, 8, 8),
    "resnet18-imagenet": ("resnet_imagenet", {"depth": 18, "stem": "imagenet"}, 33, 8),
    "resnet50": ("resnet_imagenet", {"depth": 50, "stem": "cifar"}, 8, 16),
    "resnet_preact": ("resnet_preact", {"depth": 11, "stem": "cifar"}, 8, 4),
    "resnext": ("resnext", {"depth": 11, "cardinality": 4, "width": 4, "stem": "cifar"}, 8, 8),
    "vgg16": ("vgg16", {}, 32, 16),
    "vgg16_bn": ("vgg16_bn", {"dropout": 0.5}, 32, 16),
    "wide_resnet": ("wide_resnet", {"depth": 10, "width": 1, "dropout": 0.3}, 8, 1),
}


def shape_of(name: str) -> Shape:
    """(C, H, W) of the network's images."""
    return (3, ZOO[name][2], ZOO[name][2])


def build(name: str, expand: bool = True, seed: int = 0) -> nn.Module:
    """The network in evaluation mode, KFLO-expanded or merged: all of its numbers are drawn, none is a default's."""
    network, arguments, _, divisor = ZOO[name]
    shape = shape_of(name)
    with torch.device("meta"):
        model = models.build(network, input_shape=shape, classes=CLASSES, **arguments)
        overparameterize(model, "kflo", depth=2, width=1.5)
        channels = follow(model, shape)
        dropped = {channel for channel, group in group_channels(channels, divisor).items() if group} if divisor > 1 else set()
    model = randomise(shrink(model, shape, drop(channels, dropped)).to_empty(device="cpu"), seed)
    return model.eval() if expand else collapse(model).eval()


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every number of the network so that outputs stay near 1 and no mixer is an identity, no batch norm a fresh one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in filtering_layers(model):
            tensors = dict(layer.named_parameters())
            for name, tensor in tensors.items():
                fan_in = tensor[0].numel() if tensor.ndim > 1 else 10
                scale = 1.0 if "mixers" in name else 2.0
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (scale / fan_in) ** 0.5)
        for module in model.modules():
            if isinstance(module, Involution):  # its output is a product of two: without this, one block squares the other's
                for tensor in module.conv2.parameters():
                    tensor.mul_(0.02 if tensor.ndim > 1 else 0.5)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                draw = torch.rand(4, module.num_features, generator=generator)
                ranges = ((0.5, 1.0, "weight"), (-0.3, 0.6, "bias"), (-0.3, 0.6, "running_mean"), (0.5, 1.0, "running_var"))
                for (low, span, name), values in zip(ranges, draw, strict=True):
                    if getattr(module, name) is not None:
                        getattr(module, name).copy_(low + span * values)
                if module.num_batches_tracked is not None:
                    module.num_batches_tracked.fill_(7)
    return model


def masked(model: nn.Module, reads: dict[str, Tensor]) -> nn.Module:
    """What `shrink` must equal: the whole network, where each layer sees zeros in the channels that it does not read."""
    model = copy.deepcopy(model)

    def zero(mask: Tensor) -> Callable[..., Tensor]:
        behind = lambda module, x: 0 if isinstance(module, nn.Linear) else x.ndim - 2  # noqa: E731  # axes behind the channels
        return lambda module, inputs: torch.where(mask.reshape(-1, *[1] * behind(module, inputs[0])), inputs[0], 0.0)

    for name, mask in reads.items():
        model.get_submodule(name).register_forward_pre_hook(zero(mask))
    return model


@torch.no_grad()
def difference(first: nn.Module, second: nn.Module, shape: Shape, images: int = 4) -> float:
    """The largest |difference| of outputs on random images, as a share of the largest |output|. Not finite is infinite."""
    x = torch.randn(images, *shape, generator=torch.Generator().manual_seed(1))
    a, b = first.eval()(x), second.eval()(x)
    assert a.shape == b.shape and a.abs().max() > 1e-3, "the comparison would say nothing"
    share = float((a - b).abs().max() / a.abs().max())
    return share if share == share else float("inf")


def plain(model: nn.Module) -> nn.Module:
    """A merged copy."""
    return collapse(copy.deepcopy(model))


def is_expanded(model: nn.Module) -> bool:
    return any(parametrize.is_parametrized(module) for module in model.modules())


class Unit(nn.Module):
    """Convolution, perhaps batch norm, activation."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, groups: int = 1, kernel: int = 3, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=not norm or outputs % 4 == 0)
        self.norm = nn.BatchNorm2d(outputs, affine=outputs != 6) if norm else nn.Identity()
        self.act = nn.SiLU() if outputs == 8 else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Branches(nn.Module):
    """Two branches, or one and the input itself, joined by `join`: an add or a concatenation."""

    def __init__(self, left: nn.Module, right: nn.Module, join: str) -> None:
        super().__init__()
        self.left, self.right, self.join = left, right, join

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        return torch.cat([left, right, left], 1) if self.join == "cat" else left + right


class Attention(nn.Module):
    """Squeeze and excite: every channel scaled by what the means of all say."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()))


class Subsample(nn.Module):
    """Option A: every second pixel, zero channels on both sides."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.pad = ChannelPad(before, after)

    def forward(self, x: Tensor) -> Tensor:
        return self.pad(x[:, :, ::2, ::2])


def block(kind: str, inputs: int, outputs: int) -> tuple[list[nn.Module], int]:
    """The modules of one kind of block, and how many channels they make."""
    wider = max(inputs, outputs)
    before = (wider - inputs) // 2
    pooled: list[nn.Module] = [nn.MaxPool2d(2), nn.AvgPool2d(3, 1, 1), nn.Dropout2d(), nn.Upsample(scale_factor=2)]
    depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs)
    joined = 2 * outputs + inputs
    made: dict[str, Callable[[], tuple[list[nn.Module], int]]] = {
        "unit": lambda: ([Unit(inputs, outputs)], outputs),
        "plain": lambda: ([Unit(inputs, outputs, norm=False, kernel=1)], outputs),
        "pool": lambda: (pooled, inputs),
        "identity": lambda: ([Branches(Unit(inputs, inputs), nn.Identity(), "add"), nn.ReLU()], inputs),
        "projection": lambda: ([Branches(Unit(inputs, outputs), Unit(inputs, outputs, kernel=1), "add")], outputs),
        "pad": lambda: ([Branches(Unit(inputs, wider, stride=2), Subsample(before, wider - inputs - before), "add")], wider),
        "cat": lambda: ([Branches(Unit(inputs, outputs), nn.Identity(), "cat"), nn.BatchNorm2d(joined)], joined),
        "depthwise": lambda: ([depthwise, nn.BatchNorm2d(inputs), nn.ReLU(), Unit(inputs, outputs, kernel=1)], outputs),
        "groups": lambda: ([Unit(inputs, outputs, groups=2 if inputs % 2 == 0 else 1), Unit(outputs, inputs)], inputs),
        "attention": lambda: ([Attention(inputs, outputs)], inputs),
        "transposed": lambda: ([nn.ConvTranspose2d(inputs, outputs, 3, padding=1), nn.ReLU()], outputs),
    }  # fmt: skip
    return made[kind]()


KINDS = ("unit", "plain", "pool", "identity", "projection", "pad", "cat", "depthwise", "groups", "attention", "transposed")


@st.composite
def programs(draw: Callable[..., Any]) -> dict[str, Any]:
    """What `drawn` builds."""
    blocks = draw(st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([2, 4, 6, 8])), min_size=1, max_size=4))
    return {
        "blocks": blocks,
        "head": draw(st.sampled_from(["flatten", "average"])),
        "expand": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


def drawn(program: dict[str, Any], shape: Shape = (3, 8, 8)) -> nn.Module:
    """The network of a program, every number of it drawn."""
    layers: list[nn.Module] = [Unit(shape[0], 4)]
    channels = 4
    for kind, outputs in program["blocks"]:
        made, channels = block(kind, channels, outputs)
        layers += made
    if program["head"] == "flatten":
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(channels * 4, 6), nn.BatchNorm1d(6), nn.ReLU()]
        layers += [nn.Linear(6, CLASSES)]
    else:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
    model = nn.Sequential(*layers)
    if program["expand"]:
        overparameterize(model, "kflo", depth=3, width=1.5)
    return randomise(model, program["seed"]).eval()


def draw_reads(model: nn.Module, shape: Shape, seed: int, share: float = 0.6) -> dict[str, Tensor]:
    """What each layer shall read: about `share` of its channels, but for some layers that read all. Expanded layers with groups
    read all: surgery refuses to give their groups different channels."""
    generator = torch.Generator().manual_seed(seed)
    layers = dict(filtering_layers(model))
    reads = {}
    for name, ids in follow(model, shape).inputs.items():
        mask = torch.rand(len(ids), generator=generator) < share
        mask[int(torch.randint(len(ids), (), generator=generator))] = True
        whole = getattr(layers[name], "groups", 1) > 1 and is_expanded(layers[name])
        if float(torch.rand((), generator=generator)) < 0.8 and not whole:
            reads[name] = mask
    return reads
