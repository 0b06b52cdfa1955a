"""Diverse branch block: four branches of different complexity, each with batch norms of its own, added.

Source: Ding et al. 2021, "Diverse branch block: Building a convolution as an Inception-like unit", and its code,
github.com/DingXiaoH/DiverseBranchBlock at 8d2b16b. For a k x k convolution I -> O:

    BN(k x k)  +  BN(1 x 1)  +  BN(k x k(BN(1 x 1, I -> I)))  +  BN(average k x k(BN(1 x 1)))

The inner 1 x 1 of the third branch starts as the identity. A batch norm before a spatial step pads with the value it gives a zero,
so that everything merges exactly. A depthwise convolution has no second branch, averages its input, and doubles its inner channels.
As in that code 1 x 1 and larger than 6 x 6 convolutions stay plain; even sizes, dilation and padding other than zeros do too.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.branches import Branches, Norms, aligned, branch, centred, convolve, cut_norm, fold, rows
from pipeline.config import Section
from pipeline.expansion import Chosen, choose, plain_class


class Options(Section):
    """Options under `train.overparameterize`."""

    method: Literal["dbb"]
    layers: list[str] = Field(min_length=1)  # patterns of names; ["*"]: every odd kernel of 3 to 5 taps a side
    gamma: float | None = Field(ge=0)  # what the scales of the branches' last norms start as; 1 as published; null: an exact start
    norms: Norms  # the batch norm that alone reads the layer: replace it by the branches' own, or add them before it


class Diverse(Branches):
    """The original is the k x k kernel. Letters: g groups, Q inner channels of a group, I and O those of the layer's groups."""

    identity: Tensor

    def __init__(self, layer: nn.Conv2d) -> None:
        depthwise = layer.groups == layer.in_channels == layer.out_channels
        super().__init__(layer, branches=3 if depthwise else 4)
        self.depthwise = depthwise
        outputs, inputs, *size = layer.weight.shape
        inner = 2 if self.depthwise else inputs
        draw = lambda *shape: _default(layer.weight.new_empty(*shape))  # noqa: E731
        start = draw(layer.groups, inner, inputs) if self.depthwise else layer.weight.new_zeros(layer.groups, inner, inputs)
        self.inner = nn.Parameter(start)  # (g, Q, I)
        identity = torch.zeros(inner, inputs) if self.depthwise else torch.eye(inputs)
        self.register_buffer("identity", identity.to(layer.weight).repeat(layer.groups, 1, 1))
        self.outer = nn.Parameter(draw(outputs, inner, *size))  # (O, Q, k, k)
        make = lambda channels: nn.BatchNorm2d(channels, device=layer.weight.device, dtype=layer.weight.dtype)  # noqa: E731
        self.inner_norm = make(layer.groups * inner)
        if not self.depthwise:
            self.point, self.mean = nn.Parameter(draw(outputs, inputs, 1, 1)), nn.Parameter(draw(outputs, inputs, 1, 1))
            self.mean_norm = make(outputs)

    def branches(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        pads, groups, size = layer._reversed_padding_repeated_twice, layer.groups, layer.kernel_size
        y = self.norms[0](convolve(layer, x, self.original))
        inner = (self.inner + self.identity).flatten(0, 1)[:, :, None, None]
        inside = _padded(self.inner_norm(F.conv2d(x, inner, groups=groups)), self.inner_norm, pads)
        y = y + self.norms[1](F.conv2d(inside, self.outer, None, layer.stride, groups=groups))
        if self.depthwise:
            return y + self.norms[2](F.avg_pool2d(F.pad(x, pads), size, layer.stride))
        averaged = _padded(self.mean_norm(F.conv2d(x, self.mean, groups=groups)), self.mean_norm, pads)
        y = y + self.norms[2](F.avg_pool2d(averaged, size, layer.stride))
        return y + self.norms[3](aligned(layer, x, self.point, groups))

    def others(self) -> tuple[Tensor, Tensor]:
        size = self.outer.shape[2:]
        (scale, shift), (inner_scale, inner_shift) = fold(self.norms[1]), fold(self.inner_norm)
        groups, inner, _ = self.inner.shape
        first = (self.inner + self.identity) * inner_scale.reshape(groups, inner, 1)
        second = (self.outer * rows(scale, self.outer)).flatten(2).unflatten(0, (groups, -1))  # (g, O, Q, k * k)
        kernel = torch.einsum("goqm,gqi->goim", second, first).flatten(0, 1).unflatten(2, size)
        bias = torch.einsum("goqm,gq->go", second, inner_shift.reshape(groups, inner)).flatten() + shift

        (scale, shift), taps = fold(self.norms[2]), size.numel()
        if self.depthwise:
            return kernel + rows(scale / taps, kernel), bias + shift
        mean_scale, mean_shift = fold(self.mean_norm)
        kernel = kernel + self.mean * rows(scale * mean_scale / taps, self.mean)  # the same at every tap
        bias = bias + scale * mean_shift + shift
        scale, shift = fold(self.norms[3])
        return kernel + centred(self.point * rows(scale, self.point), *size), bias + shift

    def keep(self, outputs: Tensor, inputs: Tensor) -> None:
        """All inner channels of the groups that stay, stay."""
        groups, inner, _ = self.inner.shape
        staying = torch.unique(outputs // (len(self.original) // groups))
        super().keep(outputs, inputs)
        self.inner = nn.Parameter(self.inner.detach()[staying][:, :, inputs].clone())
        self.identity = self.identity[staying][:, :, inputs].clone()
        self.outer = nn.Parameter(self.outer.detach()[outputs].clone())
        cut_norm(self.inner_norm, (staying[:, None] * inner + torch.arange(inner)).flatten())
        if not self.depthwise:
            self.point = nn.Parameter(self.point.detach()[outputs][:, inputs].clone())
            self.mean = nn.Parameter(self.mean.detach()[outputs][:, inputs].clone())
            cut_norm(self.mean_norm, outputs)


def _default(kernel: Tensor) -> Tensor:
    """torch's default draw."""
    return kernel.uniform_(-(kernel[0].numel() ** -0.5), kernel[0].numel() ** -0.5)


def _padded(y: Tensor, norm: Any, pads: list[int]) -> Tensor:
    """`y` with a border of what the norm's running statistics make of a zero."""
    if not any(pads):
        return y
    _, shift = fold(norm)
    inside = F.pad(y.new_ones(y.shape[2:], dtype=torch.bool), pads)
    return torch.where(inside, F.pad(y, pads), shift.detach().to(y.dtype)[:, None, None])


def treats(layer: Any) -> bool:
    """Convolutions with odd sides of 3 to 5, without dilation, padded by zeros."""
    odd = plain_class(layer) is nn.Conv2d and all(side in (3, 5) for side in layer.kernel_size)
    return odd and set(layer.dilation) == {1} and layer.padding_mode == "zeros"


def expand(model: nn.Module, *, layers: Chosen = ("*",), gamma: float | None = None, norms: Norms = "replace") -> None:
    """Give every 3 x 3 to 5 x 5 convolution its diverse branches, in place."""
    branch(model, choose(model, "dbb", layers, treats), Diverse, norms=norms, gamma=gamma)
