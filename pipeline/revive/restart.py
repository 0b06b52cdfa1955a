"""Partial restart: rank all filters, draw the least useful ones anew, train on, and repeat.

Source: Han and Zhang, "Partial Restart of Neural Network", and its code, github.com/sjtu-cs222/Group_36 at 43e8da4.

    Theta(filter) = | mean over pixels of z * dC/dz |, averaged over images, divided by the layer's L2 norm of Theta

z is the filter's feature map: behind its batch norm where one follows, because a batch norm makes z orthogonal to its gradient.
Each restart resets floor(N / divisor) - 1 of the N filters ranked, with a fresh optimiser.

Two loops are published. The code: a trained network, `restarts` rounds of `fit.epochs`, an early end after a drop in accuracy
(`train_first: false, patience: null, stop_on_repeat: false, max_drop: 0.02, final_epochs: 15`). Algorithm 1 of the paper: train
until the loss stalls, reset, and so on until the same filters would be reset again (`train_first: true` where the network is not
trained yet, `patience: 5, stop_on_repeat: true`; the patience is ours, the paper gives none).
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from pipeline import hooks
from pipeline.channels import Channels, follow
from pipeline.config import Block
from pipeline.errors import InputError, allow
from pipeline.evaluation import evaluate
from pipeline.filters import filter_norms
from pipeline.layers import convolutions, edit, renew

IN_EPOCHS = ("final_epochs",)  # options that count epochs
CRITERIA = ("per_example", "batch_signed", "elementwise")
RESETS = ("uniform", "he", "he_literal", "he_fan_in", "xavier", "minmax", "distribution")


class Options(Block):
    """A block under `revive:`. `fit.epochs` is the length of each round."""

    method: Literal["restart"]
    reset: Literal["uniform", "he", "he_literal", "he_fan_in", "xavier", "minmax", "distribution"]
    scope: Literal["filter", "layer"]  # whose values minmax and distribution imitate
    criterion: Literal["per_example", "batch_signed", "elementwise", "random"]  # random: the control, as many filters, drawn
    ranking_batches: int | None = Field(ge=1)  # training batches behind one ranking; null: a whole epoch, as the authors
    ranking_dropout: bool  # rank with dropout active, as the authors
    divisor: float = Field(gt=1)  # N / divisor - 1 filters a restart
    train_first: bool  # begin with a round without a reset: for a network that is not trained yet
    restarts: int = Field(ge=1)
    final_epochs: int = Field(ge=0)  # more training after the last round
    stop_on_repeat: bool  # stop when the same filters would be reset as the last time
    patience: int | None = Field(ge=1)  # end a round when the training loss has not fallen for so many epochs; null: never
    max_drop: float = Field(gt=0, le=1)  # stop when a round ends this far below the accuracy before the first restart
    target: float | None = Field(gt=0, le=1)  # stop when a round ends at this validation accuracy; null: never
    include_residual: bool  # also reset filters whose output joins a residual add
    batchnorm: Literal["reset", "keep"]  # of a filter's batch norm: scale 1, shift 0, mean 0, variance 1

    @model_validator(mode="after")
    def _trains_what_it_resets(self) -> Self:
        if not self.fit.epochs:
            raise PydanticCustomError("epochs", "fit.epochs must be at least 1: what a restart resets has to be trained again")
        return self


def taylor_scores(
    model: nn.Module,
    watched: dict[str, str],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    criterion: str,
    dropout: bool = False,
    loss: Callable[..., Tensor] = F.cross_entropy,
) -> dict[str, Tensor]:
    """Theta of every filter, in fp32, normalised within each layer.

    `watched` names for each convolution the module whose output is its feature map; `batches` gives images (B, C, H, W) and
    labels (B,), whose `loss` is added up. `per_example` takes |mean over pixels| of each image (the paper's formula),
    `batch_signed` sums signed values over the whole pass and takes the absolute value at the end (what the authors ran),
    `elementwise` takes it of each element.
    """
    allow("criterion", criterion, CRITERIA)
    totals: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def on_output(module: nn.Module, inputs: Any, output: Tensor) -> None:
            maps = output.detach().clone()  # a later in-place activation may overwrite the output
            output.register_hook(lambda gradient: collect(name, maps * gradient))

        return on_output

    def collect(name: str, products: Tensor) -> None:
        if criterion == "elementwise":
            products = products.abs()
        per_image = products.flatten(2).mean(2)  # (B, C, H, W) -> (B, C)
        per_image = per_image.abs() if criterion == "per_example" else per_image
        totals[name] = totals.get(name, torch.zeros_like(per_image[0])) + per_image.sum(0)

    training, gradients = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    for module in model.modules():
        if dropout and isinstance(module, nn.modules.dropout._DropoutNd):
            module.train()
    handles = [model.get_submodule(at).register_forward_hook(watch(name)) for name, at in watched.items()]
    try:
        for images, labels in batches:
            # The images carry the graph, so that no gradient of a weight is computed.
            loss(model(images.requires_grad_()), labels, reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in zip(model.parameters(), gradients, strict=True):
            parameter.requires_grad_(wanted)
        model.train(training)
    return {name: F.normalize(totals[name].abs(), dim=0) for name in watched if name in totals}


def least_useful(scores: dict[str, Tensor], divisor: float) -> dict[str, list[int]]:
    """The floor(N / divisor) - 1 filters with the smallest scores in the whole network, by layer, in ascending index.

    `InputError` where that is none, or not fewer than N.
    """
    total = sum(map(len, scores.values()))
    count = int(total / divisor) - 1 if divisor > 1 else 0
    if count < 1:
        raise InputError(
            f"restart: {total} filters / divisor {divisor} - 1 leaves nothing to reset; a divisor lies above 1, up to {total / 2:g}"
        )
    chosen = torch.cat(list(scores.values())).argsort(stable=True)[:count].tolist()
    useless, start = {}, 0
    for name, values in scores.items():
        useless[name] = sorted(index - start for index in chosen if start <= index < start + len(values))
        start += len(values)
    return {name: filters for name, filters in useless.items() if filters}


def draw(kernels: Tensor, filters: list[int], reset: str, scope: str, generator: torch.Generator) -> Tensor:
    """New kernels (F, I, kh, kw) for the listed filters of a layer with kernels (O, I, kh, kw).

    uniform U(-0.05, 0.05); he U(+-sqrt(3 / O)), the paper's equation 4 as its code reads it; he_literal U(+-sqrt(6) / (2 O)), as
    printed; xavier U(+-sqrt(6 / (fan in + fan out))); he_fan_in U(+-sqrt(6 / fan in)); minmax U(min, max) and distribution
    N(mean, std^2) of the old values of the filter (or of the layer).
    """
    allow("reset", reset, RESETS)
    old = kernels[filters]
    shape, count = old.shape, len(kernels)
    fan_in, fan_out = kernels[0].numel(), count * kernels[0, 0].numel()
    bounds = {
        "uniform": 0.05,
        "he": (3 / count) ** 0.5,
        "he_literal": 6**0.5 / (2 * count),
        "xavier": (6 / (fan_in + fan_out)) ** 0.5,
        "he_fan_in": (6 / fan_in) ** 0.5,
    }
    if reset in bounds:
        new = torch.empty(shape).uniform_(-bounds[reset], bounds[reset], generator=generator)
        return new.to(kernels)
    source = (old if scope == "filter" else kernels.reshape(1, -1).expand(len(filters), -1)).reshape(len(filters), -1)
    if reset == "minmax":
        low, high = (bound[:, None, None, None] for bound in (source.amin(1), source.amax(1)))
        return low + (high - low) * torch.rand(shape, generator=generator).to(kernels)
    mean, std = source.mean(1), source.std(1, correction=0)
    std = torch.where(std > 0, std, 0.05 / 3**0.5)  # of U(-0.05, 0.05)
    return mean[:, None, None, None] + std[:, None, None, None] * torch.randn(shape, generator=generator).to(kernels)


@torch.no_grad()
def reset_filters(
    model: nn.Module,
    useless: dict[str, list[int]],
    channels: Channels,
    *,
    reset: str,
    scope: str,
    batchnorm: str,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """Draw the useless filters anew, in place: their kernels, bias 0, and their batch norm's entries. Nothing else changes.
    Returns for each layer how many filters were reset and their mean L1 norm before and after."""
    layers, done = dict(convolutions(model)), []
    for name, filters in useless.items():
        layer: Any = layers[name]
        before = filter_norms(layer.weight)[filters].mean()
        if batchnorm == "reset":
            renew(layer, _index(filters, layer.weight))
        new = draw(layer.weight.detach(), filters, reset, scope, generator)
        edit(layer, "weight", lambda weight, rows=filters, new=new: weight.index_copy(0, _index(rows, weight), new))
        if layer.bias is not None:
            edit(layer, "bias", lambda bias, rows=filters: bias.index_fill(0, _index(rows, bias), 0.0))
        if batchnorm == "reset" and name in channels.norm_after:
            norm: Any = model.get_submodule(channels.norm_after[name])
            for tensor, value in (
                (norm.weight, 1.0),
                (norm.bias, 0.0),
                (norm.running_mean, 0.0),
                (norm.running_var, 1.0),
            ):
                if tensor is not None:
                    tensor[filters] = value
        norms = {"mean_norm_before": float(before), "mean_norm_after": float(filter_norms(layer.weight)[filters].mean())}
        done.append({"name": name, "filters": len(filters), **norms})
    return done


def _index(rows: list[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, device=like.device)


class Restart(hooks.Hook):
    """Rounds of reset and training."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.useless: dict[str, list[int]] = {}
        self.baseline = 0.0  # validation accuracy before the first restart

    def rounds(self, epochs: int) -> list[int]:
        options = self.options
        return [epochs] * (options.train_first + options.restarts) + [options.final_epochs] * (options.final_epochs > 0)

    def coverage(self, model: nn.Module, input_shape: tuple[int, int, int]) -> list[str]:
        self.channels = follow(model, input_shape)
        layers = [name for name, _ in convolutions(model)]
        skipped = [n for n in layers if self.channels.joins(n)]
        skipped = [] if self.options.include_residual else skipped
        self.watched = {name: self.channels.norm_after.get(name, name) for name in layers if name not in skipped}
        layers_of = dict(convolutions(model))
        least_useful({name: torch.zeros(layers_of[name].out_channels) for name in self.watched}, self.options.divisor)
        return [f"restart leaves layers whose output joins a residual add: {', '.join(skipped)}"] if skipped else []

    def prepare(self, run: hooks.Run) -> None:
        if run.fresh is not None and not self.options.train_first:
            raise InputError("restart: the network is not trained, so no filter can be ranked: set train_first to true")

    def begin_round(self, run: hooks.Run) -> bool:
        options = self.options
        first = 1 + options.train_first  # the first round that begins with a restart
        if not first <= run.round < first + options.restarts:
            return True  # training before the first restart, or the final epochs
        if run.round == first:
            run.model.to(run.device)
            self.baseline = evaluate(run.model, run.validation).accuracy
        why = self._reason_to_stop(run) if run.round > first else ""
        if not why:
            useless = self._rank(run)
            repeated = options.stop_on_repeat and useless == self.useless
            why = "the same filters would be reset again" if repeated else ""
            self.useless = useless
        if why:
            run.log("stop", reason=why)
            run.rounds = run.rounds[: run.round - 1] + [options.final_epochs] * (options.final_epochs > 0)
            return run.round <= len(run.rounds)
        layers = reset_filters(
            run.model,
            self.useless,
            self.channels,
            reset=options.reset,
            scope=options.scope,
            batchnorm=options.batchnorm,
            generator=run.generator("reset"),
        )
        accuracy = evaluate(run.model, run.validation).accuracy
        run.log("restart", layers=layers, filters=sum(row["filters"] for row in layers), validation_accuracy_after=accuracy)
        return True

    def after_epoch(self, run: hooks.Run) -> bool:
        losses = [row["train_loss"] for row in run.history if row["round"] == run.round]
        patience = self.options.patience
        return patience is not None and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])

    def state(self) -> dict[str, Any]:
        return {"useless": self.useless, "baseline": self.baseline}

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.useless, self.baseline = state["useless"], state["baseline"]

    def _reason_to_stop(self, run: hooks.Run) -> str:
        names = run.task.names
        accuracy = run.history[-1][f"validation_{names.headline}"]
        if accuracy <= self.baseline - self.options.max_drop:
            return f"validation {names.title} {accuracy:.2%} is more than {self.options.max_drop:.2%} below {self.baseline:.2%}"
        reached = self.options.target is not None and accuracy >= self.options.target
        return f"validation {names.title} {accuracy:.2%} reaches the target" if reached else ""

    def _rank(self, run: hooks.Run) -> dict[str, list[int]]:
        if self.options.criterion == "random":
            generator, layers = run.generator("ranking"), dict(convolutions(run.model))
            scores = {name: torch.rand(layers[name].out_channels, generator=generator) for name in self.watched}
            return least_useful(scores, self.options.divisor)
        batches = run.train.epoch(run.epoch)
        if self.options.ranking_batches is not None:
            batches = (batch for batch, _ in zip(batches, range(self.options.ranking_batches), strict=False))
        torch.manual_seed(hooks.stable_seed(run.seed, run.stage, "ranking", run.round))
        how: dict[str, Any] = {"criterion": self.options.criterion, "dropout": self.options.ranking_dropout}
        scores = taylor_scores(run.model, self.watched, batches, **how, loss=run.task.loss)
        return least_useful(scores, self.options.divisor)


def create(options: Options) -> hooks.Hook:
    """The hook of this method."""
    return Restart(options)
