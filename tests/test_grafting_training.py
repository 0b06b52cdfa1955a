"""Networks that train together and graft each other, against the same networks trained alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_grafting import PUBLISHED, Net, State, arrays, assert_same, network, options, part, reference, slow_share
from test_training import Killed, Killer, fit, outcome, run_on
from torch import Tensor, nn

from pipeline.averaging import Averaging
from pipeline.data.batches import Batches, Prepared
from pipeline.errors import InputError
from pipeline.evaluation import evaluate
from pipeline.filters import strength
from pipeline.hooks import BiasRate, Hook, Run, stable_seed
from pipeline.overparameterize import collapse, kflo
from pipeline.resume import Resume
from pipeline.revive.grafting import create, relative_rate
from pipeline.training import train


class Watch(Hook):
    """Keeps the network's tensors after each epoch (listed before grafting: before the graft) and the momentum."""

    def __init__(self) -> None:
        self.states: list[State] = []
        self.momenta: list[list[Tensor]] = []

    def after_epoch(self, run: Run) -> bool:
        assert run.optimizer is not None
        self.states.append(arrays(run.model))
        self.momenta.append([state["momentum_buffer"].clone() for state in run.optimizer.state.values()])
        return False


@pytest.mark.parametrize(("networks", "rates"), [(2, [0.5, 1]), (3, [0.25, 0.75, 1]), (4, [0.5 - 8**-0.5, 0.5, 0.5 + 8**-0.5, 1])])
def test_learning_rates_are_those_of_the_formula_and_multiply_with_other_rules(
    tiny: Prepared, networks: int, rates: list[float]
) -> None:
    assert [relative_rate(number, networks) for number in range(1, networks + 1)] == pytest.approx(rates)
    run, seen = run_on(tiny, network(), fit(epochs=1)), {}

    class Rates(Hook):
        def after_step(self, run: Run) -> None:
            names = {parameter: name for name, parameter in run.model.named_parameters()}
            assert run.optimizer is not None
            seen.update({names[p]: group["lr"] / run.lr for group in run.optimizer.param_groups for p in group["params"]})

    train(run, [BiasRate(2.0), create(options(networks=networks)), Rates()])
    assert len(seen) == networks * len(list(network().parameters()))
    for name, rate in seen.items():
        place = networks - 1 if name.startswith("own.") else int(name.split(".")[1])
        assert rate == pytest.approx(rates[place] * (2 if "bias" in name else 1))
    assert create(options(learning_rates="same")).parameter_rules(run) == {}


@pytest.mark.parametrize("way", ["different", "same"])
def test_networks_train_together_as_they_do_alone_until_they_are_grafted(tiny: Prepared, way: str) -> None:
    settings: dict[str, Any] = {"epochs": 2, "label_smoothing": 0.1, "nesterov": True}
    run, before, after = run_on(tiny, network(0), fit(**settings)), Watch(), Watch()
    run.fresh = network
    train(run, [before, create(options(networks=3, data=way, learning_rates=way)), after])
    assert run.notes == []
    for place, number in (("own.", 0), ("others.0.", 1), ("others.1.", 2)):
        differs = number > 0 and way == "different"
        alone, watch = (
            run_on(tiny, network(number), fit(**settings, lr=0.05 * (relative_rate(number, 3) if differs else 1))),
            Watch(),
        )
        if differs:
            alone.train = Batches(tiny, "train", 64, "cpu", alone.train.augment, True, stable_seed(3, "test", "grafting", number))
        train(alone, [watch])
        for name, value in part(before.states[0], place).items():  # the rates of others may be one rounding apart
            np.testing.assert_allclose(value, watch.states[0][name], rtol=1e-4 * differs, atol=1e-6 * differs)
        for key in ("lr", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
            assert number or run.history[0][key] == alone.history[0][key]
    order = ("others.0.", "others.1.", "own.")
    for place, state in zip(order, reference([part(before.states[0], place) for place in order], **PUBLISHED), strict=True):
        assert_same(part(after.states[0], place), state)
    assert all(map(torch.equal, before.momenta[0], after.momenta[0])) and len(after.momenta[0]) == 3 * len(list(Net().parameters()))


@pytest.mark.parametrize("data", ["different", "same"])
def test_every_network_sees_the_images_in_an_order_of_its_own_or_in_the_runs(tiny: Prepared, data: str) -> None:
    run, seen = run_on(tiny, network(), fit(epochs=2)), {}

    class Look(Hook):
        def begin_round(self, run: Run) -> bool:
            for name in ("own", "others.0", "others.1"):
                watch = lambda module, inputs, name=name: seen.setdefault(name, []).append(inputs[0]) if module.training else None  # noqa: E731
                run.model.get_submodule(name).register_forward_pre_hook(watch)
            return True

    train(run, [create(options(networks=3, data=data)), Look()])
    for number, name in enumerate(("own", "others.0", "others.1")):
        seed = stable_seed(3, "test", "grafting", number) if number and data == "different" else 3
        batches = Batches(tiny, "train", 64, "cpu", run.train.augment, True, seed)
        wanted = [images for epoch in (0, 1) for images, _ in batches.epoch(epoch)]
        assert len(seen[name]) == len(wanted) == 6 and all(map(torch.equal, seen[name], wanted))
    assert run.train.seed == 3


def test_it_grafts_after_every_epoch_but_the_last_and_gives_back_the_networks_own_class(tiny: Prepared) -> None:
    run, before = run_on(tiny, network(), fit(epochs=3, lr=0.01)), Watch()
    run.fresh, last = network, {}

    class Last(Hook):
        def after_step(self, run: Run) -> None:
            last.update(part(arrays(run.model), "own."))

    model = run.model
    result = train(run, [before, create(options()), Last()])
    assert result is run.model is model and type(model) is Net and not model.training
    assert_same(arrays(result), last)
    assert [(event["kind"], event["epoch"]) for event in run.events] == [("grafting", 1), ("grafting", 2), ("shipped", 3)]
    for event, state in zip(run.events, before.states, strict=False):
        for row in event["layers"]:
            key = f"{row['name']}.weight"
            assert row["weight"] == slow_share(state[f"own.{key}"], state[f"others.0.{key}"], **PUBLISHED)
            assert row["mean_norm_before"] == pytest.approx(float(np.abs(state[f"own.{key}"]).sum((1, 2, 3)).mean()), rel=1e-6)


@pytest.mark.parametrize("ship", ["own", "best"])
@pytest.mark.parametrize("select", ["last", "best"])
def test_what_is_shipped_is_the_runs_own_network_or_the_best_one(tiny: Prepared, ship: str, select: str) -> None:
    """At a rate of next to nothing an epoch only measures the batch norms' statistics, together as alone."""
    alone = {seed: run_on(tiny, network(seed), fit(epochs=1, lr=1e-9)) for seed in range(5)}
    ranked = sorted(alone, key=lambda seed: evaluate(train(alone[seed], []), alone[seed].validation).accuracy)
    worst, *_, second, best = ranked
    run = run_on(tiny, network(worst), fit(epochs=1, lr=1e-9, select=select))
    run.fresh = lambda number: network({1: best, 2: second}[number])
    result = train(run, [create(options(networks=3, ship=ship, data="same"))])
    accuracies = [alone[seed].history[-1]["validation_accuracy"] for seed in (best, second, worst)]
    assert run.events[-1]["validation_accuracy_of_each"] == accuracies and accuracies[0] > accuracies[1] > accuracies[2]
    assert run.events[-1]["network"] == (1 if ship == "best" else 3) and type(result) is Net
    for name, tensor in alone[best if ship == "best" else worst].model.state_dict().items():
        torch.testing.assert_close(result.state_dict()[name], tensor)
    assert (run.best is not None) is (select == "best")
    assert_same(arrays(result), {name: tensor.numpy() for name, tensor in (run.best or result.state_dict()).items()})


def test_the_best_epoch_is_that_of_the_runs_own_network(tiny: Prepared) -> None:
    run, watch = run_on(tiny, network(), fit(epochs=4, lr=0.5, select="best", schedule="constant")), Watch()
    run.fresh = network
    result = train(run, [watch, create(options())])
    accuracies = [row["validation_accuracy"] for row in run.history]
    best = accuracies.index(max(accuracies))
    assert best < 3, "the last epoch is the best: nothing is tested"
    assert_same(arrays(result), part(watch.states[best], "own."))


def test_expanded_networks_train_together_with_the_penalty_and_the_average_of_all(tiny: Prepared) -> None:
    run, watch = run_on(tiny, network(0, "kflo"), fit(epochs=2, weight_decay=0.01)), Watch()
    run.fresh = lambda number: network(number, "kflo")
    kind = type(run.model)
    result = train(run, [kflo.Hook(), Averaging(0.9), watch, create(options(networks=3))])
    assert type(result) is kind and type(collapse(result)) is Net
    assert run.optimizer is not None
    groups = {(round(group["lr_scale"], 9), group["weight_decay"]) for group in run.optimizer.param_groups}
    assert groups == {(rate, decay) for rate in (0.25, 0.75, 1.0) for decay in (0.0, 1e-9, 0.01)}
    for number, place in enumerate(("own.", "others.0.", "others.1.")):
        moved, start = part(watch.states[0], place), arrays(network(number, "kflo"))
        trained = [name for name in start if "original" in name or "mixers" in name]
        assert trained and not any(np.array_equal(moved[name], start[name]) for name in trained)


@pytest.mark.parametrize(
    ("expansion", "optimizer", "ship", "data", "networks"),
    [("", "sgd", "own", "different", 3), ("kflo", "adam", "best", "same", 2)],
)
def test_a_killed_training_goes_on_bit_for_bit(
    tiny: Prepared, tmp_path: Path, expansion: str, optimizer: str, ship: str, data: str, networks: int
) -> None:
    def attempt(resume: Resume | None, killer: Killer) -> Run | None:
        run = run_on(tiny, network(0, expansion, dropout=0.3), fit(epochs=3, optimizer=optimizer, lr=0.02, select="best"))
        run.fresh = lambda number: network(number, expansion, dropout=0.3)
        torch.manual_seed(torch.seed())
        method: list[Hook] = [create(options(networks=networks, ship=ship, data=data)), killer]
        try:
            train(run, [kflo.Hook(), *method] if expansion else method, resume)
        except Killed:
            return None
        return run

    undisturbed = attempt(None, Killer())
    assert undisturbed is not None
    resume = Resume(tmp_path, "train-0", "0" * 16)
    for killer in (Killer(step=5), Killer(after_epoch=2), Killer(step=4)):
        assert attempt(resume, killer) is None
    for killer in (Killer(), Killer(step=1)):  # the second finds the last epoch kept: only the end is left
        run = attempt(resume, killer)
        assert run is not None and outcome(run) == outcome(undisturbed)


def test_the_others_of_a_trained_network_are_copies_which_part_ways(tiny: Prepared) -> None:
    for way in ("different", "same"):
        run, watch = run_on(tiny, network(), fit(epochs=2)), Watch()
        train(run, [watch, create(options(learning_rates=way, data=way))])
        own, other = (part(watch.states[0], place) for place in ("own.", "others.0."))
        assert np.array_equal(own["conv1.weight"], other["conv1.weight"]) is (way == "same")
        assert ["start alike" in note for note in run.notes] == [True] * (way == "same")
    run = run_on(tiny, network(), fit(epochs=0))
    model = run.model
    assert train(run, [create(options(ship="best"))]) is model  # of equals the run's own


def test_mistakes_are_told_beforehand() -> None:
    assert create(options()).coverage(network(), (1, 16, 16)) == []
    with pytest.raises(InputError, match="grafting: the network has no convolution"):
        create(options()).coverage(nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), (1, 16, 16))
    for bad in (
        {"networks": 1},
        {"strength": 1.1},
        {"steepness": -1.0},
        {"bins": 1},
        {"learning_rates": "halved"},
        {"ship": "last"},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            options(**bad)


def dead(number: int) -> nn.Module:
    """A network whose filters are all zero."""
    model = network(number)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def test_the_picture_of_the_filters_is_of_the_runs_own_network(tiny: Prepared) -> None:
    run = run_on(tiny, network(), fit(epochs=1))
    run.fresh = dead
    result = train(run, [create(options())])
    expected = strength(result)
    assert {key: run.history[0][key] for key in expected} == pytest.approx(expected, rel=1e-6) and expected["dead_filters"] == 0
