"""Learned group convolution: while training goes on, every group of a 1x1 convolution gives up the inputs it weighs least.

Source: Huang et al. 2018, "CondenseNet: An efficient DenseNet using learned group convolutions", and its code,
github.com/ShichenLiu/CondenseNet at 833a91d (layers.py), the rival of selective convolution in Jeong and Shin 2019.

    groups       output o is of group o modulo G
    condense     at the shares 1/(G-1), 2/(G-1), ..., 1 of `until` of the training's steps, each group drops those I/G of its I
                 inputs whose |w|, summed over the group's outputs, are smallest; so 1/G of them stay
    lasso        until then, the loss gets `lasso` * sum over layers, groups and inputs of sqrt(sum of w^2 over the group's outputs)
    in the end   the layer becomes an index select, a convolution in G groups, and a shuffle of its outputs: the same numbers

The condensation factor is the number of groups, as published. Theirs masks a dropped weight in every forward pass; here it is
set to 0 after every step, which gives the weights that stay the same course. Theirs drops before a step's forward pass, here it
is done after the step before, so that a validation in between already sees it. What an interrupted or short training did not
reach is dropped at the end, and batch norms are estimated again. Their normalisation and ReLU come behind the index select and
ours in front of it: the same numbers, and as many parameters.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline import hooks
from pipeline.channels import follow
from pipeline.config import CompressBlock
from pipeline.errors import InputError
from pipeline.evaluation import settle_batchnorm
from pipeline.layers import ChannelSelect, convolutions, expanded, filtering_layers, insert
from pipeline.surgery import keep


class Options(CompressBlock):
    """A block under `compress:`."""

    method: Literal["lgc"]
    groups: int = Field(ge=2)  # of each learned convolution, which keeps one input in so many; 4 as published for CIFAR
    until: float = Field(gt=0, le=1)  # share of the training's steps after which nothing is dropped any more; 0.5 as published
    lasso: float = Field(ge=0)  # 0 as published for CIFAR, 1e-5 for ImageNet
    linear: float = Field(gt=0, le=1)  # share of a linear layer's inputs that stay, by summed |w|; 0.5 in the published code


def condense(weight: Tensor, kept: Tensor, count: int) -> Tensor:
    """The inputs (G, I) that each group keeps, when of those in `kept` the `count` with the smallest summed |w| go.

    `weight` is (O, I, 1, 1); output o is of group o modulo G.
    """
    groups, inputs = kept.shape
    sums = weight.detach().float().abs().reshape(-1, groups, inputs).sum(0)  # (O / G, G, I) -> (G, I)
    order = sums.masked_fill(~kept, torch.inf).argsort(dim=1, stable=True)
    return kept.scatter(1, order[:, :count], False)


def masked(weight: Tensor, kept: Tensor) -> Tensor:
    """`weight` (O, I, 1, 1) with zeros where an output's group (G, I) does not keep the input."""
    return weight * kept.repeat(len(weight) // len(kept), 1)[..., None, None]


def group_lasso(weight: Tensor, groups: int) -> Tensor:
    """The sum over groups and inputs of the norm of a column, as a scalar; below 1e-3 a norm counts that and has no gradient."""
    squares = weight.float().square().reshape(-1, groups, weight.shape[1]).sum(0)
    return squares.clamp(min=1e-6).sqrt().sum()


@torch.no_grad()
def convert(model: nn.Module, name: str, kept: Tensor) -> None:
    """Replace the convolution `name` by `select`, `layer` and `shuffle`: where only inputs in `kept` (G, I), the same number in
    each group, have weights other than 0, the output is the same."""
    layer: Any = model.get_submodule(name)
    groups, outputs = len(kept), layer.out_channels
    columns = kept.nonzero()[:, 1].reshape(groups, -1)  # (G, I / G)
    order = torch.arange(outputs, device=kept.device).reshape(-1, groups).T.flatten()  # group by group
    each = columns.repeat_interleave(outputs // groups, 0)[..., None, None]  # (O, I / G, 1, 1)
    weight = layer.weight[order].gather(1, each)
    keep(layer, order, columns[0])
    layer.weight.copy_(weight)
    layer.groups, layer.in_channels = groups, columns.numel()
    _select(model, name, columns.flatten())
    insert(model, name, "shuffle", ChannelSelect(order.argsort()))


@torch.no_grad()
def narrow(model: nn.Module, name: str, share: float) -> int:
    """Leave the linear layer `name` this share of its inputs, those of the largest summed |w|; how many that are."""
    layer: Any = model.get_submodule(name)
    count = max(round(share * layer.in_features), 1)
    order = layer.weight.float().abs().sum(0).argsort(descending=True, stable=True)
    inputs = order[:count].sort().values
    keep(layer, torch.arange(layer.out_features, device=inputs.device), inputs)
    _select(model, name, inputs)
    return count


def _select(model: nn.Module, name: str, index: Tensor) -> None:
    """Let the layer read the channels at `index` of those it reads now."""
    parent, _, child = name.rpartition(".")
    there: Any = getattr(model.get_submodule(parent), "select", None) if child == "layer" else None
    if isinstance(there, ChannelSelect):
        there.index = there.index[index]
    else:
        insert(model, name, "select", ChannelSelect(index))


class LearnedGroups(hooks.Hook):
    """The groups' inputs, fewer and fewer."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.steps = 0
        self.stage = 0  # how often inputs were dropped; G - 1 in the end
        self.kept: dict[str, Tensor] = {}

    def coverage(self, model: nn.Module, input_shape: tuple[int, int, int]) -> list[str]:
        inputs, groups = follow(model, input_shape).inputs, self.options.groups
        plain = {n: c for n, c in convolutions(model) if n in inputs and c.groups == 1 and c.kernel_size == (1, 1)}
        self.names = [n for n, c in plain.items() if c.in_channels % groups == c.out_channels % groups == 0]
        self.linear = [n for n, layer in filtering_layers(model) if n in inputs and isinstance(layer, nn.Linear)]
        if not self.names:
            raise InputError(
                f"lgc: the network has no ungrouped 1x1 convolution whose inputs and outputs both divide into {groups} groups; "
                "choose other groups or another method"
            )
        for name in [*self.names, *self.linear]:
            if expanded(model.get_submodule(name)):
                raise InputError(
                    f"lgc: layer {name} is over-parameterised, and groups that read different inputs cannot be cut out of that: "
                    "set train.overparameterize.method to none"
                )
        rest = [name for name in inputs if name not in self.names and name not in self.linear]
        return [f"lgc leaves {', '.join(rest)}: no ungrouped 1x1 convolution of a multiple of {groups} channels"] if rest else []

    def prepare(self, run: hooks.Run) -> None:
        for name in self.names:
            layer: Any = run.network.get_submodule(name)
            self.kept[name] = torch.ones(self.options.groups, layer.in_channels, dtype=torch.bool)

    def penalty(self, run: hooks.Run, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        if not self.options.lasso or self.stage == self.options.groups - 1:
            return None
        layers: list[Any] = [run.network.get_submodule(name) for name in self.names]
        return self.options.lasso * torch.stack([group_lasso(layer.weight, self.options.groups) for layer in layers]).sum()

    def penalty_reads(self, run: hooks.Run) -> int:
        return self.stage

    def after_step(self, run: hooks.Run) -> None:
        self.steps += 1
        share = self.steps / (self.options.until * run.epochs * len(run.train))
        due = min(int(share * (self.options.groups - 1) + 1e-9), self.options.groups - 1)
        if self.stage < due:
            self.drop(run, due)
        if self.stage:
            self.mask(run)

    def drop(self, run: hooks.Run, due: int) -> None:
        """Give up inputs until `due` times they were given up."""
        for name in self.names:
            weight: Any = run.network.get_submodule(name).weight
            kept = self.kept[name].to(weight.device)
            for _ in range(self.stage, due):
                kept = condense(weight, kept, kept.shape[1] // self.options.groups)
            self.kept[name] = kept
        self.stage = due
        run.best, run.best_accuracy = None, -1.0  # an earlier network would lose inputs that it still used
        rows = [{"name": name, "open": int(kept[0].sum()), "inputs": kept.shape[1]} for name, kept in self.kept.items()]
        run.log("condense", layers=rows, step=self.steps)

    @torch.no_grad()
    def mask(self, run: hooks.Run) -> None:
        """Set the dropped weights to 0."""
        for name in self.names:
            weight: Any = run.network.get_submodule(name).weight
            self.kept[name] = self.kept[name].to(weight.device)
            weight.copy_(masked(weight, self.kept[name]))

    def finish(self, run: hooks.Run) -> None:
        late = self.stage < self.options.groups - 1
        if late:
            self.drop(run, self.options.groups - 1)
        self.mask(run)  # also what came back: averages of weights
        for name in self.names:
            convert(run.network, name, self.kept[name])
        linear = {name: narrow(run.network, name, self.options.linear) for name in self.linear if self.options.linear < 1}
        run.log("surgery", groups=dict.fromkeys(self.names, self.options.groups), inputs=linear)
        if late:
            settle_batchnorm(run)

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "stage": self.stage}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.kept)

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.steps, self.stage, self.kept = state["steps"], state["stage"], tensors


def create(options: Options) -> hooks.Hook:
    """The hook of this method."""
    return LearnedGroups(options)
