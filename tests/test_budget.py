"""Budgets against counts of the networks that are really cut, brute force over all widths, and shares written by hand."""

import itertools
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import ZOO, build, drawn, programs, shape_of
from torch import nn

from pipeline import latency_budget, measure, models
from pipeline.budget import Budget, Choice
from pipeline.channels import follow
from pipeline.config import Target
from pipeline.costs import Costs
from pipeline.errors import InputError
from pipeline.families import Families, allowed
from pipeline.latency_budget import fit_latency
from pipeline.layers import filtering_layers
from pipeline.overparameterize import collapse
from pipeline.removal import choose, prune
from pipeline.structure import structure
from pipeline.surgery import Shape, drop, shrink

KINDS = ("keep", "macs", "params")
PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("resnet", {"depth": 56}),
    ("resnet_imagenet", {"depth": 18, "stem": "cifar"}),
    ("wide_resnet", {"depth": 16, "width": 4, "dropout": 0.0}),
]
IMAGE = (3, 32, 32)


def target(kind: str, fraction: float) -> Target:
    return Target.model_validate({"of": kind, "fraction": fraction})


def uniform(families: Families, seed: int = 0) -> dict[int, float]:
    units = [unit for family in families.all for unit in family.units]
    return dict(zip(units, torch.rand(len(units), generator=torch.Generator().manual_seed(seed)).tolist(), strict=True))


def published(name: str, **arguments: Any) -> nn.Module:
    with torch.device("meta"):
        return models.build(name, input_shape=IMAGE, classes=10, **arguments)


def counted(model: nn.Module, shape: Shape, layers: Iterable[str]) -> dict[str, int]:
    """Of a network as it is, by a trace and by its tensors; `layers` are those that make channels of their own."""
    found = measure.count(model, shape)
    made = {name.removesuffix(".layer"): outputs for name, (_, outputs, _) in structure(model)["filtering"].items()}
    outputs = sum(made[name.removesuffix(".layer")] for name in layers)
    return {"keep": outputs, "macs": found["macs"], "params": found["parameters"]}


def some_counts(families: Families, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.array([draw.choice(family.allowed) for family in families.all], dtype=np.int64)


def cut(model: nn.Module, shape: Shape, families: Families, kept: np.ndarray) -> tuple[dict[str, Any], nn.Module]:
    gone = [unit for family, count in zip(families.all, kept, strict=True) for unit in family.units[count:]]
    reads = drop(families.channels, families.members(gone))
    return reads, shrink(model, shape, reads)


def check_amounts(model: nn.Module, shape: Shape, seed: int) -> None:
    """What is expected of a cut, what `Costs` says of it and what the cut network has are one."""
    families = Families(model, follow(model, shape), multiple=1)
    assert families.all
    costs = Costs(model, families.channels)
    least = np.array([family.allowed[0] for family in families.all])
    for kept in (least, some_counts(families, seed)):
        reads, smaller = cut(model, shape, families, kept)
        quick = {"keep": costs.keep(reads), "macs": costs.macs(reads), "params": costs.parameters(reads)}
        assert {kind: float(families.amounts(kind, kept)) for kind in KINDS} == quick
    assert quick == counted(collapse(smaller), shape, families.channels.outputs)


@pytest.mark.parametrize("network", ZOO)
def test_amounts_are_those_of_the_network_that_is_cut(network: str) -> None:
    check_amounts(build(network, expand=False), shape_of(network), 0)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs(), st.integers(0, 99))
def test_amounts_are_those_of_drawn_networks_too(program: dict[str, Any], seed: int) -> None:
    check_amounts(drawn(program), (3, 8, 8), seed)


class Grouped(nn.Module):
    """Two grouped convolutions, a depthwise one, a concatenation, and an add with what was padded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.first, self.second = nn.Conv2d(24, 48, 3, groups=4, padding=1), nn.Conv2d(48, 48, 3, groups=2, padding=1)
        self.depthwise = nn.Conv2d(48, 48, 3, groups=48)
        self.head = nn.Linear(48 + 24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.depthwise(self.second(self.first(x)))
        return self.head(torch.cat([y.mean((2, 3)), x.mean((2, 3))], 1))


def test_groups_stay_equal_and_their_widths_multiples() -> None:
    model, shape = Grouped().eval(), (3, 9, 9)
    check_amounts(model, shape, 3)
    families = Families(model, follow(model, shape), multiple=8)
    for fraction in (0.8, 0.5):
        how = {"share": None, "target": target("macs", fraction), "multiple": 8, "scope": "layer"}
        smaller, facts = prune(model, shape, lambda *_: uniform(families), **how)
        made = {name: outputs for name, (_, outputs, _) in structure(smaller)["filtering"].items()}
        assert all(width % 8 == 0 for name, width in made.items() if name != "head") and made["head"] == 5
        assert [structure(smaller)["filtering"][name][2] for name in ("first", "second")] == [4, 2]
        assert facts["macs"] <= fraction and smaller(torch.randn(2, *shape)).shape == (2, 5)


@pytest.mark.parametrize(("name", "arguments"), PUBLISHED, ids=[name for name, _ in PUBLISHED])
def test_targets_are_reached_from_below_within_2_percent_in_multiples_of_8(name: str, arguments: dict[str, Any]) -> None:
    model = published(name, **arguments)
    whole = structure(model)["filtering"]
    families = Families(model, follow(model, IMAGE))
    for kind, scope, fraction in itertools.product(KINDS, ("global", "layer"), (0.8, 0.5)):
        choice = Budget(families, uniform(families), scope).target(kind, fraction)  # type: ignore[arg-type]
        assert 0.98 * fraction <= choice.shares[kind] <= fraction and choice.note is None
        if kind != "macs":
            continue
        made = structure(shrink(model, IMAGE, drop(families.channels, choice.channels)))["filtering"]
        for layer, (inputs, outputs, _) in made.items():
            assert outputs % 8 == 0 or outputs == whole[layer][1], layer
            assert inputs % 8 == 0 or inputs == whole[layer][0], layer
        lost = {layer: whole[layer][1] - outputs for layer, (_, outputs, _) in made.items() if outputs < whole[layer][1]}
        assert lost == choice.removed and made[[*made][-1]][1] == 10


@pytest.mark.parametrize("network", ["vgg16_bn", "resnet50", "alexnet", "mininet", "cifar_quick"])
def test_targets_are_reached_in_other_networks_channel_by_channel(network: str) -> None:
    model, shape = build(network, expand=False), shape_of(network)
    families = Families(model, follow(model, shape), multiple=1)
    whole = counted(model, shape, families.channels.outputs)
    for kind, fraction in (("keep", 0.7), ("macs", 0.4), ("params", 0.6)):
        choice = Budget(families, uniform(families)).target(kind, fraction)  # type: ignore[arg-type]
        assert 0.98 * fraction <= choice.shares[kind] <= fraction and choice.note is None
        smaller = shrink(model, shape, drop(families.channels, choice.channels))
        assert counted(smaller, shape, families.channels.outputs)[kind] / whole[kind] == pytest.approx(choice.shares[kind])


def chain(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, *widths)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4)).eval()


@pytest.mark.parametrize("widths", [(16, 24, 16), (32, 40, 16), (32, 16, 32, 16), (24, 16, 40, 16, 32)])
def test_where_multiples_are_too_coarse_no_other_widths_are_nearer_below(widths: tuple[int, ...]) -> None:
    model, shape = chain(*widths), (3, 8, 8)
    families = Families(model, follow(model, shape))
    every = np.array(list(itertools.product(*(family.allowed for family in families.all))))
    for kind, fraction in itertools.product(KINDS, (0.95, 0.8, 0.65, 0.5, 0.4)):
        shares = families.amounts(kind, every) / families.amounts(kind, families.sizes)  # type: ignore[arg-type]
        below = shares[shares <= fraction * (1 + 1e-9)]
        if not len(below):
            with pytest.raises(InputError, match=f"{kind} = {fraction} cannot be reached: {shares.min():.4f} is left"):
                Budget(families, uniform(families)).target(kind, fraction)  # type: ignore[arg-type]
            continue
        choice = Budget(families, uniform(families)).target(kind, fraction)  # type: ignore[arg-type]
        near = choice.shares[kind] >= 0.98 * fraction
        assert near or choice.shares[kind] == pytest.approx(below.max())
        assert (choice.note is None) is near and (near or f"instead of {fraction}" in str(choice.note))


def test_how_many_may_stay() -> None:
    assert allowed(24, [1], 8) == (8, 16, 24)
    assert allowed(30, [1], 8) == (8, 16, 24, 30)  # all of them is always allowed
    assert allowed(6, [1], 8) == (1, 2, 3, 4, 5, 6)  # too narrow for one multiple
    assert allowed(12, [4, 1], 8) == (8, 12)
    assert allowed(12, [4], 8) == (2, 4, 6, 8, 10, 12)
    assert allowed(1, [1], 8) == allowed(1, [1], 1) == (1,)


def test_the_lowest_scores_go_of_each_family_and_of_the_whole() -> None:
    model, shape = chain(8, 8), (3, 8, 8)
    families = Families(model, follow(model, shape), multiple=1)
    first, second = families.all
    scores = {unit: 10 + position for position, unit in enumerate(first.units)}
    scores |= {unit: (7 * position) % 8 for position, unit in enumerate(second.units)}
    everywhere, alike = Budget(families, scores).share(0.45), Budget(families, scores, "layer").share(0.4)
    assert everywhere.kept == {"0": (8, 8), "3": (1, 8)}  # int(16 * 0.45) + 1 go, but for one channel
    assert everywhere.channels == families.members([u for u in second.units if scores[u] < 7])
    assert alike.kept == {"0": (4, 8), "3": (4, 8)}  # int(8 * 0.6) stay
    assert alike.channels == families.members([*first.units[:4], *(u for u in second.units if scores[u] < 4)])
    assert Budget(families, scores).share(0.1).removed == {"3": 2}


def test_costs_decide_how_a_budget_is_spread() -> None:
    model, shape = chain(40, 40, 40), (3, 8, 8)
    families = Families(model, follow(model, shape), multiple=1)
    names = [family.name for family in families.all]
    dear = {
        names[0]: [{"share": 0.5, "cost": 5.0}],
        names[1]: [{"share": 0.5, "cost": 1.0}],
        names[2]: [{"share": 1.0, "cost": 2.0}],
    }
    choice = Budget(families, uniform(families), costs=dear).target("keep", 0.6)
    lost = [(whole - kept) / whole for kept, whole in choice.kept.values()]
    assert lost[1] == pytest.approx(5 * lost[0], abs=0.06) and lost[1] == pytest.approx(lost[2], abs=0.03)
    unmeasured = Budget(families, uniform(families), costs={names[1]: dear[names[1]]}).target("keep", 0.7)
    assert unmeasured.kept[names[0]] == unmeasured.kept[names[2]] == (40, 40) and unmeasured.kept[names[1]][0] < 5
    how: dict[str, Any] = {"share": None, "target": target("macs", 0.5), "multiple": 1, "scope": "sensitivity"}
    found = choose(model, shape, families.channels, uniform(families), **how)
    assert 0.49 <= found.shares["macs"] <= 0.5


def test_protected_pinned_and_unscored_layers_stay_whole() -> None:
    model = published("resnet", depth=20)
    channels = follow(model, IMAGE)
    families = Families(model, channels, protect=["layer2.*.conv1", "conv1"], multiple=1)
    scores = uniform(families)
    unscored = next(family for family in families.all if family.name == "layer3.0.conv1")
    choice = Budget(families, {unit: s for unit, s in scores.items() if unit != unscored.units[0]}).target("macs", 0.6)
    made = structure(shrink(model, IMAGE, drop(channels, choice.channels)))["filtering"]
    whole = structure(model)["filtering"]
    for name in ("conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.2.conv1", "layer3.0.conv1", "fc"):
        assert made[name][1] == whole[name][1], name
    assert made["layer1.0.conv1"][1] < 16 and made["layer3.2.conv2"][1] < 64
    assert not choice.channels & set(channels.pins())
    with pytest.raises(InputError, match="protect = 'layer9' matches no layer"):
        Families(model, channels, protect=["layer9"])
    with pytest.raises(InputError, match="there is nothing to remove"):
        Budget(Families(model, channels, protect=["*"]), scores)
    with pytest.raises(InputError, match="the scores of layer conv1 are not finite"):
        Budget(Families(model, channels), dict.fromkeys(channels.units().values(), float("nan")))


def test_a_search_takes_a_moment() -> None:
    model = published("resnet", depth=56)
    channels = follow(model, IMAGE)
    start = time.process_time()
    families = Families(model, channels)
    for kind in KINDS:
        Budget(families, uniform(families)).target(kind, 0.5)  # type: ignore[arg-type]
    assert time.process_time() - start < 1.5


def timed_as(model: nn.Module, rule: Any) -> Any:
    """A timer by a rule on the multiply-adds of the candidate it is given, with an interval of 1 % to each side."""
    whole = measure.count(model, (3, 8, 8))["macs"]

    def measured(candidate: nn.Module) -> tuple[float, float, float]:
        ratio = rule(measure.count(candidate, (3, 8, 8))["macs"] / whole)
        return ratio, 0.99 * ratio, 1.01 * ratio

    return measured


def latency(rule: Any, fraction: float) -> Choice:
    model = chain(40, 40, 40)
    families = Families(model, follow(model, (3, 8, 8)), multiple=1)
    return fit_latency(model, (3, 8, 8), Budget(families, uniform(families)), fraction, timed_as(model, rule))


def test_a_latency_is_reached_whatever_it_does_with_multiply_adds() -> None:
    for rule in (lambda x: x, lambda x: 0.3 + 0.7 * x, lambda x: x**0.3, lambda x: x**3):
        choice = latency(rule, 0.5)
        assert choice.latency["latency"] == pytest.approx(0.5, rel=0.02) and choice.note is None
        assert rule(choice.shares["macs"]) == pytest.approx(choice.latency["latency"])
        assert choice.facts()["latency_high"] == pytest.approx(1.01 * choice.latency["latency"])


def test_a_latency_that_no_candidate_has_is_the_next_below_and_its_interval_is_told() -> None:
    choice = latency(lambda x: 0.25 if x < 0.4 else 0.9, 0.5)
    assert choice.latency["latency"] == 0.25
    assert choice.note == "latency comes to 0.250 (95 % interval 0.247 to 0.253) of the whole network's instead of 0.5"
    with pytest.raises(InputError, match="latency = 0.5 cannot be reached: 0.7[0-9]* of the time is left"):
        latency(lambda x: 0.7 + 0.3 * x, 0.5)


def test_a_latency_is_measured_in_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_budget, "CANDIDATES", 2)
    monkeypatch.setitem(latency_budget.TIMING, "warmup_s", 0.05)
    monkeypatch.setitem(latency_budget.TIMING, "attempts", 1)
    model = chain(32, 64)
    families = Families(model, follow(model, IMAGE))
    choice = fit_latency(model, IMAGE, Budget(families, uniform(families)), 0.8)
    found = choice.latency
    assert 0 < found["latency_low"] <= found["latency"] <= found["latency_high"] < 1 and 0 < choice.shares["macs"] < 1
    assert [len(layer.weight) for _, layer in filtering_layers(model)] == [32, 64, 4]
