"""What each task learns and how it is judged, against formulas in numpy; what a task cannot take is refused before training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIT
from raw_data import options
from torch import Tensor, nn

from pipeline import files, methods, models
from pipeline.certificate import certify
from pipeline.config import Distill, Fit
from pipeline.data.batches import SPLITS, Batches, Prepared, load
from pipeline.data.prepare import prepare
from pipeline.distillation import Distillation, distance
from pipeline.errors import InputError
from pipeline.evaluation import evaluate
from pipeline.hooks import Hook, Run
from pipeline.overparameterize import kflo, overparameterize
from pipeline.revive.restart import taylor_scores
from pipeline.scores import NAMES
from pipeline.tasks import TASKS, Tally, check_options, check_output
from pipeline.training import train

DENSE = ("segment", "depth")


def small(width: int = 6) -> nn.Sequential:
    """A fully convolutional network: (B, 1, H, W) -> (B, 1, H, W)."""
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 1, 1)]
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    """Of the scenes of each dense task the first 64 to train on, 24 to validate, 24 to test."""
    found = {}
    for task in DENSE:
        whole, folder = tmp_path_factory.mktemp(task), tmp_path_factory.mktemp(f"{task}-few")
        prepare(options(f"scenes_{task}", "unused"), whole / "data")
        counts = dict(zip(SPLITS, (64, 24, 24), strict=True))
        for split, count in counts.items():
            for kind in ("images", "targets"):
                np.save(folder / f"{split}_{kind}.npy", np.load(whole / f"data/{split}_{kind}.npy")[:count])
        found[task] = replace(load(whole / "data"), folder=folder, counts=counts)
    return found


def run_on(data: Prepared, model: nn.Module, **changes: Any) -> Run:
    fit = Fit.model_validate(FIT | {"batch_size": 16, "optimizer": "adam", "lr": 0.01} | changes)
    batches = [Batches(data, split, 16, "cpu", None, split == "train", 0) for split in ("train", "validation")]
    return Run(model, fit, *batches, seed=0, device=torch.device("cpu"))


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return small()


def judged(task: str, outputs: Tensor, targets: Tensor, sizes: list[int]) -> Any:
    tally = Tally(TASKS[task])
    for batch in zip(outputs.split(sizes), targets.split(sizes), strict=True):
        tally.add(*batch)
    return tally


def drawn(task: str, images: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn(images, 1, 9, 5, generator=generator)
    if task == "segment":
        return outputs, (torch.rand(images, 9, 5, generator=generator) < torch.linspace(0, 0.8, images)[:, None, None]).float()
    targets = 1 + 4 * torch.rand(images, 9, 5, generator=generator)
    outputs = targets[:, None] * (1 + 0.6 * outputs)  # some of it negative
    targets[0, :4] = 0  # unknown
    return outputs, targets


def test_masks_are_judged_by_intersections_and_unions_over_all_pixels() -> None:
    outputs, targets = drawn("segment")
    z, t = outputs[:, 0].double().numpy(), targets.numpy() > 0
    inside = 1 / (1 + np.exp(-z))
    loss = -np.where(t, np.log(inside), np.log(1 - inside)).mean()
    hits, found, there = (z > 0) & t, z > 0, t
    for sizes in ([7], [3, 4], [1] * 7):
        tally = judged("segment", outputs, targets, sizes)
        score = tally.score()
        assert score.accuracy == hits.sum() / (found | there).sum() and score.loss == pytest.approx(loss, rel=1e-5)
        assert score.others == {"dice": 2 * hits.sum() / (found.sum() + there.sum())}
        assert tally.metrics() == {"test_iou": score.accuracy, "test_dice": score.others["dice"]}
    assert float(TASKS["segment"].loss(outputs, targets)) == pytest.approx(loss, rel=1e-5)
    nothing = judged("segment", -torch.ones(2, 1, 3, 3), torch.zeros(2, 3, 3), [2]).score()
    assert (nothing.accuracy, nothing.others) == (1.0, {"dice": 1.0})


def test_depths_are_judged_by_ratios_and_differences_where_they_are_known() -> None:
    outputs, targets = drawn("depth")
    known = targets.numpy() > 0
    p, t = outputs[:, 0].double().numpy()[known], targets.double().numpy()[known]
    ratio = np.where(p > 0, np.maximum(p / t, t / np.where(p > 0, p, 1)), np.inf)
    assert known.sum() < targets.numel() and (p <= 0).any() and 0.2 < (ratio < 1.25).mean() < 0.8
    for sizes in ([7], [3, 4], [1] * 7):
        score = judged("depth", outputs, targets, sizes).score()
        assert score.accuracy == (ratio < 1.25).sum() / known.sum()
        assert score.loss == pytest.approx(((p - t) ** 2).mean(), rel=1e-6)
        assert score.others["rmse_m"] == pytest.approx(np.sqrt(((p - t) ** 2).mean()), rel=1e-6)
        assert score.others["abs_rel"] == pytest.approx((np.abs(p - t) / t).mean(), rel=1e-6)
    loss = TASKS["depth"].loss
    assert float(loss(outputs, targets)) == pytest.approx(((p - t) ** 2).mean(), rel=1e-5)
    assert float(loss(outputs, torch.zeros_like(targets))) == 0
    (gradient,) = torch.autograd.grad(loss(outputs.requires_grad_(), targets), outputs)
    assert not gradient[0, 0, :4].any() and gradient[0, 0, 4:].all()


def test_classes_are_judged_as_before_and_five_likeliest_beside() -> None:
    draw = np.random.default_rng(0)
    logits, labels = draw.standard_normal((40, 12)).astype(np.float32), draw.integers(0, 12, 40)
    order = np.argsort(-logits, 1)
    score = judged("classify", torch.from_numpy(logits), torch.from_numpy(labels), [25, 15]).score()
    assert score.accuracy == (order[:, 0] == labels).mean()
    assert score.others == {"top5_accuracy": (order[:, :5] == labels[:, None]).any(1).mean()}
    normalised = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert score.loss == pytest.approx(-normalised[np.arange(40), labels].mean(), rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_a_sum_of_losses_is_the_mean_times_the_images(task: str) -> None:
    outputs, targets = drawn(task) if task in DENSE else (torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0]))
    loss = TASKS[task].loss
    torch.testing.assert_close(loss(outputs, targets, reduction="sum"), loss(outputs, targets) * len(targets))


def test_two_networks_agree_by_sign_and_by_one_percent() -> None:
    first = torch.tensor([[[[2.0, -1.0, 0.5, -3.0]]]])
    hits, of = TASKS["segment"].agreement(first, torch.tensor([[[[0.1, 4.0, 0.2, -1.0]]]]))
    assert (int(hits), of) == (3, 4)
    hits, of = TASKS["depth"].agreement(first, torch.tensor([[[[2.019, -1.0, 0.506, 3.0]]]]))  # off by 0.95 %, 0, 1.2 %, a sign
    assert (int(hits), of) == (2, 4)
    hits, of = TASKS["classify"].agreement(torch.tensor([[0.0, 1], [2, 1]]), torch.tensor([[3.0, 4], [1, 2]]))
    assert (int(hits), of) == (1, 2)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_teacher_of_masks_is_compared_by_the_sigmoid_of_every_pixel(temperature: float) -> None:
    student, teacher = torch.randn(2, 3, 1, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p, q = (1 / (1 + np.exp(-each.numpy() / temperature)) for each in (student, teacher))
    divergence = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    wanted = {"softmax_mse": ((p - q) ** 2).mean(), "kl": temperature**2 * divergence.mean()}
    wanted["logit_mse"] = ((student - teacher) ** 2).numpy().mean()
    for loss, value in wanted.items():
        assert float(distance(student, teacher, loss, temperature)) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("task", DENSE)
def test_a_training_learns_and_calls_its_score_by_name(task: str, scenes: dict[str, Prepared]) -> None:
    class Noting(Hook):
        def after_epoch(self, run: Run) -> bool:
            run.log("noted", validation_accuracy_before=0.5)
            return False

    model, name = model_of(), NAMES[task].headline
    overparameterize(model, "kflo", depth=2, width=1.5)
    run = run_on(scenes[task], model, epochs=6, select="best")
    before = evaluate(run.model, run.validation)
    trained = train(run, [kflo.Hook(depth=2, width=1.5, l2_factor=1.0, mixer_decay=1e-9), Noting()])
    last = evaluate(trained, run.validation)
    assert last.loss < 0.8 * before.loss and last.accuracy > before.accuracy
    assert last.accuracy == max(row[f"validation_{name}"] for row in run.history) == run.best_accuracy
    assert all(0 <= row[f"train_{name}"] <= 1 and "train_accuracy" not in row for row in run.history)
    assert f"validation_{name}_before" in run.events[0] and "validation_accuracy_before" not in run.events[0]
    expected = judged(task, *answers(trained, scenes[task], "validation"), [24]).score()
    assert last.accuracy == pytest.approx(expected.accuracy) and last.loss == pytest.approx(expected.loss, rel=1e-5)


def answers(model: nn.Module, data: Prepared, split: str) -> tuple[Tensor, Tensor]:
    """What the model says of a split, and its targets, read past the batches."""
    pixels = np.load(data.folder / f"{split}_images.npy").transpose(0, 3, 1, 2) / 255
    images = torch.from_numpy((pixels - data.mean[0]) / data.std[0]).float()
    with torch.no_grad():
        return model(images), torch.from_numpy(np.load(data.folder / f"{split}_targets.npy")).float()


RESTART = {"reset": "uniform", "scope": "filter", "criterion": "per_example", "ranking_batches": 1, "ranking_dropout": False}
RESTART |= {"divisor": 3, "train_first": False, "restarts": 2, "stop_on_repeat": False, "final_epochs": 0, "patience": None}
RESTART |= {"max_drop": 1.0, "target": None, "include_residual": False, "batchnorm": "reset"}
GRAFTING = {"networks": 2, "strength": 0.4, "steepness": 500.0, "bins": 10, "learning_rates": "different"}
GRAFTING |= {"data": "different", "ship": "best"}


@pytest.mark.parametrize("task", DENSE)
@pytest.mark.parametrize(("family", "name", "chosen"), [("revive", "restart", RESTART), ("revive", "grafting", GRAFTING)])
def test_methods_that_look_at_losses_take_the_tasks_own(
    task: str, family: str, name: str, chosen: dict[str, Any], scenes: dict[str, Prepared]
) -> None:
    run = run_on(scenes[task], model_of(), epochs=1)
    found = methods.options(family, "x", {"method": name, "fit": run.fit.model_dump(), **chosen})
    trained = train(run, [methods.load(family, name).create(found)])
    assert evaluate(trained, run.validation).accuracy == pytest.approx(
        run.history[-1][f"validation_{NAMES[task].headline}"], abs=0.5
    )
    assert not any("accuracy" in key for row in [*run.events, *run.history] for key in row)


@pytest.mark.parametrize("task", DENSE)
def test_a_filters_taylor_score_is_of_the_tasks_loss(task: str, scenes: dict[str, Prepared]) -> None:
    model, (images, targets) = model_of().eval(), next(iter(Batches(scenes[task], "train", 8, "cpu", None, False, 0).epoch(0)))
    maps = model[:1](images).detach().requires_grad_()
    cost = TASKS[task].loss(model[1:](maps), targets) * len(targets)
    (gradient,) = torch.autograd.grad(cost, maps)
    wanted = (maps * gradient).mean((2, 3)).abs().sum(0)
    found = taylor_scores(model, {"0": "0"}, [(images, targets)], criterion="per_example", loss=TASKS[task].loss)["0"]
    torch.testing.assert_close(found, (wanted / wanted.norm()).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", DENSE)
def test_a_certificate_of_dense_outputs_has_the_tasks_names(task: str, scenes: dict[str, Prepared]) -> None:
    test = Batches(scenes[task], "test", 10, "cpu", None, False, 0)
    one, names = model_of(), NAMES[task]
    found = certify(one, one, test)
    assert found.keys() == {
        f"test_{names.headline}",
        *(f"test_{name}" for name in names.beside),
        "max_abs_difference",
        names.agreement,
    }
    assert (found["max_abs_difference"], found[names.agreement]) == (0, 1)
    with pytest.raises(InputError, match="differs by"):
        certify(one, model_of(1), test)


@pytest.mark.parametrize("loss", ["softmax_mse", "kl", "logit_mse"])
def test_a_depth_is_distilled_by_the_squared_difference_alone(loss: Any, scenes: dict[str, Prepared]) -> None:
    for task in DENSE:
        teacher = Distillation(Distill(loss=loss, weight=1.0, temperature=4.0))
        if task == "depth" and loss != "logit_mse":
            with pytest.raises(InputError, match=r"distill\.loss = .*must be logit_mse"):
                train(run_on(scenes[task], model_of(), epochs=1), [teacher])
        else:
            train(run_on(scenes[task], model_of(), epochs=1), [teacher])


def test_smoothing_between_classes_is_refused_where_there_are_none(scenes: dict[str, Prepared]) -> None:
    for task in DENSE:
        with pytest.raises(InputError, match=rf"label_smoothing = 0\.1: must be 0 where the task of the data is '{task}'"):
            train(run_on(scenes[task], model_of(), label_smoothing=0.1), [])
    check_options(TASKS["classify"], "x", Fit.model_validate(FIT | {"label_smoothing": 0.1}))


def test_a_network_that_answers_otherwise_than_the_task_asks_is_refused_without_memory() -> None:
    classes = lambda: models.build("cifar_quick", input_shape=(1, 32, 32), classes=1)  # noqa: E731
    with torch.device("meta"):
        check_output(TASKS["segment"], "small", small(), (1, 32, 32), 1)
        with pytest.raises(
            InputError, match=r"'cifar_quick' gives \(N, 1\) for images \(N, 1, 32, 32\), but .*'depth' needs \(N, 1, 32, 32\)"
        ):
            check_output(TASKS["depth"], "cifar_quick", classes(), (1, 32, 32), 1)
        with pytest.raises(
            InputError, match=r"'small' gives \(N, 1, 32, 32\) .*'classify' needs \(N, 10\): choose one that classifies"
        ):
            check_output(TASKS["classify"], "small", small(), (1, 32, 32), 10)


def test_older_folders_are_of_classes(prepared: Prepared, tmp_path: Path) -> None:
    shutil.copytree(prepared.folder, tmp_path / "data")
    card = files.read_json(tmp_path / "data/data.json")
    assert card.pop("task") == "classify"
    (tmp_path / "data/data.json").write_text(json.dumps(card))
    assert load(tmp_path / "data").task == "classify"
