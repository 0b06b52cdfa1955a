"""What removals cost, against networks that really lost the channels and sums written out, and budgets spread by it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import build, shape_of
from torch import Tensor, nn

from pipeline.channels import follow
from pipeline.data.batches import Batches, Prepared
from pipeline.evaluation import evaluate, reestimate_batchnorm
from pipeline.hooks import Hook, Run
from pipeline.layers import filtering_layers
from pipeline.sensitivity import Stretch, around, layer_costs, shares_at, stretches, weights
from pipeline.surgery import Shape, drop, shrink
from pipeline.training import train

SHAPE = (3, 8, 8)


def validation(prepared: Prepared) -> Batches:
    return Batches(prepared, "validation", 16, "cpu", None, shuffle=False, seed=0)


def without(model: nn.Module, shape: Shape, stretch: Stretch, share: float) -> nn.Module:
    """The network that surgery makes when the weakest of the stretch are gone."""
    channels = follow(model, shape)
    dropped = {channel for unit in stretch.units[: round(share * len(stretch.units))] for channel in unit}
    return shrink(model, shape, drop(channels, dropped))


@pytest.mark.parametrize("name", ["resnet", "resnet18", "lenet5"])
def test_a_measured_cost_is_that_of_the_network_which_really_lost_the_channels(
    name: str, pictures: Callable[[Shape], Prepared]
) -> None:
    shape = shape_of(name)
    model, batches = build(name), validation(pictures(shape))
    found = layer_costs(model, shape, batches, by="measured")
    whole = evaluate(model, batches)
    members = {stretch.name: stretch for stretch in stretches(model, follow(model, shape))}
    assert found.keys() == members.keys()
    for stretch in list(found)[:: max(1, len(found) // 4)]:
        for point in found[stretch]:
            left = evaluate(without(model, shape, members[stretch], point["share"]), batches)
            assert point["loss"] == pytest.approx(left.loss, rel=1e-4), (stretch, point)
            assert point["cost"] == pytest.approx(left.loss - whole.loss, abs=1e-4 * whole.loss)
            assert point["score"] == pytest.approx(left.accuracy, abs=1 / 16)


class Within(nn.Module):
    """An addition in place, behind a branch that is cut later than the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.inner, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        out = self.left(x)
        out = out.add_(self.right(self.inner(x).relu_()))
        return self.fc(out.mean((2, 3)))


def test_operations_in_place_do_not_spoil_what_is_computed_once(pictures: Callable[[Shape], Prepared]) -> None:
    torch.manual_seed(0)
    model, batches = Within().eval(), validation(pictures(SHAPE))
    found = layer_costs(model, SHAPE, batches, by="measured")
    assert list(found) == ["stem", "left", "inner"]
    for stretch in stretches(model, follow(model, SHAPE)):
        for point in found[stretch.name]:
            left = evaluate(without(model, SHAPE, stretch, point["share"]), batches)
            assert point["loss"] == pytest.approx(left.loss, rel=1e-4)


def test_refitted_costs_are_those_of_the_smaller_network_with_its_own_statistics(pictures: Callable[[Shape], Prepared]) -> None:
    shape, data = shape_of("resnet"), pictures(shape_of("resnet"))
    model, batches = build("resnet", expand=False), validation(data)
    images = Batches(data, "train", 16, "cpu", None, shuffle=True, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = layer_costs(model, shape, batches, by="measured", refit=images, shares=[0.5])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    stretch = stretches(model, follow(model, shape))[2]
    smaller = without(model, shape, stretch, 0.5)
    reestimate_batchnorm(smaller, images, 0, limit=2)
    assert found[stretch.name][0]["loss"] == pytest.approx(evaluate(smaller, batches).loss, rel=1e-4)


@pytest.mark.parametrize("name", ["alexnet", "lenet5", "resnet", "resnet50", "vgg16_bn", "wide_resnet"])
def test_every_channel_that_may_go_is_in_one_stretch_and_the_weakest_goes_first(name: str) -> None:
    shape = shape_of(name)
    model = build(name)
    channels, layers = follow(model, shape), dict(filtering_layers(model))
    found = stretches(model, channels)
    everything = [channel for stretch in found for unit in stretch.units for channel in unit]
    made = {channels.find(c) for ids in channels.outputs.values() for c in ids}
    assert len(everything) == len(set(everything))
    assert {*everything} & made >= made - {*channels.pins()} - {
        c for ids in channels.outputs.values() if len({*ids}) == 1 for c in ids
    }
    sums = {name: layers[name].weight.detach().abs().flatten(1).sum(1).tolist() for name in channels.outputs}
    for stretch in found:
        norms = [
            sum(norm for m in stretch.layers for c, norm in zip(channels.outputs[m], sums[m], strict=True) if c in unit)
            for unit in stretch.units
        ]
        assert norms == pytest.approx(sorted(norms), rel=1e-5) and stretch.layers[0] == stretch.name


def test_the_trunk_of_a_stage_is_one_stretch_and_each_inner_convolution_another() -> None:
    model = build("resnet18", expand=False)
    found = {stretch.name: stretch.layers for stretch in stretches(model, follow(model, shape_of("resnet18")))}
    assert found["layer2.0.conv2"] == ["layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"] or len(found) == 12
    assert [name for name, layers in found.items() if len(layers) > 1][0] == "conv1"
    assert sum(len(layers) == 1 for layers in found.values()) == 8  # one inner convolution a block


class Chain(nn.Module):
    """Readers behind batch norm and ReLU, behind max pooling, with groups, and behind flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.BatchNorm2d(12)
        self.c = nn.Conv2d(12, 6, 1)
        self.fc = nn.Linear(6 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm_a(self.a(x)))
        x = nn.functional.relu(self.norm_b(self.b(x)))
        return self.fc(torch.flatten(self.c(nn.functional.max_pool2d(x, 2)), 1))


def activities(norm: Any) -> list[float]:
    draws = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (draws * norm.weight.double() + norm.bias.double()).relu().mean(0).tolist()


def test_an_expected_cost_is_the_sum_written_out() -> None:
    torch.manual_seed(0)
    model: Any = Chain()
    for norm in (model.norm_a, model.norm_b):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    found, worst = layer_costs(model, SHAPE, by="ecdm", shares=[0.5]), {}
    readers = {"a": (model.b, activities(model.norm_a), 2), "c": (model.fc, [1.0] * 96, 1)}
    members = {stretch.name: stretch for stretch in stretches(model, follow(model, SHAPE))}
    for name, (reader, means, groups) in readers.items():
        kept = drop(follow(model, SHAPE), {c for unit in members[name].units[: len(members[name].units) // 2] for c in unit})
        mask = kept["b" if name == "a" else "fc"].tolist()
        rows, width = reader.weight.detach().double(), len(means) // groups
        shares = []
        for o in range(len(rows)):
            first = o * groups // len(rows) * width
            damage = [abs(float(rows[o, i].sum())) * means[first + i] for i in range(width)]
            shares.append(sum(d for i, d in enumerate(damage) if not mask[first + i]) / sum(damage))
        worst[name] = max(shares)
    assert {name: found[name][0]["cost"] for name in readers} == pytest.approx(worst, rel=0.01)
    assert [point["share"] for point in found["c"]] == [0.5] and "loss" not in found["c"][0]


class Fork(nn.Module):
    """Two readers of one batch norm's ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.left, self.right, self.fc = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.fc(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))


def test_a_layer_that_reads_a_selection_counts_what_it_reads_by_its_activity() -> None:
    torch.manual_seed(0)
    model: Any = Fork()
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    nn.init.uniform_(model.norm.bias, -0.5, 0.5)
    reads = {"left": torch.tensor([1, 0, 1, 1, 0, 0, 1, 0]).bool(), "right": torch.tensor([0, 1, 1, 0, 1, 1, 1, 1]).bool()}
    smaller: Any = shrink(model, SHAPE, reads)
    (stem,) = (s for s in stretches(smaller, follow(smaller, SHAPE)) if s.name == "stem")
    channels = follow(smaller, SHAPE)
    gone = [channel in {c for unit in stem.units[:4] for c in unit} for channel in channels.outputs["stem"]]
    means, worst = activities(model.norm), 0.0
    for name, mask in reads.items():
        for row in model.get_submodule(name).weight.detach().sum((2, 3)).tolist():
            damage = [abs(w) * m if read else 0.0 for w, m, read in zip(row, means, mask.tolist(), strict=True)]
            worst = max(worst, sum(d for d, out in zip(damage, gone, strict=True) if out) / sum(damage))
    assert layer_costs(smaller, SHAPE, by="ecdm", shares=[0.5])["stem"][0]["cost"] == pytest.approx(worst, rel=0.01)


costs = st.lists(st.floats(-0.5, 5), min_size=3, max_size=3).map(
    lambda values: [{"share": share, "cost": value} for share, value in zip((0.25, 0.5, 0.75), values, strict=True)]
)


@given(st.lists(costs, min_size=1, max_size=6), st.floats(0.05, 0.95))
def test_weights_have_the_mean_that_was_asked_and_lie_between_nothing_and_all(points: list[Any], mean: float) -> None:
    table = {str(index): of for index, of in enumerate(points)}
    found = weights(table, mean)
    assert sum(found.values()) / len(found) == pytest.approx(mean, abs=1e-6)
    assert all(-1e-9 <= share <= 1 + 1e-9 for share in found.values())


def test_a_budget_is_spread_so_that_every_removal_costs_the_same() -> None:
    line = lambda *values: [{"share": s, "cost": v} for s, v in zip((0.25, 0.5, 0.75), values, strict=True)]  # noqa: E731
    found = weights({"robust": line(0.1, 0.2, 0.3), "frail": line(0.4, 0.8, 1.2)}, 0.25)
    assert found == pytest.approx({"robust": 0.4, "frail": 0.1})  # both cost 0.16
    bent = {"bent": line(0.1, 0.1, 0.9), "better": line(-0.3, 0.2, 0.1)}
    assert shares_at(bent, 0.5) == pytest.approx({"bent": 0.625, "better": 1.0})
    assert shares_at(bent, 0.15) == pytest.approx({"bent": 0.515625, "better": 0.4375})
    assert weights({}) == {}


class Cut(Hook):
    """Takes the weaker half of the first stretch out after the last epoch."""

    def finish(self, run: Run) -> None:
        run.model = without(run.model, run.input_shape, stretches(run.model, follow(run.model, run.input_shape))[0], 0.5)


@pytest.mark.parametrize("by", ["ecdm", "measured"])
def test_the_hooks_log_the_network_that_enters_the_stage_and_the_one_that_leaves(
    by: Any, pictures: Callable[[Shape], Prepared], make_run: Callable[..., Run]
) -> None:
    shape = shape_of("resnet")
    run = make_run(build("resnet", expand=False))
    run.train, run.validation = (Batches(pictures(shape), s, 16, "cpu", None, s == "train", 0) for s in ("train", "validation"))
    whole = layer_costs(run.model, shape, run.validation, by=by)
    method = Cut()
    smaller = train(run, around([method], by))
    before, after = (event for event in run.events if event["kind"] == "sensitivity")
    assert (before["when"], after["when"], before["by"], after["score"]) == ("before", "after", by, "accuracy")
    assert {row["name"]: row["costs"] for row in before["stretches"]} == whole
    assert {row["name"]: row["costs"] for row in after["stretches"]} == layer_costs(smaller, shape, run.validation, by=by)
    assert [(one["units"], two["units"]) for one, two in zip(before["stretches"], after["stretches"], strict=True)][0] == (16, 8)
    assert around([method], None) == [method]
