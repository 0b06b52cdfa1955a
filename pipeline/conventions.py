"""Costs by the conventions in which others publish them, so that their figures can be compared with ours.

What the pipeline itself reports is `pipeline.measure`: multiply-adds of filters alone. Each function here takes a network and the
shape (C, H, W) of one image and counts the network as deployed, module by module; ChannelPad, ChannelSelect and
Redirect, which surgery puts in, are free. The tensors may be on the "meta" device.
"""

import copy
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.expansion import collapse
from pipeline.involution import Involve
from pipeline.layers import ChannelPad, ChannelSelect
from pipeline.redirect import Redirect

Rule = Callable[[Any, Tensor, Tensor], int]  # of a module, its first input and its output
POOLINGS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
FREE = (
    nn.Dropout, nn.Dropout2d, nn.Identity, nn.Flatten, nn.Upsample, nn.ZeroPad2d,
    ChannelPad, ChannelSelect, Redirect,
)  # fmt: skip


def thesis_flops(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Of Lee 2022 (model diet), tables 4.1, 4.3 and 4.4: MACs of convolutions and linear layers without biases, 4 for each
    output of a batch norm, 1 for each of a ReLU, 1 for each input of a pooling, 2 for each product of an involution."""
    rules: dict[Any, Rule] = {
        (nn.Conv2d, nn.ConvTranspose2d, nn.Linear): _multiply_adds,
        nn.modules.batchnorm._BatchNorm: lambda module, x, y: 4 * y.numel(),
        nn.ReLU: lambda module, x, y: y.numel(),
        POOLINGS: lambda module, x, y: x.numel(),
        Involve: lambda module, x, y: 2 * y.numel() * module.kernel_size**2,
        FREE: lambda module, x, y: 0,
    }
    return _total(model, input_shape, rules, "the thesis's")


def condensenet_flops(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Of ShichenLiu/CondenseNet at 833a91d, utils.py (measure_model), as published for CondenseNet and for selective
    convolution: MACs of convolutions, one for each input of a ReLU, products of average poolings, linear layers with biases;
    batch norm is free. A learned group convolution counts as the grouped convolution that it becomes."""
    rules: dict[Any, Rule] = {
        nn.Conv2d: _multiply_adds,
        nn.Linear: lambda module, x, y: _multiply_adds(module, x, y) + (y.numel() if module.bias is not None else 0),
        nn.ReLU: lambda module, x, y: x.numel(),
        nn.AvgPool2d: lambda module, x, y: y.numel() * prod(_pair(module.kernel_size)),
        nn.AdaptiveAvgPool2d: lambda module, x, y: x.numel(),
        (nn.modules.batchnorm._BatchNorm, *FREE): lambda module, x, y: 0,
    }
    return _total(model, input_shape, rules, "CondenseNet's")


def activation_mb(model: nn.Module, input_shape: Sequence[int]) -> float:
    """Of torchsummary ("Forward/backward pass size"), as in Lee 2022: the outputs of all modules, blocks included but neither
    `nn.Sequential` nor the network itself, in float32, twice, in 2^20 bytes. A flattening, which copies nothing, is not counted;
    an involution counts as the authors', which first copies the image once for each tap (unfold)."""
    made = 0

    def add(module: nn.Module, x: Tensor, y: Tensor) -> None:
        nonlocal made
        if isinstance(module, Involve):
            made += y.numel() * module.kernel_size**2
        elif not isinstance(module, nn.Sequential | nn.Flatten):
            made += y.numel()

    _visit(model, input_shape, add)
    return made * 4 * 2 / 2**20


def _total(model: nn.Module, input_shape: Sequence[int], rules: dict[Any, Rule], whose: str) -> int:
    """The sum of what the rules say of the innermost modules. `InputError` for a kind that has none."""
    sums: list[int] = []

    def add(module: nn.Module, x: Tensor, y: Tensor) -> None:
        if any(True for _ in module.children()):
            return
        for kinds, rule in rules.items():
            if isinstance(module, kinds):
                sums.append(rule(module, x, y))
                return
        raise InputError(f"{whose} convention of counting says nothing of {type(module).__name__}: use pipeline.measure.count")

    _visit(model, input_shape, add)
    return sum(sums)


def _visit(model: nn.Module, input_shape: Sequence[int], see: Callable[[nn.Module, Tensor, Tensor], None]) -> None:
    """Show `see` every call of a module of the deployed network, with its first input and its output."""
    deployed = collapse(copy.deepcopy(model)).eval()

    def shown(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        see(module, inputs[0], output)

    for module in deployed.modules():
        if module is not deployed or not list(deployed.children()):
            module.register_forward_hook(shown)
    device = next((parameter.device for parameter in deployed.parameters()), torch.device("cpu"))
    with torch.no_grad():
        deployed(torch.zeros(1, *input_shape, device=device))


def _multiply_adds(module: Any, x: Tensor, y: Tensor) -> int:
    """A transposed convolution multiplies each of its inputs by a filter; the others make each output with one."""
    return (x if isinstance(module, nn.ConvTranspose2d) else y).numel() * module.weight[0].numel()


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
