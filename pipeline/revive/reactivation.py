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
from pipeline.errors import InputError
from pipeline.layers import convolutions, edit, filtering_layers

EPSILON = 1e-12  # a norm below it has no direction to keep

ROUNDING = {"floor": math.floor, "round": round, "ceil": math.ceil}


class Options(Block):
    """A block under `revive:`. Shares lie in [0, 1]."""

    method: Literal["reactivation"]
    alpha: float = Field(ge=0, le=1)
    beta: float = Field(ge=0, le=1)
    gamma: float = Field(ge=0, le=1)  # at the first learning rate
    every: int = Field(ge=1)  # epochs between two passes
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
) -> dict[str, Any]:
    """One pass over `model`, in place. Returns what was done: kernels and filters touched in each layer, and dead filters."""
    layers = eligible(model)
    count = lambda share, total: min(ROUNDING[rounding](round(share * total, 9)), total)  # noqa: E731
    kernels = {name: layer.weight.detach().float().abs().sum((2, 3)) for name, layer in layers.items()}  # (O, I)
    means = [kernels[name].sum(1) / layer.weight[0].numel() for name, layer in layers.items()]
    weakest = _smallest(torch.cat(means), count(alpha, sum(map(len, means)))).split([len(mean) for mean in means])
    touched, dead = [], 0
    for (name, layer), in_network in zip(layers.items(), weakest, strict=True):
        norms = kernels[name]
        filters = in_network & _smallest(norms.sum(1), count(beta, len(norms)))
        invalid = filters[:, None] & _smallest(norms, count(gamma, norms.shape[1]))
        best = norms.amax(1, keepdim=True)
        dead += int((best < EPSILON).sum())
        invalid &= (best >= EPSILON) & (norms >= EPSILON) & (best / norms).isfinite()
        ratio = torch.where(invalid, (best / norms).clamp(max=max_ratio or math.inf), 1.0)
        if not invalid.any():
            continue
        scale = ratio[..., None, None].to(layer.weight.dtype)
        edit(layer, "weight", lambda weight, scale=scale: weight * scale)
        if optimizer is not None and momentum != "keep":
            factor = scale if momentum == "scale" else (~invalid)[..., None, None].to(scale.dtype)
            edit(layer, "weight", lambda moment, factor=factor: moment * factor, optimizer)
        before, after = float(norms[invalid].mean()), float((norms * ratio)[invalid].mean())
        touched.append({"name": name, "filters": int(invalid.any(1).sum()), "kernels": int(invalid.sum())})
        touched[-1] |= {"mean_norm_before": before, "mean_norm_after": after}
    return {"kernels": sum(row["kernels"] for row in touched), "dead_filters": dead, "layers": touched}


def _smallest(values: Tensor, count: int) -> Tensor:
    """A mask of the `count` smallest values along the last axis; ties go to the lower index."""
    order = values.argsort(dim=-1, stable=True)
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order[..., :count], True)


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
            )
            run.log("reactivation", gamma=gamma, **done)
        return False


def create(options: Options) -> hooks.Hook:
    """The hook of this method."""
    return Reactivation(options)
