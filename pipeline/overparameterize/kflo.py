"""KFLO, kernel filtering linear overparameterization: kernels as linear combinations of more filters.

Source: "Utilizing Excess Resources in Training Neural Networks", and its code, github.com/AmitHenig/KFLO at b9eecdc.
The paper's "KFLO BxR" is depth B, width R.

A layer with O filters trains h = round(width * O) filters W1 and depth - 1 mixing matrices, and convolves with

    W' = W_depth ... W_2 W1        W1: (h, I/groups, kh, kw) as a matrix (h, I/groups * kh * kw), W_i: (h_{i+1}, h_i)

A bias lives at width h and is mixed by the same product. The first O filters of W1 start as those the layer had, the others as
a default layer's, the mixers as identities: at the start W' is exactly the old kernel. In a grouped convolution the mixing runs
across groups in kernel space, as in the authors' code; no feature-space cascade computes that.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline import hooks
from pipeline.config import Section
from pipeline.errors import InputError
from pipeline.layers import FilteringLayer, filtering_layers


class Options(Section):
    """Options under `train.overparameterize`."""

    method: Literal["kflo"]
    depth: int = Field(ge=2)  # B: matrices in the product, W1 included
    width: float = Field(ge=1)  # rho: filters of W1 for each filter of the layer
    l2_factor: float = Field(ge=0)  # of weight_decay * |W'|^2 in the loss: 1.0 as the authors ran it, 0.5 equals SGD's decay
    mixer_decay: float = Field(ge=0)  # weight decay of the mixers; 1e-9 as published


class Mixing(nn.Module):
    """A parametrisation that mixes its original (h, ...) along the first axis into (O, ...). The rows that it adds to the
    layer's own start as draws from U(-bound, bound)."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound
        self.owner: tuple[parametrize.ParametrizationList, ...] = ()  # a tuple, so that it is no submodule

    def matrix(self) -> Tensor:
        """The mixing matrix: (O, h)."""
        raise AssertionError("a subclass says what mixes")

    def forward(self, original: Tensor) -> Tensor:
        """(h, ...) -> (O, ...), in fp32 also under autocast."""
        device = original.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():  # not on "meta"
            return (self.matrix() @ original.reshape(len(original), -1)).reshape(-1, *original.shape[1:])

    def solve(self, original: Tensor, target: Tensor) -> Tensor:
        """The tensor nearest to `original` that mixes into `target`: exact where the matrix has full row rank, the least
        squares solution otherwise."""
        change = (target - self(original)).reshape(len(target), -1)
        step = torch.linalg.pinv(self.matrix().double()) @ change.double()
        return original + step.reshape(original.shape).to(original.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What `layer.weight = weight` stores."""
        if self.owner:
            return self.solve(self.owner[0].original, weight)
        more = torch.empty(self.matrix().shape[1] - len(weight), *weight.shape[1:]).uniform_(-self.bound, self.bound)
        return torch.cat([weight.detach(), more.to(weight)])


class KernelMixing(Mixing):
    """Mixes the kernels of a layer. `mixers` are W_2 ... W_depth, in the order in which they act."""

    def __init__(self, outputs: int, hidden: int, depth: int, bound: float) -> None:
        super().__init__(bound)
        widths = [hidden] * (depth - 1) + [outputs]
        self.mixers = nn.ParameterList(nn.Parameter(torch.eye(o, i)) for i, o in zip(widths, widths[1:], strict=False))

    def matrix(self) -> Tensor:
        product = self.mixers[0]
        for mixer in self.mixers[1:]:
            product = mixer @ product
        return product

    def keep(self, outputs: Tensor, inputs: Tensor) -> None:
        """Keep only some outputs and inputs of the layer. W1 keeps all its filters: the kernel is exactly the slice."""
        last = len(self.mixers) - 1
        self.mixers[last] = nn.Parameter(self.mixers[last].detach()[outputs].clone())
        filters = self.owner[0]
        filters.original = nn.Parameter(filters.original.detach()[:, inputs].clone())


class BiasMixing(Mixing):
    """Mixes the bias of a layer as its kernels are mixed."""

    def __init__(self, kernels: KernelMixing) -> None:
        super().__init__(kernels.bound)
        self.kernels = (kernels,)

    def matrix(self) -> Tensor:
        return self.kernels[0].matrix()

    def keep(self, outputs: Tensor, inputs: Tensor) -> None:
        """The kernels' mixers were sliced already; a bias has nothing of its own to drop."""


def expand_layer(layer: FilteringLayer, *, depth: int, width: float) -> None:
    """Over-parameterise one layer in place."""
    outputs, fan_in = len(layer.weight), layer.weight[0].numel()
    # torch's default initialisation of kernels and biases: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
    kernels = KernelMixing(outputs, round(width * outputs), depth, bound=fan_in**-0.5).to(layer.weight.device)
    tensors: Sequence[tuple[str, Mixing]] = [("weight", kernels)]
    if layer.bias is not None:
        tensors = [*tensors, ("bias", BiasMixing(kernels))]
    for name, mixing in tensors:
        parametrize.register_parametrization(layer, name, mixing)
        mixing.owner = (layer.parametrizations[name],)  # type: ignore[index]


def expand(model: nn.Module, *, depth: int = 2, width: float = 4, l2_factor: float = 1.0, mixer_decay: float = 1e-9) -> None:
    """Over-parameterise every convolution and linear layer of `model`, in place (`l2_factor` and `mixer_decay` only matter
    to the `Hook`). `InputError` where a layer is expanded already or a width below 1 would leave outputs at zero."""
    if depth < 2 or width < 1:
        raise InputError(f"kflo: depth {depth} and width {width}: depth must be at least 2 and width at least 1")
    layers = dict(filtering_layers(model))
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer):
            raise InputError(f"kflo: layer {name} is over-parameterised already; collapse it first")
    for layer in layers.values():
        expand_layer(layer, depth=depth, width=width)


class Hook(hooks.Hook):
    """Regularisation as in the authors' code: W1 has no weight decay, the mixers `mixer_decay`, and the composed kernels pay
    l2_factor * weight_decay * sum |W'|^2 in the loss."""

    def __init__(self, *, depth: int = 2, width: float = 4, l2_factor: float = 1.0, mixer_decay: float = 1e-9) -> None:
        self.l2_factor, self.mixer_decay = l2_factor, mixer_decay

    def parameter_rules(self, run: hooks.Run) -> dict[nn.Parameter, hooks.ParameterRule]:
        rules = {}
        for _, layer in filtering_layers(run.model):
            for parametrization in getattr(layer, "parametrizations", {}).values():
                rules[parametrization.original] = hooks.ParameterRule(weight_decay=0.0)
                for mixer in parametrization.parameters():
                    rules.setdefault(mixer, hooks.ParameterRule(weight_decay=self.mixer_decay))
        return rules

    def penalty(self, run: hooks.Run, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        strength = self.l2_factor * run.fit.weight_decay
        kernels = [layer.weight for _, layer in filtering_layers(run.model) if parametrize.is_parametrized(layer)]
        if not strength or not kernels:
            return None
        return strength * torch.stack([kernel.square().sum() for kernel in kernels]).sum()
