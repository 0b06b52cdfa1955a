"""Filter grafting: networks that train side by side and, after every epoch, take over a part of each other's weights.

Source: Meng et al. 2020, "Filter grafting for deep neural networks", and its code, github.com/fxmeng/filter-grafting at ce4b88c,
grafting_cifar/grafting.py.

    W_i <- w W_i + (1 - w) W_(i-1)        w = strength / pi * arctan(steepness * (H_i - H_(i-1))) + 1/2, to two decimals

for every convolution of network i of n, from the weights before any graft; network 1 takes from network n. H is the entropy of a
histogram of the layer's weights. Whatever follows a convolution (its bias, batch norms with their statistics, linear layers) is
mixed with that convolution's w; momentum stays. Of an over-parameterised layer the effective kernel is what counts and is mixed.

The network of the run is the n-th, which the authors' different learning rates leave at the full rate; validation and `select`
look at it alone. The authors also graft after the last epoch, but what they test and save is from before that graft, as here. Each
of their processes prints its own network's accuracy on the test images and the best so far; which network their tables show, they
do not say. Their convolutions are the layers named "conv"; here they are known by their type.

The networks step one after the other: on a CPU core two ResNet-20 as grouped convolutions took 1.4 times, as one vmapped network
twice as long.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline import hooks
from pipeline.config import Block
from pipeline.errors import InputError
from pipeline.evaluation import evaluate
from pipeline.filters import filter_norms
from pipeline.layers import convolutions, edit
from pipeline.precision import autocast


class Options(Block):
    """A block under `revive:`."""

    method: Literal["grafting"]
    networks: int = Field(ge=2)  # trained side by side: each costs the time and memory of one training
    strength: float = Field(ge=0, le=1)  # w lies within 1/2 - strength / 2 and 1/2 + strength / 2
    steepness: float = Field(ge=0)
    bins: int = Field(ge=2)  # of the histograms
    learning_rates: Literal["different", "same"]  # different: network i starts at lr * (1 + cos(pi * (n - i) / n)) / 2
    data: Literal["different", "same"]  # different: every network sees the images in an order of its own
    ship: Literal["own", "best"]  # what is kept: the network of the run, or the best one on the validation images in the end


def histogram(values: Tensor, bins: int) -> Tensor:
    """How many values lie in each of `bins` equal intervals from the smallest to the largest: (bins,).

    As in the authors' code every interval is half-open, so the largest value lies in none (unless rounding lifts the last edge).
    """
    low, high = values.aminmax()
    width = (high - low) / bins
    reached = torch.stack([(values >= low + edge * width).sum() for edge in range(bins + 1)])
    return reached[:-1] - reached[1:]


def entropies(model: nn.Module, bins: int) -> dict[str, float]:
    """For each convolution, by its name, the entropy in nats of the histogram of its effective weights."""
    layers = dict(convolutions(model))
    counts = torch.stack([histogram(layer.weight.detach(), bins) for layer in layers.values()]).tolist()
    shares = [[count / layer.weight.numel() for count in row] for layer, row in zip(layers.values(), counts, strict=True)]
    return {name: -sum(p * math.log(p) for p in row if p) for name, row in zip(layers, shares, strict=True)}


def own_share(own: float, other: float, *, strength: float, steepness: float) -> float:
    """w, from the entropies of a layer in the network that takes and in the one that gives."""
    return round(strength / math.pi * math.atan(steepness * (own - other)) + 0.5, 2)


def relative_rate(number: int, networks: int) -> float:
    """The learning rate of network `number`, counted from 1, as a multiple of the last one's."""
    return (1 + math.cos(math.pi * (networks - number) / networks)) / 2


@torch.no_grad()
def graft(networks: Sequence[nn.Module], *, strength: float, steepness: float, bins: int) -> list[list[dict[str, Any]]]:
    """Graft alike networks in place. Returns for each network what was done to each convolution: its w, its entropy before, and
    the mean L1 norm of its filters before and after."""
    information = [entropies(network, bins) for network in networks]
    norms = [_mean_norms(network) for network in networks]
    places = [_tensors(network) for network in networks]
    before = [[getattr(module, name).detach().clone() for _, module, name in there] for there in places]
    done = []
    for i, network in enumerate(networks):  # number i + 1; of the first, i - 1 is the last
        pairs = [(name, own, information[i - 1][name]) for name, own in information[i].items()]
        share = {name: own_share(own, other, strength=strength, steepness=steepness) for name, own, other in pairs}
        for (layer, module, name), own, other in zip(places[i], before[i], before[i - 1], strict=True):
            mixed = own * share[layer] + other * (1 - share[layer])
            edit(module, name, lambda _, mixed=mixed: mixed)
        rows = zip(share.items(), information[i].values(), norms[i], _mean_norms(network), strict=True)
        keys = ("name", "weight", "entropy", "mean_norm_before", "mean_norm_after")
        done.append([dict(zip(keys, (*layer, *numbers), strict=True)) for layer, *numbers in rows])
    return done


def _mean_norms(model: nn.Module) -> list[float]:
    return torch.stack([filter_norms(layer.weight).mean() for _, layer in convolutions(model)]).tolist()


def _tensors(model: nn.Module) -> list[tuple[str, Any, str]]:
    """Everything that is mixed: (convolution whose w counts, module, tensor of the module). Before the first convolution its w
    counts. Whole numbers are not mixed, nor what a kernel is computed from: only, and first, the batch norms in there."""
    inside, outside = [], []
    layer = next(convolutions(model))[0]
    for place, module in model.named_modules():
        layer = place if isinstance(module, nn.Conv2d) else layer
        hidden = ".parametrizations." in f".{place}."
        if hidden and not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        computed: Any = getattr(module, "parametrizations", [])
        stored = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        names = [*computed, *(name for name, tensor in stored if tensor.is_floating_point())]
        (inside if hidden else outside).extend((layer, module, name) for name in names)
    return inside + outside


class Together(nn.Module):
    """Several networks that act as one of them: `own`."""

    def __init__(self, own: nn.Module, others: Sequence[nn.Module]) -> None:
        super().__init__()
        self.own, self.others = own, nn.ModuleList(others)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x)

    @property
    def networks(self) -> list[nn.Module]:
        """All, in the order in which each takes from the one before."""
        return [*self.others, self.own]


class Grafting(hooks.Hook):
    """Trains other networks beside the run's, and grafts after every epoch but the last."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.streams: list[Iterator[tuple[Tensor, Tensor]]] = []  # the others' batches, of one epoch
        self.streams_epoch = -1

    def coverage(self, model: nn.Module, input_shape: tuple[int, int, int]) -> list[str]:
        if not any(convolutions(model)):
            raise InputError("grafting: the network has no convolution, whose weights are what is compared; choose another method")
        return []

    def prepare(self, run: hooks.Run) -> None:
        options, self.streams_epoch = self.options, -1
        if run.fresh is None and options.learning_rates == options.data == "same":
            run.notes.append("grafting: the networks start alike and see the same images at the same rate: only dropout parts them")
        run.own = run.model
        run.model = Together(run.model, [run.another(number) for number in range(1, options.networks)])

    def parameter_rules(self, run: hooks.Run) -> dict[nn.Parameter, hooks.ParameterRule]:
        if self.options.learning_rates == "same":
            return {}
        rules = {}
        for number, network in enumerate(self._together(run).others, start=1):
            rule = hooks.ParameterRule(lr_scale=relative_rate(number, self.options.networks))
            rules |= dict.fromkeys(network.parameters(), rule)
        return rules

    def penalty(self, run: hooks.Run, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        """The losses of the other networks, whose parameters are none of the run's network's."""
        together = self._together(run)
        if not together.training:
            return None
        same = self.options.data == "same"
        batches = [(images, labels)] * len(together.others) if same else [next(stream) for stream in self._streams(run)]
        losses = []
        for network, (seen, classes) in zip(together.others, batches, strict=True):
            with autocast(run.device, run.fit.precision):
                other = network(seen)
            losses.append(run.task.loss(other.float(), classes, run.fit.label_smoothing))
        return torch.stack(losses).sum()

    def penalty_reads(self, run: hooks.Run) -> tuple[()] | None:
        return () if self.options.data == "same" else None  # else it takes batches of its own

    def after_epoch(self, run: hooks.Run) -> bool:
        options = self.options
        done = graft(self._together(run).networks, strength=options.strength, steepness=options.steepness, bins=options.bins)
        run.log("grafting", layers=done[-1])
        return False

    def finish(self, run: hooks.Run) -> None:
        self.streams = []
        networks = self._together(run).networks
        accuracies = [evaluate(network, run.validation).accuracy for network in networks]
        chosen = len(networks) - 1
        if self.options.ship == "best":
            chosen = max(range(len(networks)), key=lambda i: (accuracies[i], i))  # of equals the run's own
        run.log("shipped", network=chosen + 1, networks=len(networks), validation_accuracy_of_each=accuracies)
        run.model, run.own = networks[chosen], None
        if run.best:
            prefix = "own." if chosen == len(networks) - 1 else f"others.{chosen}."
            run.best = {name.removeprefix(prefix): value for name, value in run.best.items() if name.startswith(prefix)}

    def _together(self, run: hooks.Run) -> Together:
        assert isinstance(run.model, Together)
        return run.model

    def _streams(self, run: hooks.Run) -> list[Iterator[tuple[Tensor, Tensor]]]:
        """The others' batches of this epoch, begun anew in each."""
        if self.streams_epoch != run.epoch:
            self.streams = []
            for number in range(1, self.options.networks):
                batches = copy.copy(run.train)  # the pixels are shared
                batches.seed = hooks.stable_seed(run.seed, run.stage, "grafting", number)
                self.streams.append(run.steps(batches))
            self.streams_epoch = run.epoch
        return self.streams


def create(options: Options) -> hooks.Hook:
    """The hook of this method."""
    return Grafting(options)
