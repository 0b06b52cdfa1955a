"""ACNet and DBB against networks of ordinary modules that compute their branches in feature space, and where biases and batch
norms go when they merge."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drawn_layers import randomise
from torch import Tensor, nn

from pipeline.overparameterize import collapse, overparameterize

CLOSE = {"atol": 1e-9, "rtol": 1e-9}  # everything here is computed in fp64
SHAPES: dict[str, dict[str, Any]] = {
    "padded": {"kernel_size": 3, "padding": 1},
    "unpadded, strided": {"kernel_size": 3, "stride": 2},
    "same": {"kernel_size": 5, "padding": "same"},
    "padded more than needed": {"kernel_size": 3, "padding": (2, 3), "stride": (1, 2)},
    "padded less than needed": {"kernel_size": 5, "padding": 1},
    "rectangular": {"kernel_size": (3, 5), "padding": (1, 0)},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4, "out_channels": 4},
    "depthwise, more outputs": {"kernel_size": 3, "padding": 1, "groups": 4, "out_channels": 8},
}
UNUSUAL: dict[str, dict[str, Any]] = {  # that DBB leaves plain
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "dilated, same": {"kernel_size": (5, 3), "padding": "same", "dilation": (1, 2)},
    "circular": {"kernel_size": 5, "padding": (2, 1), "padding_mode": "circular"},
    "reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "stride": 2},
}


class Padding(nn.Module):
    """Around an image what the layer puts there; `value` in place of zeros."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        reach = [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        top, left = reach if layer.padding == "same" else (0, 0) if layer.padding == "valid" else layer.padding
        self.sides, self.mode = (left, left, top, top), layer.padding_mode

    def forward(self, x: Tensor, value: Tensor | None = None) -> Tensor:
        if value is None:
            return F.pad(x, self.sides, "constant" if self.mode == "zeros" else self.mode)
        return F.pad(x - value[:, None, None], self.sides) + value[:, None, None]


class Cropped(nn.Module):
    """A thin convolution whose taps lie at the middle of the layer's own."""

    def __init__(self, layer: nn.Conv2d, height: int, width: int) -> None:
        super().__init__()
        self.pad, (full_height, full_width), (down, right) = Padding(layer), layer.kernel_size, layer.dilation
        self.top, self.left = down * (full_height - height) // 2, right * (full_width - width) // 2
        arguments: Any = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups, "bias": False}
        self.conv = nn.Conv2d(layer.in_channels, layer.out_channels, (height, width), **arguments)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pad(x)
        return self.conv(x[:, :, self.top : x.shape[2] - self.top, self.left : x.shape[3] - self.left])


class AcNet(nn.Module):
    """Three convolutions side by side, each with its batch norm."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        height, width = layer.kernel_size
        self.convs = nn.ModuleList([Cropped(layer, height, width), Cropped(layer, height, 1), Cropped(layer, 1, width)])
        self.norms = nn.ModuleList(nn.BatchNorm2d(layer.out_channels) for _ in self.convs)

    def forward(self, x: Tensor) -> Tensor:
        return sum((norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=True)), torch.zeros(()))

    def pairs(self, expanded: Any) -> list[tuple[Tensor, Tensor]]:
        """(a tensor of the expanded layer, this network's)."""
        kernels = expanded.parametrizations.weight[0]
        own = [expanded.parametrizations.weight.original, kernels.vertical, kernels.horizontal]
        found = [(tensor, conv.conv.weight) for tensor, conv in zip(own, self.convs, strict=True)]  # type: ignore[union-attr]
        return found + of_norms(kernels.norms, self.norms)


class Dbb(nn.Module):
    """k x k; 1 x 1 then k x k; 1 x 1 then average; 1 x 1. A depthwise one averages its input and has no last branch."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        channels, outputs, groups = layer.in_channels, layer.out_channels, layer.groups
        self.depthwise = groups == channels == outputs
        middle = 2 * channels if self.depthwise else channels
        self.pad = Padding(layer)
        self.full = nn.Conv2d(channels, outputs, layer.kernel_size, layer.stride, groups=groups, bias=False)
        self.narrow = nn.Conv2d(channels, middle, 1, groups=groups, bias=False)
        self.wide = nn.Conv2d(middle, outputs, layer.kernel_size, layer.stride, groups=groups, bias=False)
        self.average = nn.AvgPool2d(layer.kernel_size, layer.stride)
        self.before_average = nn.Conv2d(channels, outputs, 1, groups=groups, bias=False)
        self.point = Cropped(layer, 1, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(3 if self.depthwise else 4))
        self.inner, self.averaged = nn.BatchNorm2d(middle), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        border = lambda norm, y: self.pad(y, at_zero(norm))  # noqa: E731
        y = self.norms[0](self.full(self.pad(x))) + self.norms[1](self.wide(border(self.inner, self.inner(self.narrow(x)))))
        if self.depthwise:
            return y + self.norms[2](self.average(self.pad(x)))
        y = y + self.norms[2](self.average(border(self.averaged, self.averaged(self.before_average(x)))))
        return y + self.norms[3](self.point(x))

    def pairs(self, expanded: Any) -> list[tuple[Tensor, Tensor]]:
        kernels = expanded.parametrizations.weight[0]
        found = [(expanded.parametrizations.weight.original, self.full.weight), (kernels.outer, self.wide.weight)]
        found += of_norms([*kernels.norms, kernels.inner_norm], [*self.norms, self.inner])
        if not self.depthwise:
            found += [(kernels.point, self.point.conv.weight), (kernels.mean, self.before_average.weight)]
            found += of_norms([kernels.mean_norm], [self.averaged])
        return found


def at_zero(norm: nn.BatchNorm2d) -> Tensor:
    """What the norm makes of a zero in evaluation."""
    assert norm.running_mean is not None
    return copy.deepcopy(norm).eval()(torch.zeros_like(norm.running_mean)[None, :, None, None]).flatten().detach()


def of_norms(own: Any, others: Any) -> list[tuple[Tensor, Tensor]]:
    names = ("weight", "bias", "running_mean", "running_var")
    return [(getattr(norm, name), getattr(other, name)) for norm, other in zip(own, others, strict=True) for name in names]


REFERENCES: dict[str, type[AcNet] | type[Dbb]] = {"acnet": AcNet, "dbb": Dbb}
CASES = [("acnet", shape) for shape in SHAPES | UNUSUAL] + [("dbb", shape) for shape in SHAPES]


@pytest.mark.parametrize("gamma", [1 / 3, None])
@pytest.mark.parametrize(("method", "shape"), CASES)
def test_training_is_that_of_branches_in_feature_space(method: str, shape: str, gamma: float | None) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Conv2d(**{"in_channels": 4, "out_channels": 6, "bias": False, **(SHAPES | UNUSUAL)[shape]})
    reference: Any = REFERENCES[method](layer).double()
    model: Any = overparameterize(nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels)), method, gamma=gamma).double()
    kernels = model[0].parametrizations.weight[0]
    with torch.no_grad():
        if gamma is None:
            randomise(model)
        for own, other in reference.pairs(model[0]):
            other.copy_(own)
        if method == "dbb":  # the stored matrix is the difference from the identity (of a depthwise layer, from nothing)
            kernels.inner += torch.randn_like(kernels.inner) / 4
            eye = 0 if reference.depthwise else torch.eye(layer.in_channels // layer.groups).repeat(layer.groups, 1)
            reference.narrow.weight.copy_((kernels.inner.flatten(0, 1) + eye)[:, :, None, None])
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9) for network in (model, reference)]
    for _ in range(3):
        x = torch.randn(5, 4, 8, 9, dtype=torch.float64)
        seen, given = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, wanted = model(seen), reference(given)
        torch.testing.assert_close(y, wanted, **CLOSE)
        weights = torch.randn_like(y)
        for optimizer, loss in zip(optimizers, ((y * weights).mean(), (wanted * weights).mean()), strict=True):
            optimizer.zero_grad()
            loss.backward()
        torch.testing.assert_close(seen.grad, given.grad, **CLOSE)
        for own, other in reference.pairs(model[0]):
            torch.testing.assert_close(own.grad, other.grad, **CLOSE)
        if method == "dbb":
            torch.testing.assert_close(kernels.inner.grad.flatten(), reference.narrow.weight.grad.flatten(), **CLOSE)
        for optimizer in optimizers:
            optimizer.step()
    for own, other in reference.pairs(model[0]):
        torch.testing.assert_close(own, other, **CLOSE)
    x = torch.randn(5, 4, 8, 9, dtype=torch.float64)
    wanted = reference.eval()(x)
    torch.testing.assert_close(model.eval()(x), wanted, **CLOSE)
    merged = collapse(model)
    assert [type(module) for module in merged] == [nn.Conv2d, nn.BatchNorm2d] and merged[0].bias is None
    torch.testing.assert_close(merged(x), wanted, **CLOSE)


def statistics(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in evaluation."""
    scale = torch.ones(norm.num_features, dtype=torch.float64) if norm.weight is None else norm.weight
    scale = scale / (norm.running_var + norm.eps).sqrt()
    return scale, (0 if norm.bias is None else norm.bias) - norm.running_mean * scale


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("follower", ["nothing", "norm", "fixed norm", "untracked norm"])
@pytest.mark.parametrize("norms", ["replace", "add"])
@pytest.mark.parametrize("method", ["acnet", "dbb"])
@torch.no_grad()
def test_a_merged_bias_goes_where_the_network_has_a_place_for_it(method: str, norms: str, follower: str, bias: bool) -> None:
    torch.manual_seed(0)
    arguments = {"norm": {}, "fixed norm": {"affine": False}, "untracked norm": {"track_running_stats": False}}
    after = nn.BatchNorm2d(6, eps=1e-3, momentum=0.2, **arguments[follower]) if follower in arguments else nn.Identity()
    plain: Any = randomise(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=bias), after, nn.ReLU())).double().eval()
    x, wanted = torch.randn(5, 4, 8, 9, dtype=torch.float64), copy.deepcopy(plain)
    model = overparameterize(copy.deepcopy(plain), method, norms=norms)
    replaced = follower == "norm" and norms == "replace"
    assert (type(model[1]) is type(plain[1])) is not replaced
    assert {(norm.eps, norm.momentum) for norm in model[0].parametrizations.weight[0].norms} == {
        (1e-3, 0.2) if replaced else (1e-5, 0.1)
    }
    torch.testing.assert_close(model(x), plain(x), **CLOSE)
    randomise(model[0], 1)
    expected = model(x)
    kernel, shift = model[0].weight.clone(), model[0].bias.clone()
    merged = collapse(model)
    torch.testing.assert_close(merged(x), expected, **CLOSE)
    assert [type(module) for module in merged] == [type(module) for module in wanted]
    assert repr(merged[1]) == repr(wanted[1]) and torch.equal(merged[0].weight, kernel)
    absorbs = not bias and follower in ("norm", "fixed norm")
    assert merged[0].bias is None if absorbs else torch.equal(merged[0].bias, shift)
    if replaced:  # it adds what the layer cannot
        scale, added = statistics(merged[1])
        torch.testing.assert_close(scale, torch.ones_like(scale), **CLOSE)
        torch.testing.assert_close(added, torch.zeros_like(shift) if bias else shift, **CLOSE)
    elif absorbs:
        moved = merged[1].state_dict() | {"running_mean": wanted[1].running_mean}
        torch.testing.assert_close(merged[1].running_mean, wanted[1].running_mean - shift, **CLOSE)
        assert all(torch.equal(tensor, moved[name]) for name, tensor in wanted[1].state_dict().items())


@pytest.mark.parametrize("method", ["acnet", "dbb"])
def test_only_a_norm_that_alone_reads_the_layer_gives_way(method: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alone, self.shared, self.twice, self.last = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(4))
            self.norm_a, self.norm_s, self.norm_t, self.norm_r = (nn.BatchNorm2d(4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm_a(self.alone(x))
            y = self.shared(x)
            x = self.norm_s(y) + y
            x = self.norm_t(self.twice(self.norm_t(self.twice(x))))
            return self.last(self.norm_r(F.relu(x)))

    model: Any = randomise(Net()).eval()
    x = torch.randn(3, 4, 6, 6)
    wanted = model(x)
    overparameterize(model, method)
    assert [name for name, module in model.named_children() if type(module).__name__ == "GivenWay"] == ["norm_a"]
    torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)
    collapse(model)
    torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)
    assert [name for name, module in model.named_modules() if getattr(module, "bias", None) is None] == ["", "alone"]


@pytest.mark.parametrize("method", ["acnet", "dbb"])
@pytest.mark.parametrize("gamma", [None, 0.0, 1 / 3])
def test_scales_start_at_gamma_or_so_that_the_first_branch_is_the_layer(method: str, gamma: float | None) -> None:
    model: Any = overparameterize(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 5)), method, gamma=gamma)
    for index in (0, 2):
        first, *others = model[index].parametrizations.weight[0].norms
        own = {0: 1.0, 2: (1 + 1e-5) ** 0.5}[index] if gamma is None else gamma
        torch.testing.assert_close(first.weight, torch.full((6,), own))
        assert all(torch.equal(norm.weight, torch.full((6,), gamma or 0.0)) for norm in others)
