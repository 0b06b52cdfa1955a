"""Model diet against plain slicing, group sums by hand, published counts, and networks that are two halves side by side."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import models
from pipeline.channels import follow
from pipeline.compress.diet import Options, create, diet
from pipeline.config import Distill
from pipeline.distillation import Distillation
from pipeline.errors import InputError
from pipeline.evaluation import evaluate
from pipeline.grouping import group_channels
from pipeline.layers import filtering_layers
from pipeline.overparameterize import collapse, kflo, overparameterize
from pipeline.training import train

SHAPE = (3, 64, 64)
NETWORKS: dict[str, dict[str, Any]] = {
    "cifar_quick": {},
    "mininet": {"dropout": 0.5},
    "resnet": {"depth": 8},
    "resnet_imagenet": {"depth": 18, "stem": "imagenet"},
}


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

    def features(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        up = self.up(self.grouped(self.depthwise(self.deep(self.pool(skip)))))
        return self.join(torch.cat([skip, up], 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.gap(self.features(x))))


class Stack(nn.Module):
    """Convolutions with batch norms, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 8), (8, 12), (12, 16)):
            layers += [nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.gap(self.features(x))))


def network(name: str, expanded: bool = False) -> nn.Module:
    """A network in evaluation mode that has no neutral value anywhere."""
    torch.manual_seed(5)
    own = {"unet": UNet, "stack": Stack}
    model = own[name]() if name in own else models.build(name, input_shape=SHAPE, classes=10, **NETWORKS[name])
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
        resnet = models.build("resnet_imagenet", input_shape=(3, 224, 224), classes=10, depth=18, stem="imagenet")
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
    ("name", "groups"), [("cifar_quick", 2), ("cifar_quick", 4), ("mininet", 4), ("resnet", 2), ("resnet_imagenet", 2)]
)
def test_every_tensor_is_the_slice_of_one_contiguous_group(name: str, groups: int, expanded: bool) -> None:
    full, exact = (
        collapse(network(name, expanded)).state_dict(),
        {"rtol": 1e-5, "atol": 1e-6} if expanded else {"rtol": 0, "atol": 0},
    )
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
    """No weight leads from one half of the channels to the other; behind [skip | up] a half is half of either."""
    full: Any = network(name)
    halves = lambda *widths: torch.cat([torch.arange(width) >= width // 2 for width in widths])  # noqa: E731
    for layer, module in filtering_layers(full):
        if module.weight.shape[1] > 4 and layer != "fc":  # neither the first, nor the depthwise, nor the grouped one
            read = halves(8, 24) if layer == "join.0" else halves(module.weight.shape[1])
            module.weight.data[halves(len(module.weight))[:, None] != read] = 0
    x = torch.randn(2, *SHAPE)
    features = full.features(x).chunk(2, 1)
    for group in range(2):
        small: Any = diet(full, SHAPE, select=group)[0]
        torch.testing.assert_close(small.features(x), features[group], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "kflo"])
@pytest.mark.parametrize("name", ["cifar_quick", "mininet", "resnet"])
def test_a_group_scores_the_sum_of_the_slices_that_it_would_keep(name: str, expanded: bool) -> None:
    full = collapse(network(name, expanded)).state_dict()
    small = collapse(diet(network(name, expanded), SHAPE)[0]).state_dict()
    changed = {key: tensor for key, tensor in full.items() if tensor.shape != small[key].shape}
    kernels = {f"{layer}.weight" for layer, _ in filtering_layers(network(name))}
    sums: dict[str, list[float]] = {"sum": [], "abs": [], "weights_only": []}
    for group in range(2):
        slices = {key: narrowed(tensor, small[key], group).double() for key, tensor in changed.items()}
        sums["sum"].append(sum(float(part.sum()) for part in slices.values()))
        sums["abs"].append(sum(float(part.abs().sum()) for part in slices.values()))
        sums["weights_only"].append(sum(float(part.sum()) for key, part in slices.items() if key in kernels))
    for score, wanted in sums.items():
        for select, best in (("max", max(wanted)), ("min", min(wanted))):
            _, facts = diet(network(name, expanded), SHAPE, score=score, select=select)
            assert facts["scores"] == pytest.approx(wanted, rel=1e-4, abs=1e-3)
            assert facts["group"] == wanted.index(best)


def test_first_takes_group_0_and_random_draws_one() -> None:
    assert diet(network("stack"), SHAPE, groups=4, score="first")[1]["group"] == 0
    draws = torch.Generator().manual_seed(0)
    found = {str(diet(network("stack"), SHAPE, groups=4, score="random", generator=draws)[1]["group"]) for _ in range(25)}
    assert found == set("0123")
    dead = network("stack")
    for tensor in dead.state_dict().values():
        tensor.zero_()
    assert diet(dead, SHAPE)[1]["group"] == 0  # of equal scores the first


def test_what_cannot_be_divided_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"the 8 channels of layer features.0 do not divide into 3 groups"):
        diet(network("stack"), SHAPE, groups=3)
    with pytest.raises(InputError, match=r"the 16 channels of layer features.6 do not divide into 3 groups"):
        diet(network("stack"), SHAPE, groups=3, protect=("features.[03]",))
    with pytest.raises(InputError, match=r"protect = 'feature' matches no layer; layers are features.0, features.3"):
        diet(network("stack"), SHAPE, protect=("feature",))
    with pytest.raises(InputError, match="there is nothing to cut"):
        diet(network("stack"), SHAPE, protect=("*",))
    with pytest.raises(InputError, match="select = 2, but the 2 groups"):
        diet(network("stack"), SHAPE, select=2)
    with pytest.raises(ValueError, match="select must be max, min or a group from 0 to 1"):
        options(select=2)


def options(**changes: Any) -> Options:
    fit = {"epochs": 1, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0}
    fit |= {"schedule": "cosine", "label_smoothing": 0.0, "select": "last", "precision": "fp32"}
    usual = {"method": "diet", "groups": 2, "target": None, "multiple": 8, "score": "sum", "select": "max", "concat": "aware"}
    usual |= {"weights": "inherited", "protect": [], "distill": None, "sensitivity": None, "fit": fit}
    return Options.model_validate(usual | changes)


def test_without_training_the_statistics_are_those_of_the_cut_network_on_training_images(make_run: Any) -> None:
    torch.manual_seed(0)
    run = make_run(models.build("cifar_quick", input_shape=(1, 16, 16), classes=10), epochs=0)
    trained: Any = train(run, [create(options())])
    maps = [trained.conv1(images) for images, _ in run.train.epoch(0)]
    means = torch.stack([each.mean((0, 2, 3)) for each in maps]).mean(0)
    variances = torch.stack([each.var((0, 2, 3)) for each in maps]).mean(0)
    torch.testing.assert_close(trained.bn1.running_mean, means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained.bn1.running_var, variances, rtol=1e-4, atol=1e-5)
    assert run.events[1]["validation_accuracy_after"] == evaluate(trained, run.validation).accuracy


@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "kflo"])
def test_in_training_the_cut_comes_first_then_the_batch_norms_then_the_optimiser(make_run: Any, expanded: bool) -> None:
    torch.manual_seed(0)
    model = models.build("cifar_quick", input_shape=(1, 16, 16), classes=10)
    hooks = [kflo.Hook()] if expanded else []
    parent = train(make_run(overparameterize(model, width=2) if expanded else model, lr=0.05, epochs=1), hooks)
    run = make_run(parent, epochs=1, lr=0.01)
    trained = train(run, [*hooks, Distillation(Distill(loss="kl", weight=1.0, temperature=4.0)), create(options())])
    cut, norms = run.events
    assert (cut["kind"], cut["epoch"], norms["kind"]) == ("diet", 0, "batchnorm") and cut["full_width"] == ["fc2"]
    assert all(0 <= norms[f"validation_accuracy_{when}"] <= 1 for when in ("before", "after"))
    assert norms["batches"] == len(run.train)
    assert run.optimizer is not None and trained is not parent
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trained.parameters()}
    assert [len(m.weight) for m in trained.modules() if isinstance(m, nn.BatchNorm2d)] == [16, 16, 32]
    assert [len(m.weight) for m in parent.modules() if isinstance(m, nn.BatchNorm2d)] == [32, 32, 64]
    assert run.notes == ["diet leaves fc2 at full width: protected, or what enters or leaves the network"]
    assert len(group_channels(follow(parent, (1, 16, 16)), 2)) == 32 + 32 + 64 + 64
