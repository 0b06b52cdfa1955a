"""The control: channels removed at random, as many as a rival with the same target removes.

Every unit of channels (those that can only go together) draws its score from the same uniform distribution, so that a removal of
given size is one of all equally likely ones, but for the rounding of widths.
"""

from typing import Any, Literal

import torch
from torch import nn

from pipeline import hooks, removal
from pipeline.budget import Scores
from pipeline.channels import Channels
from pipeline.surgery import Shape


class Options(removal.RemovalBlock):
    """A block under `compress:`."""

    method: Literal["random"]


def scores(channels: Channels, generator: torch.Generator) -> Scores:
    """A number in [0, 1) for each unit, in their order in the network."""
    units = list(removal.filters_of(channels))
    return dict(zip(units, torch.rand(len(units), generator=generator, dtype=torch.float64).tolist(), strict=True))


def prune(model: nn.Module, input_shape: Shape, *, generator: torch.Generator, **how: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A smaller copy of `model`, and what was removed. `how`: see `removal.choose`."""
    return removal.prune(model, input_shape, lambda _, channels: scores(channels, generator), **how)


class Random(removal.Removal):
    """Draws, and cuts the network before training."""

    def scores(self, run: hooks.Run, channels: Channels) -> Scores:
        return scores(channels, run.generator("random"))


def create(options: Options) -> hooks.Hook:
    """The hook of this method."""
    return Random(options)
