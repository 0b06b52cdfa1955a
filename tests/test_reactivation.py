"""Kernel reactivation against a reference of one loop over single kernels, and against what the published setting touches."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.hooks import Hook
from pipeline.layers import filtering_layers
from pipeline.overparameterize import overparameterize
from pipeline.revive.reactivation import Options, create, eligible, reactivate
from pipeline.training import learning_rate, train

SHARES: dict[str, Any] = {"alpha": 0.6, "beta": 0.6, "gamma": 0.3}


class Net(nn.Module):
    """Convolutions of every sort: 1x8x8 images, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)  # one kernel a filter
        self.wide = nn.Conv2d(4, 6, (1, 3), padding=(0, 1), bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(6, 12, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.pointwise = nn.Conv2d(12, 10, 1)
        self.last = nn.Conv2d(10, 9, 5, padding=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.wide(self.first(x).relu())).relu()
        x = self.last(self.pointwise(self.depthwise(self.grouped(x))).relu())
        return self.fc(self.flatten(self.pool(x)))


TREATED = ["wide", "grouped", "last"]


def network(expanded: bool = False, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    if expanded:
        overparameterize(model, depth=2, width=2)
        for name, parameter in model.named_parameters():
            if "mixers" in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def kernels_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in filtering_layers(model)}


def reference(weights: dict[str, Tensor], alpha: float, beta: float, gamma: float, rounding: Any = math.floor) -> dict[Any, float]:
    """The ratio of every kernel that must change, {(layer, filter, kernel): R}, by sorting lists of single numbers."""
    norm = {
        (name, o, i): math.fsum(abs(v) for row in weights[name][o, i].tolist() for v in row)
        for name in TREATED
        for o in range(len(weights[name]))
        for i in range(weights[name].shape[1])
    }
    filters = [(name, o) for name in TREATED for o in range(len(weights[name]))]
    size = {name: weights[name][0].numel() for name in TREATED}
    total = {(name, o): sum(norm[name, o, i] for i in range(weights[name].shape[1])) for name, o in filters}
    weakest = sorted(filters, key=lambda f: total[f] / size[f[0]])[: rounding(alpha * len(filters))]
    ratios = {}
    for name, o in weakest:
        own = sorted(range(len(weights[name])), key=lambda other: total[name, other])
        if o in own[: rounding(beta * len(own))]:
            kernels = sorted(range(weights[name].shape[1]), key=lambda i: norm[name, o, i])
            for i in kernels[: rounding(gamma * len(kernels))]:
                ratios[name, o, i] = max(norm[name, o, j] for j in kernels) / norm[name, o, i]
    return ratios


@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "kflo"])
@pytest.mark.parametrize("rounding", ["floor", "ceil", "round"])
@pytest.mark.parametrize("shares", [(0.6, 0.6, 0.3), (0.2, 0.9, 0.55), (1, 1, 1), (0.9, 0.15, 0.7), (0, 1, 1), (1, 0, 1)])
def test_one_pass_scales_exactly_the_invalid_kernels_to_the_best_of_their_filter(
    shares: tuple[float, float, float], rounding: Any, expanded: bool
) -> None:
    model = network(expanded)
    before, state = kernels_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ratios = reference(before, *shares, rounding={"floor": math.floor, "ceil": math.ceil, "round": round}[rounding])
    done = reactivate(model, alpha=shares[0], beta=shares[1], gamma=shares[2], rounding=rounding)
    after = kernels_of(model)
    assert done["kernels"] == len(ratios) and done["dead_filters"] == 0
    same = torch.testing.assert_close if expanded else lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0)
    for name, weight in before.items():
        if name not in TREATED:
            assert torch.equal(after[name], weight)
            continue
        for o in range(len(weight)):
            for i in range(weight.shape[1]):
                if (name, o, i) in ratios:
                    best = weight[o].abs().sum((1, 2)).max()
                    torch.testing.assert_close(after[name][o, i].abs().sum(), best, rtol=1e-5, atol=0)
                    torch.testing.assert_close(after[name][o, i], weight[o, i] * ratios[name, o, i], rtol=1e-4, atol=1e-6)
                    assert torch.cosine_similarity(after[name][o, i].flatten(), weight[o, i].flatten(), 0) > 1 - 1e-6
                else:
                    same(after[name][o, i], weight[o, i])
    edited = {f"{name}.parametrizations.weight.original" if expanded else f"{name}.weight" for name in TREATED}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items() if name not in edited)


def test_the_number_of_kernels_is_the_share_of_each_invalid_filter_rounded_down() -> None:
    done = reactivate(network(), alpha=1.0, beta=0.5, gamma=0.34)
    rows = {row["name"]: (row["filters"], row["kernels"]) for row in done["layers"]}
    # Half of 6, 12 and 9 filters; a third of 4, 3 and 10 kernels in each.
    assert rows == {"wide": (3, 3 * 1), "grouped": (6, 6 * 1), "last": (4, 4 * 3)}
    assert done["kernels"] == 3 + 6 + 12
    assert all(row["mean_norm_after"] > row["mean_norm_before"] for row in done["layers"])


@pytest.mark.parametrize(
    ("gamma", "published"),
    [
        # Epochs 10, 20, ..., 190: kernels in a filter of 16, of 32 and of 64, rounded down.
        (0.05, ["013"] * 3 + ["012"] * 5 + ["001"] * 4 + ["000"] * 7),
        (0.1, ["136"] * 3 + ["125"] * 3 + ["124"] * 2 + ["013"] * 2 + ["012"] * 2 + ["001"] * 2 + ["000"] * 5),
    ],
    ids=["ResNet-32", "ResNet-110"],
)
def test_the_published_setting_fades_out_after_two_thirds_of_200_epochs(make_run: Any, gamma: float, published: list[str]) -> None:
    widths = {16: 0, 32: 1, 64: 2}
    found = []
    for epoch in range(10, 200, 10):
        model = nn.Sequential(*(nn.Conv2d(width, 2, 3) for width in widths))
        run = make_run(model, epochs=200)
        run.epoch, run.lr = epoch, learning_rate(run.fit, epoch - 1 / 391, 200)  # of the last of 391 steps
        create(options(alpha=1.0, beta=1.0, gamma=gamma, every=10)).after_epoch(run)
        rows = {int(row["name"]): row["kernels"] // row["filters"] for row in run.events[0]["layers"]}
        found.append("".join(str(rows.get(place, 0)) for place in widths.values()))
    assert found == published


def options(**changes: Any) -> Options:
    fit = {"epochs": 1, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0}
    fit |= {"schedule": "cosine", "label_smoothing": 0.0, "select": "last", "precision": "fp32"}
    usual = {
        "method": "reactivation",
        "every": 2,
        "rounding": "floor",
        "max_ratio": None,
        "momentum": "keep",
        "selection": "norm",
        "fit": fit,
    }
    return Options.model_validate(usual | SHARES | changes)


def test_gamma_is_halved_when_the_learning_rate_is(make_run: Any) -> None:
    for lr, gamma in ((0.1, 0.3), (0.05, 0.15), (0.0, 0.0)):
        model = network()
        before, run = kernels_of(model), make_run(model, lr=0.1)
        run.epoch, run.lr = 4, lr
        create(options()).after_epoch(run)
        assert run.events[0]["gamma"] == pytest.approx(gamma)
        assert run.events[0]["kernels"] == len(reference(before, 0.6, 0.6, gamma))
    assert run.events[0]["kernels"] == 0 and all(torch.equal(before[name], w) for name, w in kernels_of(model).items())


@pytest.mark.parametrize(("epochs", "every", "passes"), [(5, 2, [2, 4]), (4, 2, [2]), (3, 1, [1, 2]), (2, 3, [])])
def test_it_acts_after_every_so_many_epochs_but_never_after_the_last(
    make_run: Any, epochs: int, every: int, passes: list[int]
) -> None:
    run = make_run(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 10)))
    run.fit = run.fit.model_copy(update={"epochs": epochs})
    train(run, [create(options(every=every))])
    assert [event["epoch"] for event in run.events if event["kind"] == "reactivation"] == passes


@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "kflo"])
def test_the_random_control_touches_as_many_filters_and_kernels_of_every_layer(expanded: bool) -> None:
    ranked, drawn = network(expanded), network(expanded)
    before = kernels_of(drawn)
    shares: dict[str, Any] = {"alpha": 1.0, "beta": 0.6, "gamma": 0.34}
    first = reactivate(ranked, **shares)["layers"]
    second = reactivate(drawn, **shares, random=torch.Generator().manual_seed(3))["layers"]
    count = lambda rows: [(row["name"], row["filters"], row["kernels"]) for row in rows]  # noqa: E731
    assert count(first) == count(second)
    for name in TREATED:
        old, new = before[name], dict(drawn.named_modules())[name].weight.detach()  # type: ignore[union-attr]
        scaled = ((new - old).abs() > 1e-5).any(3).any(2)
        assert not torch.equal(scaled, ((kernels_of(ranked)[name] - old).abs() > 1e-5).any(3).any(2))
        best = old.abs().sum((2, 3)).amax(1, keepdim=True).expand(scaled.shape)
        torch.testing.assert_close(new.abs().sum((2, 3))[scaled], best[scaled], rtol=1e-4, atol=1e-6)


def test_a_second_pass_selects_by_the_weights_as_they_are_then() -> None:
    model = network()
    first = reference(kernels_of(model), **SHARES)
    reactivate(model, **SHARES)
    between = kernels_of(model)
    second = reference(between, **SHARES)
    assert reactivate(model, **SHARES)["kernels"] == len(second) > 0
    changed = {
        (name, o, i) for name in TREATED for o, i in (kernels_of(model)[name] != between[name]).any(3).any(2).nonzero().tolist()
    }
    assert changed == set(second) and not changed & set(first)  # what was just raised is no longer among the weakest


def test_kernels_and_filters_without_a_direction_stay_and_nothing_becomes_infinite() -> None:
    model = network()
    weight = model.last.weight.data
    weight[0] = 0.0  # a dead filter
    weight[1] = 1e-16 * weight[1]
    weight[2, 3] = 0.0  # a dead kernel
    weight[3, 4, 0, 0], weight[4, 5, 0, 0] = float("nan"), float("inf")
    before = weight.clone()
    done = reactivate(model, alpha=1.0, beta=1.0, gamma=0.2)
    after = model.last.weight.detach()
    assert done["dead_filters"] == 2
    kept = torch.tensor([0, 1, 3, 4])
    assert torch.equal(after[kept].nan_to_num(1, 2), before[kept].nan_to_num(1, 2))
    assert torch.equal(after[2, 3], before[2, 3]) and not torch.equal(after[2], before[2])
    assert after[[0, 1, 2, 5, 6, 7, 8]].isfinite().all()


def test_max_ratio_limits_the_scaling() -> None:
    model = network()
    before = kernels_of(model)
    reactivate(model, alpha=1.0, beta=1.0, gamma=0.5, max_ratio=1.2)
    ratios = torch.cat([(kernels_of(model)[name] / before[name]).flatten() for name in TREATED])
    assert ratios.max() == pytest.approx(1.2, rel=1e-5) and ratios.min() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "kflo"])
@pytest.mark.parametrize("momentum", ["keep", "zero", "scale"])
def test_momentum_of_edited_kernels_is_kept_zeroed_or_scaled_and_no_other_changes(momentum: str, expanded: bool) -> None:
    model = network(expanded)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    torch.nn.functional.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8)).backward()
    optimizer.step()

    def moments() -> dict[str, Tensor]:
        """Momentum of the effective kernels: of W1, mixed as W1 is."""
        if not expanded:
            return {name: optimizer.state[model.get_submodule(name).weight]["momentum_buffer"].clone() for name in TREATED}
        lists = {name: model.get_submodule(name).parametrizations.weight for name in TREATED}  # type: ignore[union-attr]
        return {name: p[0](optimizer.state[p.original]["momentum_buffer"]).detach() for name, p in lists.items()}

    kernels, before = kernels_of(model), moments()
    ratios = reference(kernels, **SHARES)
    parameters = list(model.parameters())
    reactivate(model, **SHARES, momentum=momentum, optimizer=optimizer)
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    for name, wanted in before.items():
        for (layer, o, i), ratio in ratios.items():
            if layer == name:
                wanted[o, i] *= {"keep": 1.0, "zero": 0.0, "scale": ratio}[momentum]
        torch.testing.assert_close(moments()[name], wanted, rtol=1e-4, atol=1e-7 if not expanded else 1e-6)


@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "kflo"])
@pytest.mark.parametrize("momentum", ["zero", "scale"])
def test_training_with_adam_goes_on_after_its_averages_were_edited(momentum: str, expanded: bool) -> None:
    model = network(expanded)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8)).backward()
        optimizer.step()
        reactivate(model, **SHARES, momentum=momentum, optimizer=optimizer)
        assert all((state["exp_avg_sq"] >= 0).all() for state in optimizer.state.values())
    assert all(weight.isfinite().all() for weight in kernels_of(model).values())


def test_what_has_no_shape_to_keep_is_told_beforehand() -> None:
    model = network()
    assert list(eligible(model)) == TREATED
    notes = create(options()).coverage(model, (1, 8, 8))
    assert notes == ["reactivation leaves layers whose filters have no k x k kernels to compare: first, depthwise, pointwise, fc"]
    assert Hook().coverage(model, (1, 8, 8)) == []
    with pytest.raises(InputError, match="no convolution with kernels larger than 1x1"):
        create(options()).coverage(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4)), (3, 8, 8))
    for bad in ({"alpha": 1.1}, {"beta": -0.1}, {"gamma": float("nan")}, {"every": 0}, {"max_ratio": 0.5}, {"rounding": "up"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            options(**bad)
