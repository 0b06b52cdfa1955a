"""The networks of selective convolution against published counts, torchvision, and forward passes from the authors' code."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from test_models import LayerTracer, on_meta, parameters, randomise_batchnorm
from test_public_weights import published
from torch import Tensor, nn

from pipeline import methods, models
from pipeline.channels import follow
from pipeline.errors import InputError
from pipeline.measure import count

DENSE = {"growth": 12, "compression": 1.0, "stem": "cifar"}
RESNEXT = {"depth": 29, "cardinality": 8, "width": 64, "stem": "cifar"}
CONDENSE = {"depth": 182, "growth": 12, "groups": 4, "dropout": 0.1}
TORCHVISION = {"growth": 32, "compression": 0.5, "stem": "torchvision"}


@pytest.mark.parametrize(
    ("name", "arguments", "shape", "classes", "number"),
    [
        *(("densenet", DENSE | {"depth": d}, (3, 32, 32), 10, n) for d, n in ((40, 211_978), (100, 995_698))),
        *(("densenet", DENSE | {"depth": d}, (3, 32, 32), 100, n) for d, n in ((40, 233_668), (100, 1_049_788))),
        *(("densenet", DENSE | {"depth": d, "stem": "tiny"}, (3, 64, 64), 200, n) for d, n in ((40, 257_768), (100, 1_109_888))),
        *(("densenet", DENSE | {"depth": d}, (1, 28, 28), 10, n) for d, n in ((40, 211_546), (100, 995_266))),
        ("densenet", DENSE | {"depth": 100, "compression": 0.5}, (3, 32, 32), 10, 769_162),  # DenseNet-BC, "0.8M"
        ("densenet", TORCHVISION | {"depth": 121, "stem": "imagenet"}, (3, 224, 224), 1000, 7_978_728),
        ("resnet_preact", {"depth": 164, "stem": "cifar"}, (3, 32, 32), 10, 1_661_274),
        ("resnet_preact", {"depth": 164, "stem": "cifar"}, (3, 32, 32), 100, 1_684_404),
        ("resnext", RESNEXT, (3, 32, 32), 10, 33_751_370),
        ("condensenet", CONDENSE, (3, 32, 32), 10, 13_792_906),
    ],
)
def test_parameter_counts_are_the_published_ones(
    name: str, arguments: dict[str, Any], shape: tuple[int, int, int], classes: int, number: int
) -> None:
    with torch.device("meta"):
        assert parameters(models.build(name, input_shape=shape, classes=classes, **arguments)) == number


def test_resnet50_is_torchvisions_without_the_projections() -> None:
    """22.8M as published; theirs normalises before each convolution."""
    with torch.device("meta"):
        theirs = torchvision.models.resnet50()
    kernels = sum(p.numel() for p in theirs.parameters() if p.dim() == 4)
    kernels -= sum(p.numel() for name, p in theirs.named_parameters() if "downsample.0" in name)
    norms = 0
    inputs = width = 64
    for blocks in (3, 4, 6, 3):
        for _ in range(blocks):
            norms += 2 * (inputs + 2 * width)
            inputs = 4 * width
        width *= 2
    wanted = kernels + norms + 2 * 2048 + 2048 * 1000 + 1000
    assert parameters(on_meta("resnet_preact", 224, classes=1000, depth=50, stem="imagenet")) == wanted
    assert round(wanted / 1e6, 1) == 22.8


@pytest.mark.parametrize(
    ("name", "arguments", "mega"),
    [
        ("densenet", DENSE | {"depth": 40}, "71.3"),
        ("densenet", DENSE | {"depth": 100}, "286.4"),
        ("resnet_preact", {"depth": 164, "stem": "cifar"}, "239.3"),
        ("resnext", RESNEXT, "4901"),
        ("condensenet", CONDENSE, "1615"),
    ],
)
def test_multiply_adds_are_the_published_ones(name: str, arguments: dict[str, Any], mega: str) -> None:
    found = count(on_meta(name, 32, **arguments).to_empty(device="cpu"), (3, 32, 32))
    assert f"{found['macs'] / 1e6:.{len(mega.partition('.')[2])}f}" == mega
    assert not found["unsupported"] and not found["uncalled"]


@pytest.mark.parametrize(("depth", "growth"), [(121, 32), (161, 48), (169, 32), (201, 32)])
def test_torchvisions_tensors_have_their_names_and_shapes(depth: int, growth: int) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(f"densenet{depth}", weights=None, num_classes=7).state_dict()
    ours = on_meta("densenet", 64, classes=7, **TORCHVISION | {"depth": depth, "growth": growth}).state_dict()
    assert [(name, tensor.shape) for name, tensor in ours.items()] == [(name, tensor.shape) for name, tensor in theirs.items()]


def test_torchvisions_weights_give_torchvisions_outputs() -> None:
    source = published("densenet121", 7)
    ours = on_meta("densenet", 64, classes=7, **TORCHVISION | {"depth": 121})
    ours.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, actual = source(x), ours(x)
    assert (expected[0] - expected[1]).abs().min() > 1e-3  # the outputs depend on the image
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class Units:
    """A network's tensors in the order in which a forward pass needs them; what is left over counts too."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")]
        self.kernels = [t for t in tensors if t.dim() == 4]
        self.vectors = [t for t in tensors if t.dim() == 1][:-1]
        self.linear = [t for t in tensors if t.dim() == 2][0], tensors[-1]

    def convolve(self, x: Tensor, **how: int) -> Tensor:
        return F.conv2d(x, self.kernels.pop(0), **how)  # type: ignore[arg-type]

    def activate(self, x: Tensor) -> Tensor:
        """Batch norm and ReLU."""
        scale, shift, mean, variance = (self.vectors.pop(0)[:, None, None] for _ in range(4))
        return ((x - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)

    def unit(self, x: Tensor, **how: int) -> Tensor:
        return self.convolve(self.activate(x), **how)

    def classify(self, x: Tensor) -> Tensor:
        weight, bias = self.linear
        x = self.activate(x).mean((2, 3)) @ weight.T + bias
        assert not self.kernels and not self.vectors
        return x


def halved(x: Tensor) -> Tensor:
    """Means of 2x2 pixels."""
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    return x[:, :, :height, :width].reshape(*x.shape[:2], height // 2, 2, width // 2, 2).mean((3, 5))


def densenet(x: Tensor, units: Units, layers: int, growth: int, compression: float, stride: int) -> Tensor:
    x = units.convolve(x, stride=stride, padding=1)
    for block in range(3):
        if block:
            x = halved(units.unit(x) if compression < 1 else x)
        for _ in range(layers):
            x = torch.cat((x, units.unit(units.unit(x), padding=1)), 1)
    return units.classify(x)


def bottlenecks(x: Tensor, units: Units, blocks: int, stride: int, groups: int = 1) -> Tensor:
    """ResNet and ResNeXt."""
    x = units.convolve(x, stride=stride, padding=1)
    for stage in range(3):
        x = halved(x) if stage else x
        for _ in range(blocks):
            y = units.unit(units.unit(units.unit(x), padding=1, groups=groups))
            y[:, : x.shape[1]] += x
            x = y
    return units.classify(x)


def condensenet(x: Tensor, units: Units, layers: int, groups: int) -> Tensor:
    x = units.convolve(x, padding=1)
    for block in range(3):
        x = halved(x) if block else x
        for _ in range(layers):
            x = torch.cat((x, units.unit(units.unit(x), padding=1, groups=groups)), 1)
    return units.classify(x)


Forward = Callable[[Tensor, Units], Tensor]
BY_HAND: list[tuple[str, dict[str, Any], Forward]] = [
    ("densenet", {"depth": 16, "growth": 4, "compression": 1.0, "stem": "cifar"}, lambda x, u: densenet(x, u, 2, 4, 1.0, 1)),
    ("densenet", {"depth": 10, "growth": 6, "compression": 0.5, "stem": "tiny"}, lambda x, u: densenet(x, u, 1, 6, 0.5, 2)),
    ("resnet_preact", {"depth": 20, "stem": "cifar"}, lambda x, u: bottlenecks(x, u, 2, 1)),
    ("resnet_preact", {"depth": 11, "stem": "tiny"}, lambda x, u: bottlenecks(x, u, 1, 2)),
    ("resnext", {"depth": 20, "cardinality": 4, "width": 4, "stem": "cifar"}, lambda x, u: bottlenecks(x, u, 2, 1, 4)),
    ("resnext", {"depth": 11, "cardinality": 2, "width": 8, "stem": "tiny"}, lambda x, u: bottlenecks(x, u, 1, 2, 2)),
    ("condensenet", {"depth": 14, "growth": 8, "groups": 4, "dropout": 0.5}, lambda x, u: condensenet(x, u, 2, 4)),
]
every_form = pytest.mark.parametrize(("name", "arguments", "forward"), BY_HAND)


@every_form
def test_the_network_is_its_published_equation(name: str, arguments: dict[str, Any], forward: Forward) -> None:
    torch.manual_seed(0)
    model = models.build(name, input_shape=(3, 19, 22), classes=10, **arguments).eval().double()
    randomise_batchnorm(model)
    x = torch.randn(2, 3, 19, 22, dtype=torch.float64)
    with torch.no_grad():
        wanted = forward(x, Units(model))
        torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3


@every_form
def test_every_convolution_but_the_first_has_a_batch_norm_of_its_own(
    name: str, arguments: dict[str, Any], forward: Forward
) -> None:
    """What the damage of a closed channel is estimated from; and each layer is called once."""
    model = on_meta(name, 32, **arguments)
    found = follow(model, (3, 32, 32))
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert list(found.relu_source) == convolutions[1:] and not found.untreated
    assert len(set(found.relu_source.values())) == len(convolutions) - 1
    graph = LayerTracer().trace(model)
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    assert calls == Counter(path for path, module in model.named_modules() if not list(module.children()))


@pytest.mark.parametrize("name", ["densenet", "resnet_preact", "resnext", "condensenet"])
def test_networks_start_as_the_authors_draw_them(name: str) -> None:
    torch.manual_seed(0)
    wide = {"densenet": {"growth": 16}, "resnext": {"width": 32}, "condensenet": {"growth": 32, "groups": 2}}
    arguments = next(arguments for other, arguments, _ in BY_HAND if other == name) | wide.get(name, {})
    model = models.build(name, input_shape=(3, 32, 32), classes=10, **arguments)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 2000]
    assert len(convolutions) > 5
    for layer in convolutions:
        assert layer.bias is None
        std = (2 / (layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1])) ** 0.5
        assert layer.weight.std().item() == pytest.approx(std, rel=0.08)  # five standard errors of 2000 draws
        assert abs(layer.weight.mean().item()) < 5 * std / layer.weight.numel() ** 0.5
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        elif isinstance(module, nn.Linear):
            assert bool(module.bias.any()) is (name in ("resnet_preact", "resnext"))  # the authors leave these to PyTorch


def test_dropout_stands_before_each_1x1_convolution() -> None:
    model = on_meta("condensenet", 32, depth=14, growth=8, groups=4, dropout=0.3)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.3] * 6
    layer: Any = model.get_submodule("block1.0")
    assert list(layer._modules) == ["norm1", "relu1", "dropout", "conv1", "norm2", "relu2", "conv2"]


@pytest.mark.parametrize(
    ("name", "arguments", "smallest"),
    [
        ("densenet", {"depth": 10, "growth": 4, "compression": 1.0, "stem": "cifar"}, 4),
        ("densenet", {"depth": 10, "growth": 4, "compression": 1.0, "stem": "tiny"}, 7),
        ("densenet", {"depth": 10, "growth": 4, "compression": 0.5, "stem": "imagenet"}, 13),
        ("densenet", {"depth": 121, "growth": 4, "compression": 0.5, "stem": "torchvision"}, 29),
        ("resnet_preact", {"depth": 11, "stem": "cifar"}, 4),
        ("resnet_preact", {"depth": 11, "stem": "tiny"}, 7),
        ("resnet_preact", {"depth": 50, "stem": "imagenet"}, 29),
        ("resnext", {"depth": 11, "cardinality": 2, "width": 8, "stem": "cifar"}, 4),
        ("resnext", {"depth": 11, "cardinality": 2, "width": 8, "stem": "tiny"}, 7),
        ("condensenet", {"depth": 8, "growth": 4, "groups": 4, "dropout": 0.0}, 4),
    ],
)
def test_smallest_images_are_the_limit(name: str, arguments: dict[str, Any], smallest: int) -> None:
    model = on_meta(name, smallest, **arguments)
    assert model(torch.empty(2, 3, smallest, smallest + 9, device="meta")).shape == (2, 10)
    with pytest.raises(RuntimeError, match="too small"):
        model(torch.empty(2, 3, smallest - 1, smallest, device="meta"))
    with pytest.raises(InputError, match=f"{name}: .*too small; the smallest are {smallest}x{smallest}"):
        models.build(name, input_shape=(3, smallest, smallest - 1), classes=10, **arguments)


@pytest.mark.parametrize(
    ("name", "rest", "wrong", "what"),
    [
        ("densenet", DENSE, (4, 9, 41, 120), r"6n \+ 4"),
        ("resnet_preact", {"stem": "cifar"}, (2, 10, 18, 51), r"9n \+ 2"),
        ("resnext", {"cardinality": 2, "width": 4, "stem": "cifar"}, (2, 10, 18, 50), r"9n \+ 2"),
        ("condensenet", {"growth": 4, "groups": 4, "dropout": 0.0}, (2, 7, 33, 181), r"6n \+ 2"),
    ],
)
def test_impossible_depths_are_refused(name: str, rest: dict[str, Any], wrong: tuple[int, ...], what: str) -> None:
    for depth in wrong:
        with pytest.raises(InputError, match=rf"model\.depth = {depth}: must be {what}"):
            models.build(name, input_shape=(3, 32, 32), classes=10, depth=depth, **rest)
        with pytest.raises(InputError, match=rf"{name}: depth {depth} must be {what}"):
            methods.load("models", name).build(input_shape=(3, 32, 32), classes=10, depth=depth, **rest)


@pytest.mark.parametrize(
    ("name", "arguments", "key"),
    [
        *(("densenet", DENSE | {"depth": 40, "compression": c}, r"\.compression = ") for c in (0, 1.1)),
        ("densenet", DENSE | {"depth": 40, "growth": 0}, r"\.growth = 0"),
        ("densenet", DENSE | {"depth": 40, "stem": "small"}, r"\.stem = 'small'"),
        ("resnet_preact", {"depth": 11, "stem": "torchvision"}, r"\.stem = "),
        ("resnext", RESNEXT | {"cardinality": 0}, r"\.cardinality = 0"),
        ("resnext", RESNEXT | {"width": 0}, r"\.width = 0"),
        ("resnext", RESNEXT | {"stem": "imagenet"}, r"\.stem = "),
        ("condensenet", CONDENSE | {"dropout": 1.0}, r"\.dropout = "),
        ("condensenet", CONDENSE | {"groups": 5}, ".*groups must divide growth"),
    ],
)
def test_values_that_are_not_allowed_are_refused_by_key(name: str, arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=f"model{key}"):
        models.build(name, input_shape=(3, 32, 32), classes=10, **arguments)


def test_groups_that_do_not_divide_growth_are_refused_by_build_too() -> None:
    with pytest.raises(InputError, match="condensenet: growth 12 with 5 groups: groups must divide growth"):
        methods.load("models", "condensenet").build(input_shape=(3, 32, 32), classes=10, **CONDENSE | {"groups": 5})
