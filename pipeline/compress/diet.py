"""Model diet: a network of the same depth whose widths are 1/g of the original's, cut out of it in one piece.

Source: Lee 2022, "A Novel Filter Pruning Algorithm for Vision Tasks based on Kernel Grouping" (JAIST, hdl.handle.net/10119/17665;
no public code).

The channels that each layer makes are divided into g contiguous groups; one group index serves the whole network, so every add,
concatenation and flatten stays consistent, and nothing is sorted. The index is chosen by the sum of the tensors that each group
would keep. What enters the network and what leaves it keeps its width, and so do the layers named in `protect`.

A layer follows the channels it reads, wherever they come from: behind a concatenation it keeps the group's part of every segment
(the thesis's pseudo-code would keep the first segment alone). Where residual adds tie a layer's channels to an earlier layer's,
they follow that layer, and the rest of them are divided evenly.
"""

from fnmatch import fnmatch
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from pipeline import hooks
from pipeline.channels import Channels, follow
from pipeline.config import CompressBlock
from pipeline.errors import InputError
from pipeline.evaluation import evaluate, reestimate_batchnorm
from pipeline.surgery import drop, shrink


class Options(CompressBlock):
    """A block under `compress:`."""

    method: Literal["diet"]
    groups: int = Field(ge=2)  # g
    score: Literal["sum", "abs", "weights_only", "first", "random"]
    select: Literal["max", "min"] | int  # which score wins, or the index of a group
    protect: list[str]  # layers that keep their outputs: names, * for any text

    @model_validator(mode="after")
    def _selects_a_group(self) -> Self:
        if isinstance(self.select, int) and not 0 <= self.select < self.groups:
            raise PydanticCustomError("group", "select must be max, min or a group from 0 to {last}", {"last": self.groups - 1})
        return self


def diet(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    *,
    groups: int = 2,
    score: str = "sum",
    select: str | int = "max",
    protect: tuple[str, ...] = (),
    generator: torch.Generator | None = None,
) -> tuple[nn.Module, dict[str, object]]:
    """A copy of `model` at 1/groups of its widths, and what was decided: the scores, the group, the layers left alone.

    `InputError` names the layer whose channels do not divide, a pattern in `protect` that matches no layer, a group that does
    not exist, and says so when nothing may be cut. Re-estimate the batch norms before using the result.
    """
    if isinstance(select, int) and not 0 <= select < groups:
        raise InputError(f"diet: select = {select}, but the {groups} groups are counted from 0 to {groups - 1}")
    channels = follow(model, input_shape)
    label = group_channels(channels, groups, protect)
    scores = group_scores(model, channels, label, groups, score, generator)
    best = max if select == "max" else min
    chosen = select if isinstance(select, int) else best(range(groups), key=lambda group: scores[group])
    smaller = shrink(model, input_shape, drop(channels, {channel for channel, group in label.items() if group != chosen}))
    return smaller, {"scores": scores, "group": chosen, "full_width": full_width(channels, label)}


def full_width(channels: Channels, label: dict[int, int]) -> list[str]:
    """The layers that keep all their outputs."""
    return [name for name, ids in channels.outputs.items() if not any(channels.find(channel) in label for channel in ids)]


def group_channels(channels: Channels, groups: int, protect: tuple[str, ...] = ()) -> dict[int, int]:
    """The group of every channel that may go, by the id that stands for it."""
    for pattern in protect:
        if not any(fnmatch(name, pattern) for name in channels.outputs):
            raise InputError(f"diet: protect = {pattern!r} matches no layer; layers are {', '.join(channels.outputs)}")
    kept = set(channels.pins())
    for name, ids in channels.outputs.items():
        if any(fnmatch(name, pattern) for pattern in protect):
            kept |= {channels.find(channel) for channel in ids}
    label: dict[int, int] = {}
    for name, ids in channels.outputs.items():
        free = list(dict.fromkeys(c for c in map(channels.find, ids) if c not in kept and c not in label))
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
) -> list[float]:
    """The score of each group: the sum over every tensor that the cut changes of the slice that the group would keep.

    `sum` is signed and takes kernels, biases, batch-norm parameters and statistics, as the thesis; `abs` their absolute values;
    `weights_only` the signed kernels alone; `first` prefers group 0 and `random` draws.
    """
    if score == "first":
        return [float(groups - group) for group in range(groups)]
    if score == "random":
        return torch.rand(groups, generator=generator).tolist()
    modules: dict[str, Any] = dict(model.named_modules())
    sums = torch.zeros(groups, dtype=torch.float64)
    marks = lambda ids: torch.tensor([label.get(channels.find(channel), -1) for channel in ids])  # noqa: E731
    for name, module in modules.items():
        if name in channels.outputs:
            made, read = marks(channels.outputs[name]), marks(channels.inputs[name])
            _add_slices(sums, module.weight, (made, read), score)
            if module.bias is not None and score != "weights_only":
                _add_slices(sums, module.bias, (made,), score)
        elif name in channels.channelwise:
            own = marks(channels.channelwise[name])
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                counted = score != "weights_only" or (tensor == "weight" and isinstance(module, nn.Conv2d))
                if counted and getattr(module, tensor, None) is not None:
                    _add_slices(sums, getattr(module, tensor), (own,), score)
    return sums.tolist()


def _add_slices(sums: Tensor, tensor: Tensor, axes: tuple[Tensor, ...], score: str) -> None:
    """Add to each group the sum of its slice: its channels in every axis that the cut changes, all of the others."""
    if all((axis < 0).all() for axis in axes):
        return
    values = tensor.detach().double().cpu()
    values = values.abs() if score == "abs" else values
    if len(axes) == 2 and values.shape[1] != len(axes[1]):
        axes = axes[:1]  # a grouped convolution: its second axis counts channels inside one group
    for group in range(len(sums)):
        part = values
        for dimension, axis in enumerate(axes):
            part = part.index_select(dimension, ((axis < 0) | (axis == group)).nonzero().flatten())
        sums[group] += part.sum()


class Diet(hooks.Hook):
    """Cuts the network before training."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def coverage(self, model: nn.Module, input_shape: tuple[int, int, int]) -> list[str]:
        channels = follow(model, input_shape)
        label = group_channels(channels, self.options.groups, tuple(self.options.protect))
        whole = full_width(channels, label)
        notes = [f"diet leaves {', '.join(whole)} at full width: protected, or what enters or leaves the network"]
        return notes + [f"diet: {what}" for what in channels.untreated]

    def prepare(self, run: hooks.Run) -> None:
        options = self.options
        run.model, facts = diet(
            run.model,
            run.input_shape,
            groups=options.groups,
            score=options.score,
            select=options.select,
            protect=tuple(options.protect),
            generator=run.generator("diet"),
        )
        run.model.to(run.device)
        before = evaluate(run.model, run.validation).accuracy
        batches = reestimate_batchnorm(run.model, run.train, run.epoch)
        after = evaluate(run.model, run.validation).accuracy
        run.log("diet", **facts)
        run.log("batchnorm", batches=batches, validation_accuracy_before=before, validation_accuracy_after=after)


def create(options: Options) -> hooks.Hook:
    """The hook of this method."""
    return Diet(options)
