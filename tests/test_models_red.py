"""RedNet and U-Net against published counts and plain functions written from the authors' code."""

import warnings
from collections import Counter
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from networks import randomise
from torch import Tensor, nn

from pipeline import models
from pipeline.errors import InputError
from pipeline.involution import Involve
from pipeline.measure import count

State = dict[str, Tensor]
BLOCKS = {26: [1, 2, 4, 1], 38: [2, 3, 5, 2], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
# Arguments and image sizes of small networks of every kind, odd sizes on the way included.
CASES: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("rednet", {"depth": 26, "width": 16, "zero_init": False}, (32, 64)),
    ("rednet", {"depth": 26, "width": 32, "zero_init": False}, (61, 31)),
    ("unet", {"width": 4, "up": "transposed"}, (32, 16)),
    ("unet", {"width": 4, "up": "transposed"}, (23, 45)),
    ("unet", {"width": 4, "up": "bilinear"}, (31, 18)),
]
every_case = pytest.mark.parametrize(("name", "arguments", "size"), CASES)


def on_meta(name: str, shape: tuple[int, int, int], classes: int, **arguments: Any) -> nn.Module:
    with torch.device("meta"):
        return models.build(name, input_shape=shape, classes=classes, **arguments)


def network(name: str, arguments: dict[str, Any], size: tuple[int, int], classes: int = 5) -> nn.Module:
    """In evaluation mode, without a neutral value anywhere; its batch norms have seen images, since an involution multiplies
    activations by each other and its outputs would run away."""
    torch.manual_seed(2)
    model = randomise(models.build(name, input_shape=(3, *size), classes=classes, **arguments)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(8, 3, *size))
    return model.eval()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("depth", "published"), [(26, 9_233_166), (38, 12_386_986), (50, 15_540_806), (101, 25_652_950), (152, 33_984_582)]
)
def test_rednet_has_its_published_parameters(depth: int, published: int) -> None:
    assert parameters(on_meta("rednet", (3, 224, 224), 1000, depth=depth, width=64, zero_init=True)) == published
    ten = parameters(on_meta("rednet", (3, 224, 224), 10, depth=depth, width=64, zero_init=True))
    assert ten == published - 990 * 2049 and (depth != 26 or ten == 7_204_656)


def test_rednet_at_half_width_keeps_its_stem() -> None:
    assert parameters(on_meta("rednet", (3, 224, 224), 10, depth=26, width=32, zero_init=True)) == 1_835_542  # the published diet


@pytest.mark.parametrize(
    ("width", "up", "published"),
    [
        (64, "transposed", 31_037_633),
        (32, "transposed", 7_763_041),
        (64, "bilinear", 17_262_977),
        (32, "bilinear", 4_318_401),
    ],
)
def test_unet_has_its_published_parameters(width: int, up: str, published: int) -> None:
    assert parameters(on_meta("unet", (3, 64, 64), 1, width=width, up=up)) == published


def batch_norm(x: Tensor, state: State, name: str) -> Tensor:
    mean, var, scale, shift = (state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def involution(x: Tensor, state: State, name: str, k: int, stride: int) -> Tensor:
    """involution_naive.py of the authors."""
    pooled = F.avg_pool2d(x, stride) if stride > 1 else x
    reduced = batch_norm(F.conv2d(pooled, state[f"{name}.conv1.conv.weight"]), state, f"{name}.conv1.bn").relu()
    kernels = F.conv2d(reduced, state[f"{name}.conv2.conv.weight"], state[f"{name}.conv2.conv.bias"])
    b, _, h, w = kernels.shape
    patches = F.unfold(x, k, 1, (k - 1) // 2, stride).view(b, x.shape[1] // 16, 16, k * k, h, w)
    return (kernels.view(b, -1, 1, k * k, h, w) * patches).sum(3).view(b, -1, h, w)


def rednet(x: Tensor, state: State, depth: int) -> Tensor:
    """rednet.py of the authors, global average pooling and a linear layer."""
    x = F.conv2d(x, state["backbone.stem.0.conv.weight"], stride=2, padding=1)
    x = batch_norm(x, state, "backbone.stem.0.bn").relu()
    x = batch_norm(involution(x, state, "backbone.stem.1", 3, 1), state, "backbone.stem.2").relu()
    x = F.conv2d(x, state["backbone.stem.4.conv.weight"], padding=1)
    x = F.max_pool2d(batch_norm(x, state, "backbone.stem.4.bn").relu(), 3, 2, 1)
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        for block in range(blocks):
            name, stride = f"backbone.layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = batch_norm(F.conv2d(x, state[f"{name}.conv1.weight"]), state, f"{name}.bn1").relu()
            y = batch_norm(involution(y, state, f"{name}.conv2", 7, stride), state, f"{name}.bn2").relu()
            y = batch_norm(F.conv2d(y, state[f"{name}.conv3.weight"]), state, f"{name}.bn3")
            if f"{name}.downsample.0.weight" in state:
                x = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
                x = batch_norm(x, state, f"{name}.downsample.1")
            x = (y + x).relu()
    return F.linear(x.mean((2, 3)), state["head.fc.weight"], state["head.fc.bias"])


def double(x: Tensor, state: State, name: str) -> Tensor:
    for conv, norm in ((0, 1), (3, 4)):
        x = F.conv2d(x, state[f"{name}.double_conv.{conv}.weight"], padding=1)
        x = batch_norm(x, state, f"{name}.double_conv.{norm}").relu()
    return x


def unet(x: Tensor, state: State, up: str) -> Tensor:
    """unet_parts.py and unet_model.py of milesial/Pytorch-UNet, which pads as it goes."""
    skips = [double(x, state, "inc")]
    for level in (1, 2, 3, 4):
        skips.append(double(F.max_pool2d(skips[-1], 2), state, f"down{level}.maxpool_conv.1"))
    x = skips.pop()
    for level in (1, 2, 3, 4):
        if up == "bilinear":
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        else:
            x = F.conv_transpose2d(x, state[f"up{level}.up.weight"], state[f"up{level}.up.bias"], stride=2)
        skip = skips.pop()
        dy, dx = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        x = double(torch.cat([skip, x], 1), state, f"up{level}.conv")
    return F.conv2d(x, state["outc.conv.weight"], state["outc.conv.bias"])


@every_case
def test_output_is_that_of_the_authors_equations(name: str, arguments: dict[str, Any], size: tuple[int, int]) -> None:
    model = network(name, arguments, size).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    state = model.state_dict()
    with torch.no_grad():
        expected = rednet(x, state, arguments["depth"]) if name == "rednet" else unet(x, state, arguments["up"])
        assert expected.abs().max() > 1e-2 and expected.shape == (2, 5, *(size if name == "unet" else ()))
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


@every_case
def test_traced_network_computes_the_same_with_each_layer_called_once(
    name: str, arguments: dict[str, Any], size: tuple[int, int]
) -> None:
    model = network(name, arguments, size)
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    leaves = {path for path, module in model.named_modules() if not list(module.children()) and not isinstance(module, Involve)}
    assert calls == Counter(leaves)
    assert not any(getattr(module, "inplace", False) for module in model.modules())


@pytest.mark.parametrize(("name", "arguments", "size"), [CASES[0], CASES[3], CASES[4]])
def test_onnx_computes_the_same_for_any_batch(name: str, arguments: dict[str, Any], size: tuple[int, int]) -> None:
    model = network(name, arguments, size)
    if name == "rednet":  # one block a stage: exporting more of the same takes long
        layers = model.get_submodule("backbone")
        for stage in ("layer2", "layer3"):
            setattr(layers, stage, model.get_submodule(f"backbone.{stage}")[:1])  # type: ignore[index]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own code
        program = torch.onnx.export(
            model, (torch.zeros(2, 3, *size),), dynamo=True, opset_version=20, dynamic_shapes=({0: "batch"},), verbose=False
        )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = torch.randn(batch, 3, *size)
        theirs = np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(theirs), model(x), rtol=1e-3, atol=1e-4)


@every_case
def test_every_parameter_gets_a_gradient(name: str, arguments: dict[str, Any], size: tuple[int, int]) -> None:
    model = network(name, arguments, size).train()
    x = torch.randn(4, 3, *size).contiguous(memory_format=torch.channels_last)
    model(x).square().mean().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None and 0 < parameter.grad.norm().item() < float("inf"), path


@pytest.mark.parametrize(("name", "arguments", "size"), [CASES[0], CASES[3], CASES[4]])
def test_multiply_adds_are_the_formulas(name: str, arguments: dict[str, Any], size: tuple[int, int]) -> None:
    model = network(name, arguments, size)
    total = 0

    def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.ConvTranspose2d):  # each input pixel makes four output pixels
            total += inputs[0].numel() * module.out_channels * 4
        elif isinstance(module, nn.Conv2d | nn.Linear):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, Involve):
            total += output.numel() * module.kernel_size**2

    for module in model.modules():
        module.register_forward_hook(add)
    with torch.no_grad():
        model(torch.zeros(1, 3, *size))
    found = count(models.build(name, input_shape=(3, *size), classes=5, **arguments), (3, *size))
    assert found["macs"] == total and found["unsupported"] == {} and found["uncalled"] == []


def test_rednet_starts_as_the_authors_with_or_without_blocks_that_are_their_shortcut() -> None:
    for zero in (True, False):
        torch.manual_seed(0)
        model = models.build("rednet", input_shape=(3, 32, 32), classes=10, depth=26, width=32, zero_init=zero)
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.bias is not None and not module.bias.any()
                assert (module.weight == (0 if zero and name.endswith("bn3") else 1)).all(), name
            elif isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
                std = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
                assert module.weight.std().item() == pytest.approx(std, rel=0.08)
                assert module.bias is None or not module.bias.any()
        fc = model.get_submodule("head.fc")
        assert isinstance(fc, nn.Linear) and fc.weight.std().item() == pytest.approx(0.01, rel=0.05) and not fc.bias.any()


def test_parameters_have_the_names_of_the_authors_checkpoints() -> None:
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    kernel = ["conv1.conv.weight", *(f"conv1.bn.{key}" for key in norm), "conv2.conv.weight", "conv2.conv.bias"]
    expected = {"head.fc.weight", "head.fc.bias"}
    for stem in ("0", "4"):
        expected |= {f"backbone.stem.{stem}.conv.weight", *(f"backbone.stem.{stem}.bn.{key}" for key in norm)}
    expected |= {*(f"backbone.stem.1.{key}" for key in kernel), *(f"backbone.stem.2.{key}" for key in norm)}
    for stage, blocks in enumerate(BLOCKS[50], start=1):
        for name in (f"backbone.layer{stage}.{block}" for block in range(blocks)):
            expected |= {f"{name}.conv1.weight", f"{name}.conv3.weight", *(f"{name}.conv2.{key}" for key in kernel)}
            expected |= {f"{name}.bn{i}.{key}" for i in (1, 2, 3) for key in norm}
        expected |= {f"backbone.layer{stage}.0.downsample.{key}" for key in ("0.weight", *(f"1.{key}" for key in norm))}
    assert set(on_meta("rednet", (3, 32, 32), 1000, depth=50, width=64, zero_init=True).state_dict()) == expected


@pytest.mark.parametrize("size", [(28, 32), (32, 28), (33, 64), (224, 60), (100, 100)])
def test_rednet_refuses_images_that_its_strides_do_not_divide(size: tuple[int, int]) -> None:
    named = "smallest are 29x29" if min(size) < 29 else f"{size[0]}x{size[1]} pixels do not divide"
    with pytest.raises(InputError, match=f"rednet: images of .*{named}"):
        on_meta("rednet", (3, *size), 10, depth=26, width=64, zero_init=True)


def test_sizes_that_are_allowed_run() -> None:
    for size in [(29, 32), (30, 61), (64, 31), (224, 224)]:
        model = on_meta("rednet", (1, *size), 10, depth=26, width=16, zero_init=True)
        assert model(torch.empty(2, 1, *size, device="meta")).shape == (2, 10)
    for size in [(16, 16), (17, 31), (224, 225)]:
        model = on_meta("unet", (2, *size), 1, width=2, up="bilinear")
        assert model(torch.empty(2, 2, *size, device="meta")).shape == (2, 1, *size)
    with pytest.raises(InputError, match="unet: .*smallest are 16x16"):
        on_meta("unet", (3, 15, 16), 1, width=2, up="bilinear")


@pytest.mark.parametrize(
    ("name", "arguments", "key"),
    [
        ("rednet", {"depth": 18, "width": 64, "zero_init": True}, "depth"),
        ("rednet", {"depth": 26, "width": 40, "zero_init": True}, "width"),
        ("rednet", {"depth": 26, "width": 64, "zero_init": "yes"}, "zero_init"),
        ("unet", {"width": 0, "up": "bilinear"}, "width"),
        ("unet", {"width": 64, "up": "nearest"}, "up"),
    ],
)
def test_values_that_are_not_allowed_are_refused_by_key(name: str, arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=rf"model\.{key} = "):
        models.build(name, input_shape=(3, 32, 32), classes=10, **arguments)
