"""What methods that remove channels by a score share: how much goes, the cut itself, and what the record keeps of it.

Every channel is removed with all that are one with it (`pipeline.families`), by a share of their number or a target for the network
(`pipeline.budget`). A method is a function that scores them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from pipeline import hooks
from pipeline.budget import Budget, Choice, FamilyCosts, Scores
from pipeline.channels import Channels, follow
from pipeline.config import CompressBlock, Target
from pipeline.data.batches import Batches
from pipeline.evaluation import settle_batchnorm
from pipeline.families import Families
from pipeline.latency_budget import fit_latency
from pipeline.sensitivity import layer_costs
from pipeline.surgery import Shape, drop, shrink

Spread = Literal["global", "layer", "sensitivity"]
Score = Callable[[nn.Module, Channels], Scores]


class RemovalBlock(CompressBlock):
    """How much a method under `compress:` removes, and where."""

    share: float | None = Field(gt=0, lt=1)  # of the units of channels, by their scores; null: as the target says
    target: Target | None  # what the network shall come to; null: as the share says
    multiple: int = Field(ge=1)  # outputs of layers come in multiples of it where they are that many
    scope: Spread  # one ranking; the same share of each layer; or such shares that all suffer alike, as `sensitivity` finds
    protect: list[str]  # layers that keep their outputs: names, * for any text

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.share is None) == (self.target is None):
            raise PydanticCustomError("share", "give a share or a target, and null for the other")
        if self.scope == "sensitivity" and self.sensitivity is None:
            raise PydanticCustomError("scope", "scope: sensitivity needs sensitivity: ecdm or measured")
        return self


def choose(
    model: nn.Module,
    input_shape: Shape,
    channels: Channels,
    scores: Scores,
    *,
    share: float | None,
    target: Target | None,
    multiple: int,
    scope: Spread,
    protect: Sequence[str] = (),
    costs: FamilyCosts | None = None,
) -> Choice:
    """What goes. `costs`, with scope "sensitivity", are those of `pipeline.sensitivity.layer_costs`; None: its data-free ones."""
    families = Families(model, channels, protect=protect, multiple=multiple)
    if scope == "sensitivity":
        budget = Budget(families, scores, costs=layer_costs(model, input_shape, by="ecdm") if costs is None else costs)
    else:
        budget = Budget(families, scores, scope)
    if share is not None:
        return budget.share(share)
    assert target is not None
    if target.of == "latency":
        return fit_latency(model, input_shape, budget, target.fraction)
    return budget.target(target.of, target.fraction)


def prune(
    model: nn.Module, input_shape: Shape, score: Score, *, protect: Sequence[str] = (), **how: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A smaller copy of `model`, and what was removed. `how`: see `choose`. Re-estimate the batch norms before using the copy."""
    channels = follow(model, input_shape)
    choice = choose(model, input_shape, channels, score(model, channels), protect=protect, **how)
    return shrink(model, input_shape, drop(channels, choice.channels)), choice.facts()


def filters_of(channels: Channels) -> dict[int, list[tuple[str, int]]]:
    """The filters that make each unit: layers, those that treat each channel alone among them, and positions there."""
    label = channels.units()
    found: dict[int, list[tuple[str, int]]] = {}
    for name, ids in (*channels.outputs.items(), *channels.channelwise.items()):
        for position, channel in enumerate(ids):
            found.setdefault(label[channel], []).append((name, position))
    return found


class Removal(hooks.Hook):
    """Cuts the network before training."""

    def __init__(self, options: RemovalBlock) -> None:
        self.options: Any = options

    def scores(self, run: hooks.Run, channels: Channels) -> Scores:
        """Of each unit; one without a score stays."""
        raise AssertionError("a method says how")

    def treated(self, model: nn.Module, channels: Channels) -> set[int] | None:
        """The units that get a score; None: all."""
        return None

    def protected(self, channels: Channels) -> list[str]:
        """Layers that keep their outputs."""
        return list(self.options.protect)

    def coverage(self, model: nn.Module, input_shape: Shape) -> list[str]:
        options, channels = self.options, follow(model, input_shape)
        families = Families(model, channels, protect=self.protected(channels), multiple=options.multiple)
        treated = self.treated(model, channels)
        units = {unit for family in families.all for unit in family.units}
        budget = Budget(families, dict.fromkeys(units if treated is None else units & treated, 0.0))
        if options.target is not None and options.target.of != "latency":
            budget.target(options.target.of, options.target.fraction)  # refuses what cannot be reached
        cut = [family for family, least in zip(families.all, budget.least, strict=True) if least < len(family.units)]
        free = {name for family in cut for name in family.layers}
        whole = [name for name in channels.outputs if name not in free]
        why = "protected, too narrow, without a score, or what enters or leaves the network"
        notes = [f"{options.method} leaves {', '.join(whole)} at full width: {why}"] if whole else []
        return notes + [f"{options.method}: {what}" for what in channels.untreated]

    def prepare(self, run: hooks.Run) -> None:
        self.cut(run)

    def cut(self, run: hooks.Run) -> dict[str, Tensor]:
        """Replace `run.model` by the smaller network, with batch norms that fit it; what its layers read of the whole's."""
        options, channels = self.options, follow(run.model, run.input_shape)
        run.model.to(run.device)
        measured = options.scope == "sensitivity" and options.sensitivity == "measured"
        costs = layer_costs(run.model, run.input_shape, run.validation, by="measured") if measured else None
        choice = choose(
            run.model,
            run.input_shape,
            channels,
            self.scores(run, channels),
            share=options.share,
            target=options.target,
            multiple=options.multiple,
            scope=options.scope,
            protect=self.protected(channels),
            costs=costs,
        )
        return self.apply(run, drop(channels, choice.channels), choice.facts())

    def apply(self, run: hooks.Run, reads: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Tensor]:
        """Cut, estimate batch norms again, and log both; `reads` as it came."""
        run.model = shrink(run.model, run.input_shape, reads).to(run.device)
        run.log(self.options.method, **facts)
        settle_batchnorm(run)
        return reads


def first_batches(batches: Batches, epoch: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """The first `count` batches of an epoch, on the CPU."""
    return [(images.cpu(), labels.cpu()) for (images, labels), _ in zip(batches.epoch(epoch), range(count), strict=False)]
