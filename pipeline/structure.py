"""The channels of every layer as JSON, and a freshly built network given these channels: how a compressed model is stored."""

from typing import Any

import torch
from torch import nn

from pipeline.errors import InputError
from pipeline.layers import ChannelPad, ChannelSelect, FilteringLayer, insert
from pipeline.redirect import Redirect
from pipeline.surgery import cut_channelwise, keep


def structure(model: nn.Module) -> dict[str, Any]:
    """The channels of every layer, as JSON: what `restructure` needs to make the same modules again."""
    found: dict[str, dict[str, Any]] = {"selects": {}, "redirects": {}, "shuffles": {}, "filtering": {}, "biases": {}}
    found |= {"norms": {}, "pads": {}}
    for name, module in model.named_modules():
        if isinstance(module, FilteringLayer):
            found["filtering"][name] = widths_of(module)
            found["biases"][name] = module.bias is not None
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            found["norms"][name] = module.num_features
        elif isinstance(module, ChannelPad):
            found["pads"][name] = [module.before, module.after]
        elif isinstance(module, ChannelSelect):
            owner, _, key = name.rpartition(".")
            found["shuffles" if key == "shuffle" else "selects"][owner] = len(module.index)
        elif isinstance(module, Redirect):
            found["redirects"][name.removesuffix(".redirect")] = module.described()
    return found


def widths_of(layer: Any) -> list[int]:
    """Inputs, outputs and groups of a filtering layer."""
    if isinstance(layer, nn.Linear):
        return [layer.in_features, layer.out_features, 1]
    return [layer.in_channels, layer.out_channels, layer.groups]


def restructure(model: nn.Module, wanted: dict[str, Any]) -> None:
    """Give the layers of a freshly built `model` the channels that `structure` found, in place; their values are arbitrary.

    `InputError` where a layer would need more channels than it has.
    """
    for name, sizes in wanted.get("redirects", {}).items():  # older cards have none
        insert(model, name, "redirect", Redirect.blank(*sizes))
    for key in ("select", "shuffle"):
        for name, length in wanted.get(f"{key}s", {}).items():
            there = model.get_submodule(name)
            index = torch.zeros(length, dtype=torch.long)
            insert(model, name, key, ChannelSelect.before(getattr(there, "layer", there), index))
    for name, (inputs, outputs, groups) in wanted["filtering"].items():
        layer: Any = model.get_submodule(name)
        there = widths_of(layer)
        if inputs > there[0] or outputs > there[1]:
            raise InputError(f"surgery: layer {name} has {there[0]} inputs and {there[1]} outputs, not {inputs} and {outputs}")
        if there != [inputs, outputs, groups]:
            _resize(layer, there[2], inputs, outputs, groups)
    for name, biased in wanted["biases"].items():
        layer = model.get_submodule(name)
        if biased and layer.bias is None:  # merging branches can add one
            layer.bias = nn.Parameter(layer.weight.new_empty(wanted["filtering"][name][1]))
    for name, count in wanted["norms"].items():
        if model.get_submodule(name).num_features != count:
            cut_channelwise(model.get_submodule(name), torch.arange(count))
    for name, (before, after) in wanted["pads"].items():
        pad: Any = model.get_submodule(name)
        pad.before, pad.after = before, after


def _resize(layer: Any, built: int, inputs: int, outputs: int, groups: int) -> None:
    """Other widths and groups; `built`: the groups there are."""
    if groups > built:  # learned groups of a layer that had none: fewer inputs to each output
        keep(layer, torch.arange(outputs), torch.arange(inputs // groups))
        layer.groups, layer.in_channels = groups, inputs
        return
    per_group = widths_of(layer)[1] // built
    rows = [group * per_group + i for group in range(groups) for i in range(outputs // groups)]
    keep(layer, torch.tensor(rows), torch.arange(inputs // groups))
