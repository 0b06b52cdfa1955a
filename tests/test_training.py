"""The training loop: a killed training ends as an undisturbed one; schedules, parameter groups, selection and the control."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIT
from networks import randomise
from torch import Tensor, nn

from pipeline import methods
from pipeline.config import Augment, Distill, Fit
from pipeline.data.batches import Batches, Prepared
from pipeline.distillation import Distillation
from pipeline.errors import InputError
from pipeline.hooks import Hook, ParameterRule, Run
from pipeline.overparameterize import kflo, overparameterize
from pipeline.resume import Resume, fingerprint
from pipeline.training import learning_rate, train

EPOCHS = 4
BATCH = 64  # 3 steps an epoch


class Killed(BaseException):
    """As a signal, nothing in the pipeline catches it."""


class Killer(Hook):
    """Ends the process's part in the training in the given step, epoch or round of this attempt."""

    def __init__(self, step: int = 0, after_epoch: int = 0, begin_round: int = 0) -> None:
        self.when = {"step": step, "after_epoch": after_epoch, "begin_round": begin_round}
        self.steps = 0

    def penalty(self, run: Run, *tensors: Tensor) -> None:
        self.steps += 1
        self._kill("step", self.steps)

    def after_epoch(self, run: Run) -> bool:
        self._kill("after_epoch", run.epoch)
        return False

    def begin_round(self, run: Run) -> bool:
        self._kill("begin_round", run.round)
        return True

    def _kill(self, event: str, number: int) -> None:
        if self.when[event] == number:
            raise Killed


def network(expand: bool = False) -> nn.Module:
    """Two convolutions with all that a step can depend on: dropout, running statistics, memory order."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Dropout(0.3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    return randomise(overparameterize(model, "kflo", width=2) if expand else model)


class Deaf(Hook):
    """Nothing reads the last convolution's third filter: it is the least useful one in every round."""

    def prepare(self, run: Run) -> None:
        nn.init.zeros_(run.model.get_parameter("12.weight")[:, 8:12])


def fit(**changes: Any) -> Fit:
    return Fit.model_validate({**FIT, "epochs": EPOCHS, "batch_size": BATCH, "lr": 0.05, **changes})


def run_on(data: Prepared, model: nn.Module, chosen: Fit | None = None, seed: int = 3) -> Run:
    chosen = chosen or fit()
    augment = Augment(pad=1, pad_mode="zero", flip=False, scale=None)
    batches = Batches(data, "train", chosen.batch_size, "cpu", augment, True, seed)
    return Run(model, chosen, batches, Batches(data, "validation", 256, "cpu", None, False, 0), seed, torch.device("cpu"), "test")


def method(family: str, name: str, **options: Any) -> Hook:
    block = {"method": name, "fit": FIT, **options} | ({"distill": None, "sensitivity": None} if family == "compress" else {})
    return methods.load(family, name).create(methods.options(family, "block", block))


REACTIVATION: dict[str, Any] = {"alpha": 0.6, "beta": 0.6, "gamma": 0.6, "every": 1, "rounding": "ceil"}
REACTIVATION |= {"selection": "norm", "max_ratio": None}
RESTART: dict[str, Any] = {
    "reset": "he", "scope": "filter", "criterion": "per_example", "ranking_batches": 2, "ranking_dropout": True,
    "divisor": 3, "train_first": False, "restarts": 2, "stop_on_repeat": True, "final_epochs": 1,
    "patience": None, "max_drop": 1.0, "target": None,
    "include_residual": True, "batchnorm": "reset",
}  # fmt: skip
REPEATING, IMPATIENT = RESTART | {"divisor": 11}, RESTART | {"patience": 1}
RANDOM = REACTIVATION | {"selection": "random"}
EVOLUTION: dict[str, Any] = {"rule": "code", "share": 0.9, "norm_share": 0.9, "local": 0.9, "force": 2}
EVOLUTION |= {"period": 2, "divisors": [1.0, 2.0], "steepness": 1.0}
DIET: dict[str, Any] = {
    "groups": 2,
    "target": None,
    "multiple": 8,
    "concat": "aware",
    "weights": "inherited",
    "score": "random",
    "select": "max",
    "protect": [],
}
SELECTIVE: dict[str, Any] = {"gamma": 0.4, "target": None, "multiple": 1, "until": 0.8, "mean_batches": 2, "realloc": {}}
SELECTIVE |= {"max_pointers": None, "reset_momentum": False, "compensate": False}
TEACHER = Distill(loss="kl", weight=2.0, temperature=3.0)
# Hooks, changes of the fit, expanded or not.
CASES: dict[str, tuple[Callable[[], list[Hook]], dict[str, Any], bool]] = {
    "plain": (lambda: [], {"nesterov": True, "schedule": "constant"}, False),
    "kflo": (lambda: [kflo.Hook()], {"label_smoothing": 0.1}, True),
    "adam": (lambda: [], {"optimizer": "adam", "lr": 0.01, "schedule": {"every": 2, "factor": 0.5}}, False),
    "best": (lambda: [], {"select": "best", "lr": 1.0, "schedule": "constant", "momentum": 0.0}, False),
    "reactivation": (lambda: [method("revive", "reactivation", **REACTIVATION, momentum="scale")], {}, False),
    "reactivation of kflo": (
        lambda: [kflo.Hook(), method("revive", "reactivation", **REACTIVATION, momentum="zero")],
        {"optimizer": "adam", "lr": 0.01},
        True,
    ),
    "random reactivation": (lambda: [method("revive", "reactivation", **RANDOM, momentum="keep")], {}, False),
    "weight evolution": (lambda: [kflo.Hook(), method("revive", "weight_evolution", **EVOLUTION)], {}, True),
    "restart after a round": (lambda: [method("revive", "restart", **RESTART | {"train_first": True})], {"epochs": 1}, False),
    "random restart": (lambda: [method("revive", "restart", **RESTART | {"criterion": "random"})], {"epochs": 1}, False),
    "restart": (lambda: [kflo.Hook(), method("revive", "restart", **RESTART)], {"epochs": 2}, True),
    "impatient restart": (lambda: [method("revive", "restart", **IMPATIENT)], {"epochs": 4, "lr": 1e-6}, False),
    "repeating restart": (lambda: [Deaf(), method("revive", "restart", **REPEATING)], {"epochs": 2, "lr": 1e-6}, False),
    "selective": (lambda: [kflo.Hook(), method("compress", "selective", **SELECTIVE)], {"select": "best"}, True),
    "diet with its teacher": (lambda: [kflo.Hook(), Distillation(TEACHER), method("compress", "diet", **DIET)], {}, True),
}  # fmt: skip


def outcome(run: Run) -> dict[str, Any]:
    """All that a training leaves behind, but for its speed."""
    history = [{key: value for key, value in row.items() if key not in ("images_per_s", "loader_share")} for row in run.history]
    kept = {"history": history, "events": run.events, "notes": run.notes, "rounds": run.rounds, "best": run.best_accuracy}
    return kept | {"state": {name: tensor.numpy().tobytes() for name, tensor in run.model.state_dict().items()}}


def attempt(data: Prepared, case: str, resume: Resume | None, killer: Killer) -> Run | None:
    """One process: everything made anew. None where it was killed."""
    make, changes, expand = CASES[case]
    run = run_on(data, network(expand), fit(**changes))
    torch.manual_seed(torch.seed())
    try:
        train(run, [*make(), killer], resume)
    except Killed:
        return None
    return run


@pytest.mark.parametrize("case", CASES)
def test_a_killed_training_ends_bit_for_bit_as_an_undisturbed_one(case: str, tiny: Prepared, tmp_path: Path) -> None:
    undisturbed = attempt(tiny, case, None, Killer())
    assert undisturbed is not None
    expected = outcome(undisturbed)
    assert ("same filters" in str(expected["events"])) is ("repeating" in case)
    assert 3 <= len(expected["history"]) <= sum(expected["rounds"]) - ("impatient" in case)
    # In every second step after a whole epoch, until the training is over.
    resume, attempts = Resume(tmp_path, case.replace(" ", "-"), "0" * 16), 0
    while (run := attempt(tiny, case, resume, Killer(step=5))) is None:
        attempts += 1
        assert attempts < 10, "it does not go on"
    assert attempts == len(expected["history"]) - 1
    assert outcome(run) == expected
    # With the last epoch kept, only the end is left.
    again = attempt(tiny, case, resume, Killer(step=1))
    assert again is not None and outcome(again) == expected
    resume.clear()
    assert not list(tmp_path.iterdir())
    # Between an epoch and its state, and between two rounds.
    for killer in (Killer(after_epoch=2), Killer(begin_round=2)) if len(expected["rounds"]) > 1 else (Killer(after_epoch=2),):
        assert attempt(tiny, case, resume, killer) is None
        last = attempt(tiny, case, resume, Killer())
        assert last is not None and outcome(last) == expected
        resume.clear()


def test_a_state_of_other_parameters_or_a_damaged_one_is_not_taken_up(tiny: Prepared, tmp_path: Path) -> None:
    expected = attempt(tiny, "plain", None, Killer())
    assert expected is not None
    resume = Resume(tmp_path, "train-0", "0" * 16)
    assert attempt(tiny, "plain", resume, Killer(step=5)) is None
    content = resume.path.read_bytes()
    for damaged in (b"", content[:20], content[: len(content) // 2]):
        resume.path.write_bytes(damaged)
        run = attempt(tiny, "plain", resume, Killer())
        assert run is not None and outcome(run) == outcome(expected)
    resume.path.write_bytes(content)
    other = run_on(tiny, network(), fit())
    assert not Resume(tmp_path, "train-0", "1" * 16).load(other, []) and other.epoch == 0
    assert Resume(tmp_path, "train-0", "0" * 16).load(other, [Killer()]) and other.epoch == 1
    file = tmp_path / "input"
    file.write_bytes(b"a")
    prints = [fingerprint({"lr": 0.1}, [file]), fingerprint({"lr": 0.2}, [file]), fingerprint({"lr": 0.1}, [])]
    file.write_bytes(b"b")
    prints.append(fingerprint({"lr": 0.1}, [file]))
    assert len(set(prints)) == 4 and all(len(value) == 16 for value in prints)
    other_name = tmp_path / f"train-0-1-{'0' * 16}.safetensors"
    other_name.write_bytes(b"")
    resume.clear()
    assert other_name.exists() and not resume.path.exists()


@pytest.mark.parametrize(("lr", "poison"), [(1e6, False), (0.1, True)])
def test_a_diverging_loss_stops_with_its_place(tiny: Prepared, lr: float, poison: bool) -> None:
    run = run_on(tiny, network(), fit(lr=lr, weight_decay=10.0, schedule="constant"))
    run.stage = "revive"

    class Poison(Hook):
        def after_epoch(self, run: Run) -> bool:
            with torch.no_grad():
                next(run.model.parameters()).fill_(float("nan"))
            return False

    with pytest.raises(InputError, match=r"revive: the loss is (nan|inf) in epoch \d \(round 1\), last learning rate ") as error:
        train(run, [Poison()] if poison else [])
    assert f"{lr:.3g}" in str(error.value) and "lower fit.lr" in str(error.value)
    assert not poison or "epoch 2 (round 1)" in str(error.value)


def test_learning_rates_are_the_closed_forms() -> None:
    for progress in np.linspace(0, 10, 41):
        assert learning_rate(fit(lr=0.2), progress, 10) == pytest.approx(0.1 * (1 + math.cos(progress * math.pi / 10)))
        assert learning_rate(fit(lr=0.2, schedule="constant"), progress, 10) == 0.2
        stairs = 0.2 * 0.1 ** sum(progress >= edge for edge in (3, 6, 9))
        assert learning_rate(fit(lr=0.2, schedule={"every": 3, "factor": 0.1}), progress, 10) == pytest.approx(stairs)


class Watch(Hook):
    """Keeps the learning rates of every step and the optimisers; one parameter learns at a tenth and does not decay."""

    def __init__(self, rounds: Sequence[int] = ()) -> None:
        self.plan = list(rounds)
        self.rates: list[list[float]] = []
        self.fresh: list[bool] = []
        self.edited: list[int] = []

    def rounds(self, epochs: int) -> list[int]:
        return self.plan or super().rounds(epochs)

    def parameter_rules(self, run: Run) -> dict[nn.Parameter, ParameterRule]:
        return {run.model.get_parameter("12.bias"): ParameterRule(weight_decay=0.0, lr_scale=0.1)}

    def penalty(self, run: Run, *tensors: Tensor) -> None:
        assert run.optimizer is not None
        self.rates.append([group["lr"] for group in run.optimizer.param_groups])
        self.fresh.append(not run.optimizer.state)

    def after_epoch(self, run: Run) -> bool:
        self.edited.append(run.epoch)
        return False


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_round_has_a_fresh_optimiser_and_its_schedule_from_the_start(tiny: Prepared, optimizer: str) -> None:
    run, watch = run_on(tiny, network(), fit(optimizer=optimizer, lr=0.01)), Watch([3, 1])
    train(run, [watch])
    cosine = [0.005 * (1 + math.cos(math.pi * step / steps)) for steps in (9, 3) for step in range(steps)]
    assert [rates[0] for rates in watch.rates] == pytest.approx(cosine)
    assert [rates[1] for rates in watch.rates] == pytest.approx([0.1 * rate for rate in cosine])
    assert watch.edited == [1, 2, 3]  # nothing trains an edit after the last epoch
    assert watch.fresh == [True, *[False] * 8, True, False, False]
    assert [(row["epoch"], row["round"]) for row in run.history] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    assert [row["lr"] for row in run.history] == pytest.approx([cosine[2], cosine[5], cosine[8], cosine[11]])


def test_every_parameter_is_in_one_group_with_the_rule_that_hooks_give_it(tiny: Prepared) -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    run = run_on(tiny, model, fit(weight_decay=0.01, epochs=1))
    before = model[0].weight.clone()
    train(run, [Watch()])
    assert run.optimizer is not None
    groups = [(group["weight_decay"], group["lr_scale"], len(group["params"])) for group in run.optimizer.param_groups]
    members = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    assert groups == [(0.01, 1.0, len(list(model.parameters())) - 2), (0.0, 0.1, 1)]
    assert sorted(map(id, members)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert torch.equal(model[0].weight, before)
