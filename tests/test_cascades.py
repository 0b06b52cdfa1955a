"""KFLO, DO-Conv and ExpandNets against the cascades of ordinary layers, in feature space, that their kernels stand for."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.overparameterize import collapse, overparameterize

CLOSE = {"atol": 1e-9, "rtol": 1e-9}  # everything here is computed in fp64
# A factor of the expanded layer, the same tensor of the cascade, how that one arranges it, and what it adds.
Factor = tuple[Tensor, Tensor, Callable[[Tensor], Tensor], Tensor | int]
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "1d": ("Conv1d", {"kernel_size": 3, "stride": 2, "padding": 2}),
    "2d": ("Conv2d", {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)}),
    "2d, circular": ("Conv2d", {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    "2d, same": ("Conv2d", {"kernel_size": 5, "padding": "same"}),
    "2d, grouped": ("Conv2d", {"kernel_size": 3, "padding": 1, "groups": 2}),
    "2d, depthwise": ("Conv2d", {"kernel_size": 3, "padding": 1, "groups": 4, "out_channels": 8}),
    "3d": ("Conv3d", {"kernel_size": (1, 2, 3), "padding": 1}),
    "1d, transposed": ("ConvTranspose1d", {"kernel_size": 3, "stride": 2, "output_padding": 1}),
    "2d, transposed": ("ConvTranspose2d", {"kernel_size": (3, 2), "stride": 2, "padding": 1}),
    "2d, transposed, grouped": ("ConvTranspose2d", {"kernel_size": 3, "stride": 2, "groups": 2}),
    "3d, transposed": ("ConvTranspose3d", {"kernel_size": 2, "dilation": 2}),
    "linear": ("Linear", {}),
}

BIASED = [(shape, bias) for shape in LAYERS for bias in (True, False) if not (bias and "transposed" in shape)]


def make(shape: str, bias: bool) -> tuple[Any, Tensor]:
    """The layer, and something that it reads."""
    torch.manual_seed(0)
    kind, arguments = LAYERS[shape]
    if kind == "Linear":
        return nn.Linear(4, 6, bias=bias).double(), torch.randn(5, 4, dtype=torch.float64)
    layer = getattr(nn, kind)(**{"in_channels": 4, "out_channels": 6, "bias": bias, **arguments}).double()
    return layer, torch.randn(3, 4, *[6] * int(kind[-2]), dtype=torch.float64)


def wide(layer: Any, inputs: int, outputs: int, **changes: Any) -> Any:
    """A plain layer of the same class and extent between other numbers of channels."""
    kind = getattr(nn, type(layer).__name__.removeprefix("Parametrized"))
    if isinstance(layer, nn.Linear):
        return kind(inputs, outputs, bias=changes["bias"])
    names = ["kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    if layer.transposed:
        names[-1] = "output_padding"
    return kind(inputs, outputs, **{name: getattr(layer, name) for name in names} | changes)


def pointwise(layer: Any, inputs: int, outputs: int, **changes: Any) -> Any:
    """A 1 x 1 convolution of the layer's dimension."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(inputs, outputs, bias=changes["bias"])
    return getattr(nn, f"Conv{layer.weight.ndim - 2}d")(inputs, outputs, 1, **changes)


def turned(layer: Any) -> Callable[[Tensor], Tensor]:
    """Filters (O, I/groups, ...) as the layer's class stores them: transposed convolutions (I, O/groups, ...), group by group."""
    if not getattr(layer, "transposed", False):
        return lambda filters: filters
    return lambda filters: torch.cat([group.transpose(0, 1) for group in filters.chunk(layer.groups)])


def extended(layer: Any) -> Callable[[Tensor], Tensor]:
    """Matrices, perhaps one a group, as the kernels of `pointwise`."""
    return lambda matrix: matrix.reshape(-1, matrix.shape[-1], *[1] * (layer.weight.ndim - 2))


def compare(layer: Any, cascade: nn.Sequential, x: Tensor, factors: list[Factor]) -> None:
    """Give the cascade the layer's factors: then outputs, gradients and the merged layer's outputs are equal."""
    with torch.no_grad():
        for own, step, as_step, constant in factors:
            step.copy_(as_step(own) + constant)
    assert {id(own) for own, *_ in factors} == {id(parameter) for parameter in layer.parameters()}
    seen, given = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = layer(seen), cascade(given)
    torch.testing.assert_close(y, wanted, **CLOSE)
    weights = torch.randn_like(y)
    for result in (y, wanted):
        (result * weights).sum().backward()
    torch.testing.assert_close(seen.grad, given.grad, **CLOSE)
    for own, step, as_step, _ in factors:
        assert own.grad is not None and own.grad.abs().max() > 0
        torch.testing.assert_close(as_step(own.grad), step.grad, **CLOSE)
    torch.testing.assert_close(collapse(layer)(x), wanted, **CLOSE)


def draw(layer: Any) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += torch.randn_like(parameter) / 4


def same(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [shape for shape in LAYERS if "grouped" not in shape and "depthwise" not in shape])
def test_kflo_is_a_wide_layer_and_pointwise_ones_after_it(shape: str, bias: bool, depth: int) -> None:
    layer, x = make(shape, bias)
    overparameterize(layer, "kflo", depth=depth, width=2)
    draw(layer)
    cascade = nn.Sequential(wide(layer, 4, 12, bias=bias))
    for outputs in [12] * (depth - 2) + [6]:
        cascade.append(pointwise(layer, 12, outputs, bias=False))
    cascade.double()
    computed = layer.parametrizations
    factors: list[Factor] = [(computed.weight.original, cascade[0].weight, turned(layer), 0)]
    steps = zip(computed.weight[0].mixers, list(cascade)[1:], strict=True)
    factors += [(mixer, step.weight, extended(layer), 0) for mixer, step in steps]
    factors += [(computed.bias.original, cascade[0].bias, same, 0)] if bias else []
    compare(layer, cascade, x, factors)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [shape for shape in LAYERS if shape != "linear"])
def test_do_conv_is_a_depthwise_layer_and_a_pointwise_one_after_it(shape: str, bias: bool) -> None:
    layer, x = make(shape, bias)
    overparameterize(layer, "do_conv")
    draw(layer)
    computed, taps = layer.parametrizations.weight, math.prod(layer.kernel_size)
    depthwise = wide(layer, 4, 4 * taps, groups=4, bias=False)
    cascade = nn.Sequential(depthwise, pointwise(layer, 4 * taps, layer.out_channels, groups=layer.groups, bias=bias)).double()

    def filters(multiplier: Tensor) -> Tensor:
        """Channel i * M + s of the depthwise layer has the taps (D + E)[i, :, s]."""
        rows = multiplier.reshape(4, taps, taps).transpose(1, 2)
        return rows.reshape(depthwise.weight.shape)

    def mixing(original: Tensor) -> Tensor:
        return original.reshape(cascade[1].weight.shape)

    identity = filters(torch.eye(taps, dtype=torch.float64).repeat(4, 1, 1))
    factors: list[Factor] = [(computed[0].multiplier, depthwise.weight, filters, identity)]
    factors += [(computed.original, cascade[1].weight, mixing, 0)] + ([(layer.bias, cascade[1].bias, same, 0)] if bias else [])
    compare(layer, cascade, x, factors)


@pytest.mark.parametrize("stem", [True, False])
@pytest.mark.parametrize(("shape", "bias"), BIASED)
def test_expandnet_is_a_layer_between_two_pointwise_ones(shape: str, stem: bool, bias: bool) -> None:
    """Not for the first bias of a transposed convolution: it would not reach every pixel alike."""
    layer, x = make(shape, bias)
    first = [] if stem else [getattr(nn, f"Conv{max(layer.weight.ndim - 2, 1)}d")(1, 1, 1)]
    overparameterize(nn.Sequential(*first, layer), "expandnet", layers=["0" if stem else "1"], ratio=3, linear=True, exact=False)
    computed, groups = layer.parametrizations, getattr(layer, "groups", 1)
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    inner = 4 if stem and not isinstance(layer, nn.Linear) else 12  # the network's first convolution keeps its channels
    before: dict[str, Any] = {}
    within: dict[str, Any] = {"bias": bias}
    if shape != "linear" and not layer.transposed:
        reach = [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        before = {"padding": reach if layer.padding == "same" else layer.padding, "padding_mode": layer.padding_mode}
        within |= {"padding": 0}
    cascade = nn.Sequential(
        pointwise(layer, 4, inner, groups=groups, bias=bias, **before),
        wide(layer, inner, 3 * outputs, **within),
        pointwise(layer, 3 * outputs, outputs, groups=groups, bias=bias),
    ).double()
    kernels = computed.weight[0]
    tensors = [(kernels.first, extended(layer)), (computed.weight.original, turned(layer)), (kernels.last, extended(layer))]
    for (tensor, as_step), step in zip(tensors, cascade, strict=True):  # a start as the layers of the published cascade have it
        fan_in = tensor[0].numel() if tensor is computed.weight.original else tensor.shape[-1]
        assert (tensor.numel() < 20 or tensor.abs().max() > 0.7 * fan_in**-0.5) and tensor.abs().max() <= fan_in**-0.5
        assert as_step(tensor).shape == step.weight.shape
    factors: list[Factor] = [(own, step.weight, as_step, 0) for (own, as_step), step in zip(tensors, cascade, strict=True)]
    if bias:
        biases = (computed.bias[0].first_bias, computed.bias.original, computed.bias[0].last_bias)
        factors += [(own, step.bias, torch.flatten, 0) for own, step in zip(biases, cascade, strict=True)]
    compare(layer, cascade, x, factors)


def test_grouped_kflo_mixes_kernels_across_groups() -> None:
    """No cascade computes that: an output's kernel is a sum over filters of all groups."""
    layer, _ = make("2d, grouped", bias=True)
    overparameterize(layer, "kflo", depth=2, width=1.5)
    draw(layer)
    (mixer,) = layer.parametrizations.weight[0].mixers
    for name in ("weight", "bias"):
        original = layer.parametrizations[name].original
        for output, kernel in enumerate(getattr(layer, name)):
            wanted = sum(mixer[output, row] * original[row] for row in range(9))
            torch.testing.assert_close(kernel, wanted, **CLOSE)
