"""Deallocation at one stroke and towards a target: what it comes to, which channels go, and what the outputs keep on average."""

from typing import Any

import pytest
import torch
from networks import build, randomise, shape_of
from test_selective import options
from torch import Tensor, nn

from pipeline import models
from pipeline.allocation import Step, allocate, unit_of
from pipeline.channels import follow
from pipeline.compress.selective import Selective, create, dealloc, make_up
from pipeline.config import Target
from pipeline.costs import Costs
from pipeline.ecdm import Ranking, activity, deallocate
from pipeline.errors import InputError
from pipeline.measure import count
from pipeline.selection import activities, damage, measured_means, units
from pipeline.surgery import shrink
from pipeline.training import train

SHAPE = (3, 8, 8)


def densenet() -> nn.Module:
    return randomise(
        models.build("densenet", input_shape=SHAPE, classes=10, depth=16, growth=12, compression=1.0, stem="cifar")
    ).eval()


def target(of: str, fraction: float) -> Target:
    return Target.model_validate({"of": of, "fraction": fraction})


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize(("of", "fraction"), [("macs", 0.7), ("macs", 0.35), ("params", 0.5), ("keep", 0.8)])
def test_the_smaller_network_costs_what_was_asked(of: str, fraction: float, multiple: int) -> None:
    model = densenet()
    reads, facts = dealloc(model, SHAPE, target=target(of, fraction), multiple=multiple)
    assert 0.98 * fraction <= facts["share"] <= fraction and facts["whole"] == []
    small = shrink(model, SHAPE, reads)
    if of == "keep":
        costs = [sum(m.weight.shape[0] for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)) for net in (small, model)]
    else:
        costs = [count(net, SHAPE)["macs" if of == "macs" else "parameters"] for net in (small, model)]
    assert costs[0] / costs[1] == pytest.approx(facts["share"], abs=1e-9)
    for mask in reads.values():
        assert int(mask.sum()) % unit_of(multiple, len(mask)) == len(mask) % unit_of(multiple, len(mask)) * bool(mask.all())


def test_all_layers_have_one_gamma_and_a_smaller_target_keeps_less_of_each() -> None:
    model, before = densenet(), None
    sizes = {name: both[1] for name, both in activities(model, units(model, follow(model, SHAPE)).values(), {}).items()}
    for fraction in (0.9, 0.7, 0.5, 0.3):
        reads, facts = dealloc(model, SHAPE, target=target("macs", fraction))
        for name, mask in reads.items():
            closed = deallocate(damage(model, name, sizes[name]), facts["gamma"] + 1e-6)
            assert torch.equal(mask, ~closed), name
            assert before is None or not (mask & ~before[name]).any()
        again, _ = dealloc(model, SHAPE, gamma=facts["gamma"] + 1e-6)
        assert all(torch.equal(mask, reads[name]) for name, mask in again.items())
        before = reads


def test_where_a_step_would_overshoot_other_layers_go_on() -> None:
    ranking = lambda *lost: Ranking(torch.arange(len(lost)), torch.tensor(lost))  # noqa: E731
    rankings = {"large": ranking(0.1, 0.2, 0.3, 1.0), "small": ranking(0.25, 0.4, 0.5, 1.0)}
    cost = lambda reads: (int(reads["large"].sum()) * 30 + int(reads["small"].sum()) * 2.5) / 130  # noqa: E731
    # After 0.1 and 0.2 are 70 left; large's step at 0.3 would leave 37.5 of the 62.6 that are asked for.
    found = allocate(rankings, cost, 0.482, 1)
    assert (int(found.reads["large"].sum()), int(found.reads["small"].sum())) == (2, 1)
    assert found.share == pytest.approx(62.5 / 130) and found.gamma == 0.5
    # Where that is not enough either, it is overshot rather than missed.
    found = allocate(rankings, cost, 0.43, 1)
    assert (int(found.reads["large"].sum()), int(found.reads["small"].sum())) == (1, 3) and found.share <= 0.43
    assert Step(0.5, "a", 1) > Step(0.4, "b", 2)


@pytest.mark.parametrize(
    ("multiple", "channels", "unit"), [(8, 64, 8), (8, 16, 8), (8, 15, 4), (16, 16, 8), (8, 3, 1), (1, 5, 1), (6, 7, 3)]
)
def test_a_narrow_layer_keeps_a_smaller_multiple(multiple: int, channels: int, unit: int) -> None:
    assert unit_of(multiple, channels) == unit


def test_units_without_a_measured_mean_are_left_whole_and_what_is_out_of_reach_is_refused() -> None:
    shape, model = shape_of("resnet"), build("resnet", expand=False)
    reads, facts = dealloc(model, shape, target=target("macs", 0.7))
    assert facts["whole"] == ["layer2.0.conv1", "layer3.0.conv1"] and not set(facts["whole"]) & set(reads)
    images = [(torch.randn(8, *shape, generator=torch.Generator().manual_seed(0)), torch.zeros(8))]
    means = measured_means(model, facts["whole"], images, 1)
    reads, facts = dealloc(model, shape, target=target("macs", 0.7), means=means)
    assert facts["whole"] == [] and 0.98 * 0.7 <= facts["share"] <= 0.7
    with pytest.raises(InputError, match=r"macs = 0.01 is out of reach: 0.\d+ is left when all is closed"):
        dealloc(model, shape, target=target("macs", 0.01), means=means)
    with pytest.raises(InputError, match="out of reach"):
        Selective(options(gamma=None, target={"of": "params", "fraction": 0.001})).coverage(model, shape)
    for both in ({}, {"gamma": 0.1, "target": target("macs", 0.7)}):
        with pytest.raises(InputError, match="either gamma or target"):
            dealloc(model, shape, **both)


def test_a_latency_is_told_by_timing_the_merged_smaller_network(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, model, seen = shape_of("resnet"), build("resnet"), []

    def timer(whole: nn.Module, input_shape: tuple[int, int, int], folder: Any) -> Any:
        full = count(whole, input_shape)["macs"]

        def measure(candidate: nn.Module) -> tuple[float, float, float]:
            seen.append(candidate)
            ratio = (count(candidate, input_shape)["macs"] / full) ** 0.5  # slower than its multiply-adds promise
            return ratio, ratio, ratio

        return measure

    monkeypatch.setattr("pipeline.latency_budget.timer_of", timer)
    _, facts = dealloc(model, shape, target=target("latency", 0.8))
    assert 0.98 * 0.8 <= facts["share"] <= 0.8 and 0 < len(seen) < 40
    assert not any("parametrizations" in name for candidate in seen for name in candidate.state_dict())


@pytest.mark.parametrize(("epochs", "until", "goals"), [(5, 0.5, [0.8, 0.6, 0.4]), (1, 0.5, [0.4]), (3, 1.0, [0.7, 0.4])])
def test_training_closes_step_by_step_down_to_the_target(make_run: Any, epochs: int, until: float, goals: list[float]) -> None:
    shape = (1, 16, 16)
    model = models.build("densenet", input_shape=shape, classes=10, depth=10, growth=8, compression=1.0, stem="tiny")
    run, whole = make_run(model, epochs=epochs, batch_size=256, select="best"), Costs(model, follow(model, shape))
    small = train(run, [create(options(gamma=None, until=until, multiple=2, target={"of": "macs", "fraction": 0.4}))])
    events = [event for event in run.events if event["kind"] == "dealloc"]
    assert [event["wanted"] for event in events] == pytest.approx(goals)
    assert all(0.97 * event["wanted"] <= event["share"] <= event["wanted"] for event in events)
    opened = [event["open"] for event in events]
    assert opened == sorted(opened, reverse=True)
    assert count(small, shape)["macs"] / whole.whole["macs"] == pytest.approx(events[-1]["share"])


class Pair(nn.Module):
    """Two convolutions, the second without padding, and perhaps a batch norm behind it."""

    def __init__(self, norm: bool, rectified: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 1)
        self.before = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU()) if rectified else nn.Sigmoid()
        self.second = nn.Conv2d(12, 10, 3, bias=not norm)
        self.after = nn.BatchNorm2d(10) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.second(self.before(self.first(x)))).mean((2, 3))


@pytest.mark.parametrize("norm", [True, False], ids=["batch norm", "bias"])
def test_compensation_keeps_the_output_of_constant_images(norm: bool) -> None:
    model = randomise(Pair(norm, rectified=False)).eval()
    x = torch.tensor([0.3, -1.2, 0.8])[:, None, None].expand(2, 3, 9, 9)
    wanted = model(x)
    means = measured_means(model, ["second"], [(x, x)], 1)
    reads, _ = dealloc(model, (3, 9, 9), gamma=0.7, means=means)
    assert 0 < int(reads["second"].sum()) < 8
    assert (shrink(model, (3, 9, 9), reads)(x) - wanted).abs().max() > 0.1
    assert make_up(model, (3, 9, 9), reads, means) == []
    torch.testing.assert_close(shrink(model, (3, 9, 9), reads)(x), wanted, rtol=1e-5, atol=1e-5)


def test_compensation_keeps_the_expectation_behind_a_batch_norm_and_relu() -> None:
    model: Any = randomise(Pair(norm=True, rectified=True)).eval()
    norm = model.before[0]
    drawn = torch.randn(64, 12, 60, 60, generator=torch.Generator().manual_seed(0))
    model.first = nn.Identity()  # what enters the batch norm is normal, with its own statistics
    x = drawn * norm.running_var.add(norm.eps).sqrt()[:, None, None] + norm.running_mean[:, None, None]
    wanted = model(x).mean(0)
    closed = torch.arange(12) < 7
    unit = units(other := Pair(norm=True, rectified=True), follow(other, (3, 9, 9)))["second"]
    mean = activity(norm.weight, norm.bias)
    assert (unit.norm, unit.behind) == ("before.0", "after")
    handle = model.second.register_forward_pre_hook(lambda module, inputs: inputs[0] * ~closed[:, None, None])
    lost = (model(x).mean(0) - wanted).abs().max()
    model.after.running_mean -= damage(model, "second", mean)[:, closed].sum(1)
    kept = (model(x).mean(0) - wanted).abs().max()
    handle.remove()
    assert kept < 0.005 and lost > 0.2


def test_the_method_compensates_where_it_is_asked_to(make_run: Any) -> None:
    for wanted in (False, True):
        model: Any = randomise(models.build("resnet", input_shape=(1, 16, 16), classes=10, depth=8))
        hook, run = Selective(options(gamma=0.3, compensate=wanted)), make_run(model)
        notes = hook.coverage(model, run.input_shape)
        hook.prepare(run)
        before = model.layer1[0].bn2.running_mean.clone()
        norm, layer = model.layer1[0].bn1, model.layer1[0].conv2
        matrix = layer.weight.detach().sum((2, 3)) * activity(norm.weight, norm.bias)
        hook.rewire(run, 1.0)
        closed = layer.gate.open == 0
        assert closed.any() and not any("compensate" in note for note in notes)
        change = matrix[:, closed].sum(1) if wanted else torch.zeros(16)
        torch.testing.assert_close(model.layer1[0].bn2.running_mean, before - change)
    notes = Selective(options(compensate=True)).coverage(densenet(), SHAPE)
    assert any("cannot compensate what features.denseblock1.denselayer1.conv2" in note for note in notes)
