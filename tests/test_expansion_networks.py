"""Over-parameterising whole networks: shrinking, the walks of other libraries, the choice of layers, what is refused, dtypes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawn_layers import METHODS, branching, expand, randomise, snapshot
from torch import nn
from torch.nn.utils import parametrize

from pipeline.errors import InputError
from pipeline.layers import filtering_layers
from pipeline.overparameterize import collapse, kflo, overparameterize
from pipeline.surgery import shrink

every_method = pytest.mark.parametrize("label", METHODS)


def fresh() -> nn.Sequential:
    """Plain, depthwise and grouped convolutions, with and without biases, inside one another."""
    inner = [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2, bias=False)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Sequential(*inner), nn.BatchNorm2d(12),
        nn.ReLU(), nn.Conv2d(12, 6, (3, 5)), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 5),
    )  # fmt: skip


def small() -> nn.Sequential:
    """The same, as if it had been trained."""
    model = fresh()
    randomise(model)
    return model


@every_method
@torch.no_grad()
def test_shrinking_commutes_with_merging(label: str) -> None:
    torch.manual_seed(0)
    model = randomise(expand(small(), label)).double().eval()
    reads = {"3.3": torch.tensor([1, 1, 0, 1, 1, 1, 0, 1], dtype=torch.bool), "6": torch.ones(12, dtype=torch.bool)}
    reads["6"][[3, 4, 6, 8]] = False  # two of each group, at different places
    reads["11"] = torch.arange(24) // 4 != 2
    one, other = collapse(shrink(model, (3, 9, 9), reads)), shrink(collapse(copy.deepcopy(model)), (3, 9, 9), reads)
    assert one[0].out_channels == 6 and one[3][3].out_channels == 8 and one[6].out_channels == 5
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], tensor, atol=1e-9, rtol=1e-9)
    x = torch.randn(3, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(one(x), other(x), atol=1e-9, rtol=1e-9)


def timm_walk(model: nn.Module) -> None:
    """As timm.utils.reparameterize_model goes over a network."""
    for name, child in model.named_children():
        if hasattr(child, "fuse"):
            setattr(model, name, child.fuse())
        elif hasattr(child, "reparameterize"):
            child.reparameterize()
        elif hasattr(child, "switch_to_deploy"):
            child.switch_to_deploy()
        timm_walk(child)


def deploy_walk(model: nn.Module) -> None:
    """As RepVGG's, ACNet's and DBB's converters go over theirs."""
    for module in model.modules():
        if hasattr(module, "switch_to_deploy"):
            module.switch_to_deploy()


def reparameterize_walk(model: nn.Module) -> None:
    """As MobileOne's does."""
    for module in model.modules():
        if hasattr(module, "reparameterize"):
            module.reparameterize()


@pytest.mark.parametrize("walk", [timm_walk, deploy_walk, reparameterize_walk])
@every_method
def test_the_walks_of_other_libraries_merge_as_collapse_does(label: str, walk: Callable[[nn.Module], None]) -> None:
    model = randomise(expand(small(), label)).eval()
    before, kept = snapshot(model), snapshot(small())
    one, other = collapse(copy.deepcopy(model)), copy.deepcopy(model)
    walk(other)
    assert snapshot(other)["values"] == snapshot(one)["values"]
    for found in (one, other):  # and a copy's merging is nothing to the original
        assert snapshot(found)["modules"] == {name: (*facts[:2], False) for name, facts in kept["modules"].items()}
    assert snapshot(model) == before and all(hasattr(model[0], name) for name in ("fuse", "reparameterize", "switch_to_deploy"))
    collapse(model)
    assert snapshot(model)["values"] == snapshot(one)["values"]
    walk(model)
    assert snapshot(model)["values"] == snapshot(one)["values"]


def treated(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if parametrize.is_parametrized(module)]


@every_method
def test_a_predicate_or_patterns_of_names_choose_the_layers(label: str) -> None:
    linear = METHODS[label][0] == "kflo" or "linear" in METHODS[label][1]
    every = ["0", "3.0", "3.3", "6", *(["11"] if linear else [])]
    assert treated(expand(small(), label)) == every == treated(expand(small(), label, layers=["[0-9]*"]))
    assert treated(expand(small(), label, layers=["3.*"])) == ["3.0", "3.3"]
    assert treated(expand(small(), label, layers=["0", "*3"])) == ["0", "3.3"]
    ungrouped = lambda name, layer: name != "6" and getattr(layer, "groups", 1) == 1  # noqa: E731
    assert treated(expand(small(), label, layers=ungrouped)) == ["0", *(["11"] if linear else [])]
    model = expand(small(), label, layers=["0"])
    assert treated(expand(model, label, layers=["6"])) == ["0", "6"]


@every_method
def test_what_cannot_be_expanded_is_refused_and_changes_nothing(label: str) -> None:
    shared = small()
    shared[3][0].weight = shared[3][3].weight = nn.Parameter(torch.randn(8, 1, 3, 3))
    cases: list[tuple[nn.Module, Any, str]] = [
        (small(), ["0", "conv9"], "no layer fits 'conv9'; there are 0, 3.0, 3.3, 6, 11"),
        (small(), [], "among the chosen layers there is none that it treats"),
        (small(), lambda name, layer: False, "among the chosen layers there is none that it treats"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), ["*"], "no layer fits '*'; there are none"),
        (expand(small(), label), ["*"], "is over-parameterised already; collapse it first"),
        (expand(small(), label, layers=["6"]), ["0", "6"], "layer 6 is over-parameterised already"),
        (overparameterize(small(), "kflo", layers=["6"]), ["*"], "layer 6 is over-parameterised already"),
        (shared, ["3.*"], "layer 3.0 shares its weight or bias with another layer; leave it out of `layers`"),
    ]
    for model, layers, message in cases:
        before = snapshot(model)
        with pytest.raises(InputError, match=f"^{METHODS[label][0]}: ") as error:
            expand(model, label, layers=layers)
        assert message in str(error.value)
        assert snapshot(model) == before
    with torch.no_grad():
        assert treated(expand(shared, label, layers=["0"])) == ["0"]
    if not branching(label):
        lazy = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 3), nn.LazyLinear(4))
        with pytest.raises(InputError, match="layer 1 has no shape yet; pass one batch through the network first"):
            expand(lazy, label)
        assert treated(lazy) == []


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("kflo", {"depth": 1}, "kflo.depth = 1: must be greater than or equal to 2"),
    ("kflo", {"depth": 2.5}, "kflo.depth = 2.5: must be a valid integer"),
    ("kflo", {"width": 0.99}, "kflo: width must be at least 1, or narrow true"),
    ("kflo", {"width": float("nan")}, "kflo.width = nan: must be"),
    ("kflo", {"rho": 4}, "kflo.rho is not a parameter"),
    ("expandnet", {"ratio": 0}, "expandnet.ratio = 0: must be greater than or equal to 1"),
    ("acnet", {"norms": "replce"}, "acnet.norms = 'replce': must be 'replace' or 'add'"),
    ("dbb", {"gamma": -1.0}, "dbb.gamma = -1.0: must be greater than or equal to 0"),
    ("do_conv", {"layers": None}, "do_conv: layers = None: must be patterns of names, or a predicate"),
    ("do_conv", {"layers": [1]}, r"do_conv: layers = \[1\]: must be patterns of names, or a predicate"),
]


@pytest.mark.parametrize(("method", "arguments", "message"), WRONG)
def test_impossible_arguments_are_refused_and_change_nothing(method: str, arguments: dict[str, Any], message: str) -> None:
    model = small()
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        overparameterize(model, method, **arguments)
    assert snapshot(model) == before


def test_one_pattern_may_stand_alone() -> None:
    model = overparameterize(small(), "do_conv", layers="3.*")
    assert treated(model) == ["3.0", "3.3"]


def test_tensors_shared_with_anything_are_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(8, 4), nn.Linear(4, 8)
            self.head.weight = self.words.weight

    biased = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 1))
    biased[1].bias = biased[0].bias
    for model in (Tied(), biased):
        before = snapshot(model)
        with pytest.raises(InputError, match="shares its weight or bias with another layer"):
            overparameterize(model, "kflo")
        assert snapshot(model) == before


def test_parametrisations_of_another_kind_are_left_alone() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3))
    with pytest.raises(InputError, match="layer 0 has a parametrisation of another kind; remove it first"):
        overparameterize(model, "kflo")
    collapse(overparameterize(model, "kflo", layers=["1"]))
    assert parametrize.is_parametrized(model[0]) and not parametrize.is_parametrized(model[1])


@pytest.mark.parametrize("label", [label for label in METHODS if branching(label)])
def test_a_batch_norm_in_evaluation_stays_so_in_the_branches(label: str) -> None:
    model = small().train()
    model[1].eval()
    x = torch.randn(4, 3, 9, 9)
    wanted = model[1](model[0](x))
    arguments = METHODS[label][1] | {"norms": "replace", "gamma": None}
    overparameterize(model, METHODS[label][0], layers=["0"], **arguments)
    torch.testing.assert_close(model[1](model[0](x)), wanted, atol=1e-5, rtol=1e-5)


def test_batch_norms_of_other_libraries_are_found() -> None:
    from timm.layers import BatchNormAct2d

    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), BatchNormAct2d(4), nn.Conv2d(4, 2, 3, bias=False))
    x = torch.randn(4, 3, 9, 9)
    overparameterize(model, "acnet").train()(x)
    wanted = model.eval()(x)
    merged = collapse(model)
    assert merged[0].bias is None and merged[2].bias is not None  # type: ignore[index]
    torch.testing.assert_close(merged(x), wanted, atol=1e-5, rtol=1e-5)


def test_a_kernel_that_was_composed_without_gradients_is_refused() -> None:
    model, x = overparameterize(small(), "kflo"), torch.randn(2, 3, 9, 9)
    with parametrize.cached():
        with torch.no_grad():
            model(x)
        model(x)
        with pytest.raises(InputError, match="composed without gradients inside parametrize.cached"):
            kflo.penalty(model)


@pytest.mark.parametrize("label", [label for label in METHODS if branching(label)])
def test_only_branches_that_replace_norms_must_follow_the_network(label: str) -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.sum() > 0 else self.conv(-x)

    model, x = Deciding(), torch.randn(2, 3, 5, 5)
    before, wanted = snapshot(model), model.eval()(x)
    model.train()
    if METHODS[label][1].get("norms") == "add":
        torch.testing.assert_close(expand(model, label).eval()(x), wanted)
        torch.testing.assert_close(collapse(model)(x), wanted)
    else:
        with pytest.raises(
            InputError, match="may not branch on the values of tensors; with norms: add nothing needs to be followed"
        ):
            expand(model, label)
        assert snapshot(model) == before


@every_method
def test_frozen_layers_stay_frozen(label: str) -> None:
    model = small()
    for layer in (model[0], model[1], model[3]):
        layer.requires_grad_(False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    expand(model, label)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # A frozen convolution before a batch norm that trains: its branches' norms train in that one's place.
    training = {name.split(".")[0] for name in trained if ".parametrizations.weight.0.norms." not in name}
    assert training - {"4", "7"} == {"6", "11"} and all(parameter.requires_grad for parameter in model[6].parameters())
    collapse(model)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@every_method
def test_a_layers_dtype_is_that_of_all_it_gains(label: str, dtype: torch.dtype) -> None:
    model = expand(small().to(dtype), label)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {dtype}
    x = torch.randn(2, 3, 9, 9, dtype=dtype)
    for mode in (True, False):
        y = model.train(mode)(x)
        assert y.dtype == dtype and y.isfinite().all()
    with torch.no_grad():
        assert torch.equal(collapse(copy.deepcopy(model))(x), y) or branching(label)
        model[0].weight = model[0].weight + 1  # solved in fp64, stored as it was
    assert model[0].weight.dtype == dtype and {tensor.dtype for tensor in model.parameters()} == {dtype}


@every_method
def test_networks_without_values_can_be_expanded_and_merged(label: str) -> None:
    with torch.device("meta"):
        model, plain = expand(fresh(), label), fresh()
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
    for mode in (True, False):
        assert model.train(mode)(torch.empty(2, 3, 9, 9, device="meta")).shape == (2, 5)
    wanted = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert {name: tensor.shape for name, tensor in collapse(model).state_dict().items()} == wanted


@every_method
def test_kernels_are_computed_in_fp32_under_autocast(label: str) -> None:
    model = randomise(expand(small(), label)).eval()
    wanted = {name: layer.weight for name, layer in filtering_layers(model)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, layer in filtering_layers(model):
            assert layer.weight.dtype == torch.float32 and torch.equal(layer.weight, wanted[name])
        assert model(torch.randn(2, 3, 9, 9)).dtype == torch.bfloat16
