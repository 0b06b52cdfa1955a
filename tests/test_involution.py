"""Involution against the authors' formula, finite differences, shifted images, ONNX Runtime and two halves side by side."""

import math
import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.involution import Involution, Involve
from pipeline.measure import count

# Channels, kernel size, stride, height, width.
SHAPES = [
    (16, 1, 1, 3, 4),
    (32, 3, 1, 6, 5),
    (48, 7, 1, 4, 9),
    (32, 7, 2, 8, 6),
    (16, 3, 2, 2, 2),
    (32, 5, 3, 6, 9),
    (16, 3, 4, 8, 4),
]
every_shape = pytest.mark.parametrize(("channels", "k", "stride", "height", "width"), SHAPES)


def naive(x: Tensor, kernels: Tensor, k: int, stride: int, group_channels: int = 16) -> Tensor:
    """d-li14/involution, involution_naive.py: copy the neighbourhood of each pixel, multiply, sum."""
    b, channels = x.shape[:2]
    h, w = kernels.shape[2:]
    patches = F.unfold(x, k, dilation=1, padding=(k - 1) // 2, stride=stride)
    patches = patches.view(b, channels // group_channels, group_channels, k * k, h, w)
    return (kernels.view(b, -1, 1, k * k, h, w) * patches).sum(3).view(b, channels, h, w)


def drawn(channels: int, k: int, stride: int, height: int, width: int, **kinds: Any) -> tuple[Tensor, Tensor]:
    """Images and kernels."""
    generator = torch.Generator().manual_seed(channels + k + stride)
    x = torch.randn(2, channels, height, width, generator=generator, **kinds)
    return x, torch.randn(2, channels // 16 * k * k, height // stride, width // stride, generator=generator, **kinds)


@every_shape
def test_values_and_gradients_are_those_of_the_authors_formula(channels: int, k: int, stride: int, height: int, width: int) -> None:
    x, kernels = operands = drawn(channels, k, stride, height, width, dtype=torch.float64)
    for operand in operands:
        operand.requires_grad_()
    ours, theirs = Involve(k, stride)(x, kernels), naive(x, kernels, k, stride)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.randn(ours.shape, dtype=torch.float64)
    for ours_g, theirs_g in zip(*(torch.autograd.grad((y * weights).sum(), operands) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(ours_g, theirs_g, rtol=1e-12, atol=1e-12)
    with torch.no_grad():  # and so without a gradient to keep
        torch.testing.assert_close(Involve(k, stride)(*operands), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradient_is_the_slope(wanted: tuple[bool, bool]) -> None:
    operands = [t.requires_grad_(w) for t, w in zip(drawn(16, 3, 2, 4, 4, dtype=torch.float64), wanted, strict=True)]
    assert torch.autograd.gradcheck(Involve(3, 2), operands)


def test_kernel_of_a_single_one_shifts_its_group() -> None:
    x = torch.arange(1.0, 32 * 12 + 1).reshape(1, 32, 3, 4)
    kernels = torch.zeros(1, 2 * 9, 3, 4)
    kernels[:, 2] = 1  # the first group's tap above and to the right
    kernels[:, 9 + 4] = 2  # the second group's middle
    y = Involve(3, 1)(x, kernels)
    assert torch.equal(y[:, :16, 1:, :3], x[:, :16, :2, 1:]) and not y[:, :16, 0].any() and not y[..., :16, :, 3][:, :16].any()
    assert torch.equal(y[:, 16:], 2 * x[:, 16:])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_in_memory_is_kept_and_changes_no_value(layout: torch.memory_format) -> None:
    x, kernels = (tensor.contiguous(memory_format=layout).requires_grad_() for tensor in drawn(32, 3, 2, 6, 8))
    y = Involve(3, 2)(x, kernels)
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, naive(x.contiguous(), kernels.contiguous(), 3, 2))
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_bfloat16_is_rounded_once() -> None:
    x, kernels = (tensor.bfloat16() for tensor in drawn(32, 7, 1, 9, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = Involve(7, 1)(x, kernels)
    exact = naive(x.double(), kernels.double(), 7, 1)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()


def test_generator_is_a_bottleneck_of_a_quarter_on_averaged_pixels() -> None:
    torch.manual_seed(0)
    layer = Involution(32, 3, 2).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.named_parameters()}
    assert shapes == {
        "conv1.conv.weight": (8, 32, 1, 1), "conv1.bn.weight": (8,), "conv1.bn.bias": (8,),
        "conv2.conv.weight": (18, 8, 1, 1), "conv2.conv.bias": (18,),
    }  # fmt: skip
    values = layer.state_dict()
    for name in ("conv1.bn.running_mean", "conv1.bn.running_var", "conv1.bn.weight", "conv1.bn.bias"):
        values[name].uniform_(0.5, 1.5)
    x = torch.randn(2, 32, 6, 8)
    pooled = x.unflatten(2, (3, 2)).unflatten(4, (4, 2)).mean((3, 5))
    reduced = torch.einsum("oi,bihw->bohw", values["conv1.conv.weight"][..., 0, 0], pooled)
    mean, var, scale, shift = (values[f"conv1.bn.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias"))
    reduced = ((reduced - mean) / (var + 1e-5).sqrt() * scale + shift).relu()
    kernels = torch.einsum("oi,bihw->bohw", values["conv2.conv.weight"][..., 0, 0], reduced)
    kernels += values["conv2.conv.bias"][:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), naive(x, kernels, 3, 2), rtol=1e-4, atol=1e-5)


def test_operator_holds_no_tensors_and_serves_fewer_groups_as_it_is() -> None:
    operator = Involve(3, 1)
    assert not operator.state_dict() and not list(operator.buffers())
    x, kernels = drawn(64, 3, 1, 4, 4)
    full = operator(x, kernels)
    assert torch.equal(operator(x[:, 16:48], kernels[:, 9:27]), full[:, 16:48])


def halves(channels: int, group: int) -> tuple[Involution, Involution]:
    """An involution whose two halves of channels, kernels included, know nothing of each other, and one with the group's half of
    every tensor. Whole numbers, so that sums are exact in whatever order."""
    torch.manual_seed(3)
    full, half = Involution(channels, 7, 2).eval(), Involution(channels // 2, 7, 2).eval()
    for module in full.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
            for tensor in (module.weight, module.bias):
                tensor.data.random_(1, 4)
    with torch.no_grad():
        for conv in (full.conv1.conv, full.conv2.conv):
            conv.weight.random_(-2, 3)
            outputs, inputs = (side // 2 for side in conv.weight.shape[:2])
            conv.weight[:outputs, inputs:] = conv.weight[outputs:, :inputs] = 0
            if conv.bias is not None:
                conv.bias.random_(-2, 3)
    values = full.state_dict()
    for name, tensor in half.state_dict().items():
        part = values[name]
        for axis, size in enumerate(tensor.shape):
            if size != part.shape[axis]:
                assert part.shape[axis] == 2 * size
                part = part.narrow(axis, group * size, size)
        tensor.copy_(part)
    half.conv1.bn.eps = 0.0
    return full, half


@pytest.mark.parametrize("group", [0, 1])
def test_half_of_every_tensor_is_the_involution_of_half_the_channels(group: int) -> None:
    full, half = halves(64, group)
    x = torch.randint(-4, 5, (2, 64, 8, 8)) * 4.0  # averages of 4 stay whole
    own = slice(32 * group, 32 * group + 32)
    with torch.no_grad():
        expected = full(x)[:, own]
        assert expected.abs().max() > 100 and torch.equal(half(x[:, own]), expected)
        full.conv1.conv.weight[:8, 32:] = full.conv1.conv.weight[8:, :32] = 1.0
        assert not torch.equal(half(x[:, own]), full(x)[:, own])  # where the halves do know of each other


@every_shape
def test_counted_is_one_multiply_add_a_tap_and_output(channels: int, k: int, stride: int, height: int, width: int) -> None:
    found = count(Involution(channels, k, stride), (channels, height, width))
    pixels, quarter = height // stride * (width // stride), channels // 4
    taps = k * k * channels * pixels
    generator = (channels * quarter + quarter * channels // 16 * k * k) * pixels
    assert found["by_module"]["involve"] == taps and found["macs"] == taps + generator
    assert found["unsupported"] == {} and found["uncalled"] == []


@pytest.mark.parametrize(("k", "stride"), [(7, 2), (3, 1)])
def test_onnx_is_plain_operators_on_five_axes_at_most_and_computes_the_same(k: int, stride: int) -> None:
    torch.manual_seed(1)
    layer = Involution(32, k, stride).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own code
        program = torch.onnx.export(
            layer, (torch.zeros(2, 32, 8, 8),), dynamo=True, opset_version=20, dynamic_shapes=({0: "batch"},), verbose=False
        )
    assert program is not None
    proto = onnx.shape_inference.infer_shapes(program.model_proto)
    plain = {"Pad", "Slice", "Concat", "Mul", "ReduceSum", "Add", "Split", "Reshape", "Unsqueeze", "Conv", "Relu", "AveragePool"}
    assert {node.op_type for node in proto.graph.node} <= plain and len(proto.graph.node) < 60
    known = {value.name: len(value.type.tensor_type.shape.dim) for value in proto.graph.value_info}
    made = [name for node in proto.graph.node for name in node.output]
    assert max(known.get(name, 0) for name in made) == 5 and sum(name in known for name in made) > 6 * k
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x = torch.randn(batch, 32, 8, 8)
        theirs = np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(theirs), layer(x), rtol=1e-5, atol=1e-5)


def test_traced_network_keeps_one_node_and_its_checks() -> None:
    traced = torch.fx.symbolic_trace(Involution(16, 7, 2).eval())
    assert len(traced.graph.nodes) < 12
    x = torch.randn(1, 16, 4, 4)
    assert traced(x).shape == (1, 16, 2, 2)
    with pytest.raises(InputError, match="5x4 pixels"):
        Involve(7, 2)(torch.zeros(1, 16, 5, 4), torch.zeros(1, 49, 2, 2))


@pytest.mark.parametrize(
    ("x", "kernels", "named"),
    [
        ((1, 16, 6, 5), (1, 9, 3, 2), "stride 2: an image of 6x5 pixels does not divide"),
        ((1, 24, 4, 4), (1, 9, 2, 2), "24 channels do not divide into groups of 16"),
        ((1, 32, 4, 4), (1, 9, 2, 2), r"shape \(9, 2, 2\) for an image that needs \(18, 2, 2\)"),
        ((1, 16, 4, 4), (1, 9, 4, 4), r"needs \(9, 2, 2\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x: tuple[int, ...], kernels: tuple[int, ...], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Involve(3, 2)(torch.zeros(x), torch.zeros(kernels))


@pytest.mark.parametrize("numbers", [(2, 1, 16), (0, 1, 16), (3, 0, 16), (3, 1, 0)])
def test_impossible_operators_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="must be odd"):
        Involve(*numbers)


def test_channels_that_make_no_groups_are_refused() -> None:
    for channels in (8, 40):
        with pytest.raises(InputError, match=f"{channels} channels do not divide into groups of 16"):
            Involution(channels, 3, 1)


def test_memory_is_that_of_a_few_images_not_of_one_a_tap() -> None:
    x, kernels = drawn(64, 7, 1, 14, 14)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        Involve(7, 1)(x, kernels)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated < 8 * x.numel() * 4 < math.prod((49, *x.shape)) * 4
