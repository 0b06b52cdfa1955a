"""Involution: a convolution turned round. Every pixel makes its own kernel, which all channels of a group share.

Source: Li et al. 2021, "Involution: Inverting the Inherence of Convolution for Visual Recognition", equations 4 to 6, and
d-li14/involution at 21c3158, cls/mmcls/models/utils/involution_naive.py, whose parameter names these are.

The authors copy the image k*k times, once for each tap of the kernel (unfold). Here the taps are multiplied and added one by
one on shifted slices: 3 to 9 times as fast in training on a CPU core, in a k*k-th of the memory. In ONNX they are plain Pad,
Slice, Concat, Mul, ReduceSum and Add.

Letters: B images, C channels in G groups of 16, k x k taps, s stride, h = H/s and w = W/s pixels.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from pipeline.errors import InputError

Phases = list[list[Tensor]]


class Involve(nn.Module):
    """Applies kernels made elsewhere: x (B, C, H, W), kernels (B, G*k*k, h, w) -> (B, C, h, w), with zeros around the image.

    The channels of `kernels` count the groups first, then the taps row by row. Nothing but the three numbers is stored: G is
    read from x, so that channels can be cut a group at a time. `InputError` where the shapes do not fit each other.
    """

    def __init__(self, kernel_size: int, stride: int, group_channels: int = 16) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0 or stride < 1 or group_channels < 1:
            raise InputError(
                f"involution: kernel size {kernel_size}, stride {stride}, {group_channels} channels a group: the kernel size must "
                "be odd (1, 3, 5, 7, ...) so that a kernel has a middle, and all three at least 1"
            )
        self.kernel_size, self.stride, self.group_channels = kernel_size, stride, group_channels

    def forward(self, x: Tensor, kernels: Tensor) -> Tensor:
        return involve(x, kernels, self.kernel_size, self.stride, self.group_channels)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, group_channels={self.group_channels}"


class Involution(nn.Module):
    """(B, C, H, W) -> (B, C, h, w): kernels from the pixels, averaged over the stride, through a 1x1 bottleneck of C/4."""

    def __init__(self, channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.involve = Involve(kernel_size, stride)
        groups, rest = divmod(channels, self.involve.group_channels)
        if rest or not groups:
            raise InputError(f"involution: {channels} channels do not divide into groups of {self.involve.group_channels}")
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else None
        self.conv1 = ConvNorm(channels, channels // 4, 1)
        self.conv2 = Conv(channels // 4, groups * kernel_size**2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x if self.avgpool is None else self.avgpool(x)  # (B, C, H, W) -> (B, C, h, w)
        return self.involve(x, self.conv2(self.conv1(pooled)))  # kernels: -> (B, C/4, h, w) -> (B, G*k*k, h, w)


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU: (B, I, H, W) -> (B, O, H/s, W/s)."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class Conv(nn.Module):
    """A biased 1x1 convolution: (B, I, h, w) -> (B, O, h, w)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def involve(x: Tensor, kernels: Tensor, kernel_size: int, stride: int, group_channels: int) -> Tensor:
    """What `Involve` computes, in float32 at least: a sum of 49 products in bf16 would lose 3 of its 8 bits."""
    _check(x, kernels, kernel_size, stride, group_channels)
    wide = torch.promote_types(x.dtype, torch.float32)
    operands = x.to(wide).contiguous(), kernels.to(wide).contiguous()  # short rows of 16 channels would be slow to walk
    if torch.compiler.is_exporting():
        return _multiply_rows(*operands, kernel_size, stride, group_channels).to(x.dtype)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
        made: Any = _Taps.apply(*operands, kernel_size, stride, group_channels)
    else:
        made = _multiply_taps(*operands, kernel_size, stride, group_channels)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return made.to(x.dtype, memory_format=torch.channels_last if last else torch.contiguous_format)


fx.wrap("involve")  # one node of a traced network: its checks read shapes, which a trace does not know


def _check(x: Tensor, kernels: Tensor, kernel_size: int, stride: int, group_channels: int) -> None:
    channels, height, width = x.shape[1:]
    if height % stride or width % stride:
        raise InputError(
            f"involution of stride {stride}: an image of {height}x{width} pixels does not divide by it; "
            f"choose an image size (data.image_size, or data.crop, in params.yaml) that gives multiples of {stride} here"
        )
    if channels % group_channels:
        raise InputError(f"involution: {channels} channels do not divide into groups of {group_channels}")
    expected = (channels // group_channels * kernel_size**2, height // stride, width // stride)
    if tuple(kernels.shape[1:]) != expected:
        raise InputError(f"involution: kernels of shape {tuple(kernels.shape[1:])} for an image that needs {expected}")


class _Taps(torch.autograd.Function):
    """The taps with a gradient of their own: autograd's would fill one image of zeros for each of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor, k: int, s: int, group_channels: int) -> Tensor:
        ctx.save_for_backward(x, kernels)
        ctx.numbers = k, s, group_channels
        return _multiply_taps(x, kernels, k, s, group_channels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Each tap sends the gradient back to the pixels it read, by its weight, and to its weight, by what it read."""
        x, kernels = ctx.saved_tensors
        k, s, group_channels = ctx.numbers
        phases, by_tap = _phases(x, k, s, group_channels), kernels.unflatten(1, (-1, k * k))
        g = gradient.contiguous().unflatten(1, (-1, group_channels))
        g_phases = [[torch.zeros_like(phase) for phase in row] for row in phases]
        g_by_tap = torch.empty_like(by_tap)
        reads = zip(_shifted(phases, k, s, kernels.shape[2:]), _shifted(g_phases, k, s, kernels.shape[2:]), strict=True)
        for tap, (read, g_read) in enumerate(reads):
            g_read.addcmul_(g, by_tap[:, :, tap, None])
            torch.sum(g * read, 2, out=g_by_tap[:, :, tap])
        g_padded = x.new_empty(*x.shape[:2], *(side + k - 1 for side in x.shape[2:])).unflatten(1, (-1, group_channels))
        for i, row in enumerate(g_phases):
            for j, phase in enumerate(row):
                g_padded[..., i::s, j::s] = phase
        p = k // 2
        return g_padded.flatten(1, 2)[..., p : p + x.shape[2], p : p + x.shape[3]], g_by_tap.flatten(1, 2), None, None, None


def _multiply_taps(x: Tensor, kernels: Tensor, k: int, s: int, group_channels: int) -> Tensor:
    by_tap = kernels.unflatten(1, (-1, k * k))  # (B, G, k*k, h, w)
    phases = _phases(x, k, s, group_channels)
    out = torch.zeros_like(phases[0][0][..., : kernels.shape[2], : kernels.shape[3]])  # (B, G, 16, h, w)
    for tap, read in enumerate(_shifted(phases, k, s, kernels.shape[2:])):
        out.addcmul_(read, by_tap[:, :, tap, None])
    return out.flatten(1, 2)


def _multiply_rows(x: Tensor, kernels: Tensor, k: int, s: int, group_channels: int) -> Tensor:
    """The same a row of taps at a time: slower here and as fast in ONNX Runtime, but a fifth of the operators, whose number is what
    an export takes long for. B and G share an axis, so that no tensor has more than five."""
    (channels, height, width), p = x.shape[1:], k // 2
    padded = (
        F.pad(x, (p, p, p, p)).unflatten(1, (-1, group_channels)).flatten(0, 1)[:, :, None]
    )  # (BG, 16, 1, H + k - 1, W + k - 1)
    columns = torch.cat([padded[..., j : j + width : s] for j in range(k)], 2)  # (BG, 16, k, H + k - 1, w)
    by_row = kernels.unflatten(1, (-1, k * k)).flatten(0, 1)[:, None].split(k, 2)  # k times (BG, 1, k, h, w)
    rows = [(columns[..., i : i + height : s, :] * row).sum(2) for i, row in enumerate(by_row)]
    return sum(rows[1:], rows[0]).unflatten(0, (-1, channels // group_channels)).flatten(1, 2)


def _phases(x: Tensor, k: int, s: int, group_channels: int) -> Phases:
    """The padded image (B, G, 16, H + k - 1, W + k - 1), every s-th row and column from each of the first s: what a tap reads
    lies side by side then, and is read many times."""
    padded = F.pad(x, (k // 2,) * 4).unflatten(1, (-1, group_channels))
    return [[padded[..., i::s, j::s].contiguous() for j in range(s)] for i in range(s)]


def _shifted(phases: Phases, k: int, s: int, size: torch.Size) -> Iterator[Tensor]:
    """What each tap reads, (B, G, 16, h, w), tap by tap."""
    h, w = size
    for i in range(k):
        for j in range(k):
            yield phases[i % s][j % s][..., i // s : i // s + h, j // s : j // s + w]
