"""Contiguous groups of a network's channels, one of which a diet keeps: who is in which, what each is worth, and the cut.

Source: Lee 2022, "A Novel Filter Pruning Algorithm for Vision Tasks based on Kernel Grouping" (JAIST, hdl.handle.net/10119/17665;
no public code), algorithm 2 where it is complete.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.channels import Channels, Ids
from pipeline.errors import InputError
from pipeline.families import Families, fixed
from pipeline.layers import edit, filtering_layers, turn
from pipeline.surgery import cut_channelwise, keep

NONE = -1  # the label of channels that are in no whole group: they go whichever is kept
STAYS = -2  # the mark of channels without a label


def full_width(channels: Channels, label: dict[int, int]) -> list[str]:
    """The layers that keep all their outputs."""
    return [name for name, ids in channels.outputs.items() if not any(channel in label for channel in ids)]


def group_channels(channels: Channels, groups: int, protect: tuple[str, ...] = ()) -> dict[int, int]:
    """The group of every channel that may go, by the id that stands for it."""
    kept = fixed(channels, protect)
    label: dict[int, int] = {}
    for name, ids in channels.outputs.items():
        free = list(dict.fromkeys(channel for channel in ids if channel not in kept and channel not in label))
        if len(free) % groups:
            raise InputError(f"diet: the {len(free)} channels of layer {name} do not divide into {groups} groups; protect it")
        label |= {channel: position * groups // len(free) for position, channel in enumerate(free)}
    if not label:
        raise InputError("diet: every channel of the network is protected or pinned; there is nothing to cut")
    return label


def group_scores(
    model: nn.Module,
    channels: Channels,
    label: dict[int, int],
    groups: int,
    score: str,
    generator: torch.Generator | None = None,
    naive: bool = False,
) -> list[float]:
    """The score of each group: the sum over every tensor that the cut changes of the slice that the group would keep (`naive`: as
    `take_naively` has it).

    `sum` is signed and takes kernels, biases, batch-norm parameters and statistics, as the thesis; `abs` their absolute values;
    `weights_only` the signed kernels alone; `first` prefers group 0 and `random` draws.
    """
    if score == "first":
        return [float(groups - group) for group in range(groups)]
    if score == "random":
        return torch.rand(groups, generator=generator).tolist()
    modules: dict[str, Any] = dict(model.named_modules())
    sums = torch.zeros(groups, dtype=torch.float64)

    def marks(ids: Ids, reads: bool) -> Tensor:
        if naive and reads and all(_share_of(ids, label, group, groups) for group in range(groups)):
            return torch.arange(len(ids)) * groups // len(ids)
        return torch.tensor([label.get(channel, STAYS) for channel in ids])

    for name, module in modules.items():
        if name in channels.outputs:
            made, read = marks(channels.outputs[name], False), marks(channels.inputs[name], name not in channels.groups)
            _add_slices(sums, _filters(module), (made, read), score)
            if module.bias is not None and score != "weights_only":
                _add_slices(sums, module.bias, (made,), score)
        elif name in channels.channelwise:
            own = marks(channels.channelwise[name], True)
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                counted = score != "weights_only" or (tensor == "weight" and isinstance(module, nn.Conv2d | nn.ConvTranspose2d))
                if counted and getattr(module, tensor, None) is not None:
                    _add_slices(sums, getattr(module, tensor), (own,), score)
    return sums.tolist()


def _add_slices(sums: Tensor, tensor: Tensor, axes: tuple[Tensor, ...], score: str) -> None:
    """Add to each group the sum of its slice: its channels in every axis that the cut changes, all of the others."""
    if all((axis == STAYS).all() for axis in axes):
        return
    values = tensor.detach().double().cpu()
    values = values.abs() if score == "abs" else values
    if len(axes) == 2 and values.shape[1] != len(axes[1]):
        axes = axes[:1]  # a grouped convolution: its second axis counts channels inside one group
    for group in range(len(sums)):
        part = values
        for dimension, axis in enumerate(axes):
            part = part.index_select(dimension, ((axis == STAYS) | (axis == group)).nonzero().flatten())
        sums[group] += part.sum()


def _filters(layer: Any) -> Tensor:
    """The kernels as (O, I/groups, ...)."""
    return turn(layer.weight, layer.groups) if isinstance(layer, nn.ConvTranspose2d) else layer.weight


def windows(families: Families, kept: dict[str, tuple[int, int]]) -> dict[int, int]:
    """Groups of other sizes than 1/g: of each family, of which `kept` says how many units shall stay and how many there are, as
    many windows of that length as every family has room for, side by side from the first unit on. The label of every channel
    that may go is that of its window."""
    label: dict[int, int] = {}
    cut = [(family, kept[family.name][0]) for family in families.all if kept[family.name][0] < len(family.units)]
    count = min(len(family.units) // length for family, length in cut)
    for family, length in cut:
        for position, unit in enumerate(family.units):
            window = position // length
            label |= dict.fromkeys(families.members([unit]), window if window < count else NONE)
    return label


def _share_of(ids: Ids, label: dict[int, int], group: int, groups: int) -> list[int]:
    """Where in `ids` a group's channels are, if they are a 1/groups of them; none where nothing goes, or another share."""
    positions = [i for i, channel in enumerate(ids) if label.get(channel, group) == group]
    return positions if len(positions) * groups == len(ids) else []


def take_naively(model: nn.Module, smaller: nn.Module, channels: Channels, label: dict[int, int], group: int, groups: int) -> None:
    """Give the layers of `smaller` behind a concatenation the kernels that contiguous slices of their inputs as a whole have, in
    place: the thesis's pseudo-code taken at its word. With two segments, group 0 then has the kernels of the first segment alone,
    though the layer reads half of each."""
    modules: dict[str, Any] = dict(model.named_modules())
    for name, ids in (*channels.inputs.items(), *channels.channelwise.items()):
        if name in channels.groups or not (positions := _share_of(ids, label, group, groups)):
            continue
        start = torch.arange(group * len(positions), (group + 1) * len(positions))
        if start.tolist() == positions:
            continue
        taken: Any = copy.deepcopy(modules[name])
        if name in channels.inputs:
            outputs = [i for i, channel in enumerate(channels.outputs[name]) if label.get(channel, group) == group]
            keep(taken, torch.tensor(outputs), start)
        else:
            cut_channelwise(taken, start)
        smaller.get_submodule(name).load_state_dict(taken.state_dict())


def as_if_drawn_small(whole: nn.Module, smaller: nn.Module) -> None:
    """Give the freshly drawn kernels of a cut network the spread that its own start would have had, in place.

    Starts in use go with the root of a filter's inputs (torch's own, He's of fan in), with that of a channel's uses (He's of fan
    out) or are constants: which one drew a layer is told by its spread. Biases go with the inputs.
    """
    full: dict[str, Any] = dict(filtering_layers(whole))
    for name, layer in filtering_layers(smaller):
        old = full[name.removesuffix(".layer")]
        ratio = _start_ratio(old, layer)
        if ratio != 1:
            edit(layer, "weight", lambda kernels, ratio=ratio: kernels * ratio)
        inputs = (_fans(old)[0] / _fans(layer)[0]) ** 0.5
        if layer.bias is not None and inputs != 1:
            edit(layer, "bias", lambda biases, inputs=inputs: biases * inputs)


def _fans(layer: Any) -> tuple[int, int]:
    """Numbers that a filter reads, and uses of an input channel."""
    kernels = _filters(layer)
    return kernels[0].numel(), kernels.shape[0] * kernels[0, 0].numel()


def _start_ratio(old: Any, new: Any) -> float:
    """By how much the spread of a start grows from one layer to the other."""
    (fan_in, fan_out), (less_in, less_out) = _fans(old), _fans(new)
    variance = float(old.weight.detach().double().var())
    starts = {"out": 2 / fan_out, "in": 2 / fan_in, "torch": 1 / (3 * fan_in), "one": 1 / fan_in, "both": 2 / (fan_in + fan_out)}
    grown = {"out": fan_out / less_out, "both": (fan_in + fan_out) / (less_in + less_out)}
    kind = min(starts, key=lambda kind: abs(starts[kind] / variance - 1)) if variance else "constant"
    near = variance and abs(starts[kind] / variance - 1) < 0.25  # of a few hundred numbers the variance is known to a tenth
    return (grown.get(kind, fan_in / less_in) if near else 1.0) ** 0.5
