"""Over-parameterisation by branches with batch norms of their own: while it trains, a convolution is a sum

    y = sum_b BN_b(branch_b(x))

and in evaluation, with the running statistics, one convolution with one kernel and one bias. So `layer.weight` and `layer.bias`
are the merged ones, evaluation costs what the plain network costs, and methods that edit kernels work as ever.

A batch norm that alone reads the convolution can give way to the branches' (`norms: replace`, as in ACNet's and DBB's own
networks) or stay (`add`, as in their pre-activation networks). Merged, the network has the modules it had before: the bias goes
into the layer's bias where it had one; else into the batch norm that gave way, which comes back as y + bias; else into the
running mean of the batch norm that follows; only where there is neither does the layer gain a bias.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.expansion import Computed, Kernel, attach
from pipeline.tracing import norms_after

Norms = Literal["replace", "add"]


class GivenWay(nn.Module):
    """Where a batch norm was whose work the branches before it do. A batch norm becomes one in place, and comes back."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Branches(Kernel):
    """A merged kernel. The original is the kernel of the first branch, of the layer's own size."""

    gave_way: tuple[nn.Module, ...] = ()  # the batch norm; tuples, so that they are no submodules
    follows: tuple[nn.Module, ...] = ()
    had_bias = False

    def __init__(self, layer: nn.Conv2d, branches: int) -> None:
        super().__init__(layer)
        make = lambda: nn.BatchNorm2d(layer.out_channels, device=layer.weight.device, dtype=layer.weight.dtype)  # noqa: E731
        self.norms = nn.ModuleList(make() for _ in range(branches))  # what each branch ends with

    def branches(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        """The sum, with the statistics of this batch where the norms train: (B, I, H, W) -> (B, O, H', W')."""
        raise AssertionError("a subclass says what is summed")

    def others(self) -> tuple[Tensor, Tensor]:
        """Merged kernel (O, I/groups, *kernel) and bias (O,) of all branches but the first."""
        raise AssertionError("a subclass says how they merge")

    def compose(self, original: Tensor) -> Tensor:
        scale, _ = fold(self.norms[0])
        return original * rows(scale, original) + self.others()[0]

    def invert(self, original: Tensor, target: Tensor) -> Tensor:
        """By the first branch alone: the change that it cannot make where its scale is 0 is not made."""
        scale, _ = fold(self.norms[0])
        change = (target - self.compose(original)) / rows(scale, original)
        return original + torch.where(rows(scale, original) == 0, 0, change)

    def shift(self) -> Tensor:
        """The merged bias of all branches: (O,)."""
        return fold(self.norms[0])[1] + self.others()[1]

    def normalising(self) -> bool:
        """Whether any statistic is that of the batch, so that nothing can be merged."""
        return any(norm.training for norm in self.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm))

    def keep(self, outputs: Tensor, inputs: Tensor) -> None:
        self.replace(self.original[outputs][:, inputs])
        for norm in self.norms:
            cut_norm(norm, outputs)

    def renew(self, filters: Tensor) -> None:
        """As in a layer that was just given its branches and starts at what it computed: the first branch alone counts, and the
        statistics are a fresh batch norm's."""
        for index, norm in enumerate(self.norms):
            scale = 0.0 if index else (1 + norm.eps) ** 0.5  # type: ignore[operator]
            for tensor, value in ((norm.weight, scale), (norm.bias, 0.0), (norm.running_mean, 0.0), (norm.running_var, 1.0)):
                tensor.detach()[filters] = value  # type: ignore[operator,union-attr]

    def settle(self, layer: Any) -> None:
        bias = layer.bias.detach()
        del layer.bias
        layer.register_parameter("bias", None)
        if self.gave_way:
            _come_back(self.gave_way[0], torch.zeros_like(bias) if self.had_bias else bias)
        if self.had_bias or not (self.gave_way or self.follows):
            layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
        elif self.follows:
            norm: Any = self.follows[0]
            norm.running_mean -= bias


class Shift(Computed):
    """The merged bias. Its original is not used; an edit of the bias goes into that of the first branch's norm."""

    def __init__(self, kernels: Branches) -> None:
        super().__init__()
        self.kernels = (kernels,)

    def start(self, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor)

    def compose(self, original: Tensor) -> Tensor:
        return self.kernels[0].shift()

    def invert(self, original: Tensor, target: Tensor) -> Tensor:
        first: Any = self.kernels[0].norms[0]
        first.bias += target - self.compose(original)
        return original

    def carry(self, moment: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        return change(moment.clone())

    @property
    def trained(self) -> Tensor:
        first: Any = self.kernels[0].norms[0]
        return first.bias

    def keep(self, outputs: Tensor, inputs: Tensor) -> None:
        self.replace(self.original[outputs])


def branch(
    model: nn.Module,
    layers: dict[str, nn.Conv2d],
    make: Callable[[nn.Conv2d], Branches],
    *,
    norms: Norms,
    gamma: float | None,
) -> None:
    """Give every layer its branches, in place.

    `gamma`: what the scales of all branches' norms start as. None: a start at what the layer computed, in evaluation: its own
    normalisation stays with the first branch and the others' scales are 0.
    """
    following = _norms_after(model, norms)
    for name, layer in layers.items():
        kernels = make(layer)
        norm: Any = model.get_submodule(following[name]) if name in following else None
        replaced = norms == "replace" and type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats
        _start_norms(kernels, layer, norm if replaced else None, gamma)
        kernels.had_bias = layer.bias is not None
        del layer.bias
        layer.register_buffer("bias", layer.weight.new_zeros(layer.out_channels))
        trains = norm.weight.requires_grad if replaced else layer.weight.requires_grad
        if replaced:
            kernels.gave_way = (_give_way(norm),)
        elif norm is not None and norm.running_mean is not None:
            kernels.follows = (norm,)
        attach(layer, weight=kernels, bias=Shift(kernels))
        kernels.norms.requires_grad_(trains)
        kernels.norms.train(norm.training if replaced and norm else layer.training)
        type(layer).forward = _forward  # type: ignore[method-assign]


def _norms_after(model: nn.Module, norms: Norms) -> dict[str, str]:
    try:
        return norms_after(model)
    except InputError as error:
        if norms == "add":
            return {}
        raise InputError(f"{error}; with norms: add nothing needs to be followed") from error


def _forward(self: Any, x: Tensor) -> Tensor:
    kernels: Branches = self.parametrizations.weight[0]
    return kernels.branches(self, x) if kernels.normalising() else nn.Conv2d.forward(self, x)


def _start_norms(kernels: Branches, layer: nn.Conv2d, replaced: Any, gamma: float | None) -> None:
    with torch.no_grad():
        norms: list[Any] = list(kernels.norms)
        for norm in norms:
            norm.weight.fill_(0 if gamma is None else gamma)
        if replaced is not None:
            for norm in norms:
                norm.eps, norm.momentum = replaced.eps, replaced.momentum
        if gamma is not None:
            return
        first: Any = kernels.norms[0]
        if replaced is not None:
            first.load_state_dict(replaced.state_dict())
            first.running_mean -= 0 if layer.bias is None else layer.bias
        else:
            first.weight.fill_((1 + first.eps) ** 0.5)  # with a running variance of 1, a scale of 1
            first.bias.copy_(torch.zeros_like(first.bias) if layer.bias is None else layer.bias)


def _give_way(norm: Any) -> nn.Module:
    norm.trained = (norm.weight.requires_grad, norm.bias.requires_grad)
    norm._parameters.clear()
    norm._buffers.clear()
    norm.__class__ = GivenWay
    return norm


def _come_back(norm: Any, bias: Tensor) -> None:
    """A batch norm in evaluation that adds `bias`."""
    training, eps, momentum, trained = norm.training, norm.eps, norm.momentum, norm.__dict__.pop("trained")
    norm.__class__ = nn.BatchNorm2d
    nn.BatchNorm2d.__init__(norm, len(bias), eps, momentum, device=bias.device, dtype=bias.dtype)
    norm.train(training)
    norm.weight.requires_grad, norm.bias.requires_grad = trained
    with torch.no_grad():
        norm.running_var.fill_(1 - eps)
        norm.bias.copy_(bias)


def fold(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift, (O,) each, that a batch norm amounts to with its running statistics."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def rows(values: Tensor, like: Tensor) -> Tensor:
    """(O,) so that it multiplies the rows of `like`, (O, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def cut_norm(norm: Any, kept: Tensor) -> None:
    """Keep some channels of a batch norm, in place."""
    for name in ("weight", "bias"):
        old = getattr(norm, name)
        setattr(norm, name, nn.Parameter(old.detach()[kept].clone(), requires_grad=old.requires_grad))
    for name in ("running_mean", "running_var"):
        setattr(norm, name, getattr(norm, name)[kept].clone())
    norm.num_features = len(kept)


def aligned(layer: nn.Conv2d, x: Tensor, kernel: Tensor, groups: int) -> Tensor:
    """`layer`'s convolution with a kernel of which one or both sides have length 1, placed at the middle of the layer's own."""
    reach = [
        d * (size // 2) if side == 1 else 0
        for d, size, side in zip(layer.dilation, layer.kernel_size, kernel.shape[2:], strict=True)
    ]
    pads = layer._reversed_padding_repeated_twice  # left, right, top, bottom; for padding "same" and "valid" too
    around = [pads[2] - reach[0], pads[0] - reach[1]]
    dilation = [d if side > 1 else 1 for d, side in zip(layer.dilation, kernel.shape[2:], strict=True)]
    if layer.padding_mode == "zeros" and min(around) >= 0:
        return F.conv2d(x, kernel, None, layer.stride, around, dilation, groups)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if any(pads):
        x = F.pad(x, pads, mode)
    x = x[:, :, reach[0] : x.shape[2] - reach[0], reach[1] : x.shape[3] - reach[1]]
    return F.conv2d(x, kernel, None, layer.stride, 0, dilation, groups)


def centred(kernel: Tensor, height: int, width: int) -> Tensor:
    """`kernel` in the middle of zeros: (O, I, h, w) -> (O, I, height, width); all sides odd."""
    top, left = (height - kernel.shape[2]) // 2, (width - kernel.shape[3]) // 2
    return F.pad(kernel, (left, left, top, top))


def convolve(layer: nn.Conv2d, x: Tensor, kernel: Tensor) -> Tensor:
    """`layer`'s convolution with a kernel of its own size, without bias."""
    return layer._conv_forward(x, kernel, None)
