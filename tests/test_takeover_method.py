"""The method takeover: targets, nearness to the whole network, the hook, and mistakes."""

from typing import Any

import pytest
import torch
from networks import build, difference, masked, plain, shape_of
from torch import nn

from pipeline import models
from pipeline.compress import takeover as method
from pipeline.compress.takeover import Options, create, take_over
from pipeline.config import Target
from pipeline.errors import InputError
from pipeline.measure import count
from pipeline.structure import structure
from pipeline.training import train

FIT: dict[str, Any] = {"epochs": 1, "batch_size": 64, "optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": False}
FIT |= {"weight_decay": 1e-4, "schedule": "cosine", "label_smoothing": 0.0, "select": "last", "precision": "fp32"}


def options(**changes: Any) -> Options:
    usual = {"method": "takeover", "gamma": None, "target": {"of": "macs", "fraction": 0.6}, "multiple": 4, "batches": 2}
    return Options.model_validate(usual | {"distill": None, "sensitivity": None, "fit": FIT} | changes)


def images(shape: tuple[int, int, int], count: int = 64) -> list[tuple[torch.Tensor, None]]:
    return [(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)), None) for seed in range(2)]


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("name", ["resnet", "vgg16", "wide_resnet", "densenet"])
def test_a_target_is_reached(name: str, of: Any) -> None:
    shape, model = shape_of(name), build(name, expand=False)
    smaller, facts = take_over(model, shape, images(shape), target=Target(of=of, fraction=0.6), multiple=1)
    key = "macs" if of == "macs" else "parameters"
    share = count(smaller, shape)[key] / count(model, shape)[key]
    assert 0.6 * 0.98 <= share <= 0.6 and share == pytest.approx(facts["share"], abs=2e-3)
    assert set(facts["lost"]) == set(facts["removed"])


def test_outputs_are_nearer_to_the_whole_networks_than_without_taking_over(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, model = shape_of("vgg16"), build("vgg16", expand=False)
    seen: dict[str, Any] = {}
    shrink = method.shrink
    monkeypatch.setattr(method, "shrink", lambda net, shape, reads: seen.update(reads) or shrink(net, shape, reads))
    smaller, facts = take_over(model, shape, images(shape), gamma=0.02, multiple=1)
    assert sum(facts["removed"].values()) > 8 and all(0 < share <= 0.02 for share in facts["lost"].values())
    x = images(shape)[1][0]
    with torch.no_grad():
        whole, without = model(x), masked(model, seen)(x)
        assert (smaller(x) - whole).square().mean() < 0.5 * (without - whole).square().mean()


def test_what_an_expanded_network_takes_over_is_what_its_merged_one_does() -> None:
    shape, model = shape_of("resnet"), build("resnet")
    how: dict[str, Any] = {"gamma": 0.2, "multiple": 1}
    one, other = take_over(model, shape, images(shape), **how)[0], take_over(plain(model), shape, images(shape), **how)[0]
    assert structure(plain(one)) == structure(other) and difference(plain(one), other, shape) < 1e-3


def test_the_hook_cuts_before_training_and_tells_what_it_did(make_run: Any) -> None:
    torch.manual_seed(0)
    model = models.build("cifar_quick", input_shape=(1, 16, 16), classes=10)
    run = make_run(model)
    before = count(model, (1, 16, 16))["macs"]
    train(run, [create(options())])
    assert 0.5 < count(run.model, (1, 16, 16))["macs"] / before <= 0.6
    kinds = [event["kind"] for event in run.events]
    assert kinds == ["takeover", "batchnorm"] and run.events[0]["epoch"] == 0
    assert run.events[0]["share"] <= 0.6 and run.history[0]["epoch"] == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gamma": 0.5}, "give either gamma or target"),
        ({"target": None}, "give either gamma or target"),
        ({"target": {"of": "time", "fraction": 0.5}}, "keep"),
        ({"batches": 0}, "greater"),
    ],
)
def test_options_that_contradict_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        options(**changes)


def test_what_cannot_be_done_is_refused_before_training() -> None:
    hook = create(options(target={"of": "macs", "fraction": 0.01}))
    with pytest.raises(InputError, match="out of reach"):
        hook.coverage(build("cifar_quick", expand=False), shape_of("cifar_quick"))
    lone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(InputError, match="no ungrouped convolution"):
        hook.coverage(lone, (3, 8, 8))
    with pytest.raises(InputError, match="either gamma or target"):
        take_over(lone, (3, 8, 8), images((3, 8, 8)))
