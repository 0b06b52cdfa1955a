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
from collections.abc import Callable, Collection
from math import prod
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from pipeline import operators as ops
from pipeline.channel_ids import Channels, Ids
from pipeline.involution import Involve
from pipeline.layers import ChannelPad, ChannelSelect, FilteringLayer
from pipeline.redirect import Redirect
from pipeline.tracing import Tracer, norms_in, tracing

__all__ = ["Channels", "Ids", "follow"]


def follow(model: nn.Module, input_shape: tuple[int, int, int]) -> Channels:
    """The channels of `model` for one image of shape (C, H, W). `InputError` where torch.fx cannot trace the network."""
    with tracing(model):
        traced = fx.GraphModule(model, Tracer().trace(model))
        example = next(model.parameters()).new_zeros(1, *input_shape)
        with torch.no_grad():
            ShapeProp(traced).propagate(example)
    channels = _Follower(traced).channels
    channels.shape = input_shape
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    called |= {str(node.target).rpartition(".")[0] for node in traced.graph.nodes if node.op == "get_attr"}
    for name, module in model.named_modules():
        layer = isinstance(module, FilteringLayer | nn.modules.batchnorm._BatchNorm)
        if layer and name not in called and not inside(name, called):
            channels.uncalled.append(f"{name} is not called in evaluation: what it reads is not known")
    return channels


def inside(name: str, owners: Collection[str]) -> bool:
    """Whether a module is part of one of the owners, as a parametrisation is of its layer."""
    parts = name.split(".")
    return any(".".join(parts[:depth]) in owners for depth in range(1, len(parts)))


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
        self.shared |= ops.with_shared_parameters(self.modules)
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
        if len(read) == 1 and ops.across(node, self.modules):
            return self.across(node, read[0])
        if any(turned) or ops.turns(node):
            return self.on_last_axis(node, read, turned)
        return self.module(node, read) if node.op == "call_module" else self.function(node, read)

    def module(self, node: fx.Node, read: list[Ids]) -> Ids:
        name = str(node.target)
        module = self.modules[name]
        if name in self.shared or not ops.is_torchs_own(module):
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
        if not isinstance(module, ops.ELEMENTWISE_MODULES) and len(ops.shape(node.all_input_nodes[0]) or ()) != 4:
            channelwise = False  # of three axes, pooling would take the channels for pixels
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
        before = ops.shape(node.all_input_nodes[0]) or (0,)
        if features is None or ops.shape(node) != (before[0], prod(before[1:])):
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
        elif turned == [True] and ops.is_elementwise(node, module):
            ids = read[0]
        elif module is None and node.target in ops.ADDITIONS and turned == [True, True] and len(node.all_input_nodes) == 2:
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
