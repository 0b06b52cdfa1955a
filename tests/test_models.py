"""The zoo against hand-written formulas; its laws over every network."""

import operator
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import randomise
from torch import Tensor, nn

from pipeline import methods, models
from pipeline.errors import InputError
from pipeline.models.resnet import Block

# One or more ways to build each; a network without an entry fails `test_every_network_is_tested`.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("alexnet", {"variant": "torchvision", "dropout": 0.5}),
    ("alexnet", {"variant": "four_convolutions", "dropout": 0.5}),
    ("cifar_quick", {}),
    ("condensenet", {"depth": 14, "growth": 4, "groups": 4, "dropout": 0.1}),
    ("densenet", {"depth": 10, "growth": 4, "compression": 1.0, "stem": "cifar"}),
    ("densenet", {"depth": 16, "growth": 4, "compression": 0.5, "stem": "tiny"}),
    ("lenet5", {"variant": "classic"}),
    ("lenet5", {"variant": "padded"}),
    ("lenet5", {"variant": "caffe"}),
    ("mininet", {"dropout": 0.5}),
    ("rednet", {"depth": 26, "width": 16, "zero_init": False}),
    ("resnet", {"depth": 8}),
    ("resnet_imagenet", {"depth": 18, "stem": "imagenet"}),
    ("resnet_imagenet", {"depth": 18, "stem": "cifar"}),
    ("resnet_imagenet", {"depth": 50, "stem": "cifar"}),
    ("resnet_preact", {"depth": 11, "stem": "cifar"}),
    ("resnext", {"depth": 11, "cardinality": 4, "width": 4, "stem": "cifar"}),
    ("unet", {"width": 4, "up": "transposed"}),
    ("unet", {"width": 4, "up": "bilinear"}),
    ("vgg16", {}),
    ("vgg16_bn", {"dropout": 0.5}),
    ("wide_resnet", {"depth": 10, "width": 2, "dropout": 0.3}),
    ("wide_resnet", {"depth": 16, "width": 1, "dropout": 0.0}),
]
SMALLEST = {
    **dict.fromkeys(("resnet", "resnet_imagenet", "wide_resnet"), 1), "cifar_quick": 15, "lenet5": 16, "unet": 16,
    **dict.fromkeys(("condensenet", "densenet", "resnet_preact", "resnext"), 4), "rednet": 29,
    **dict.fromkeys(("vgg16", "vgg16_bn"), 32), **dict.fromkeys(("alexnet", "mininet"), 63),
}  # fmt: skip
CONCATENATES = ("condensenet", "densenet", "unet")
PER_PIXEL = ("unet",)  # (B, classes, H, W); the others answer once an image
every_network = pytest.mark.parametrize(("name", "arguments"), CASES)


def smallest(name: str, arguments: dict[str, Any]) -> int:
    """Pixels a side of the smallest images."""
    variants: dict[tuple[str, Any], int] = {("lenet5", "padded"): 12, ("densenet", "tiny"): 7}
    return variants.get((name, arguments.get("variant", arguments.get("stem"))), SMALLEST[name])


def allowed(name: str, side: int) -> int:
    """The side, or the next larger one that the network takes: RedNet's are 32n, or up to 3 less."""
    return next(n for n in range(side, side + 32) if name != "rednet" or -n % 32 <= 3)


def on_meta(name: str, size: int, channels: int = 3, classes: int = 10, **arguments: Any) -> nn.Module:
    """The network without memory behind its tensors: shapes and counts are free."""
    with torch.device("meta"):
        return models.build(name, input_shape=(channels, size, size), classes=classes, **arguments).eval()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def randomise_batchnorm(model: nn.Module) -> None:
    """Statistics and affine parameters that no default could pass for."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                assert tensor is not None
                nn.init.uniform_(tensor, -0.5, 0.5)


def test_every_network_is_tested() -> None:
    assert methods.names("models") == sorted({name for name, _ in CASES}) == sorted(SMALLEST)


def test_resnet_block_is_the_published_equation() -> None:
    torch.manual_seed(0)
    block = Block(8, 16, halve=True).eval()
    randomise_batchnorm(block)
    x = torch.randn(3, 8, 7, 9)
    w1, w2 = block.conv1.weight, block.conv2.weight
    with torch.no_grad():
        y = F.conv2d(F.relu(normalise(F.conv2d(x, w1, stride=2, padding=1), block.bn1)), w2, padding=1)
        shortcut = torch.zeros(3, 16, 4, 5)
        for i in range(4):
            for j in range(5):
                shortcut[:, 4:12, i, j] = x[:, :, 2 * i, 2 * j]  # 16 channels: 4 of zeros, 8 of x, 4 of zeros
        torch.testing.assert_close(block(x), F.relu(normalise(y, block.bn2) + shortcut), rtol=1e-5, atol=1e-5)


def normalise(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """Ioffe and Szegedy 2015, algorithm 2."""
    assert bn.running_mean is not None and bn.running_var is not None
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    return x * scale[:, None, None] + (bn.bias - bn.running_mean * scale)[:, None, None]


@pytest.mark.parametrize("name", ["resnet", "resnet_imagenet", "vgg16_bn"])
def test_convolutions_start_as_he_et_al_draw_them(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name, input_shape=(3, 32, 32), classes=10, **dict(CASES)[name])
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 2000]
    assert len(convolutions) > 5
    for conv in convolutions:
        assert (conv.bias is None) == (name != "vgg16_bn") and (conv.bias is None or not conv.bias.any())
        std = (2 / (conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1])) ** 0.5
        assert conv.weight.std().item() == pytest.approx(std, rel=0.08)  # five standard errors of 2000 draws
    if name == "vgg16_bn":  # torchvision's linear layers: N(0, 0.01)
        hidden = model.get_submodule("classifier.3")
        assert isinstance(hidden, nn.Linear) and not hidden.bias.any()
        assert hidden.weight.std().item() == pytest.approx(0.01, rel=0.01)


@every_network
def test_output_shape_follows_any_image_size_and_channel_count(name: str, arguments: dict[str, Any]) -> None:
    low = smallest(name, arguments)
    for channels, *sides in [(1, low, low), (1, low + 1, low + 40), (2, low + 17, low), (3, 224, 224)]:
        height, width = (allowed(name, side) for side in sides)
        with torch.device("meta"):
            model = models.build(name, input_shape=(channels, height, width), classes=5, **arguments).eval()
            pixels = (height, width) if name in PER_PIXEL else ()
            assert model(torch.empty(4, channels, height, width)).shape == (4, 5, *pixels)


@every_network
def test_smallest_image_is_the_limit(name: str, arguments: dict[str, Any]) -> None:
    low = smallest(name, arguments)
    for shape in [(3, low - 1, low), (3, low, low - 1)]:
        named = f"too small; the smallest are {low}x{low}" if low > 1 else "must be at least 1"
        with pytest.raises(InputError, match=f"{name}: .*{named}"):
            models.build(name, input_shape=shape, classes=10, **arguments)
    if low > 1:  # the layers themselves cannot do with less
        model = on_meta(name, low, **arguments)
        error, said = (InputError, "7x7 pixels does not divide") if name == "rednet" else (RuntimeError, "too small")
        with pytest.raises(error, match=said):
            model(torch.empty(1, 3, low - 1, low - 1, device="meta"))


class LayerTracer(torch.fx.Tracer):
    """Looks into no module that holds no others, our own included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children())


@every_network
def test_fx_traces_each_layer_once_and_out_of_place(name: str, arguments: dict[str, Any]) -> None:
    """What surgery relies on."""
    model = on_meta(name, max(smallest(name, arguments), 20), **arguments)
    graph = LayerTracer().trace(model)
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    leaves = {path for path, module in model.named_modules() if not list(module.children())}
    assert calls == Counter(leaves)
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    functions = {node.target for node in graph.nodes if node.op in ("call_function", "call_method")}
    assert functions <= {operator.add, operator.getitem, *([torch.cat] if name in CONCATENATES else [])}


@pytest.mark.parametrize(("name", "arguments"), [case for case in CASES if case[0] != "vgg16_bn"])  # 134 million weights take long
def test_traced_network_computes_the_same(name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    size = max(smallest(name, arguments), 20)
    model = randomise(models.build(name, input_shape=(3, size, size), classes=10, **arguments)).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x), rtol=0, atol=0)


@every_network
def test_every_parameter_gets_a_gradient(name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    size = max(smallest(name, arguments), 20)
    model = models.build(name, input_shape=(3, size, size), classes=10, **arguments)
    answers = model(torch.randn(4, 3, size, size))
    labels = torch.arange(4).view(-1, *[1] * (answers.dim() - 2)).expand(4, *answers.shape[2:])  # one for each pixel, or image
    F.cross_entropy(answers, labels).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert 0 < parameter.grad.norm().item() < float("inf"), path


@every_network
def test_options_are_the_arguments_of_build(name: str, arguments: dict[str, Any]) -> None:
    section = methods.options("models", "model", {"name": name, **arguments}, by="name")
    assert section.model_dump() == {"name": name, **arguments}
    with pytest.raises(InputError, match=r"model\.pixels is not a parameter"):
        models.build(name, input_shape=(3, 224, 224), classes=10, **arguments, pixels=2)
    for missing in arguments:
        rest = {key: value for key, value in arguments.items() if key != missing}
        with pytest.raises(InputError, match=rf"model\.{missing} is missing"):
            models.build(name, input_shape=(3, 224, 224), classes=10, **rest)


@pytest.mark.parametrize("name", ["resnet18", "", "../config", "__init__", "Resnet"])
def test_unknown_network_is_refused_with_the_list(name: str) -> None:
    with pytest.raises(InputError) as error:
        models.build(name, input_shape=(3, 32, 32), classes=10)
    assert repr(name) in str(error.value) and ", ".join(sorted(SMALLEST)) in str(error.value)


@pytest.mark.parametrize("depth", [-4, -2, 0, 2, 4, 7, 18, 33, 111])
@pytest.mark.parametrize(("name", "rest", "extra"), [("resnet", {}, 2), ("wide_resnet", {"width": 2, "dropout": 0.0}, 4)])
def test_depth_without_three_equal_stages_is_refused(name: str, rest: dict[str, Any], extra: int, depth: int) -> None:
    with pytest.raises(InputError, match=rf"model\.depth = {depth}: must be 6n \+ {extra}"):
        models.build(name, input_shape=(3, 32, 32), classes=10, depth=depth, **rest)
    with pytest.raises(InputError, match=rf"{name}: depth {depth} must be 6n \+ {extra}"):
        methods.load("models", name).build(input_shape=(3, 32, 32), classes=10, depth=depth, **rest)


@pytest.mark.parametrize(
    ("name", "arguments", "key"),
    [
        ("mininet", {"dropout": 1.0}, "dropout"),
        ("vgg16_bn", {"dropout": -0.1}, "dropout"),
        ("alexnet", {"variant": "torchvision", "dropout": 1.0}, "dropout"),
        ("alexnet", {"variant": "grouped", "dropout": 0.5}, "variant"),
        ("resnet_imagenet", {"depth": 18, "stem": "tiny"}, "stem"),
        ("resnet_imagenet", {"depth": 20, "stem": "cifar"}, "depth"),
        ("resnet", {"depth": "32"}, "depth"),
        *(("wide_resnet", {"depth": 16, "width": width, "dropout": 0.0}, "width") for width in (0, 1.5)),
        ("wide_resnet", {"depth": 16, "width": 1, "dropout": 1.0}, "dropout"),
        ("lenet5", {"variant": "relu"}, "variant"),
    ],
)
def test_values_that_are_not_allowed_are_refused_by_key(name: str, arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=rf"model\.{key} = "):
        models.build(name, input_shape=(3, 224, 224), classes=10, **arguments)


@pytest.mark.parametrize(("shape", "classes"), [((0, 32, 32), 10), ((3, 32, 32), 0), ((3, -1, 32), 10), ((32, 32), 10)])
def test_impossible_shapes_are_refused(shape: Any, classes: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        models.build("resnet", input_shape=shape, classes=classes, depth=8)


@pytest.mark.parametrize(("name", "count"), [("alexnet", 2), ("mininet", 1), ("vgg16_bn", 2)])
def test_dropout_is_the_one_asked_for(name: str, count: int) -> None:
    arguments = {**dict(CASES)[name], "dropout": 0.3}
    assert [m.p for m in on_meta(name, 64, **arguments).modules() if isinstance(m, nn.Dropout)] == [0.3] * count
