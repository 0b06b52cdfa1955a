"""Torch-Pruning as a rival: its importances, its own pruner beside our cut, and what it refuses. Skipped without it."""

import copy
import sys
from typing import Any

import pytest
import torch
from networks import build, shape_of
from test_rivals import HALF, SHAPE, by_layer, chain, network, options

from pipeline import models
from pipeline.channels import follow
from pipeline.config import Target
from pipeline.errors import InputError
from pipeline.layers import filtering_layers
from pipeline.overparameterize import collapse
from pipeline.structure import structure
from pipeline.training import train


@pytest.fixture(autouse=True)
def rival() -> Any:
    pytest.importorskip("torch_pruning", reason="the optional package torch-pruning is not installed")
    from pipeline.compress import torch_pruning

    return torch_pruning


def test_its_importances_are_those_of_the_whole_groups(rival: Any) -> None:
    model = chain()
    conv, norm, after = model[0], model[1], model[3]  # type: ignore[index]
    found = rival.scores(model, SHAPE, follow(model, SHAPE), "l2")
    sums = [
        (conv.weight[c].square().sum().item() + norm.weight[c].item() ** 2 + after.weight[:, c].square().sum().item()) / 3
        for c in range(12)
    ]
    assert by_layer(model, found, "0") == pytest.approx([value / (sum(sums) / 12) for value in sums], rel=1e-4)
    scales = rival.scores(model, SHAPE, follow(model, SHAPE), "bn_scale")
    assert by_layer(model, scales, "0") == pytest.approx((norm.weight.abs() / norm.weight.abs().mean()).tolist())


@pytest.mark.parametrize("importance", ["l1", "l2", "fpgm", "lamp", "bn_scale", "taylor"])
def test_every_importance_reaches_a_budget_on_an_expanded_network(rival: Any, importance: str) -> None:
    model, shape = build("resnet18"), shape_of("resnet18")
    batches = [(torch.randn(4, *shape), torch.arange(4))]
    smaller, facts = rival.prune(model, shape, importance=importance, batches=batches, **HALF)
    assert 0.49 <= facts["macs"] <= 0.5 and smaller(batches[0][0]).shape == (4, 10)
    assert structure(collapse(smaller))["filtering"] != structure(model)["filtering"]


@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn", "densenet-bc"])
def test_its_own_pruner_and_our_cut_leave_the_same_network(rival: Any, name: str) -> None:
    import torch_pruning as theirs

    model, shape = build(name, expand=False), shape_of(name)
    how = {"share": None, "target": Target(of="macs", fraction=0.6), "multiple": 1, "scope": "global"}
    smaller, facts = rival.prune(model, shape, importance="l2", search="progressive", steps=20, **how)
    assert facts["macs"] <= 0.6 and 0 < facts["steps"] < 20
    own, last = copy.deepcopy(model), [name for name, _ in filtering_layers(model)][-1]
    pruner = theirs.pruner.BasePruner(
        own,
        torch.zeros(1, *shape),
        importance=theirs.importance.MagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=20,
        ignored_layers=[own.get_submodule(last)],
    )
    for _ in range(facts["steps"]):
        pruner.step()
    x = torch.randn(3, *shape)
    torch.testing.assert_close(smaller(x), own(x), rtol=1e-4, atol=1e-4)


def test_what_it_cannot_follow_is_refused_before_training(rival: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = rival.create(options(rival, importance="l1", search="budget", steps=10, batches=1))
    with torch.device("meta"):
        padded = models.build("resnet", input_shape=(3, 32, 32), classes=10, depth=20)
        followed = network(expanded=True)
    with pytest.raises(InputError, match="Torch-Pruning cannot follow this network .IndexError"):
        hook.coverage(padded, (3, 32, 32))
    assert "leaves fc2 at full width" in hook.coverage(followed, (1, 16, 16))[0]
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(InputError, match="needs the package torch-pruning, which is not installed: `pip install torch-pruning`"):
        hook.coverage(followed, (1, 16, 16))


@pytest.mark.parametrize("search", ["budget", "progressive"])
def test_in_training(rival: Any, make_run: Any, search: str) -> None:
    block = options(rival, 0, importance="taylor", search=search, steps=10, batches=1)
    run = make_run(network(expanded=True), epochs=0)
    trained = train(run, [rival.create(block)])
    assert [event["kind"] for event in run.events] == ["torch_pruning", "batchnorm"] and run.events[0]["macs"] < 0.7
    assert structure(trained) != structure(network(expanded=True))
    with pytest.raises(ValueError, match="scope must be global or layer"):
        options(rival, importance="l1", search="progressive", steps=10, batches=1, scope="sensitivity", sensitivity="ecdm")
