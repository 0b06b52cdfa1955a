"""Operators of a traced network, by what they do to channels."""

import operator
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

# Each element alone, whatever the axes mean.
ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh,
    nn.Identity, nn.Dropout,
)  # fmt: skip
ELEMENTWISE_FUNCTIONS: tuple[Any, ...] = (
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.dropout, torch.sigmoid,
    torch.tanh, F.sigmoid, F.tanh, "relu", "relu_", "sigmoid", "tanh", "contiguous", "clone",
)  # fmt: skip
# Each channel alone, in (B, C, ...).
CHANNELWISE_MODULES = (
    *ELEMENTWISE_MODULES, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample,
    nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad2d, nn.ReplicationPad2d, nn.ReflectionPad2d,
)  # fmt: skip
CHANNELWISE_FUNCTIONS: tuple[Any, ...] = (
    *ELEMENTWISE_FUNCTIONS, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate, F.dropout2d,
)  # fmt: skip
ADDITIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
PRODUCTS: tuple[Any, ...] = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
CONCATENATIONS: tuple[Any, ...] = (torch.cat, torch.concat)
# All channels of a pixel together: none of them may go, but what comes out are the same ones.
ACROSS: tuple[Any, ...] = (nn.GroupNorm, nn.LayerNorm, F.group_norm, F.layer_norm)
# Functions of other libraries, by name: torchvision drops residual branches by one of its own, which does nothing in evaluation.
CHANNELWISE_NAMES = ("stochastic_depth",)


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of the node's tensor; None where it makes no tensor."""
    meta: Any = node.meta.get("tensor_meta")
    return tuple(meta.shape) if hasattr(meta, "shape") else None


def channel_count(node: fx.Node) -> int | None:
    """The length of axis 1."""
    found = shape(node)
    return found[1] if found is not None and len(found) > 1 else None


def asks_shape(node: fx.Node) -> bool:
    """x.shape, x.size(0): numbers. What is computed with them has to be understood by itself."""
    return shape(node) is None and node.target in (getattr, "size", "dim")


def keeps_channels(node: fx.Node) -> bool:
    """A function of each channel alone, channels on axis 1."""
    if node.op == "call_function" and getattr(node.target, "__name__", "") in CHANNELWISE_NAMES:
        return True
    if node.target in ELEMENTWISE_FUNCTIONS:
        return True
    spatial = node.target in CHANNELWISE_FUNCTIONS and len(shape(node.all_input_nodes[0]) or ()) == 4
    return spatial or _slices_space(node) or _averages_space(node) or _pads_space(node)


def argument(node: fx.Node, position: int, names: tuple[str, ...], default: Any = None) -> Any:
    """An argument of a call, by its place or one of its names."""
    named = [node.kwargs[name] for name in names if name in node.kwargs]
    return named[0] if named else node.args[position] if position < len(node.args) else default


def is_torchs_own(module: nn.Module) -> bool:
    """Whether a module computes what its class in torch.nn (or here) does: neither a subclass with a forward pass of its own, as
    weight-standardised convolutions, nor a layer with a foreign parametrisation, as weight norm."""
    methods = [getattr(type(module), name, None) for name in ("forward", "_conv_forward")]
    own = all(method is None or method.__module__.startswith(("torch.nn.", "pipeline.")) for method in methods)
    lists: Any = getattr(module, "parametrizations", {}).values() if parametrize.is_parametrized(module) else ()
    return own and all(hasattr(computed[0], "keep") for computed in lists)


def with_shared_parameters(modules: Mapping[str, nn.Module]) -> set[str]:
    """Modules of which another one has a parameter too."""
    users: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name)
    return {name for names in users.values() if len(names) > 1 for name in names}


def is_elementwise(node: fx.Node, module: nn.Module | None) -> bool:
    """Each element alone, whatever the axes mean."""
    if module is not None:
        return isinstance(module, ELEMENTWISE_MODULES) and is_torchs_own(module)
    return node.target in ELEMENTWISE_FUNCTIONS


def across(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Normalises over channels."""
    return type(modules[str(node.target)]) in ACROSS if node.op == "call_module" else node.target in ACROSS


def joined_channels(node: fx.Node) -> list[fx.Node]:
    """The parts of torch.cat((a, b, ...), 1); none along another axis."""
    parts: Any = argument(node, 0, ("tensors",))
    axis = argument(node, 1, ("dim", "axis"), 0)
    there = len(shape(node) or ())
    return list(parts) if axis in (1, 1 - there) and isinstance(parts, list | tuple) else []


def flattens(node: fx.Node) -> bool:
    """torch.flatten(x, 1), or x.view(B, -1) and x.reshape(B, -1): (B, C, ...) -> (B, C * ...)."""
    if node.target in (torch.flatten, "flatten"):
        return bool(argument(node, 1, ("start_dim",), 0) == 1)
    if node.target not in ("view", "reshape", torch.reshape) or not node.all_input_nodes:
        return False
    sizes: Any = node.args[1:]
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes
    # A length written as a number would be wrong in a smaller network.
    return len(sizes) == 2 and (sizes[1] == -1 or isinstance(sizes[1], fx.Node))


def turns(node: fx.Node) -> Literal["away", "back"] | None:
    """Whether the node moves the channels of (B, C, H, W) to the last axis, or from there back to axis 1."""
    if node.target not in (torch.permute, "permute"):
        return None
    axes: Any = node.kwargs.get("dims") or node.args[1:]
    axes = tuple(axes[0]) if len(axes) == 1 else tuple(axes)
    return {(0, 2, 3, 1): "away", (0, 3, 1, 2): "back"}.get(axes)  # type: ignore[return-value]


def rectified_norm(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The batch norm whose ReLU the node reads, directly or averaged over pixels."""
    rectified = False
    (source,) = node.all_input_nodes
    while source.op == "call_module" and len(source.all_input_nodes) == 1:
        module = modules[str(source.target)]
        if isinstance(module, nn.BatchNorm2d):
            return str(source.target) if rectified and module.affine else None
        averages = isinstance(module, nn.AvgPool2d) and not module.padding
        if isinstance(module, nn.ReLU) and not rectified:
            rectified = True
        elif not (averages or isinstance(module, nn.Dropout | nn.Identity)):
            return None
        (source,) = source.all_input_nodes
    return None


def _slices_space(node: fx.Node) -> bool:
    """x[:, :, ...]: all images, all channels, some pixels."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    return node.args[1][:2] == (slice(None), slice(None))


def _averages_space(node: fx.Node) -> bool:
    """x.mean((2, 3)): over pixels alone."""
    if node.target not in (torch.mean, "mean"):
        return False
    axes = argument(node, 1, ("dim", "axis"))
    return axes in ((2, 3), [2, 3], (-2, -1), [-2, -1], (-1, -2), [-1, -2])


def _pads_space(node: fx.Node) -> bool:
    """F.pad(x, (left, right, top, bottom)): rows and columns of zeros."""
    padding: Any = argument(node, 1, ("pad",))
    return node.target is F.pad and isinstance(padding, list | tuple) and len(padding) <= 4 and len(shape(node) or ()) == 4
