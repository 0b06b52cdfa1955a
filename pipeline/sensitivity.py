"""What the removal of channels costs, stretch by stretch, and how a budget is spread so that all of them suffer alike.

A stretch is what one layer makes first, together with all that later layers add to the same channels: an inner convolution, or the
trunk of one residual stage. A share of it is removed by the smallest L1 norms (Li et al. 2017, "Pruning Filters for Efficient
ConvNets", section 3.2, tries layers one by one in this way); its readers see zeros there, as in the smaller network.

    measured    the rise of the validation loss over a few batches
    ecdm        the largest share of any output's expected activity that is lost, over all readers and outputs; without data
                (Jeong and Shin 2019, "Training CNNs with Selective Allocation of Channels")

A convolution that reads no batch norm's ReLU, and a linear layer, counts the channels it reads as equally active in `ecdm`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from pipeline import hooks
from pipeline.channels import Channels, follow
from pipeline.data.batches import Batches
from pipeline.ecdm import activity
from pipeline.families import Families
from pipeline.layers import ChannelSelect, FilteringLayer, turn
from pipeline.masking import Reads, refitted, scores
from pipeline.surgery import Shape, drop
from pipeline.tracing import Tracer, tracing

By = Literal["ecdm", "measured"]
Costs = Mapping[str, Sequence[Mapping[str, float]]]
SHARES = (0.25, 0.5, 0.75)  # of a stretch's channels, removed one after the other
BATCHES = 2  # validation batches behind a measured cost
RECTIFIERS = (torch.relu, torch.nn.functional.relu)
POOLS = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
PASSING = (*POOLS, nn.modules.dropout._DropoutNd, nn.Identity)  # of a maximum the mean is higher, for all channels


@dataclass(frozen=True)
class Stretch:
    """What a layer makes first: `units` of channels that can only go together, weakest first, and all `layers` that make them."""

    name: str
    layers: list[str]
    units: list[set[int]]


def stretches(model: nn.Module, channels: Channels) -> list[Stretch]:
    """Those of which something may go, in the order of the network: families of one first layer are taken together."""
    found = Families(model, channels, multiple=1)
    norms: dict[int, float] = {}
    modules = dict(model.named_modules())
    for name, ids in channels.outputs.items():
        sums = filters(modules[name]).detach().float().flatten(1).norm(p=1, dim=1).tolist()
        for channel, norm in zip(ids, sums, strict=True):
            norms[found.label[channel]] = norms.get(found.label[channel], 0.0) + norm
    members: dict[int, set[int]] = {}
    for channel, unit in found.label.items():
        members.setdefault(unit, set()).add(channel)
    units: dict[str, list[int]] = {}
    layers: dict[str, dict[str, None]] = {}
    for family in found.all:
        first = next(iter(family.layers))
        units.setdefault(first, []).extend(family.units)
        layers.setdefault(first, {}).update(dict.fromkeys(family.layers))
    weakest = {name: sorted(own, key=lambda unit: (norms[unit], unit)) for name, own in units.items() if len(own) > 1}
    order = [name for name in channels.outputs if name in weakest]
    return [Stretch(name, [*layers[name]], [members[unit] for unit in weakest[name]]) for name in order]


def filters(layer: Any) -> Tensor:
    """The effective kernels as (O, I / groups, ...), whatever the layer."""
    return turn(layer.weight, layer.groups) if isinstance(layer, nn.ConvTranspose2d) else layer.weight


def layer_costs(
    model: nn.Module,
    input_shape: Shape,
    batches: Batches | None = None,
    *,
    by: By,
    shares: Sequence[float] = SHARES,
    limit: int = BATCHES,
    refit: Batches | None = None,
) -> dict[str, list[dict[str, float]]]:
    """What each stretch's removal costs, by its first layer: a dict for each of `shares`, ascending.

    `share` is what was removed of the stretch, rounded to whole units, and `cost` what it costs; where it is measured, on at most
    `limit` of `batches`, the `loss` and the headline `score` that are left; with `refit`, training images, after the batch norms of
    a copy were re-estimated on as many batches of them. Leaves the model in evaluation mode.
    """
    channels = follow(model, input_shape)
    model.eval()
    removals = [Removal(stretch, count) for stretch in stretches(model, channels) for count in _counts(len(stretch.units), shares)]
    reads = [drop(channels, removal.channels) for removal in removals]
    if by == "ecdm":
        facts = [{"cost": cost} for cost in _damages(model, channels, reads)]
    else:
        assert batches is not None, "a measured cost needs images"
        every: list[Reads] = [{}, *reads]
        measured = refitted(model, every, batches, limit, refit) if refit else scores(model, every, batches, limit)
        (loss, _), *rest = measured
        facts = [{"cost": after - loss, "loss": after, "score": score} for after, score in rest]
    found: dict[str, list[dict[str, float]]] = {}
    for removal, fact in zip(removals, facts, strict=True):
        found.setdefault(removal.stretch.name, []).append({"share": removal.share, **fact})
    return found


@dataclass(frozen=True)
class Removal:
    """The `count` weakest units of a stretch."""

    stretch: Stretch
    count: int

    @property
    def share(self) -> float:
        """Of the units of the stretch."""
        return self.count / len(self.stretch.units)

    @property
    def channels(self) -> set[int]:
        """Their ids."""
        return {channel for unit in self.stretch.units[: self.count] for channel in unit}


def _counts(units: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers of units, at least one and never all."""
    return sorted({max(1, min(units - 1, round(share * units))) for share in shares})


@torch.no_grad()
def _damages(model: nn.Module, channels: Channels, removals: Sequence[Reads]) -> list[float]:
    """The largest share of an output's expected activity that is lost in each of `removals`, over all layers that read less."""
    modules, means = dict(model.named_modules()), _means(model)
    worst = [0.0] * len(removals)
    for name in channels.inputs:
        less = [index for index, reads in enumerate(removals) if not reads[name].all()]
        if less:
            gone = torch.stack([~removals[index][name] for index in less])
            for index, lost in zip(less, _lost(modules[name], means.get(name), gone), strict=True):
                worst[index] = max(worst[index], lost)
    return worst


def _lost(layer: Any, mean: Tensor | None, gone: Tensor) -> list[float]:
    """The largest share of an output's expected activity, |ECDM|, in each row of `gone` (R, I); `mean`: of what is read."""
    weight, groups = filters(layer).detach().float(), getattr(layer, "groups", 1)
    kernels = (weight.flatten(2).sum(2) if weight.ndim > 2 else weight).abs().unflatten(0, (groups, -1))  # (G, O / G, I / G)
    rows = torch.cat([gone, torch.ones_like(gone[:1])]).to(kernels)
    if mean is not None:
        rows *= mean.repeat_interleave(rows.shape[1] // len(mean))  # flattening gives a channel a value for each pixel
    sums = kernels @ rows.reshape(len(rows), groups, -1).permute(1, 2, 0)  # (G, O / G, R + 1)
    return (sums[..., :-1] / (sums[..., -1:] + 1e-8)).amax((0, 1)).tolist()


def _means(model: nn.Module) -> dict[str, Tensor]:
    """The expected activity of what a layer reads, where that is a batch norm's ReLU, perhaps pooled, selected or flattened."""
    with tracing(model):
        graph = Tracer().trace(model)
    modules, found = dict(model.named_modules()), {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], FilteringLayer):
            mean = _mean(node.all_input_nodes[0], modules)
            if mean is not None:
                found[str(node.target)] = mean
    return found


def _mean(node: fx.Node, modules: Mapping[str, Any]) -> Tensor | None:
    selects: list[Tensor] = []
    rectified = False
    while len(node.all_input_nodes) == 1:
        module = modules[str(node.target)] if node.op == "call_module" else None
        if isinstance(module, nn.BatchNorm2d):
            if not rectified or not module.affine:
                return None
            mean = activity(module.weight, module.bias)
            for index in reversed(selects):
                mean = mean[index]
            return mean
        if isinstance(module, ChannelSelect):
            selects.append(module.index)
        elif isinstance(module, nn.ReLU) or node.target in RECTIFIERS:
            rectified = True
        elif isinstance(module, nn.Flatten) or node.target is torch.flatten:
            if selects:  # of values, not of channels
                return None
        elif not isinstance(module, PASSING):
            return None
        (node,) = node.all_input_nodes
    return None


def shares_at(costs: Costs, level: float) -> dict[str, float]:
    """The largest share of each stretch whose removal costs at most `level`, between the points on straight lines.

    Nothing removed costs nothing, more never less than before it; behind the last point a line goes on as it came.
    """
    return {name: _share_at(points, level) for name, points in costs.items()}


def weights(costs: Costs, mean: float = 0.5) -> dict[str, float]:
    """The share of each stretch to remove so that all removals cost the same and the shares' mean is `mean`, below 1."""
    if not costs:
        return {}
    average = lambda shares: sum(shares.values()) / len(shares)  # noqa: E731
    low, high = -1.0, 1.0
    while average(shares_at(costs, high)) < mean:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if average(shares_at(costs, middle)) >= mean else (middle, high)
    below, above = shares_at(costs, low), shares_at(costs, high)
    rise = average(above) - average(below)
    part = (mean - average(below)) / rise if rise > 0 else 1.0  # a removal that costs nothing is a jump between the two
    return {name: below[name] + max(0.0, min(1.0, part)) * (above[name] - below[name]) for name in costs}


def _share_at(points: Sequence[Mapping[str, float]], level: float) -> float:
    if level < 0:
        return 0.0
    line, highest = [(0.0, 0.0)], 0.0
    for point in points:
        highest = max(highest, point["cost"])
        line.append((point["share"], highest))
    for (share, cost), (more, dearer) in pairwise(line):
        if dearer > level:
            return share + (more - share) * (level - cost) / (dearer - cost)
    (share, cost), (more, dearer) = line[-2:]
    slope = (dearer - cost) / (more - share)
    return min(1.0, more + (level - dearer) / slope) if slope else 1.0


class Sensitivity(hooks.Hook):
    """Logs the costs of every stretch of the network as it enters the stage (`when`: "before") or leaves it ("after"): a hook of
    the first kind stands before the method's, one of the second kind behind it (see `around`)."""

    def __init__(self, by: By, when: Literal["before", "after"]) -> None:
        self.by: By = by
        self.when = when

    def prepare(self, run: hooks.Run) -> None:
        if self.when == "before":
            self.log(run)

    def finish(self, run: hooks.Run) -> None:
        if self.when == "after":
            self.log(run)

    def log(self, run: hooks.Run) -> None:
        """An event: the stretches, their layers, units and costs."""
        model: Any = run.model.to(run.device)
        found = {stretch.name: stretch for stretch in stretches(model, follow(model, run.input_shape))}
        costs = layer_costs(model, run.input_shape, run.validation, by=self.by)
        rows = [
            {"name": _plain(name), "layers": [*map(_plain, found[name].layers)], "units": len(found[name].units), "costs": points}
            for name, points in costs.items()
        ]
        run.log("sensitivity", by=self.by, when=self.when, score=run.task.names.headline, stretches=rows)


def around(method: Sequence[hooks.Hook], by: By | None) -> list[hooks.Hook]:
    """The hooks of a method, and where `by` is given the sensitivity before and after them."""
    return [Sensitivity(by, "before"), *method, Sensitivity(by, "after")] if by else [*method]


def _plain(name: str) -> str:
    return name.removesuffix(".layer")  # what stands beside a layer wraps it; the table of layers names it without
