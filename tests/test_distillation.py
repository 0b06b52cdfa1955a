"""Distillation against sums over single logits, and the teacher against the network that entered the stage."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import Distill
from pipeline.distillation import Distillation, distance
from pipeline.hooks import Hook, Run
from pipeline.overparameterize import kflo, overparameterize
from pipeline.training import train

STUDENT = [[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]]
TEACHER = [[0.5, 1.0, -1.0], [2.0, 2.0, 0.0]]


def softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distances_are_the_sums_that_they_are_named_for(temperature: float) -> None:
    squares, soft_squares, divergence = [], [], []
    for student, teacher in zip(STUDENT, TEACHER, strict=True):
        p, q = softmax(student, temperature), softmax(teacher, temperature)
        squares += [(s - t) ** 2 for s, t in zip(student, teacher, strict=True)]
        soft_squares += [(a - b) ** 2 for a, b in zip(p, q, strict=True)]
        divergence.append(sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)))
    wanted = {"logit_mse": sum(squares) / 6, "softmax_mse": sum(soft_squares) / 6, "kl": temperature**2 * sum(divergence) / 2}
    for loss, value in wanted.items():
        found = float(distance(torch.tensor(STUDENT), torch.tensor(TEACHER), loss, temperature))
        assert found == pytest.approx(value, rel=1e-5)
        assert float(distance(torch.tensor(STUDENT), torch.tensor(STUDENT), loss, temperature)) == pytest.approx(0, abs=1e-6)


def test_at_a_high_temperature_the_divergence_becomes_the_square_of_centred_logits() -> None:
    """Hinton et al. 2015, section 2.1: half the squared distance over the number of classes."""
    student, teacher = (torch.tensor(each, dtype=torch.float64) for each in (STUDENT, TEACHER))
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    wanted = centred.square().sum(1).mean() / (2 * 3)
    torch.testing.assert_close(distance(student, teacher, "kl", 1e3), wanted, rtol=1e-2, atol=0)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model.append(nn.Linear(24, 10))
    return model


class Halving(Hook):
    """Changes the network before it is trained."""

    def prepare(self, run: Run) -> None:
        run.model = network()
        run.model[6].weight.data *= 0.5  # type: ignore[index,operator,union-attr]


@pytest.mark.parametrize("method", [Halving(), Hook()], ids=["replaced", "trained in place"])
@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "kflo"])
def test_the_teacher_is_the_parent_in_evaluation_mode_and_never_changes(make_run: Any, expanded: bool, method: Hook) -> None:
    parent = network()
    hooks: list[Hook] = [kflo.Hook()] if expanded else []
    if expanded:
        overparameterize(parent, width=2)
    x = torch.randn(8, 1, 16, 16)
    wanted = parent.eval()(x)
    parent.train()
    distillation = Distillation(Distill(loss="softmax_mse", weight=1.0, temperature=4.0))
    run = make_run(parent)
    train(run, [*hooks, distillation, method])
    teacher = distillation.teacher
    torch.testing.assert_close(teacher(x), wanted)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(hasattr(module, "parametrizations") for module in teacher.modules())
    assert not torch.allclose(run.model(x), wanted, atol=1e-3)


def test_the_teachers_term_joins_the_loss_with_its_weight(make_run: Any) -> None:
    run, options = make_run(network()), Distill(loss="logit_mse", weight=0.3, temperature=1.0)
    distillation = Distillation(options)
    distillation.prepare(run)
    images, labels = next(run.train.epoch(0))
    logits = (distillation.teacher(images) + torch.arange(10.0)).requires_grad_()
    term = distillation.penalty(run, images, labels, logits)
    assert float(term.detach()) == pytest.approx(0.3 * sum(i * i for i in range(10)) / 10, rel=1e-4)
    term.backward()
    assert isinstance(logits.grad, Tensor)
    torch.testing.assert_close(logits.grad, (0.3 * 2 * torch.arange(10.0) / logits.numel()).expand(len(images), 10))
    assert distillation.coverage(run.model, run.input_shape) == [] and distillation.parameter_rules(run) == {}
