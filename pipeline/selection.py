"""Selective units of a network: a convolution, the gate of every channel that it reads, and, where a batch norm and ReLU are its
own, slots that can read other channels.

Source: Jeong and Shin 2019, "Training CNNs with Selective Allocation of Channels" (ICML), and its code,
github.com/jh-jeong/selective-convolution at 8aafd93. Their unit is one module: distribute, batch norm, ReLU, dropout, gate,
convolution. Here it is found in a network as it is; while that trains, gate and pointers are modules beside the layers' own
tensors, applied by hooks, so that names stay and state dicts have all that a resumed training needs.
"""

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pipeline.channels import Channels
from pipeline.ecdm import Refill, activity, ecdm
from pipeline.layers import Beside, convolutions, edit, insert
from pipeline.redirect import Distribute
from pipeline.surgery import cut_channelwise, keep
from pipeline.tracing import Tracer, tracing


@dataclass(frozen=True)
class Unit:
    """A convolution, by its qualified name, and what is around it."""

    name: str
    norm: str | None  # the batch norm whose ReLU it reads, averaged or not
    own: bool  # whether that batch norm and all between it and the convolution feed nothing else, and slots can be redirected
    behind: str | None  # the batch norm that alone reads it


class Gate(nn.Module):
    """(B, C, H, W) -> (B, C, H, W) with zeros in closed channels."""

    open: Tensor  # (C,): 1 or 0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("open", torch.ones(channels))
        self._known: tuple[Any, bool] | None = None

    def forward(self, x: Tensor) -> Tensor:
        version = (self.open.data_ptr(), self.open._version)
        if self._known is None or self._known[0] != version:  # a look waits for the device
            self._known = (version, bool(self.open.all()))
        return x if self._known[1] else x * self.open[:, None, None].to(x.dtype)


def units(model: nn.Module, channels: Channels) -> dict[str, Unit]:
    """Ungrouped convolutions that do not read the network's input, by name."""
    entry = {channel for channel, why in channels.pins().items() if why == "the network's input"}
    found = {}
    with tracing(model):
        graph = Tracer().trace(model)
    for name, layer in convolutions(model):
        read = channels.inputs.get(name, [])
        if layer.groups == 1 and read and not entry & {channels.find(channel) for channel in read}:
            norm = channels.relu_source.get(name)
            own = norm is not None and _feeds_alone(graph, norm, name) and not _redirected(model, norm)
            found[name] = Unit(name, norm, own, channels.norm_after.get(name))
    return found


def _feeds_alone(graph: fx.Graph, norm: str, name: str) -> bool:
    """Whether what the batch norm makes reaches the layer `name` and nothing else."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    if Counter(str(node.target) for node in calls)[norm] > 1:
        return False
    (node,) = (node for node in calls if str(node.target) == name)
    while str(node.target) != norm:
        (node,) = node.all_input_nodes
        if len(node.users) > 1:
            return False
    return True


def _redirected(model: nn.Module, norm: str) -> bool:
    """Whether a `Redirect` stands in front of the batch norm."""
    owner = model.get_submodule(norm.rpartition(".")[0])
    return isinstance(owner, Beside) and "redirect" in owner._modules


def gate(model: nn.Module, units: Iterable[Unit], redirectable: Container[str]) -> None:
    """Put an open gate in front of every unit's convolution, and pointers before the batch norms of those in `redirectable`."""
    for unit in units:
        layer: Any = model.get_submodule(unit.name)
        layer.gate = Gate(layer.in_channels)
        layer.register_forward_pre_hook(_through_gate)
        if unit.name in redirectable:
            norm: Any = model.get_submodule(unit.norm or "")
            norm.distribute = Distribute(layer.in_channels)
            norm.register_forward_pre_hook(_through_distribute)


def _through_gate(module: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    return module.gate(inputs[0])


def _through_distribute(module: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    return module.distribute(inputs[0])


@torch.no_grad()
def measured_means(model: nn.Module, names: Sequence[str], batches: Iterable[Any], limit: int) -> dict[str, Tensor]:
    """For every input channel of the named layers the means, over images and pixels of `limit` batches, of x and of |x|: (2, I).

    They are equal behind a ReLU. Elsewhere a channel can be busy about 0, and only the second one tells. In evaluation mode.
    """
    sums: dict[str, Tensor] = {}
    count = 0

    def watch(name: str) -> Any:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].float()
            means = torch.stack([x.mean((2, 3)).sum(0), x.abs().mean((2, 3)).sum(0)])
            sums[name] = sums[name] + means if name in sums else means

        return before

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    model.eval()
    for images, _ in (batch for batch, _ in zip(batches, range(limit), strict=False)):
        model(images)
        count += len(images)
    for handle in handles:
        handle.remove()
    return {name: total / count for name, total in sums.items()}


def activities(model: nn.Module, units: Iterable[Unit], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `measured_means` gives, for every unit: computed where it reads a batch norm's ReLU, taken from `means` elsewhere, and
    none where neither is there."""
    found = {}
    for unit in units:
        if unit.name in means:
            found[unit.name] = means[unit.name]
        elif unit.norm is not None:
            norm: Any = model.get_submodule(unit.norm)
            found[unit.name] = activity(norm.weight, norm.bias).expand(2, -1)
    return found


def damage(model: nn.Module, name: str, mean: Tensor) -> Tensor:
    """The damage matrix (O, I) of a unit's convolution for mean activities (I,): closed channels do none."""
    layer: Any = model.get_submodule(name)
    gate = layer.gate.open if hasattr(layer, "gate") else torch.ones(layer.in_channels, device=layer.weight.device)
    return ecdm(layer.weight, mean.to(gate.device), gate)


def close(model: nn.Module, unit: Unit, closed: Tensor) -> None:
    """Close the gates of these channels, (I,), and forget what their slots read. Their columns stay as they are."""
    layer: Any = model.get_submodule(unit.name)
    layer.gate.open[closed] = 0
    norm: Any = model.get_submodule(unit.norm) if unit.norm is not None else None
    if hasattr(norm, "distribute"):
        norm.distribute.pointer[closed] = -1


@torch.no_grad()
def reopen(model: nn.Module, unit: Unit, refill: Refill, optimizer: torch.optim.Optimizer | None) -> None:
    """Open slots as `refill` says, in place, without a change of any output. With an `optimizer`, it forgets its running averages
    of what is edited."""
    layer: Any = model.get_submodule(unit.name)
    norm: Any = model.get_submodule(unit.norm or "")
    slots, sources, channels, shifts = refill
    norm.distribute.pointer[slots] = channels
    norm.distribute.shift[slots] = shifts
    layer.gate.open[slots] = 1
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if tensor is not None:
            tensor[slots] = tensor[sources]
    edit(layer, "weight", lambda weight: weight.index_fill(1, slots, 0))
    if optimizer is not None:
        edit(layer, "weight", lambda moment: moment.index_fill(1, slots, 0), optimizer)
        for owner, name in ((norm, "weight"), (norm, "bias"), (norm.distribute, "shift")):
            edit(owner, name, lambda moment: moment.index_fill(0, slots, 0), optimizer)


@torch.no_grad()
def compensate(model: nn.Module, unit: Unit, mean: Tensor, closed: Tensor) -> bool:
    """Give the unit's outputs back what they lose on average when the channels `closed` (I,) close, of mean activity (I,): as
    `give_back`."""
    return give_back(model, unit, damage(model, unit.name, mean)[:, closed].sum(1))


@torch.no_grad()
def give_back(model: nn.Module, unit: Unit, lost: Tensor) -> bool:
    """Add a constant (O,) to the unit's outputs: out of the running mean of the batch norm behind it, or into its bias. False where
    there is neither."""
    layer: Any = model.get_submodule(unit.name)
    if unit.behind is not None:
        norm: Any = model.get_submodule(unit.behind)
        if norm.running_mean is not None:  # else the batch's own mean is taken off
            norm.running_mean -= lost
    elif layer.bias is not None:
        edit(layer, "bias", lambda bias: bias + lost)
    return unit.behind is not None or layer.bias is not None


def bare(model: nn.Module) -> nn.Module:
    """Take gates and pointers away, in place."""
    for module in list(model.modules()):
        for key, kind, through in (("gate", Gate, _through_gate), ("distribute", Distribute, _through_distribute)):
            if isinstance(module._modules.get(key), kind):
                delattr(module, key)
                for number in [number for number, hook in module._forward_pre_hooks.items() if hook is through]:
                    del module._forward_pre_hooks[number]
    return model


def settle(model: nn.Module, unit: Unit) -> int:
    """Make the redirection that the unit has learnt a part of the network: the same outputs. The number of redirected slots.

    Its channels are sorted: in the batch norm and in the convolution those that are not moved come first, as in `Redirect`.
    """
    norm: Any = model.get_submodule(unit.norm or "")
    order, redirect = norm.distribute.deployed()
    if len(redirect.moved):
        layer: Any = model.get_submodule(unit.name)
        keep(layer, torch.arange(layer.out_channels), order.cpu())
        cut_channelwise(norm, order)
        insert(model, unit.norm or "", "redirect", redirect)
    return len(redirect.moved)
