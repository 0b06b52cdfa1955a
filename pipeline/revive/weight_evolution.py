"""Weight evolution: after every epoch, cross the weakest filters of a layer with its strongest, one element of a kernel at a time.

Source: Lin, Guo, Xing and Xu, "Weight Evolution: Improving Deep Neural Networks Training through Evolving Inferior Weight Values",
arXiv 2110.04492, and its code, github.com/BZQLin/Weight-evolution at 3f73b4f, WE/WE_cifar/we.py. In epoch e, counted from 0:

    r(e)      share / divisor_k * sigmoid((e - k period) / steepness),  k = e // period, at most the last divisor's
    global    of all filters of the network, those whose L1 norm / (C_in / groups) is below the one at place int(r n), ascending
    local     of a layer's filters, those whose norm is at most `local` times the layer's largest
    m         in each layer min(globally weak, locally weak): its m weakest are inferior
    matching  the k-th strongest of the layer is the dominant partner of the k-th strongest of the inferior
    crossover s: of smallest, l: of largest magnitude in a kernel of the inferior and in the same kernel of the dominant filter
              code:   s <- 2 s l / (s + l)          what l a + s (1 - a) with a = s / (s + l) comes to, signs included
              paper:  s <- a s + (1 - a) l          with a = |s| / (|s| + |l|)
              kernels of height 1, both rules: the whole filter w_s <- a w_s + (1 - a) w_l, with a from the filters' L1 norms

Batch norms' gamma and beta are treated alike, each by itself: magnitudes are norms, crossover is the paper's. Three counters, for
filters, gamma and beta, rise at every layer with globally but no locally weak entries and start again at one with both; at
(convolutions of the network) / `force` the counter starts again too, and the layer's weakest entry is inferior.

As in the code: counters run on from epoch to epoch and stay at a layer without globally weak entries; of more than n / 2 inferior
entries only the strongest n - m find a partner; linear layers, biases of convolutions, running statistics and the optimiser's
averages stay; grouped and depthwise convolutions are treated as all others; an s that a kernel holds several times is replaced
everywhere (by the paper's rule, which revives dead kernels: once). Otherwise than the code: nothing happens after the last epoch
(there it follows the last test); ties go to the lower index (there: to chance); an element stays where |s + l| is below a hundredth
of the larger of |s| and |l|, so that it grows at most 200-fold (there: without limit), or where both are 0; layers with a norm
that is not finite stay. The authors' ImageNet script forgets the division by C_in, and its schedule is r / 1, 2, 4 in periods of 30
with a steepness of 8.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline import hooks
from pipeline.config import Block
from pipeline.errors import InputError, allow
from pipeline.filters import filter_norms
from pipeline.layers import convolutions, edit, filtering_layers

IN_EPOCHS = ("period", "steepness")  # options that count epochs of the training
GUARD = 0.01  # |s + l| as a share of the larger magnitude: below it the coded crossover has no bound

INSIDE = "parametrizations"  # in the names of modules from which a layer's kernel is computed
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)

Pairs = tuple[Tensor, Tensor]  # indices of the inferior entries and of their dominant partners


class Options(Block):
    """A block under `revive:`. Shares lie in [0, 1]."""

    method: Literal["weight_evolution"]
    rule: Literal["code", "paper"]  # the crossover: as the authors' code computes it, or as it was meant
    share: float = Field(ge=0, le=1)  # of all filters, before the schedule
    norm_share: float = Field(ge=0, le=1)  # of all entries of gamma, and of beta
    local: float = Field(ge=0, le=1)  # of the largest norm in the layer
    force: int = Field(ge=0)  # a layer without a candidate gets one at most so often in a pass; 0: never
    period: int = Field(ge=1)  # epochs with one divisor
    divisors: list[Annotated[float, Field(ge=1)]] = Field(min_length=1)  # of the shares; the last one stays
    steepness: float = Field(gt=0)  # epochs in which a period's sigmoid goes from 1/2 to 0.73


def scheduled(share: float, epoch: int, *, period: int, divisors: Sequence[float], steepness: float) -> float:
    """r(e): what is left of `share` in an epoch, counted from 0."""
    part = min(epoch // period, len(divisors) - 1)
    return share / divisors[part] / (1 + math.exp(-(epoch - part * period) / steepness))


def batch_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """2D batch norms, but for those inside over-parameterised layers."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    return {name: norm for name, norm in norms.items() if INSIDE not in name}


@torch.no_grad()
def evolve(
    model: nn.Module,
    *,
    rule: str,
    share: float,
    norm_share: float,
    local: float,
    force: int,
    waiting: dict[str, int] | None = None,
) -> dict[str, Any]:
    """One pass over `model`, in place. Returns what was done: filters crossed in each layer, with their mean L1 norm, and entries
    of gamma and beta.

    `share` and `norm_share` are those of this epoch. `waiting` holds the counters of the passes before, and is brought up to date.
    """
    allow("rule", rule, ("code", "paper"))
    waiting = {} if waiting is None else waiting
    layers = dict(convolutions(model))
    patience = len(layers) / force if force else math.inf
    norms = {name: filter_norms(layer.weight) for name, layer in layers.items()}
    relative = [norms[name] / (layer.in_channels // layer.groups) for name, layer in layers.items()]
    matched, touched = _match(relative, share, local, "filters", waiting, patience), []
    for (name, layer), (inferior, dominant) in zip(layers.items(), matched, strict=True):
        if not len(inferior):
            continue
        before = float(norms[name][inferior].mean())
        weight = layer.weight.detach()
        new = crossover(weight[inferior], weight[dominant], rule).to(weight.dtype)
        edit(layer, "weight", lambda old, at=inferior, new=new: old.index_copy(0, at, new))
        after = float(filter_norms(layer.weight)[inferior].mean())
        touched.append({"name": name, "filters": len(inferior), "mean_norm_before": before, "mean_norm_after": after})
    counts = {
        kind: _evolve_norms(model, kind, tensor, norm_share, local, waiting, patience)
        for kind, tensor in (("gamma", "weight"), ("beta", "bias"))
    }
    return {"layers": touched, "filters": sum(row["filters"] for row in touched), "norms": counts}


def crossover(weak: Tensor, strong: Tensor, rule: str) -> Tensor:
    """What inferior filters (F, I, kh, kw) become by their dominant partners of the same shape."""
    weak, strong = weak.float(), strong.float()
    if weak.shape[2] == 1:
        return _blend(weak, strong, filter_norms(weak)[:, None, None, None], filter_norms(strong)[:, None, None, None])
    old, strong = weak.flatten(2), strong.flatten(2)  # (F, I, kh, kw) -> (F, I, kh kw)
    least = old.abs().argmin(2, keepdim=True)
    small, large = old.gather(2, least), strong.gather(2, strong.abs().argmax(2, keepdim=True))  # (F, I, 1)
    if rule == "paper":
        return old.scatter(2, least, _blend(small, large, small.abs(), large.abs())).reshape(weak.shape)
    new = 2 * small * (large / (small + large))
    bounded = (small + large).abs() > GUARD * torch.maximum(small.abs(), large.abs())
    return torch.where((old == small) & bounded & new.isfinite(), new, old).reshape(weak.shape)


def _blend(weak: Tensor, strong: Tensor, weak_size: Tensor, strong_size: Tensor) -> Tensor:
    """The mean of both, weighted with their sizes; `weak` where both are 0."""
    alpha = weak_size / (weak_size + strong_size)
    return torch.where(weak_size + strong_size > 0, alpha * weak + (1 - alpha) * strong, weak)


def _evolve_norms(
    model: nn.Module, kind: str, name: str, share: float, local: float, waiting: dict[str, int], patience: float
) -> int:
    """Cross the entries of one tensor of all batch norms, in place; the number of entries crossed."""
    layers: list[Any] = [norm for norm in batch_norms(model).values() if getattr(norm, name) is not None]
    matched = _match([getattr(norm, name).detach().float().abs() for norm in layers], share, local, kind, waiting, patience)
    for norm, (inferior, dominant) in zip(layers, matched, strict=True):
        if len(inferior):
            values = getattr(norm, name)
            weak, strong = values[inferior].float(), values[dominant].float()
            new = _blend(weak, strong, weak.abs(), strong.abs()).to(values.dtype)
            edit(norm, name, lambda old, at=inferior, new=new: old.index_copy(0, at, new))
    return sum(len(inferior) for inferior, _ in matched)


def _match(norms: list[Tensor], share: float, local: float, kind: str, waiting: dict[str, int], patience: float) -> list[Pairs]:
    """The pairs of every layer, given the norms (F,) of its entries; moves the counter `waiting[kind]`."""
    if not norms:
        return []
    device = norms[0].device
    everything = torch.cat(norms).cpu()  # one transfer: the counts are needed here
    threshold = everything.sort().values[min(int(len(everything) * share), len(everything) - 1)]
    layers = everything.split([len(own) for own in norms])
    pairs = [_match_layer(own, threshold, local, kind, waiting, patience) for own in layers]
    return [(inferior.to(device), dominant.to(device)) for inferior, dominant in pairs]


def _match_layer(norms: Tensor, threshold: Tensor, local: float, kind: str, waiting: dict[str, int], patience: float) -> Pairs:
    order = norms.argsort(descending=True, stable=True)
    weak = int((norms < threshold).sum())
    if not weak or not norms.isfinite().all():
        return order[:0], order[:0]
    candidates = int((norms <= norms.max() * local).sum())
    waiting[kind] = 0 if candidates else waiting.get(kind, 0) + 1
    if not candidates and waiting[kind] >= patience:
        candidates, waiting[kind] = 1, 0
    rest = len(norms) - min(weak, candidates)
    inferior = order[rest : 2 * rest]
    return inferior, order[: len(inferior)]


class WeightEvolution(hooks.Hook):
    """A pass after every epoch but the last."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.waiting: dict[str, int] = {}

    def coverage(self, model: nn.Module, input_shape: tuple[int, int, int]) -> list[str]:
        layers = dict(convolutions(model))
        if not layers:
            raise InputError("weight_evolution: the network has no convolution; choose another method")
        treated = batch_norms(model)
        norms = {name: module for name, module in model.named_modules() if isinstance(module, NORMS) and name not in treated}
        left = {
            "layers that are no convolutions": [name for name, _ in filtering_layers(model) if name not in layers],
            "batch norms inside over-parameterised layers": [name for name in norms if INSIDE in name],
            "normalisations other than 2D batch norms": [
                name for name, norm in norms.items() if INSIDE not in name and any(True for _ in norm.parameters())
            ],
        }
        return [f"weight_evolution leaves {what}: {', '.join(names)}" for what, names in left.items() if names]

    def after_epoch(self, run: hooks.Run) -> bool:
        options = self.options
        schedule: dict[str, Any] = {name: getattr(options, name) for name in ("period", "divisors", "steepness")}
        share, norm_share = (scheduled(value, run.epoch - 1, **schedule) for value in (options.share, options.norm_share))
        done = evolve(
            run.model,
            rule=options.rule,
            share=share,
            norm_share=norm_share,
            local=options.local,
            force=options.force,
            waiting=self.waiting,
        )
        run.log("weight_evolution", share=share, **done)
        return False

    def state(self) -> dict[str, Any]:
        return {"waiting": self.waiting}

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.waiting = state["waiting"]


def create(options: Options) -> hooks.Hook:
    """The hook of this method."""
    return WeightEvolution(options)
