"""Filters with small weights removed.

Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets" (ICLR), and the code of Liu et al. for it,
github.com/Eric-mingjie/rethinking-network-pruning at 2ac473d, cifar/l1-norm-pruning.

    s(filter) = sum of |w| over its kernels, without the bias, divided by the mean of this over the filters of its layer

The division changes nothing within a layer, where the authors rank; it lets filters of different sizes be compared (`scope:
global`). Filters that make the same channels, as those that a residual add ties, go together: their score is the mean of theirs,
which ranks them as the sum does. The authors remove what no add concerns, the first convolution of each block of two (`residual:
first_only`); they hand-pick a share for each layer, for which `scope: layer` or a sensitivity stands. Depthwise convolutions have
filters like others.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline import hooks, removal
from pipeline.budget import Scores
from pipeline.channels import Channels, follow
from pipeline.layers import turn
from pipeline.surgery import Shape


class Options(removal.RemovalBlock):
    """A block under `compress:`."""

    method: Literal["l1"]
    residual: Literal["tied", "first_only"]  # whether channels that are added to others may go


@torch.no_grad()
def norms(layer: Any) -> Tensor:
    """Sum of |w| of each filter, added up in fp64: (O,)."""
    weight = turn(layer.weight, layer.groups) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
    return weight.detach().abs().flatten(1).sum(1, dtype=torch.float64).cpu()


def scores(model: nn.Module, channels: Channels) -> Scores:
    """Of each unit: the mean over its filters of s."""
    shares: dict[str, list[float]] = {}
    for name in (*channels.outputs, *channels.channelwise):
        layer: Any = model.get_submodule(name)
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            sums = norms(layer)
            shares[name] = (sums / sums.mean().clamp(min=1e-30)).tolist()
    found = {}
    for unit, filters in removal.filters_of(channels).items():
        values = [shares[name][position] for name, position in filters if name in shares]
        if values:
            found[unit] = sum(values) / len(values)
    return found


def protected(channels: Channels, residual: str) -> list[str]:
    """The layers that keep their outputs because these are added to others, where only first convolutions are cut."""
    return [name for name in channels.outputs if channels.joins(name)] if residual == "first_only" else []


def prune(
    model: nn.Module, input_shape: Shape, *, residual: str = "tied", protect: Sequence[str] = (), **how: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A smaller copy of `model`, and what was removed. `how`: see `removal.choose`."""
    whole = [*protect, *protected(follow(model, input_shape), residual)]
    return removal.prune(model, input_shape, scores, protect=whole, **how)


class SmallNorms(removal.Removal):
    """Ranks filters, and cuts the network before training."""

    def scores(self, run: hooks.Run, channels: Channels) -> Scores:
        return scores(run.model, channels)

    def protected(self, channels: Channels) -> list[str]:
        return [*self.options.protect, *protected(channels, self.options.residual)]


def create(options: Options) -> hooks.Hook:
    """The hook of this method."""
    return SmallNorms(options)
