"""Model diet against plain slicing, group sums by hand, published counts, and networks that are two halves side by side."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import models
from pipeline.channels import follow
from pipeline.compress.diet import Options, create, diet, group_channels
from pipeline.config import Distill
from pipeline.distillation import Distillation
from pipeline.errors import InputError
from pipeline.layers import filtering_layers
from pipeline.overparameterize import collapse, kflo, overparameterize
from pipeline.training import train

SHAPE = (3, 64, 64)
NETWORKS: dict[str, dict[str, Any]] = {
    "cifar_quick": {},
    "mininet": {"dropout": 0.5},
    "resnet": {"depth": 8},
    "resnet18": {"stem": "imagenet"},
}
every_network = pytest.mark.parametrize("name", [*NETWORKS, "unet"])


class UNet(nn.Module):
    """Down, up, and a convolution that reads [skip | up]; a depthwise and a grouped convolution on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.up = nn.Upsample(scale_factor=2)
        self.join = nn.Sequential(nn.Conv2d(32, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        up = self.up(self.grouped(self.depthwise(self.deep(self.pool(skip)))))
        return self.fc(self.flatten(self.gap(self.join(torch.cat([skip, up], 1)))))


def network(name: str, expanded: bool = False) -> nn.Module:
    """A network in evaluation mode that has no neutral value anywhere."""
    torch.manual_seed(5)
    model = UNet() if name == "unet" else models.build(name, input_shape=SHAPE, classes=10, **NETWORKS[name])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
    if expanded:
        overparameterize(model, depth=2, width=1.5)
        for parameter in (p for n, p in model.named_parameters() if "mixers" in n):
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_vgg16_and_resnet18_shrink_to_the_published_parameters() -> None:
    with torch.device("meta"):
        vgg = models.build("vgg16_bn", input_shape=(3, 224, 224), classes=10, dropout=0.5)
        resnet = models.build("resnet18", input_shape=(3, 224, 224), classes=10, stem="imagenet")
    assert (parameters(vgg), parameters(resnet)) == (134_309_962, 11_181_642)
    assert parameters(diet(vgg, (3, 224, 224), score="first")[0]) == 33_593_386
    smaller, facts = diet(resnet, (3, 224, 224), score="first", protect=("conv1", "layer1.*"))
    assert parameters(smaller) == 2_937_546
    assert facts["full_width"] == ["conv1", *(f"layer1.{i}.conv{j}" for i in (0, 1) for j in (1, 2)), "fc"]
    with torch.device("meta"):
        expanded = overparameterize(models.build("vgg16_bn", input_shape=(3, 224, 224), classes=10, dropout=0.5), width=2)
    assert parameters(collapse(diet(expanded, (3, 224, 224), score="first")[0])) == 33_593_386


def narrowed(full: Tensor, small: Tensor, group: int) -> Tensor:
    """Of every axis whose size differs, the contiguous range number `group`."""
    assert full.dim() == small.dim()
    for axis, size in enumerate(small.shape):
        if full.shape[axis] != size:
            full = full.narrow(axis, group * size, size)
    return full


@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "kflo"])
@pytest.mark.parametrize(
    ("name", "groups"), [("cifar_quick", 2), ("cifar_quick", 4), ("mininet", 4), ("resnet", 2), ("resnet18", 2), ("resnet18", 8)]
)
def test_every_tensor_is_the_slice_of_one_contiguous_group(name: str, groups: int, expanded: bool) -> None:
    full, exact = collapse(network(name, expanded)).state_dict(), {"rtol": 1e-5, "atol": 1e-6} if expanded else {"rtol": 0, "atol": 0}
    for group in range(groups):
        small, facts = diet(network(name, expanded), SHAPE, groups=groups, select=group)
        assert facts["group"] == group
        changed = 0
        for key, tensor in collapse(small).state_dict().items():
            ratios = {a // b for a, b in zip(full[key].shape, tensor.shape, strict=True) if a != b}
            assert ratios <= {groups} and all(a % b == 0 for a, b in zip(full[key].shape, tensor.shape, strict=True))
            torch.testing.assert_close(tensor, narrowed(full[key], tensor, group), **exact)
            changed += bool(ratios)
        assert changed >= len(full) - 6 - sum("num_batches" in key for key in full)


def silence(model: nn.Module, kept: dict[str, list[int]]) -> None:
    """Make every channel but `kept` zero behind the layer that makes it, and behind its batch norm."""
    for name, channels in kept.items():
        module: Any = model.get_submodule(name)
        gone = [i for i in range(len(module.bias if module.bias is not None else module.weight)) if i not in channels]
        module.weight.data[gone] = 0
        if module.bias is not None:
            module.bias.data[gone] = 0


def quarter(width: int, group: int, groups: int) -> list[int]:
    return list(range(width * group // groups, width * (group + 1) // groups))


def kept_channels(name: str, group: int, groups: int) -> dict[str, list[int]]:
    """By hand, for every convolution and batch norm: the channels that a diet keeps."""
    if name == "unet":
        widths = {"down": 8, "deep": 16, "join": 12}
        kept = {f"{block}.{i}": quarter(width, group, groups) for block, width in widths.items() for i in (0, 1)}
        return kept | {"depthwise": quarter(16, group, groups), "grouped": quarter(24, group, groups)}
    # Option A: a shortcut has its channels in the middle of new ones, which are divided among themselves.
    trunk = [quarter(16, group, groups)]
    for width in (32, 64):
        outside = [*range(width // 4), *range(3 * width // 4, width)]
        trunk.append(sorted([outside[i] for i in quarter(width // 2, group, groups)] + [width // 4 + i for i in trunk[-1]]))
    kept = {"conv1": trunk[0], "bn1": trunk[0]}
    for stage, width in enumerate((16, 32, 64)):
        for kind in ("conv", "bn"):
            kept[f"layer{stage + 1}.0.{kind}1"] = quarter(width, group, groups)
            kept[f"layer{stage + 1}.0.{kind}2"] = trunk[stage]
    return kept


@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "kflo"])
@pytest.mark.parametrize(("name", "groups"), [("resnet", 2), ("resnet", 4), ("unet", 2), ("unet", 4)])
def test_the_diet_computes_what_the_full_network_does_without_the_other_groups(name: str, groups: int, expanded: bool) -> None:
    x = torch.randn(3, *SHAPE)
    for group in range(groups):
        full = collapse(network(name, expanded))
        silence(full, kept_channels(name, group, groups))
        small, _ = diet(network(name, expanded), SHAPE, groups=groups, select=group)
        torch.testing.assert_close(small(x), full(x), rtol=1e-3, atol=1e-3)
        for layer, channels in kept_channels(name, group, groups).items():
            assert len(small.get_submodule(layer).weight) == len(channels) == len(full.get_submodule(layer).weight) // groups


@pytest.mark.parametrize("name", ["stack", "unet"])
def test_a_network_of_two_separate_halves_is_reproduced_on_its_own_half(name: str) -> None:
    """Weights from one half of the channels to the other are zero; behind [skip | up] a half is half of either."""
    torch.manual_seed(0)
    model: Any = UNet() if name == "unet" else nn.Sequential(*(block(i, o) for i, o in ((3, 8), (8, 12), (12, 12)))).eval()
    model = network("unet") if name == "unet" else model
    halves = lambda *widths: torch.tensor([g for w in widths for g in quarter_labels(w)])  # noqa: E731
    reads = {"join.0": halves(8, 24)} if name == "unet" else {}
    for layer, module in filtering_layers(model):
        if module.weight.shape[1] > 3 and layer not in ("fc", "depthwise", "grouped"):
            made, read = halves(len(module.weight)), reads.get(layer, halves(module.weight.shape[1]))
            module.weight.data[made[:, None] != read] = 0
    inner: Any = nn.Sequential(*list(model)[:2]) if name == "stack" else model.join
    seen: list[Tensor] = []
    for group in range(2):
        small: Any = diet(model, SHAPE, select=group, protect=("2.0",) if name == "stack" else ())[0]
        parts = (inner, nn.Sequential(*list(small)[:2])) if name == "stack" else (inner, small.join)
        seen.clear()
        handles = [part.register_forward_hook(lambda module, inputs, output: seen.append(output)) for part in parts]
        x = torch.randn(2, *SHAPE)
        for network_, part in zip((model, small), parts, strict=True):
            part(x) if name == "stack" else network_(x)
        for handle in handles:
            handle.remove()
        whole, own = seen
        torch.testing.assert_close(own, whole.chunk(2, 1)[group], rtol=1e-5, atol=1e-5)


def quarter_labels(width: int) -> list[int]:
    return [0] * (width // 2) + [1] * (width // 2)


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU())
