"""ExpandNets, the CL form: a layer as a cascade of three linear ones.

Source: Guo et al. 2020, "ExpandNets: Linear over-parameterization to train compact convolutional networks", and its code,
github.com/GUOShuxuan/expandnets at 065d4d3. With ratio r a convolution I -> O becomes

    1x1 (I -> rI),  the layer's own kernel size (rI -> rO),  1x1 (rO -> O)

each with a bias where the layer has one, nothing between them, the padding before the first. The network's first convolution keeps
its I channels in the first step. Here the cascade is contracted in kernel space once a step, which costs r^2 O^2 I multiply-adds
a tap but nothing an image: same function, same gradients. A linear layer is the case of a kernel without extent (the code's FC
form); a transposed convolution has only this contracted form.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config import Section
from pipeline.expansion import Chosen, Computed, Expandable, Kernel, attach, choose, filters_of


class Options(Section):
    """Options under `train.overparameterize`."""

    method: Literal["expandnet"]
    layers: list[str] = Field(min_length=1)  # patterns of names; ["*"]: every convolution with more than one tap
    ratio: int = Field(ge=1)  # r; 4 as published
    linear: bool  # treat linear layers too
    exact: bool  # start as the layer was; false: three default layers, as published, and the layer's weights are lost


class Cascade(Kernel):
    """The original is the middle kernel, (groups * rO/groups, rI/groups, *kernel). `first`: (groups, rI/groups, I/groups),
    `last`: (groups, O/groups, rO/groups). `first_bias` and `last_bias` only where the layer has a bias."""

    def __init__(self, layer: Expandable, ratio: int, narrow: bool, exact: bool) -> None:
        super().__init__(layer)
        outputs, inputs, _ = filters_of(layer)
        self.per_group, self.exact = outputs // self.groups, exact
        self.inner = (inputs if narrow else ratio * inputs, ratio * self.per_group)  # channels of a group between the steps
        make = lambda rows, columns: layer.weight.new_empty(self.groups, rows, columns)  # noqa: E731
        self.first = nn.Parameter(make(self.inner[0], inputs))
        self.last = nn.Parameter(make(self.per_group, self.inner[1]))
        for matrix in (self.first, self.last):
            _start_matrix(matrix.data, exact)

    def start(self, tensor: Tensor) -> Tensor:
        middle = tensor.new_empty(self.groups * self.inner[1], self.inner[0], *tensor.shape[2:])
        bound = middle[0].numel() ** -0.5
        middle.uniform_(-bound, bound)
        if self.exact:
            grouped, kernel = self._by_group(middle), self._by_group(tensor.detach())
            grouped[:, : kernel.shape[1], : kernel.shape[2]] = kernel
        return middle

    def compose(self, original: Tensor) -> Tensor:
        composed = torch.einsum("gop,gpqm,gqi->goim", self.last, self._by_group(original), self.first)
        return composed.reshape(-1, self.first.shape[2], *original.shape[2:])

    def invert(self, original: Tensor, target: Tensor) -> Tensor:
        change = self._by_group(target - self.compose(original)).double()
        last, first = torch.linalg.pinv(self.last.double()), torch.linalg.pinv(self.first.double())
        step = torch.einsum("gpo,goim,giq->gpqm", last, change, first)
        return original + step.reshape(original.shape).to(original.dtype)

    def keep(self, outputs: Tensor, inputs: Tensor) -> None:
        """The channels between the steps stay: the contracted kernel is exactly the slice."""
        staying = torch.unique(outputs // self.per_group)
        rows = outputs.reshape(len(staying), -1) % self.per_group
        last = torch.stack([self.last.detach()[group, kept] for group, kept in zip(staying.tolist(), rows, strict=True)])
        self.last = nn.Parameter(last)
        self.first = nn.Parameter(self.first.detach()[staying][:, :, inputs].clone())
        self.replace(self._by_group(self.original)[staying].reshape(-1, *self.original.shape[1:]))
        self.groups, self.per_group = len(staying), rows.shape[1]

    def _by_group(self, filters: Tensor) -> Tensor:
        """(groups * P, Q, *kernel) -> (groups, P, Q, M), a view."""
        return filters.reshape(self.groups, len(filters) // self.groups, filters.shape[1], -1)


class CascadeBias(Computed):
    """b' = W_3 (sum over taps of W_2 b_1 + b_2) + b_3: b_2 is the original, (groups * rO/groups,)."""

    def __init__(self, layer: Expandable, kernels: Cascade) -> None:
        super().__init__()
        self.kernels, bias = (kernels,), layer.bias
        assert bias is not None
        self.first_bias = nn.Parameter(bias.new_zeros(kernels.groups, kernels.inner[0]))
        self.last_bias = nn.Parameter(bias.detach().clone())
        if not kernels.exact:
            for parameter, fan_in in ((self.first_bias, kernels.first.shape[2]), (self.last_bias, kernels.inner[1])):
                nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    def start(self, tensor: Tensor) -> Tensor:
        middle = self.kernels[0].original
        bound = 0.0 if self.kernels[0].exact else middle[0].numel() ** -0.5
        return tensor.new_empty(len(middle)).uniform_(-bound, bound)

    def compose(self, original: Tensor) -> Tensor:
        kernels = self.kernels[0]
        taps = kernels._by_group(kernels.original).sum(3)  # (groups, rO/groups, rI/groups)
        middle = torch.einsum("gpq,gq->gp", taps, self.first_bias) + original.reshape(kernels.groups, -1)
        return torch.einsum("gop,gp->go", kernels.last, middle).reshape(-1) + self.last_bias

    def invert(self, original: Tensor, target: Tensor) -> Tensor:
        change = (target - self.compose(original)).reshape(self.kernels[0].groups, -1)
        step = torch.einsum("gpo,go->gp", torch.linalg.pinv(self.kernels[0].last.double()), change.double())
        return original + step.reshape(original.shape).to(original.dtype)

    def keep(self, outputs: Tensor, inputs: Tensor) -> None:
        """The kernels were cut already."""
        before, hidden = len(self.first_bias), self.original.reshape(len(self.first_bias), -1)
        staying = torch.unique(outputs // (len(self.last_bias) // before))
        self.first_bias = nn.Parameter(self.first_bias.detach()[staying].clone())
        self.last_bias = nn.Parameter(self.last_bias.detach()[outputs].clone())
        self.replace(hidden[staying].reshape(-1))


def _start_matrix(matrix: Tensor, exact: bool) -> None:
    """Identities for an exact start, otherwise torch's default for a linear layer. matrix: (groups, rows, columns)."""
    if exact:
        matrix.copy_(torch.eye(*matrix.shape[1:]).expand_as(matrix))
    else:
        matrix.uniform_(-(matrix.shape[2] ** -0.5), matrix.shape[2] ** -0.5)


def expand(model: nn.Module, *, layers: Chosen = ("*",), ratio: int = 4, linear: bool = False, exact: bool = True) -> None:
    """Over-parameterise every convolution with more than one tap, and with `linear` the linear layers, in place."""

    def treats(layer: Any) -> bool:
        return linear if isinstance(layer, nn.Linear) else torch.Size(filters_of(layer)[2]).numel() > 1

    stem = next((module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)), None)
    for layer in choose(model, "expandnet", layers, treats).values():
        kernels = Cascade(layer, ratio, narrow=layer is stem, exact=exact)
        attach(layer, weight=kernels, **({} if layer.bias is None else {"bias": CascadeBias(layer, kernels)}))
