"""Channels closed for each convolution that reads them, after those that stay have taken over what they can. A method of ours, in
the way of selective convolution's deallocation.

    rank        of every ungrouped convolution: the order in which its input channels go, and the share of its outputs' variation
                that is lost by then, given that all others took over what went before (pipeline/takeover.py: optimal brain surgery
                by channels, on means and covariances of `batches` training batches)
    close       the longest prefix that loses at most `gamma` of it; or with a `target` one gamma for all layers, bisected
    take over   kernels of the channels that stay change in closed form, and a constant goes into the batch norm behind or the bias

Deallocation (Jeong and Shin 2019) knows each channel's mean alone; what it has over rankings of filters is kept: each reader
decides for itself, one threshold holds for all layers, and no gradient or label is needed. Then the network is cut and trained on.
"""

import copy
from collections.abc import Iterable
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from pipeline import hooks, takeover
from pipeline.allocation import allocate, measuring, smallest, unit_of
from pipeline.channels import Channels, follow
from pipeline.config import CompressBlock, Target
from pipeline.ecdm import prefix
from pipeline.errors import InputError
from pipeline.evaluation import settle_batchnorm
from pipeline.selection import Unit, give_back, units
from pipeline.surgery import Shape, shrink
from pipeline.takeover import Moments, moments


class Options(CompressBlock):
    """A block under `compress:`."""

    method: Literal["takeover"]
    gamma: float | None = Field(gt=0, lt=1)  # share of a layer's variation that may be lost; null: as the target says
    target: Target | None  # how small the network becomes; null: as gamma says
    multiple: int = Field(ge=1)  # of input channels that stay, in narrow layers a half or quarter of it
    batches: int = Field(ge=1)  # training batches behind means and covariances

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if (self.gamma is None) is (self.target is None):
            raise PydanticCustomError("gamma", "give either gamma or target, and null for the other")
        return self


def take_over(
    model: nn.Module,
    input_shape: Shape,
    batches: Iterable[Any],
    *,
    limit: int = 8,
    gamma: float | None = None,
    target: Target | None = None,
    multiple: int = 8,
) -> tuple[nn.Module, dict[str, Any]]:
    """A smaller copy of a trained network, and the facts: what each layer lost, and what is left of the target's cost. `batches`
    are pairs of images (B, C, H, W) and anything; `limit` of them are used. `InputError` where the target is out of reach, or
    there is no convolution to treat. Re-estimate the batch norms before using the copy."""
    if (gamma is None) is (target is None):
        raise InputError("takeover: give either gamma or target")
    channels, changed = follow(model, input_shape), copy.deepcopy(model)
    found = _units(model, channels)
    known = moments(model, list(found), batches, limit)
    rankings = {name: takeover.rank(_weight(model, name), known[name].covariance) for name in found}
    if target is None:
        counts = {name: prefix(lost, gamma or 0.0, unit_of(multiple, len(lost))) for name, (_, lost) in rankings.items()}
        closing = {name: _mask(order, counts[name]) for name, (order, _) in rankings.items()}
        reads, facts = {name: ~mask.cpu() for name, mask in closing.items()}, {"gamma": gamma}
    else:
        with measuring(target, model, channels, input_shape) as share:
            _refuse_unreachable(target, found, model, share, multiple)
            reads, reached, left = allocate(rankings, share, target.fraction, multiple)
        facts = {"gamma": reached, "share": left}
    lost = {}
    for name, mask in reads.items():
        if not mask.all():
            give(changed, found[name], known[name], ~mask)
            lost[name] = float(rankings[name].lost[int((~mask).sum()) - 1])
    removed = {name: int((~mask).sum()) for name, mask in reads.items() if not mask.all()}
    return shrink(changed, input_shape, reads), {"removed": removed, "lost": lost, **facts}


def give(model: nn.Module, unit: Unit, known: Moments, closed: Tensor) -> None:
    """Let a unit's open channels take over from the closed ones (I,), in place."""
    layer: Any = model.get_submodule(unit.name)
    give_back(model, unit, takeover.take_over(layer, known, closed.to(layer.weight.device)))


def _mask(order: Tensor, count: int) -> Tensor:
    return torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:count], True)


def _weight(model: nn.Module, name: str) -> Tensor:
    layer: Any = model.get_submodule(name)
    return layer.weight.detach()


def _units(model: nn.Module, channels: Channels) -> dict[str, Unit]:
    found = units(model, channels)
    if not found:
        raise InputError("takeover: the network has no ungrouped convolution behind its first; choose another method")
    return found


def _refuse_unreachable(target: Target, found: Iterable[str], model: nn.Module, share: Any, multiple: int) -> None:
    least = smallest({name: _weight(model, name).shape[1] for name in found}, share, multiple)
    if least > target.fraction:
        raise InputError(
            f"takeover: target: {target.of} = {target.fraction:g} is out of reach: {least:.4f} is left when all is closed that may "
            "be; ask for more than that, or allow a smaller multiple"
        )


class Takeover(hooks.Hook):
    """Cuts the network before training."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def coverage(self, model: nn.Module, input_shape: Shape) -> list[str]:
        channels, target = follow(model, input_shape), self.options.target
        found = _units(model, channels)
        if target is not None and target.of != "latency":
            with measuring(target, model, channels, input_shape) as share:
                _refuse_unreachable(target, found, model, share, self.options.multiple)
        others = [name for name in channels.inputs if name not in found]
        notes = [f"takeover leaves the inputs of {', '.join(others)} whole"] if others else []
        return notes + [f"takeover: {what}" for what in channels.untreated]

    def prepare(self, run: hooks.Run) -> None:
        options = self.options
        inputs = {name: _weight(run.model, name).shape[1] for name in units(run.model, follow(run.model, run.input_shape))}
        run.model, facts = take_over(
            run.model.to(run.device),
            run.input_shape,
            run.train.epoch(run.epoch),
            limit=options.batches,
            gamma=options.gamma,
            target=options.target,
            multiple=options.multiple,
        )
        run.model.to(run.device)
        removed, lost = facts.pop("removed"), facts.pop("lost")
        rows = [{"name": name, "open": count - removed.get(name, 0), "inputs": count} for name, count in inputs.items()]
        run.log("takeover", layers=rows, open=sum(row["open"] for row in rows), lost=max(lost.values(), default=0.0), **facts)
        settle_batchnorm(run)


def create(options: Options) -> hooks.Hook:
    """The hook of this method."""
    return Takeover(options)
