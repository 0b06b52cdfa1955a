"""Filtering layers, their effective weights, and the small layers that surgery puts between them.

A filtering layer is an `nn.Conv2d`, `nn.ConvTranspose2d` or `nn.Linear`. Its `weight` is always the *effective* kernel: a plain
parameter, or what a parametrisation (`torch.nn.utils.parametrize`) computes from larger tensors. Reading and assigning
`layer.weight` works for both, so a method written on effective kernels serves expanded and plain networks alike.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

Reads = Mapping[str, Tensor]  # (I,) by a layer's name: the channels that it reads, as `pipeline.surgery.shrink` takes them
FilteringLayer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
BESIDE = ("redirect", "select", "layer", "shuffle")  # a layer among the modules put before and behind it, in this order


class ChannelPad(nn.Module):
    """Zero channels before and after: (B, C, H, W) -> (B, before + C + after, H, W). The shortcut of He et al., option A."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"{self.before}, {self.after}"


class ChannelSelect(nn.Module):
    """The channels at `index`, in that order: (B, C, ...) -> (B, len(index), ...), or on another axis."""

    index: Tensor

    def __init__(self, index: Tensor, axis: int = 1) -> None:
        super().__init__()
        self.register_buffer("index", index.clone())
        self.axis = axis

    @staticmethod
    def before(layer: nn.Module, index: Tensor) -> "ChannelSelect":
        """One on the axis that the layer takes its channels from: a linear layer's is the last."""
        return ChannelSelect(index, -1 if isinstance(layer, nn.Linear) else 1)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.axis, self.index)

    def extra_repr(self) -> str:
        return str(len(self.index))


def filtering_layers(model: nn.Module) -> Iterator[tuple[str, FilteringLayer]]:
    """Every convolution, transposed or not, and linear layer with its qualified name, in the order of definition."""
    for name, module in model.named_modules():
        if isinstance(module, FilteringLayer):
            yield name, module


def convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Every convolution with its qualified name, in the order of definition; of those that share one weight, the first."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            weight = id(module._parameters.get("weight", module))
            if weight not in seen:
                seen.add(weight)
                yield name, module


def turn(kernel: Tensor, groups: int) -> Tensor:
    """The kernels (I, O/groups, ...) of a transposed convolution as filters (O, I/groups, ...); the way back is the same."""
    rows, columns, *size = kernel.shape
    grouped = kernel.reshape(groups, rows // groups, columns, *size)
    return grouped.transpose(1, 2).reshape(groups * columns, rows // groups, *size)


def like(old: Tensor, new: Tensor) -> nn.Parameter:
    """`new` as a parameter that trains where `old` did."""
    return nn.Parameter(new.detach().clone(), requires_grad=old.requires_grad)


@contextmanager
def masked(model: nn.Module, reads: Reads) -> Iterator[None]:
    """Within, every layer reads zeros in the channels that `reads` says it shall not read."""

    def zero(mask: Tensor) -> Any:
        def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            behind = 0 if isinstance(layer, nn.Linear) else inputs[0].ndim - 2  # axes behind the channels
            return inputs[0].masked_fill(~mask.to(inputs[0].device).reshape(-1, *[1] * behind), 0.0)

        return before

    less = {name: mask for name, mask in reads.items() if not mask.all()}
    handles = [model.get_submodule(name).register_forward_pre_hook(zero(mask)) for name, mask in less.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Beside(nn.Sequential):
    """A layer, called `layer`, with what surgery puts before and behind it. What a forward pass may ask of the layer itself, the
    wrapper answers."""

    ASKED = ("kernel_size", "stride", "padding", "dilation", "in_channels", "out_channels", "in_features", "out_features")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._modules["layer"], name) if name in self.ASKED else super().__getattr__(name)


def insert(model: nn.Module, name: str, key: str, module: nn.Module) -> bool:
    """Put `module` beside the layer `name`, as `key` of BESIDE; the layer becomes `name.layer`, or is it already. Whether its name
    changed."""
    parent, _, child = name.rpartition(".")
    owner: Any = model.get_submodule(parent)
    if isinstance(owner, Beside):
        name, there = parent, owner
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
    else:
        there = owner.get_submodule(child)
    wrapped = isinstance(there, Beside)
    parts = {**there._modules, key: module} if wrapped else {"layer": there, key: module}
    sequence = Beside()
    for part in BESIDE:
        if part in parts:
            sequence.add_module(part, parts[part])
    sequence.train(owner.training)
    setattr(owner, child, sequence)
    return not wrapped


def expanded(layer: nn.Module) -> bool:
    """Whether the layer's weight is computed by a parametrisation."""
    return parametrize.is_parametrized(layer, "weight")


def renew(layer: nn.Module, filters: Tensor) -> None:
    """Before the filters at these indices are drawn anew: an over-parameterised layer forgets what it measured of them."""
    if expanded(layer):
        computed: Any = layer.parametrizations["weight"][0]  # type: ignore[union-attr,index]
        computed.renew(filters)


@torch.no_grad()
def edit(
    layer: FilteringLayer, name: str, change: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Replace the effective tensor `layer.<name>` ("weight" or "bias") by `change(tensor)`, in place.

    The parameters behind the tensor keep their identity, so an optimiser stays valid; an expanded layer moves its own
    parameters as little as possible (`right_inverse`). With an `optimizer`, its running averages of this tensor's gradient
    (SGD's momentum, Adam's first and second moment) are edited instead of the tensor: through the same linear map where the
    layer is expanded. There Adam's second moment stays: no linear map keeps squares positive. Elsewhere, being one of squares, it
    is changed twice, so that `change` should multiply.
    """
    if optimizer is None:
        old = getattr(layer, name)
        if parametrize.is_parametrized(layer, name):
            setattr(layer, name, change(old.detach().clone()))
        else:
            old.copy_(change(old.detach().clone()))
        return
    if parametrize.is_parametrized(layer, name):
        computed: Any = layer.parametrizations[name][0]  # type: ignore[union-attr,index]
        for moment in _moments(optimizer, computed.trained, ("momentum_buffer", "exp_avg")):
            moment.copy_(computed.carry(moment, change))
    else:
        for moment in _moments(optimizer, getattr(layer, name), ("momentum_buffer", "exp_avg")):
            moment.copy_(change(moment.clone()))
        for squares in _moments(optimizer, getattr(layer, name), ("exp_avg_sq",)):
            squares.copy_(change(change(squares.clone())))


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor, keys: tuple[str, ...]) -> list[Tensor]:
    state = optimizer.state.get(parameter, {})
    return [state[key] for key in keys if isinstance(state.get(key), Tensor)]
