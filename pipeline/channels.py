"""Which channels of a network are one and the same: every channel followed from the layer that makes it to those that read it.

`follow` traces the network with torch.fx and gives every channel of every tensor an id. Layers that act on each channel alone
(normalisation, activation, pooling, depthwise convolution) pass ids on; residual adds and products make ids equal, and so does
involution for the channels of a group and the kernels made for them; concatenation joins lists; flattening repeats each id once
a pixel. What it does not understand pins the channels that reach it: they are kept, and `pinned` says why. So an unknown operator
costs compression, never correctness.

torch.fx and not a dependency graph found by autograd (as Torch-Pruning's): names of modules stay, an over-parameterised layer is
one node, and slices, zero-padded shortcuts and constants are seen for what they are.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from pipeline import operators as ops
from pipeline.involution import Involve
from pipeline.layers import ChannelPad, ChannelSelect
from pipeline.redirect import Redirect
from pipeline.tracing import Tracer, norms_in, tracing

Ids = list[int]


@dataclass
class Channels:
    """Ids of the channels of every layer, by the layer's qualified name; equal channels have equal ids."""

    inputs: dict[str, Ids] = field(default_factory=dict)  # of filtering layers: what they read
    outputs: dict[str, Ids] = field(default_factory=dict)  # of filtering layers: what they make
    channelwise: dict[str, Ids] = field(default_factory=dict)  # of batch norms and depthwise convolutions
    involved: dict[str, Ids] = field(default_factory=dict)  # of involutions, which have no tensors
    pads: dict[str, tuple[Ids, Ids]] = field(default_factory=dict)  # zero channels before and after
    selects: dict[str, tuple[Ids, Ids]] = field(default_factory=dict)  # of ChannelSelect: read, passed on
    redirects: dict[str, tuple[Ids, Ids, Ids]] = field(default_factory=dict)  # of Redirect: read, its slots, the source of each
    groups: dict[str, list[tuple[Ids, Ids]]] = field(default_factory=dict)  # of grouped layers: what each group reads and makes
    pixels: dict[str, int] = field(default_factory=dict)  # where a filtering or depthwise layer applies its kernel, for one image
    pinned: dict[int, str] = field(default_factory=dict)  # channels that must stay, and why
    summed: set[int] = field(default_factory=set)  # channels that take part in an addition
    norm_after: dict[str, str] = field(default_factory=dict)  # the batch norm that alone reads a convolution
    relu_source: dict[str, str] = field(default_factory=dict)  # the batch norm whose ReLU (averaged or not) a layer reads
    untreated: list[str] = field(default_factory=list)  # operators that were not understood
    parents: Ids = field(default_factory=list)

    def fresh(self, count: int) -> Ids:
        """New ids."""
        self.parents.extend(range(len(self.parents), len(self.parents) + count))
        return list(range(len(self.parents) - count, len(self.parents)))

    def find(self, channel: int) -> int:
        """The one id that stands for all channels equal to this one."""
        while self.parents[channel] != channel:
            self.parents[channel] = channel = self.parents[self.parents[channel]]
        return channel

    def unite(self, first: Ids, second: Ids) -> None:
        """Make channels equal, pair by pair; the older id stands for both."""
        for a, b in zip(map(self.find, first), map(self.find, second), strict=True):
            self.parents[max(a, b)] = min(a, b)

    def pin(self, channels: Ids, why: str) -> None:
        """Keep these channels, whatever is asked."""
        for channel in channels:
            self.pinned.setdefault(channel, why)

    def pins(self) -> dict[int, str]:
        """Why a channel must stay, by the id that stands for it."""
        return {self.find(channel): why for channel, why in reversed(self.pinned.items())}

    @property
    def own(self) -> dict[str, Ids]:
        """What layers treat channel by channel, those without tensors among them."""
        return {**self.channelwise, **self.involved}

    def settle(self) -> None:
        """Write the id that stands for it in place of every id."""
        rooted: Callable[[Ids], Ids] = lambda ids: [self.find(channel) for channel in ids]  # noqa: E731
        for lists in (self.inputs, self.outputs, self.channelwise, self.involved):
            lists.update({name: rooted(ids) for name, ids in lists.items()})
        for pairs in (self.pads, self.selects):
            pairs.update({name: (rooted(first), rooted(second)) for name, (first, second) in pairs.items()})
        self.redirects = {name: (rooted(read), rooted(slots), rooted(of)) for name, (read, slots, of) in self.redirects.items()}
        self.groups = {name: [(rooted(a), rooted(b)) for a, b in parts] for name, parts in self.groups.items()}
        self.pinned, self.summed = self.pins(), {self.find(channel) for channel in self.summed}

    def joins(self, name: str) -> bool:
        """Whether what the layer makes is added to something else, as at the end of a residual block."""
        made = self.outputs.get(name) or self.channelwise.get(name, [])
        return bool({*made} & self.summed)

    def units(self) -> dict[int, int]:
        """A label for every channel: those that go together or not at all, so that the groups of grouped layers stay equal, share
        one. The n-th channels of all groups of a layer go together, in what it reads and in what it makes."""
        united = Channels(parents=list(self.parents))
        for parts in self.groups.values():
            for side in zip(*parts, strict=True):
                for ids in side[1:]:
                    united.unite(side[0], ids)
        return {self.find(channel): united.find(channel) for channel in range(len(self.parents))}


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
        free = (*ops.CHANNELWISE_MODULES, nn.Flatten, Involve)
        self.shared = {name for name, count in uses.items() if count > 1 and not isinstance(self.modules[name], free)}
        self.ids: dict[fx.Node, Ids] = {}
        self.last: set[fx.Node] = set()  # tensors whose channels are on the last axis, (B, H, W, C)
        for node in traced.graph.nodes:
            ids = self.visit(node)
            if ids is not None:
                self.ids[node] = ids
        self.channels.settle()

    def visit(self, node: fx.Node) -> Ids | None:
        """The ids of the node's channels; None for what is no tensor with channels."""
        if node.op == "placeholder":
            ids = self.channels.fresh(ops.channel_count(node) or 0)
            self.channels.pin(ids, "the network's input")
            return ids
        read = [self.ids[n] for n in node.all_input_nodes if n in self.ids]
        if node.op == "output":
            for ids in read:
                self.channels.pin(ids, "the network's output")
            return None
        if ops.asks_shape(node):
            return None
        if not read:
            return self.unknown(node, read) if ops.channel_count(node) is not None and node.op != "get_attr" else None
        turned = [n in self.last for n in node.all_input_nodes if n in self.ids]
        if len(read) == 1 and (node.target in ops.ACROSS or type(self.modules.get(str(node.target))) in ops.ACROSS):
            return self.across(node, read[0])
        if any(turned) or ops.turns(node):
            return self.on_last_axis(node, read, turned)
        return self.module(node, read) if node.op == "call_module" else self.function(node, read)

    def module(self, node: fx.Node, read: list[Ids]) -> Ids:
        name = str(node.target)
        module = self.modules[name]
        if name in self.shared:
            return self.unknown(node, read)
        rules: dict[Any, Callable[..., Ids | None]] = {
            nn.Conv2d: self.convolution,
            nn.ConvTranspose2d: self.convolution,
            nn.Linear: self.linear,
            nn.modules.batchnorm._BatchNorm: self.norm,
            ChannelPad: self.pad,
            ChannelSelect: self.select,
            Redirect: self.redirect,
            nn.Flatten: lambda node, name, module, ids: self.flatten(node, ids) if module.start_dim == 1 else None,
        }
        if isinstance(module, Involve) and len(read) == 2:
            return self.involve(node, name, module, *read)
        for kind, rule in rules.items():
            if isinstance(module, kind) and len(read) == 1:
                ids = rule(node, name, module, read[0])
                return self.unknown(node, read) if ids is None else ids
        channelwise = isinstance(module, ops.CHANNELWISE_MODULES) and len(read) == 1
        return read[0] if channelwise else self.unknown(node, read)

    def convolution(self, node: fx.Node, name: str, layer: Any, ids: Ids) -> Ids | None:
        transposed = isinstance(layer, nn.ConvTranspose2d)
        self.channels.pixels[name] = prod((ops.shape(node.all_input_nodes[0] if transposed else node) or ())[2:])
        if layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels:
            self.channels.channelwise[name] = ids
            return ids
        if norm := ops.rectified_norm(node, self.modules):
            self.channels.relu_source[name] = norm
        self.channels.inputs[name] = ids
        self.channels.outputs[name] = made = self.channels.fresh(layer.out_channels)
        if layer.groups > 1:
            inputs, outputs = len(ids) // layer.groups, len(made) // layer.groups
            parts = [(g * inputs, g * outputs) for g in range(layer.groups)]
            self.channels.groups[name] = [(ids[i : i + inputs], made[o : o + outputs]) for i, o in parts]
        return made

    def linear(self, node: fx.Node, name: str, layer: nn.Linear, ids: Ids) -> Ids | None:
        shape = ops.shape(node) or ()
        if len(shape) != 2 and node.all_input_nodes[0] not in self.last:
            return None
        self.channels.pixels[name] = prod(shape[1:-1])
        self.channels.inputs[name] = ids
        self.channels.outputs[name] = made = self.channels.fresh(layer.out_features)
        return made

    def norm(self, node: fx.Node, name: str, layer: nn.Module, ids: Ids) -> Ids:
        self.channels.channelwise[name] = ids
        return ids

    def pad(self, node: fx.Node, name: str, layer: ChannelPad, ids: Ids) -> Ids:
        before, after = self.channels.fresh(layer.before), self.channels.fresh(layer.after)
        self.channels.pads[name] = (before, after)
        return before + ids + after

    def select(self, node: fx.Node, name: str, layer: ChannelSelect, ids: Ids) -> Ids:
        made = [ids[i] for i in layer.index.tolist()]
        self.channels.selects[name] = (ids, made)
        return made

    def redirect(self, node: fx.Node, name: str, layer: Redirect, ids: Ids) -> Ids:
        slots = self.channels.fresh(len(layer.index))
        self.channels.redirects[name] = (ids, slots, [ids[i] for i in layer.index.tolist()])
        return slots

    def involve(self, node: fx.Node, name: str, layer: Involve, ids: Ids, kernels: Ids) -> Ids:
        """The channels of a group and all taps of the kernel that is made for them are one."""
        self.channels.involved[name], self.channels.pixels[name] = ids, prod((ops.shape(node) or ())[2:])
        taps = len(kernels) * layer.group_channels // len(ids)
        for group in range(len(kernels) // taps):
            first, *others = ids[group * layer.group_channels : (group + 1) * layer.group_channels]
            others += kernels[group * taps : (group + 1) * taps]
            self.channels.unite([first] * len(others), others)
        return ids

    def flatten(self, node: fx.Node, ids: Ids) -> Ids | None:
        features = ops.channel_count(node)
        if features is None or len(ops.shape(node) or ()) != 2 or features % len(ids):
            return None
        return [channel for channel in ids for _ in range(features // len(ids))]

    def function(self, node: fx.Node, read: list[Ids]) -> Ids:
        target, shape = node.target, ops.shape(node) or ()
        known = len(read) == len(node.all_input_nodes) and {len(ops.shape(n) or ()) for n in node.all_input_nodes} == {len(shape)}
        if target in (*ops.ADDITIONS, *ops.PRODUCTS) and known and {len(ids) for ids in read} == {*shape[1:2]}:
            return self.joined(node, read)
        if target in ops.CONCATENATIONS and known and (parts := ops.joined_channels(node)):
            return [channel for part in parts for channel in self.ids[part]]
        if ops.flattens(node) and len(read) == 1:
            ids = self.flatten(node, read[0])
            return self.unknown(node, read) if ids is None else ids
        return (
            read[0] if ops.keeps_channels(node) and len(read) == 1 and shape[1:2] == (len(read[0]),) else self.unknown(node, read)
        )

    def joined(self, node: fx.Node, read: list[Ids]) -> Ids:
        for ids in read:
            self.channels.unite(read[0], ids)
            if len(read) > 1 and node.target in ops.ADDITIONS:
                self.channels.summed.update(ids)
        return read[0]

    def on_last_axis(self, node: fx.Node, read: list[Ids], turned: list[bool]) -> Ids:
        """What moves channels to the last axis or back, and what may happen to them there."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if (there := ops.turns(node)) and [there == "back"] == turned:
            ids: Ids | None = read[0]
        elif isinstance(module, nn.Linear) and turned == [True] and str(node.target) not in self.shared:
            ids = self.linear(node, str(node.target), module, read[0])
        elif isinstance(module, ChannelSelect) and turned == [True] and module.axis == -1:
            ids = self.select(node, str(node.target), module, read[0])
        elif (isinstance(module, ops.ELEMENTWISE_MODULES) or node.target in ops.ELEMENTWISE_FUNCTIONS) and turned == [True]:
            ids = read[0]
        elif node.target in ops.ADDITIONS and turned == [True, True] and len(node.all_input_nodes) == 2:
            ids = self.joined(node, read)
        else:
            return self.unknown(node, read)
        if there != "back":
            self.last.add(node)
        return ids or []

    def across(self, node: fx.Node, ids: Ids) -> Ids:
        """What normalises over channels keeps all of them."""
        self.unknown(node, [ids])
        if node.all_input_nodes[0] in self.last:
            self.last.add(node)
        return ids

    def unknown(self, node: fx.Node, read: list[Ids]) -> Ids:
        """Pin what the node reads and what it makes."""
        kind = type(self.modules[str(node.target)]).__name__ if node.op == "call_module" else str(node.target)
        why = f"{node.name} ({kind}) mixes channels in a way that is not understood"
        made = self.channels.fresh(ops.channel_count(node) or 0)
        for ids in [*read, made]:
            self.channels.pin(ids, why)
        self.channels.untreated.append(why)
        return made
