"""Which channels of a network are one and the same: every channel followed from the layer that makes it to those that read it.

`follow` traces the network with torch.fx and gives every channel of every tensor an id. Layers that act on each channel alone
(normalisation, activation, pooling, depthwise convolution) pass ids on; a residual add makes ids equal; concatenation joins
lists; flattening repeats each id once a pixel. What it does not understand pins the channels that reach it: they are kept, and
`pinned` says why. So an unknown operator costs compression, never correctness.
"""

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from pipeline.layers import ChannelPad, ChannelSelect
from pipeline.tracing import Tracer, norms_in, tracing

CHANNELWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Identity,
    nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample,
    nn.ZeroPad2d, nn.ReplicationPad2d, nn.ReflectionPad2d,
)  # fmt: skip
CHANNELWISE_FUNCTIONS: tuple[Any, ...] = (
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.gelu, F.silu, F.hardswish, F.dropout, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, F.interpolate, torch.sigmoid, torch.tanh, "relu", "relu_", "sigmoid", "contiguous", "clone",
)  # fmt: skip
ADDITIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
CONCATENATIONS: tuple[Any, ...] = (torch.cat, torch.concat)


@dataclass
class Channels:
    """Ids of the channels of every layer, by the layer's qualified name. Compare ids through `find`."""

    inputs: dict[str, list[int]] = field(default_factory=dict)  # of filtering layers: what they read
    outputs: dict[str, list[int]] = field(default_factory=dict)  # of filtering layers: what they make
    channelwise: dict[str, list[int]] = field(default_factory=dict)  # of batch norms and depthwise convolutions
    pads: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)  # zero channels before and after
    selects: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)  # of ChannelSelect: read, passed on
    pinned: dict[int, str] = field(default_factory=dict)  # channels that must stay, and why
    summed: set[int] = field(default_factory=set)  # channels that take part in an addition
    norm_after: dict[str, str] = field(default_factory=dict)  # the batch norm that alone reads a convolution
    relu_source: dict[str, str] = field(default_factory=dict)  # the batch norm whose ReLU (averaged or not) a layer reads
    untreated: list[str] = field(default_factory=list)  # operators that were not understood
    parents: list[int] = field(default_factory=list)

    def fresh(self, count: int) -> list[int]:
        """New ids."""
        self.parents.extend(range(len(self.parents), len(self.parents) + count))
        return list(range(len(self.parents) - count, len(self.parents)))

    def find(self, channel: int) -> int:
        """The one id that stands for all channels equal to this one."""
        while self.parents[channel] != channel:
            self.parents[channel] = channel = self.parents[self.parents[channel]]
        return channel

    def unite(self, first: list[int], second: list[int]) -> None:
        """Make channels equal, pair by pair; the older id stands for both."""
        for a, b in zip(map(self.find, first), map(self.find, second), strict=True):
            self.parents[max(a, b)] = min(a, b)

    def pin(self, channels: list[int], why: str) -> None:
        """Keep these channels, whatever is asked."""
        for channel in channels:
            self.pinned.setdefault(channel, why)

    def pins(self) -> dict[int, str]:
        """Why a channel must stay, by the id that stands for it."""
        return {self.find(channel): why for channel, why in reversed(self.pinned.items())}

    def joins(self, name: str) -> bool:
        """Whether what the layer makes is added to something else, as at the end of a residual block."""
        made = self.outputs.get(name) or self.channelwise.get(name, [])
        return bool({self.find(c) for c in made} & {self.find(c) for c in self.summed})


def follow(model: nn.Module, input_shape: tuple[int, int, int]) -> Channels:
    """The channels of `model` for one image of shape (C, H, W). `InputError` where torch.fx cannot trace the network."""
    with tracing(model):
        traced = fx.GraphModule(model, Tracer().trace(model))
        example = next(model.parameters()).new_zeros(1, *input_shape)
        with torch.no_grad():
            ShapeProp(traced).propagate(example)
    return _Follower(traced).channels


class _Follower:
    """One pass over the graph in its order."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.channels = Channels()
        self.modules = dict(traced.named_modules())
        self.channels.norm_after = norms_in(traced.graph, self.modules)
        uses = Counter(str(n.target) for n in traced.graph.nodes if n.op == "call_module")
        uses.update(str(n.target).rpartition(".")[0] for n in traced.graph.nodes if n.op == "get_attr")
        # What serves more than once and has widths of its own must stay as it is.
        free = (*CHANNELWISE_MODULES, nn.Flatten)
        self.shared = {name for name, count in uses.items() if count > 1 and not isinstance(self.modules[name], free)}
        self.ids: dict[fx.Node, list[int]] = {}
        for node in traced.graph.nodes:
            ids = self.visit(node)
            if ids is not None:
                self.ids[node] = ids

    def visit(self, node: fx.Node) -> list[int] | None:
        """The ids of the node's channel axis (axis 1); None for what is no tensor with channels."""
        if node.op == "placeholder":
            ids = self.channels.fresh(_channel_count(node) or 0)
            self.channels.pin(ids, "the network's input")
            return ids
        read = [self.ids[n] for n in node.all_input_nodes if n in self.ids]
        if node.op == "output":
            for ids in read:
                self.channels.pin(ids, "the network's output")
            return None
        if not read:
            return self.unknown(node, read) if _channel_count(node) is not None and node.op != "get_attr" else None
        return self.module(node, read) if node.op == "call_module" else self.function(node, read)

    def module(self, node: fx.Node, read: list[list[int]]) -> list[int]:
        name = str(node.target)
        module = self.modules[name]
        if name in self.shared:
            return self.unknown(node, read)
        rules: dict[type, Callable[..., list[int] | None]] = {
            nn.Conv2d: self.convolution,
            nn.Linear: self.linear,
            nn.modules.batchnorm._BatchNorm: self.norm,
            ChannelPad: self.pad,
            ChannelSelect: self.select,
            nn.Flatten: lambda node, name, module, ids: self.flatten(node, ids) if module.start_dim == 1 else None,
        }
        for kind, rule in rules.items():
            if isinstance(module, kind) and len(read) == 1:
                ids = rule(node, name, module, read[0])
                return self.unknown(node, read) if ids is None else ids
        channelwise = isinstance(module, CHANNELWISE_MODULES) and len(read) == 1
        return read[0] if channelwise else self.unknown(node, read)

    def convolution(self, node: fx.Node, name: str, layer: nn.Conv2d, ids: list[int]) -> list[int] | None:
        if layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels:
            self.channels.channelwise[name] = ids
            return ids
        self.note_source(node, name)
        self.channels.inputs[name] = ids
        self.channels.outputs[name] = made = self.channels.fresh(layer.out_channels)
        return made

    def linear(self, node: fx.Node, name: str, layer: nn.Linear, ids: list[int]) -> list[int] | None:
        if len(_shape(node) or ()) != 2:
            return None
        self.channels.inputs[name] = ids
        self.channels.outputs[name] = made = self.channels.fresh(layer.out_features)
        return made

    def norm(self, node: fx.Node, name: str, layer: nn.Module, ids: list[int]) -> list[int]:
        self.channels.channelwise[name] = ids
        return ids

    def pad(self, node: fx.Node, name: str, layer: ChannelPad, ids: list[int]) -> list[int]:
        before, after = self.channels.fresh(layer.before), self.channels.fresh(layer.after)
        self.channels.pads[name] = (before, after)
        return before + ids + after

    def select(self, node: fx.Node, name: str, layer: ChannelSelect, ids: list[int]) -> list[int]:
        made = [ids[i] for i in layer.index.tolist()]
        self.channels.selects[name] = (ids, made)
        return made

    def flatten(self, node: fx.Node, ids: list[int]) -> list[int] | None:
        features = _channel_count(node)
        if features is None or len(_shape(node) or ()) != 2:
            return None
        return [channel for channel in ids for _ in range(features // len(ids))]

    def function(self, node: fx.Node, read: list[list[int]]) -> list[int]:
        target, shape = node.target, _shape(node) or ()
        known = len(read) == len(node.all_input_nodes) and {len(_shape(n) or ()) for n in node.all_input_nodes} == {len(shape)}
        if target in ADDITIONS and known and {len(ids) for ids in read} == {*shape[1:2]}:
            for ids in read:
                self.channels.unite(read[0], ids)
                if len(read) > 1:
                    self.channels.summed.update(ids)
            return read[0]
        if target in CONCATENATIONS and known and (parts := _joined_channels(node)):
            return [channel for part in parts for channel in self.ids[part]]
        if target in (torch.flatten, "flatten") and (*node.args, None)[1] == 1 and len(read) == 1:
            ids = self.flatten(node, read[0])
            return self.unknown(node, read) if ids is None else ids
        keeps = target in CHANNELWISE_FUNCTIONS or _slices_space(node) or _averages_space(node)
        return read[0] if keeps and len(read) == 1 and shape[1:2] == (len(read[0]),) else self.unknown(node, read)

    def unknown(self, node: fx.Node, read: list[list[int]]) -> list[int]:
        """Pin what the node reads and what it makes."""
        kind = type(self.modules[str(node.target)]).__name__ if node.op == "call_module" else str(node.target)
        why = f"{node.name} ({kind}) mixes channels in a way that is not understood"
        count = _channel_count(node)
        made = self.channels.fresh(count or 0)
        for ids in [*read, made]:
            self.channels.pin(ids, why)
        self.channels.untreated.append(why)
        return made

    def note_source(self, node: fx.Node, name: str) -> None:
        """Remember the batch norm when the layer reads its ReLU, directly or averaged over pixels."""
        rectified = False
        (source,) = node.all_input_nodes
        while source.op == "call_module" and len(source.all_input_nodes) == 1:
            module = self.modules[str(source.target)]
            if isinstance(module, nn.BatchNorm2d):
                if rectified and module.affine:
                    self.channels.relu_source[name] = str(source.target)
                return
            averages = isinstance(module, nn.AvgPool2d) and not module.padding
            if isinstance(module, nn.ReLU) and not rectified:
                rectified = True
            elif not (averages or isinstance(module, nn.Dropout | nn.Identity)):
                return
            (source,) = source.all_input_nodes


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    meta: Any = node.meta.get("tensor_meta")
    return tuple(meta.shape) if hasattr(meta, "shape") else None


def _channel_count(node: fx.Node) -> int | None:
    shape = _shape(node)
    return shape[1] if shape is not None and len(shape) > 1 else None


def _joined_channels(node: fx.Node) -> list[fx.Node]:
    """The parts of torch.cat((a, b, ...), 1); none along another axis."""
    parts: Any = node.args[0] if node.args else None
    axis = node.kwargs.get("dim") or (*node.args, 0)[1]
    return list(parts) if axis == 1 and isinstance(parts, list | tuple) else []


def _slices_space(node: fx.Node) -> bool:
    """x[:, :, ...]: all images, all channels, some pixels."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    return node.args[1][:2] == (slice(None), slice(None))


def _averages_space(node: fx.Node) -> bool:
    """x.mean((2, 3)): over pixels alone."""
    if node.target not in (torch.mean, "mean"):
        return False
    axes = node.kwargs.get("dim", (*node.args, None)[1])
    return axes in ((2, 3), [2, 3], (-2, -1), [-2, -1])
