"""ACNet: beside every k x k convolution a k x 1 and a 1 x k one, each with its own batch norm; the outputs are added.

Source: Ding et al. 2019, "ACNet: Strengthening the kernel skeletons for powerful CNN via asymmetric convolution blocks", and its
code, github.com/DingXiaoH/ACNet at 748fb0c. Merged: W' = s_0 W + s_1 W_{k x 1} + s_2 W_{1 x k}, the narrow kernels on the middle
column and row, s = gamma / sqrt(var + eps); b' = sum of beta - mean * s.

As in that code 1 x 1 and larger than 6 x 6 convolutions stay plain, and so do even sizes, where the branches would not align. The
scales start at 1/3 (0.333) in its CIFAR networks with batch norms after the convolutions, and at 1 in the others. With a
dilation the narrow branches here stay aligned with the square one; that code shifts them.
"""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline.branches import Branches, Norms, aligned, branch, centred, convolve, fold, rows
from pipeline.config import Section
from pipeline.expansion import Chosen, choose, default_bound, plain_class


class Options(Section):
    """Options under `train.overparameterize`."""

    method: Literal["acnet"]
    layers: list[str] = Field(min_length=1)  # patterns of names; ["*"]: every odd kernel of 3 to 5 taps a side
    gamma: float | None = Field(ge=0)  # what the branches' scales start as; null: an exact start, only the square one not 0
    norms: Norms  # the batch norm that alone reads the layer: replace it by the branches' own, or add them before it


class Asymmetric(Branches):
    """The original is the square kernel."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer, branches=3)
        outputs, inputs, height, width = layer.weight.shape
        self.vertical = nn.Parameter(layer.weight.new_empty(outputs, inputs, height, 1))
        self.horizontal = nn.Parameter(layer.weight.new_empty(outputs, inputs, 1, width))
        for kernel, taps in ((self.vertical, width), (self.horizontal, height)):
            bound = default_bound(layer) * taps**0.5  # torch's default for the smaller fan-in
            nn.init.uniform_(kernel, -bound, bound)

    def branches(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        square, vertical, horizontal = self.norms
        y = square(convolve(layer, x, self.original))
        y = y + vertical(aligned(layer, x, self.vertical, layer.groups))
        return y + horizontal(aligned(layer, x, self.horizontal, layer.groups))

    def others(self) -> tuple[Tensor, Tensor]:
        (scale_v, shift_v), (scale_h, shift_h) = fold(self.norms[1]), fold(self.norms[2])
        height, width = self.vertical.shape[2], self.horizontal.shape[3]
        tall = centred(self.vertical * rows(scale_v, self.vertical), height, width)
        return tall + centred(self.horizontal * rows(scale_h, self.horizontal), height, width), shift_v + shift_h

    def keep(self, outputs: Tensor, inputs: Tensor) -> None:
        super().keep(outputs, inputs)
        self.vertical = nn.Parameter(self.vertical.detach()[outputs][:, inputs].clone())
        self.horizontal = nn.Parameter(self.horizontal.detach()[outputs][:, inputs].clone())


def treats(layer: Any) -> bool:
    """Convolutions with odd sides of 3 to 5."""
    return plain_class(layer) is nn.Conv2d and all(side in (3, 5) for side in layer.kernel_size)


def expand(model: nn.Module, *, layers: Chosen = ("*",), gamma: float | None = None, norms: Norms = "replace") -> None:
    """Give every 3 x 3 to 5 x 5 convolution its asymmetric branches, in place."""
    branch(model, choose(model, "acnet", layers, treats), Asymmetric, norms=norms, gamma=gamma)
