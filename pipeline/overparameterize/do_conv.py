"""DO-Conv: every input channel's kernel is a product with a matrix of its own.

Source: Cao et al. 2022, "DO-Conv: Depthwise over-parameterized convolutional layer", and its code, github.com/yangyanli/DO-Conv
at 66fa862. A convolution with M taps, M > 1, trains W (O, I/groups, M) and D (I, M, M), and convolves with

    W'[o, i, m] = sum_s (D + E)[i, m, s] W[o, i, s]        E: identities, fixed

D starts at 0 and W as the layer's kernel, so the layer starts as it was. Both decay as the network's other weights do: the decay
pulls D + E towards the identity. For 1 < groups < I the authors' reshape pairs half of W with the D of another input channel;
here each pairs with its own.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config import Section
from pipeline.expansion import Chosen, Expandable, Kernel, attach, choose, filters_of


class Options(Section):
    """Options under `train.overparameterize`."""

    method: Literal["do_conv"]
    layers: list[str] = Field(min_length=1)  # patterns of names; ["*"]: every convolution with more than one tap


class DepthwiseProduct(Kernel):
    """`multiplier` is D, (groups, I/groups, M, M); the original is W in the shape of the layer's filters."""

    def __init__(self, layer: Expandable) -> None:
        super().__init__(layer)
        _, inputs, size = filters_of(layer)
        taps = torch.Size(size).numel()
        self.multiplier = nn.Parameter(layer.weight.new_zeros(self.groups, inputs, taps, taps))

    def compose(self, original: Tensor) -> Tensor:
        composed = torch.einsum("gims,gois->goim", self._product(), self._by_group(original))
        return composed.reshape(original.shape)

    def invert(self, original: Tensor, target: Tensor) -> Tensor:
        inverse = torch.linalg.pinv(self._product().double())
        change = self._by_group(target - self.compose(original)).double()
        return original + torch.einsum("gism,goim->gois", inverse, change).reshape(original.shape).to(original.dtype)

    def keep(self, outputs: Tensor, inputs: Tensor) -> None:
        """What is left of the groups is known by the outputs that stay."""
        staying = torch.unique(outputs // (len(self.original) // self.groups))
        self.multiplier = nn.Parameter(self.multiplier.detach()[staying][:, inputs].clone())
        self.replace(self.original[outputs][:, inputs])
        self.groups = len(staying)

    def _product(self) -> Tensor:
        """D + E."""
        return self.multiplier + torch.eye(self.multiplier.shape[2]).to(self.multiplier)

    def _by_group(self, filters: Tensor) -> Tensor:
        """(O, I/groups, *kernel) -> (groups, O/groups, I/groups, M)."""
        return filters.reshape(self.groups, len(filters) // self.groups, filters.shape[1], -1)


def expand(model: nn.Module, *, layers: Chosen = ("*",)) -> None:
    """Over-parameterise every convolution (of any dimension, transposed or not) with more than one tap, in place."""
    treats = lambda layer: torch.Size(filters_of(layer)[2]).numel() > 1  # noqa: E731
    for layer in choose(model, "do_conv", layers, treats).values():
        attach(layer, weight=DepthwiseProduct(layer))
