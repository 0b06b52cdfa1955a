"""Model diet: a network of the same depth whose widths are 1/g of the original's, cut out of it in one piece.

Source: Lee 2022, "A Novel Filter Pruning Algorithm for Vision Tasks based on Kernel Grouping" (JAIST, hdl.handle.net/10119/17665;
no public code).

The channels that each layer makes are divided into g contiguous groups; one group index serves the whole network, so every add,
concatenation and flatten stays consistent, and nothing is sorted. The index is chosen by the sum of the tensors that each group
would keep. What enters the network and what leaves it keeps its width, and so do the layers named in `protect`.

A layer follows the channels it reads, wherever they come from: behind a concatenation it keeps the group's part of every segment
(`concat: aware`; `naive` is the thesis's pseudo-code, which keeps the first segment's kernels alone). Where residual adds tie a
layer's channels to an earlier layer's, they follow that layer, and the rest of them are divided evenly. With a target in place of
g, the groups are windows of the length that brings the network there. The control `weights: random` is the same small network,
drawn anew.
"""

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import nn

from pipeline import hooks
from pipeline.budget import Budget
from pipeline.channels import Channels, follow
from pipeline.config import CompressBlock, Target
from pipeline.errors import InputError
from pipeline.evaluation import settle_batchnorm
from pipeline.families import Families
from pipeline.grouping import as_if_drawn_small, full_width, group_channels, group_scores, take_naively, windows
from pipeline.latency_budget import fit_latency
from pipeline.surgery import Shape, drop, shrink


class Options(CompressBlock):
    """A block under `compress:`."""

    method: Literal["diet"]
    groups: int | None = Field(ge=2)  # g; null: as the target says
    target: Target | None  # what the network shall come to; null: as the groups say
    multiple: int = Field(ge=1)  # with a target: outputs of layers come in multiples of it where they are that many
    score: Literal["sum", "abs", "weights_only", "first", "random"]
    select: Literal["max", "min"] | int  # which score wins, or the index of a group
    concat: Literal["aware", "naive"]
    weights: Literal["inherited", "random"]
    protect: list[str]  # layers that keep their outputs: names, * for any text

    @model_validator(mode="after")
    def _selects_a_group(self) -> Self:
        if (self.groups is None) == (self.target is None):
            raise PydanticCustomError("groups", "give groups or a target, and null for the other")
        if self.groups and isinstance(self.select, int) and not 0 <= self.select < self.groups:
            raise PydanticCustomError("group", "select must be max, min or a group from 0 to {last}", {"last": self.groups - 1})
        if self.groups is None and self.concat == "naive":
            raise PydanticCustomError("concat", "concat: naive is defined for groups alone: give groups, or concat: aware")
        return self


def diet(
    model: nn.Module,
    input_shape: Shape,
    *,
    groups: int | None = 2,
    target: Target | None = None,
    multiple: int = 8,
    score: str = "sum",
    select: str | int = "max",
    concat: str = "aware",
    protect: tuple[str, ...] = (),
    generator: torch.Generator | None = None,
    drawn: nn.Module | None = None,
) -> tuple[nn.Module, dict[str, object]]:
    """A copy of `model` at 1/groups of its widths, or at the target, and what was decided: the scores, the group, the layers left
    alone. With `drawn`, a network like `model` with fresh weights, these are taken instead, with the spread that they would have
    had in a network of the smaller widths.

    `InputError` names the layer whose channels do not divide, a pattern in `protect` that matches no layer, a group that does
    not exist, and says so when nothing may be cut. Re-estimate the batch norms before using the result.
    """
    channels = follow(model, input_shape)
    label, facts = labelled(model, input_shape, channels, groups, target, multiple, protect)
    count = max(label.values()) + 1
    if isinstance(select, int) and not 0 <= select < count:
        raise InputError(f"diet: select = {select}, but the {count} groups are counted from 0 to {count - 1}")
    scores = group_scores(model, channels, label, count, score, generator, concat == "naive")
    best = max if select == "max" else min
    chosen = select if isinstance(select, int) else best(range(count), key=lambda group: scores[group])
    cut = drawn if drawn is not None else model
    smaller = shrink(cut, input_shape, drop(channels, {channel for channel, group in label.items() if group != chosen}))
    if concat == "naive":
        take_naively(cut, smaller, channels, label, chosen, count)
    if drawn is not None:
        as_if_drawn_small(drawn, smaller)
    return smaller, {"scores": scores, "group": chosen, "full_width": full_width(channels, label), **facts}


def labelled(
    model: nn.Module,
    input_shape: Shape,
    channels: Channels,
    groups: int | None,
    target: Target | None,
    multiple: int,
    protect: tuple[str, ...],
) -> tuple[dict[int, int], dict[str, Any]]:
    """The group of every channel that may go, and what a search for the target found."""
    if groups is not None:
        return group_channels(channels, groups, protect), {}
    assert target is not None
    families = Families(model, channels, protect=protect, multiple=multiple)
    budget = Budget(families, {unit: 0.0 for family in families.all for unit in family.units}, "layer")
    of, fraction = target.of, target.fraction
    choice = fit_latency(model, input_shape, budget, fraction) if of == "latency" else budget.target(of, fraction)
    found = {**choice.shares, **choice.latency} | ({"note": choice.note} if choice.note else {})
    return windows(families, choice.kept), found


class Diet(hooks.Hook):
    """Cuts the network before training."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def coverage(self, model: nn.Module, input_shape: Shape) -> list[str]:
        options, channels = self.options, follow(model, input_shape)
        protect, target = tuple(options.protect), options.target
        if target is not None and target.of == "latency":  # it is measured once there are weights
            target = Target(of="macs", fraction=target.fraction)
        label, _ = labelled(model, input_shape, channels, options.groups, target, options.multiple, protect)
        whole = full_width(channels, label)
        notes = [f"diet leaves {', '.join(whole)} at full width: protected, or what enters or leaves the network"]
        return notes + [f"diet: {what}" for what in channels.untreated]

    def prepare(self, run: hooks.Run) -> None:
        options = self.options
        run.model, facts = diet(
            run.model,
            run.input_shape,
            groups=options.groups,
            target=options.target,
            multiple=options.multiple,
            score=options.score,
            select=options.select,
            concat=options.concat,
            protect=tuple(options.protect),
            generator=run.generator("diet"),
            drawn=run.redrawn() if options.weights == "random" else None,
        )
        run.model.to(run.device)
        run.log("diet", **facts)
        settle_batchnorm(run)


def create(options: Options) -> hooks.Hook:
    """The hook of this method."""
    return Diet(options)
