"""Kernel reactivation: every few epochs, scale up the weakest kernels of the weakest filters, keeping their shape.

Source: Lee and Kim, "Versatile kernel reactivation for deep convolutional neural networks" (no public code).

    C1   the alpha share of all filters of the network with the smallest mean |weight|
    C2   the beta share of each layer's filters with the smallest L1 norm
    C3   in each filter of C1 and C2, the gamma share of its kernels with the smallest L1 norm: these are invalid
    K <- K * Best / |K|_1        for every invalid kernel K; Best: the largest kernel norm in the same filter

gamma follows the learning rate. Shares become counts by rounding down, which is what switches the published setting off after
about two thirds of the training. All norms are taken before the first edit. A filter whose best kernel is zero stays dead: the
rule has nothing to scale it by; such filters are counted.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline import hooks
from pipeline.config import Block
from pipeline.errors import InputError, allow, allow_share
from pipeline.layers import convolutions, edit, filtering_layers

IN_EPOCHS = ("every",)  # options that count epochs of the training
EPSILON = 1e-12  # a norm below it has no direction to keep

MOMENTUM = ("keep", "zero", "scale")
ROUNDING = {"floor": math.floor, "round": round, "ceil": math.ceil}


class Options(Block):
    """A block under `revive:`. Shares lie in [0, 1]."""

    method: Literal["reactivation"]
    alpha: float = Field(ge=0, le=1)
    beta: float = Field(ge=0, le=1)
    gamma: float = Field(ge=0, le=1)  # at the first learning rate
    every: int = Field(ge=1)  # epochs between two passes
    selection: Literal["norm", "random"]  # random: the control, as many kernels of each layer, drawn
    rounding: Literal["floor", "round", "ceil"]
    max_ratio: float | None = Field(gt=1)  # a kernel is scaled by at most this; null: no limit
    momentum: Literal["keep", "zero", "scale"]  # what happens to the optimiser's averages of the edited kernels


def eligible(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Convolutions whose kernels have a shape to keep (larger than 1x1) and siblings to be measured by (no depthwise)."""
    return {
        name: layer
        for name, layer in convolutions(model)
        if layer.weight[0, 0].numel() > 1 and layer.in_channels // layer.groups > 1
    }


@torch.no_grad()
def reactivate(
    model: nn.Module,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    rounding: str = "floor",
    max_ratio: float | None = None,
    momentum: str = "keep",
    optimizer: torch.optim.Optimizer | None = None,
    random: torch.Generator | None = None,
) -> dict[str, Any]:
    """One pass over `model`, in place. Returns what was done: kernels and filters touched in each layer, and dead filters.

    With `random`, a generator on the CPU, it is the control: in every layer as many filters, and in each of them as many kernels,
    but drawn instead of ranked.
    """
    for name, share in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        allow_share(name, share)
    allow("rounding", rounding, ROUNDING)
    allow("momentum", momentum, MOMENTUM)
    if not (layers := eligible(model)):
        return {"kernels": 0, "dead_filters": 0, "layers": []}
    count = lambda share, total: min(ROUNDING[rounding](round(share * total, 9)), total)  # noqa: E731
    norms = {name: layer.weight.detach().float().abs().sum((2, 3)) for name, layer in layers.items()}  # (O, I)
    means = [norms[name].sum(1) / layer.weight[0].numel() for name, layer in layers.items()]
    weakest = _smallest(torch.cat(means), count(alpha, sum(map(len, means)))).split([len(mean) for mean in means])
    in_network = dict(zip(layers, weakest, strict=True))
    touched, dead = {}, 0
    for names in _alike(layers):  # L layers of one shape at once: few large operations instead of many small ones
        kernels = torch.stack([norms[name] for name in names])  # (L, O, I)
        filters = torch.stack([in_network[name] for name in names])
        filters &= _smallest(kernels.sum(2), count(beta, kernels.shape[1]))
        invalid = filters[..., None] & _smallest(kernels, count(gamma, kernels.shape[2]))
        ratio, lifeless = _ratios(kernels, invalid, max_ratio or math.inf)
        if random is not None:
            ratio, _ = _ratios(kernels, _drawn_instead(~ratio.isnan(), kernels, random), max_ratio or math.inf)
        dead += lifeless
        for name, row in _summary(names, kernels, ratio).items():
            touched[name] = row
            _scale(layers[name], ratio[names.index(name)], momentum, optimizer)
    rows = [touched[name] for name in layers if name in touched]
    return {"kernels": sum(row["kernels"] for row in rows), "dead_filters": dead, "layers": rows}


def _alike(layers: dict[str, nn.Conv2d]) -> list[list[str]]:
    """The names of the layers, those of one shape together."""
    groups: dict[torch.Size, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(layer.weight.shape, []).append(name)
    return list(groups.values())


def _smallest(values: Tensor, count: int | Tensor) -> Tensor:
    """A mask of the `count` smallest values along the last axis; ties go to the lower index."""
    order = values.argsort(dim=-1, stable=True)
    places = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, places) < count


def _drawn_instead(chosen: Tensor, kernels: Tensor, random: torch.Generator) -> Tensor:
    """A mask like `chosen` (L, O, I) of drawn kernels: in each layer as many filters with as many kernels each, live ones."""
    draw = lambda alive: torch.rand(alive.shape, generator=random).to(kernels) + (~alive)  # noqa: E731  # dead ones last
    counts = chosen.sum(2).sort(dim=1, descending=True).values  # (L, O)
    order = draw(kernels.amax(2) >= EPSILON).argsort(dim=1)
    wanted = torch.zeros_like(counts).scatter(1, order, counts)
    return _smallest(draw(kernels >= EPSILON), wanted[..., None])


def _ratios(kernels: Tensor, invalid: Tensor, limit: float) -> tuple[Tensor, int]:
    """By what each kernel is scaled, NaN where it is not: (L, O, I); and the number of filters without a live kernel."""
    best = kernels.amax(2, keepdim=True)
    possible = (best >= EPSILON) & (kernels >= EPSILON) & (best / kernels).isfinite()
    ratio = torch.where(invalid & possible, (best / kernels).clamp(max=limit), torch.nan)
    return ratio, int((best < EPSILON).sum())


def _summary(names: list[str], kernels: Tensor, ratio: Tensor) -> dict[str, dict[str, Any]]:
    """For each layer that is touched how many filters and kernels are, and the kernels' mean norms."""
    invalid = ~ratio.isnan()
    after = (kernels * ratio).nansum((1, 2))
    sums = [invalid.any(2).sum(1), invalid.sum((1, 2)), torch.where(invalid, kernels, 0).sum((1, 2)), after]
    found = {}
    for name, (filters, count, old, new) in zip(names, torch.stack(sums, 1).tolist(), strict=True):
        if count:
            found[name] = {"name": name, "filters": int(filters), "kernels": int(count)}
            found[name] |= {"mean_norm_before": old / count, "mean_norm_after": new / count}
    return found


def _scale(layer: nn.Conv2d, ratio: Tensor, momentum: str, optimizer: torch.optim.Optimizer | None) -> None:
    """Multiply the kernels whose ratio (O, I) is a number, and, where asked, the optimiser's averages of them."""
    untouched = ratio.isnan()[..., None, None]
    scale = ratio.nan_to_num(1.0)[..., None, None].to(layer.weight.dtype)
    edit(layer, "weight", lambda weight: weight * scale)
    if optimizer is not None and momentum != "keep":
        factor = scale if momentum == "scale" else untouched.to(scale.dtype)
        edit(layer, "weight", lambda moment: moment * factor, optimizer)


class Reactivation(hooks.Hook):
    """Reactivates after every `every`-th epoch but the last."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def coverage(self, model: nn.Module, input_shape: tuple[int, int, int]) -> list[str]:
        layers = eligible(model)
        if not layers:
            raise InputError("reactivation: the network has no convolution with kernels larger than 1x1; choose another method")
        others = [name for name, _ in filtering_layers(model) if name not in layers]
        return [f"reactivation leaves layers whose filters have no k x k kernels to compare: {', '.join(others)}"] if others else []

    def after_epoch(self, run: hooks.Run) -> bool:
        options = self.options
        if run.epoch % options.every == 0:
            gamma = options.gamma * run.lr / run.fit.lr
            done = reactivate(
                run.model,
                alpha=options.alpha,
                beta=options.beta,
                gamma=gamma,
                rounding=options.rounding,
                max_ratio=options.max_ratio,
                momentum=options.momentum,
                optimizer=run.optimizer,
                random=run.generator("reactivation") if options.selection == "random" else None,
            )
            run.log("reactivation", gamma=gamma, **done)
        return False


def create(options: Options) -> hooks.Hook:
    """The hook of this method."""
    return Reactivation(options)
