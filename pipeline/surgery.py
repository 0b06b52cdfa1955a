"""The smaller network: given which channels each layer reads, cut away every channel that nobody reads.

`shrink(model, shape, reads)` gives a new network that computes exactly what the old one computes with the channels that a layer
does not read at zero, for that layer. A channel disappears from its producer, from normalisation and from every add and product it
takes part in when none of its readers wants it; a reader that wants less than what is left gets a `ChannelSelect` in front. The
groups of a grouped layer stay equal: one that would be smaller than another keeps channels, with kernels of zeros where the layer
did not read them. Layers that are over-parameterised are cut in their own parameters, so that shrinking and collapsing commute.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.channels import Channels, follow
from pipeline.errors import InputError
from pipeline.layers import Beside, ChannelSelect, FilteringLayer, Reads, insert, like, masked, turn
from pipeline.tracing import tracing

Shape = tuple[int, int, int]
WRONG = 1e-2  # of the largest output: rounding in low precision is far below


@dataclass
class Cut:
    """What stays: ids of channels, and positions of what each filtering layer makes (`outputs`) and reads (`columns`, one list for
    each group that stays; False in `real`: with a kernel of zeros)."""

    alive: set[int]
    outputs: dict[str, list[int]] = field(default_factory=dict)
    columns: dict[str, list[list[int]]] = field(default_factory=dict)
    real: dict[str, list[list[bool]]] = field(default_factory=dict)


def shrink(model: nn.Module, input_shape: Shape, reads: Reads, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """A smaller copy of `model`.

    `reads` has, for some filtering layers, a boolean tensor over the input channels (features of a linear layer) that the layer
    shall read; a layer without an entry reads all. A layer whose outputs nobody reads keeps one. With an `optimizer` of the
    model's parameters, it becomes one of the copy's, and its running averages go through the same cut. `InputError` names a layer
    that would be left without inputs, and an over-parameterised one whose groups would keep different channels.
    """
    channels = follow(model, input_shape)
    found = plan(channels, reads)
    smaller = copy.deepcopy(model)
    wrapped = _cut(smaller, channels, found)
    _check(model, smaller, input_shape, reads)
    if optimizer is not None:
        _carry(optimizer, model, smaller, channels, found, wrapped)
    return smaller


@torch.no_grad()
def _check(model: nn.Module, smaller: nn.Module, input_shape: Shape, reads: Reads) -> None:
    """One random image through both: a forward pass that uses widths by itself, as numbers, would go wrong in silence."""
    parameter = next(model.parameters())
    if parameter.is_meta:
        return
    x = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0)).to(parameter)
    masks = {name: mask.to(parameter.device) for name, mask in reads.items()}
    with tracing(model), tracing(smaller), masked(model, masks):
        wanted, found = model(x), smaller(x)
    worst, largest = float((wanted - found).abs().max()), float(wanted.abs().max())
    if worst > WRONG * largest:
        raise InputError(
            f"surgery: a cut {type(model).__name__} differs by {worst:.3g} (largest output {largest:.3g}) from the whole one "
            "without the channels that went: its forward pass depends on widths in a way that cannot be followed"
        )


def drop(channels: Channels, dropped: set[int]) -> dict[str, Tensor]:
    """What every layer reads when the channels in `dropped` are read by none."""
    dropped = set(dropped)
    for _, slots, sources in channels.redirects.values():  # in the order of the network: one pass is enough
        dropped.update(slot for slot, source in zip(slots, sources, strict=True) if source in dropped)
    return {name: torch.tensor([channel not in dropped for channel in ids]) for name, ids in channels.inputs.items()}


def plan(channels: Channels, reads: Reads) -> Cut:
    """What stays when the layers read what `reads` says."""
    wanted = {name: [True] * len(ids) for name, ids in channels.inputs.items()}
    for name, mask in reads.items():
        if name not in wanted or len(mask) != len(wanted[name]):
            raise InputError(f"surgery: there is no layer {name} that reads {len(mask)} channels")
        wanted[name] = mask.tolist()
        if not any(wanted[name]):
            raise InputError(f"surgery: layer {name} would be left without inputs")
    found, size = Cut(set(channels.pinned)), -1
    while size < len(found.alive):  # against the order of the network once; again where a later layer feeds an earlier list
        size = len(found.alive)
        for name in reversed(channels.inputs):
            _read(channels, found, name, wanted[name])
        for _, slots, sources in channels.redirects.values():
            found.alive.update(source for slot, source in zip(slots, sources, strict=True) if slot in found.alive)
    for name, ids in channels.outputs.items():
        found.outputs[name] = [i for i, channel in enumerate(ids) if channel in found.alive]
    return found


@dataclass
class Widths:
    """Of filtering layers inputs, outputs and groups; of batch norms, depthwise convolutions and involutions channels."""

    filtering: dict[str, tuple[int, int, int]]
    channelwise: dict[str, int]


def widths(channels: Channels, reads: Reads) -> Widths:
    """The widths of the network that `shrink` would make."""
    found = plan(channels, reads)
    filtering = {name: (sum(map(len, parts)), len(found.outputs[name]), len(parts)) for name, parts in found.columns.items()}
    own = {name: sum(channel in found.alive for channel in ids) for name, ids in channels.own.items()}
    return Widths(filtering, own)


def _read(channels: Channels, found: Cut, name: str, wanted: list[bool]) -> None:
    """Let what the layer reads stay, and of its groups as much as keeps them equal."""
    inputs, outputs = channels.inputs[name], channels.outputs[name]
    parts = channels.groups.get(name, [(inputs, outputs)])
    alive, width = found.alive, len(parts[0][0])
    staying = [group for group, (_, made) in enumerate(parts) if any(channel in alive for channel in made)] or [0]
    most = max(1, *(sum(channel in alive for channel in parts[group][1]) for group in staying))
    for group in staying:
        made = parts[group][1]
        spare = [channel for channel in made if channel not in alive]
        alive.update(spare[: most - (len(made) - len(spare))])
    asked = [[i for i in range(width) if wanted[group * width + i]] for group in staying]
    count = max(1, *map(len, asked))
    found.columns[name], found.real[name] = [], []
    for group, chosen in zip(staying, asked, strict=True):
        read, picked = parts[group][0], {*chosen}
        spare = sorted({*range(width)} - picked, key=lambda i, read=read: (read[i] not in alive, i)) if count > len(chosen) else []
        taken = sorted(chosen + spare[: count - len(chosen)])
        found.columns[name].append([group * width + i for i in taken])
        found.real[name].append([i in picked for i in taken])
        alive.update(read[i] for i in taken)


def _cut(model: nn.Module, channels: Channels, found: Cut) -> list[str]:
    """Cut every layer of `model` in place; the names of those that have become `layer` of their own name."""
    wrapped: list[str] = []
    modules: list[tuple[str, Any]] = list(model.named_modules())
    stays = lambda ids: torch.tensor([i for i, channel in enumerate(ids) if channel in found.alive], dtype=torch.long)  # noqa: E731
    for name, module in modules:
        if name in channels.inputs:
            wrapped += [name] * _cut_filtering(model, name, module, channels, found, stays(channels.inputs[name]))
        elif name in channels.channelwise:
            cut_channelwise(module, stays(channels.channelwise[name]))
        elif name in channels.pads:
            module.before, module.after = (len(stays(ids)) for ids in channels.pads[name])
        elif name in channels.selects:
            _cut_select(module, *map(stays, channels.selects[name]))
        elif name in channels.redirects:
            read, slots, _ = channels.redirects[name]
            module.keep(stays(slots), stays(read))
    return wrapped


def _cut_filtering(model: nn.Module, name: str, layer: Any, channels: Channels, found: Cut, there: Tensor) -> bool:
    """Whether the layer has another name since, because a select was put in front."""
    outputs, columns = torch.tensor(found.outputs[name]), torch.tensor(found.columns[name])  # (O,), (groups, I / groups)
    if name in channels.groups:
        _cut_grouped(name, layer, outputs, columns, torch.tensor(found.real[name]))
    else:
        keep(layer, outputs, columns[0])
    wanted = columns.flatten()
    if len(wanted) == len(there):
        return False
    narrowed = torch.searchsorted(there, wanted).to(next(layer.parameters()).device)
    select: Any = model.get_submodule(name.removesuffix("layer") + "select") if _has_select(model, name) else None
    if select is not None:
        select.index = select.index[narrowed]
        return False
    return insert(model, name, "select", ChannelSelect.before(layer, narrowed))


def _has_select(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, Beside) and "select" in owner._modules


def keep(layer: FilteringLayer, outputs: Tensor, inputs: Tensor) -> None:
    """Keep only some outputs of a layer and some inputs of each of its groups, in place, plain or over-parameterised."""
    groups = getattr(layer, "groups", 1)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    per_group = _outputs_of(layer) // groups
    staying = len(torch.unique(outputs // per_group))
    for tensor in ("weight", "bias"):
        if parametrize.is_parametrized(layer, tensor):
            computed: Any = layer.parametrizations[tensor][0]  # type: ignore[index]
            computed.keep(outputs, inputs)
            computed.groups = staying
        elif tensor == "weight":
            kernels = turn(layer.weight, groups) if transposed else layer.weight
            kernels = kernels[outputs][:, inputs]
            layer.weight = like(layer.weight, turn(kernels, staying) if transposed else kernels)
        elif layer.bias is not None:
            layer.bias = like(layer.bias, layer.bias[outputs])
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = len(outputs), len(inputs)
    else:
        layer.out_channels, layer.in_channels, layer.groups = len(outputs), len(inputs) * staying, staying


def _outputs_of(layer: FilteringLayer) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _cut_grouped(name: str, layer: Any, outputs: Tensor, columns: Tensor, real: Tensor) -> None:
    """Keep `columns` (groups, I / groups), inputs by their positions, of the groups that stay; False in `real`: zeros there."""
    inside = columns % (layer.in_channels // layer.groups)
    per_group, groups = layer.out_channels // layer.groups, layer.groups
    alike = bool(real.all()) and all(torch.equal(row, inside[0]) for row in inside)
    if alike:
        keep(layer, outputs, inside[0])
        return
    if parametrize.is_parametrized(layer):
        raise InputError(f"surgery: the groups of layer {name} would keep different channels; collapse the network first")
    transposed = isinstance(layer, nn.ConvTranspose2d)
    kernels = (turn(layer.weight, groups) if transposed else layer.weight).detach()[outputs]
    row = torch.searchsorted(torch.unique(outputs // per_group), outputs // per_group).to(kernels.device)
    picked, real = inside.to(kernels.device)[row], real.to(kernels.device)[row]  # (O, I / groups)
    kernels = kernels.gather(1, picked[..., None, None].expand(-1, -1, *kernels.shape[2:])) * real[..., None, None]
    keep(layer, outputs, inside[0])
    layer.weight = like(layer.weight, turn(kernels, len(columns)) if transposed else kernels)


def cut_channelwise(module: Any, kept: Tensor) -> None:
    """Keep some channels of a batch norm or a depthwise convolution."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        keep(module, kept, torch.zeros(1, dtype=torch.long))
        return
    for tensor in ("weight", "bias"):
        if getattr(module, tensor) is not None:
            setattr(module, tensor, like(getattr(module, tensor), getattr(module, tensor)[kept]))
    for buffer in ("running_mean", "running_var"):
        if getattr(module, buffer) is not None:
            setattr(module, buffer, getattr(module, buffer)[kept].clone())
    module.num_features = len(kept)


def _cut_select(module: Any, there: Tensor, made: Tensor) -> None:
    module.index = torch.searchsorted(there, module.index.cpu()[made]).to(module.index.device)


def _carry(
    optimizer: torch.optim.Optimizer, model: nn.Module, smaller: nn.Module, channels: Channels, found: Cut, wrapped: list[str]
) -> None:
    """Make `optimizer` one of `smaller`. A running average is cut as the tensor it belongs to: inside a copy of the model."""
    cut = dict(smaller.named_parameters())
    moved: dict[Tensor, nn.Parameter] = {old: cut[_renamed(name, wrapped)] for name, old in model.named_parameters()}
    states: dict[Tensor, dict[str, Any]] = {moved[old]: copy.deepcopy(state) for old, state in optimizer.state.items()}
    averages = {key for state in optimizer.state.values() for key, value in state.items() if isinstance(value, Tensor)}
    for key in averages:
        holder = copy.deepcopy(model)
        for old, held in zip(model.parameters(), holder.parameters(), strict=True):
            value = optimizer.state.get(old, {}).get(key)
            held.data = value.clone() if _is_average(value, old) else torch.zeros_like(old)
        _cut(holder, channels, found)
        by_name = dict(holder.named_parameters())
        for name, old in model.named_parameters():
            if _is_average(optimizer.state.get(old, {}).get(key), old):
                new = moved[old]
                # In the parameter's memory order: fused optimisers walk through memory, not through indices.
                states[new][key] = torch.empty_like(new).copy_(by_name[_renamed(name, wrapped)].detach())
    for group in optimizer.param_groups:
        group["params"] = [moved[old] for old in group["params"]]
    optimizer.state.clear()
    for new, state in states.items():
        optimizer.state[new] = state


def _is_average(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and parameter.ndim > 0


def _renamed(name: str, wrapped: list[str]) -> str:
    """The name of a tensor of a layer that became `layer` of its own name."""
    owner = next((layer for layer in wrapped if name.startswith(f"{layer}.")), None)
    return name if owner is None else f"{owner}.layer.{name.removeprefix(f'{owner}.')}"
