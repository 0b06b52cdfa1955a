"""The smaller network: given which channels each layer reads, cut away every channel that nobody reads.

`shrink(model, shape, reads)` gives a new network that computes exactly what the old one computes with the channels that a layer
does not read at zero, for that layer. A channel disappears from its producer, from normalisation and from every add it takes
part in when none of its readers wants it; a reader that wants less than what is left gets a `ChannelSelect` in front. Layers that
are over-parameterised are cut in their own parameters, so that shrinking and collapsing commute.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.channels import Channels, follow
from pipeline.errors import InputError
from pipeline.layers import ChannelPad, ChannelSelect, FilteringLayer

Shape = tuple[int, int, int]


def shrink(model: nn.Module, input_shape: Shape, reads: dict[str, Tensor]) -> nn.Module:
    """A smaller copy of `model`.

    `reads` has, for some filtering layers, a boolean tensor over the input channels (features of a linear layer) that the layer
    shall read; a layer without an entry reads all. `InputError` names a layer that would be left without any channel, and a
    grouped convolution whose groups would become unequal.
    """
    channels = follow(model, input_shape)
    for name, mask in reads.items():
        if name not in channels.inputs or len(mask) != len(channels.inputs[name]):
            raise InputError(f"surgery: there is no layer {name} that reads {len(mask)} channels")
    alive = living(channels, reads)
    smaller = copy.deepcopy(model)
    modules: list[tuple[str, Any]] = list(smaller.named_modules())
    for name, module in modules:
        if name in channels.inputs:
            _cut_filtering(smaller, name, module, channels, alive, reads.get(name))
        elif name in channels.channelwise:
            _cut_channelwise(name, module, _positions(channels, channels.channelwise[name], alive))
        elif name in channels.pads:
            module.before, module.after = (len(_positions(channels, ids, alive)) for ids in channels.pads[name])
        elif name in channels.selects:
            _cut_select(module, channels, alive, *channels.selects[name])
    return smaller


def living(channels: Channels, reads: dict[str, Tensor]) -> set[int]:
    """The ids of the channels that stay: pinned, or read by a layer."""
    alive = set(channels.pins())
    for name, ids in channels.inputs.items():
        mask = reads[name].tolist() if name in reads else [True] * len(ids)
        alive.update(channels.find(channel) for channel, wanted in zip(ids, mask, strict=True) if wanted)
    return alive


def drop(channels: Channels, dropped: set[int]) -> dict[str, Tensor]:
    """What every layer reads when the channels in `dropped` (ids as `find` gives them) are read by none."""
    return {name: torch.tensor([channels.find(channel) not in dropped for channel in ids]) for name, ids in channels.inputs.items()}


def _positions(channels: Channels, ids: list[int], alive: set[int]) -> Tensor:
    return torch.tensor([i for i, channel in enumerate(ids) if channels.find(channel) in alive], dtype=torch.long)


def _cut_filtering(model: nn.Module, name: str, layer: Any, channels: Channels, alive: set[int], mask: Tensor | None) -> None:
    outputs = _positions(channels, channels.outputs[name], alive)
    there = _positions(channels, channels.inputs[name], alive)
    wanted = there if mask is None else there[mask.to("cpu")[there]]
    if not len(outputs) or not len(wanted):
        raise InputError(f"surgery: layer {name} would be left without {'inputs' if len(outputs) else 'outputs'}")
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        _cut_grouped(name, layer, outputs, wanted)
    else:
        keep(layer, outputs, wanted)
    if len(wanted) < len(there):
        _wrap(model, name, torch.searchsorted(there, wanted))


def keep(layer: FilteringLayer, outputs: Tensor, inputs: Tensor) -> None:
    """Keep only some outputs and inputs of a layer without groups, in place, plain or over-parameterised."""
    for tensor in ("weight", "bias"):
        if parametrize.is_parametrized(layer, tensor):
            layer.parametrizations[tensor][0].keep(outputs, inputs)  # type: ignore[index]
        elif tensor == "weight":
            layer.weight = _like(layer.weight, layer.weight[outputs][:, inputs])
        elif layer.bias is not None:
            layer.bias = _like(layer.bias, layer.bias[outputs])
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = len(outputs), len(inputs)
    else:
        layer.out_features, layer.in_features = len(outputs), len(inputs)


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    """`new` as a parameter that trains where `old` did."""
    return nn.Parameter(new.detach().clone(), requires_grad=old.requires_grad)


def _cut_grouped(name: str, layer: nn.Conv2d, outputs: Tensor, inputs: Tensor) -> None:
    """Drop whole groups, and in those that stay the same number of channels in each."""
    group_in, group_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    inside = [inputs[inputs // group_in == g] % group_in for g in range(layer.groups)]
    made = [int((outputs // group_out == g).sum()) for g in range(layer.groups)]
    shapes = {(len(i), o) for i, o in zip(inside, made, strict=True) if len(i) or o}
    if len(shapes) != 1 or 0 in next(iter(shapes)):
        raise InputError(f"surgery: the {layer.groups} groups of layer {name} would keep different numbers of channels")
    staying = [columns for columns in inside if len(columns)]
    if any(not torch.equal(columns, staying[0]) for columns in staying) and parametrize.is_parametrized(layer):
        raise InputError(f"surgery: the groups of layer {name} would keep different channels; collapse the network first")
    if parametrize.is_parametrized(layer):
        keep(layer, outputs, staying[0])
    else:
        columns = torch.stack([inside[group] for group in (outputs // group_out).tolist()])  # (outputs, inputs a group)
        columns = columns.to(layer.weight.device)
        kernels = layer.weight.detach()[outputs]
        keep(layer, outputs, staying[0])
        layer.weight = _like(layer.weight, kernels.gather(1, columns[..., None, None].expand(-1, -1, *kernels.shape[2:])))
    layer.groups, layer.in_channels = len(staying), len(inputs)


def _cut_channelwise(name: str, module: Any, kept: Tensor) -> None:
    """Keep some channels of a batch norm or a depthwise convolution."""
    if not len(kept):
        raise InputError(f"surgery: layer {name} would be left without channels")
    if isinstance(module, nn.Conv2d):
        keep(module, kept, torch.zeros(1, dtype=torch.long))
        module.groups = module.in_channels = len(kept)
        return
    for tensor in ("weight", "bias"):
        if getattr(module, tensor) is not None:
            setattr(module, tensor, _like(getattr(module, tensor), getattr(module, tensor)[kept]))
    for buffer in ("running_mean", "running_var"):
        if getattr(module, buffer) is not None:
            setattr(module, buffer, getattr(module, buffer)[kept].clone())
    module.num_features = len(kept)


def _cut_select(module: Any, channels: Channels, alive: set[int], read: list[int], made: list[int]) -> None:
    there = _positions(channels, read, alive)
    wanted = module.index.cpu()[_positions(channels, made, alive)]
    module.index = torch.searchsorted(there, wanted).to(module.index.device)


def _wrap(model: nn.Module, name: str, index: Tensor) -> None:
    """Put a `ChannelSelect` in front of the layer `name`, which becomes `name.layer`; or narrow the one that is there."""
    parent, _, child = name.rpartition(".")
    owner: Any = model.get_submodule(parent)
    layer = owner.get_submodule(child)
    index = index.to(next(layer.parameters()).device)
    if isinstance(owner, nn.Sequential) and list(owner._modules) == ["select", "layer"] and child == "layer":
        select: Any = owner.get_submodule("select")
        select.index = select.index[index]
        return
    wrapped = nn.Sequential()
    wrapped.add_module("select", ChannelSelect(index))
    wrapped.add_module("layer", layer)
    setattr(owner, child, wrapped)


def structure(model: nn.Module) -> dict[str, Any]:
    """The channels of every layer, as JSON: what `restructure` needs to make the same modules again."""
    found: dict[str, dict[str, Any]] = {"selects": {}, "filtering": {}, "biases": {}, "norms": {}, "pads": {}}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            found["filtering"][name] = [module.in_channels, module.out_channels, module.groups]
        elif isinstance(module, nn.Linear):
            found["filtering"][name] = [module.in_features, module.out_features, 1]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            found["norms"][name] = module.num_features
        elif isinstance(module, ChannelPad):
            found["pads"][name] = [module.before, module.after]
        elif isinstance(module, ChannelSelect):
            found["selects"][name.removesuffix(".select")] = len(module.index)
        if isinstance(module, nn.Conv2d | nn.Linear):
            found["biases"][name] = module.bias is not None
    return found


def restructure(model: nn.Module, wanted: dict[str, Any]) -> None:
    """Give the layers of a freshly built `model` the channels that `structure` found, in place; their values are arbitrary.

    `InputError` where a layer would need more channels than it has.
    """
    for name, length in wanted["selects"].items():
        _wrap(model, name, torch.zeros(length, dtype=torch.long))
    for name, (inputs, outputs, groups) in wanted["filtering"].items():
        layer: Any = model.get_submodule(name)
        there = structure(layer)["filtering"][""]
        if inputs > there[0] or outputs > there[1]:
            raise InputError(f"surgery: layer {name} has {there[0]} inputs and {there[1]} outputs, not {inputs} and {outputs}")
        if there != [inputs, outputs, groups]:
            keep(layer, torch.arange(outputs), torch.arange(inputs // groups))
            if isinstance(layer, nn.Conv2d):
                layer.groups, layer.in_channels = groups, inputs
    for name, biased in wanted["biases"].items():
        layer = model.get_submodule(name)
        if biased and layer.bias is None:  # merging branches can add one
            layer.bias = nn.Parameter(layer.weight.new_empty(wanted["filtering"][name][1]))
    for name, count in wanted["norms"].items():
        if model.get_submodule(name).num_features != count:
            _cut_channelwise(name, model.get_submodule(name), torch.arange(count))
    for name, (before, after) in wanted["pads"].items():
        pad: Any = model.get_submodule(name)
        pad.before, pad.after = before, after
