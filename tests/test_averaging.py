"""What a first training adds beside the method: the moving average of weights, the rate of biases, networks to start from."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import Killed, Killer, fit, network, outcome, run_on
from torch import Tensor, nn

from pipeline import models
from pipeline.averaging import Averaging
from pipeline.data.batches import Prepared
from pipeline.errors import InputError
from pipeline.first_training import begin, transfer
from pipeline.hooks import BiasRate, Hook, ParameterRule, Run
from pipeline.layers import filtering_layers
from pipeline.overparameterize import kflo, overparameterize
from pipeline.resume import Resume
from pipeline.training import train


class Watch(Hook):
    """Keeps the network's tensors after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def after_step(self, run: Run) -> None:
        self.steps.append({name: tensor.clone() for name, tensor in run.model.state_dict().items()})


@pytest.mark.parametrize("expand", [False, True])
def test_what_is_kept_is_the_average_of_weights_and_the_last_statistics(tiny: Prepared, expand: bool) -> None:
    watch, plain, decay = Watch(), Watch(), 0.8
    train(run_on(tiny, network(expand), fit(epochs=2)), [plain])
    run = run_on(tiny, network(expand), fit(epochs=2))
    names = {name for name, _ in run.model.named_parameters()}
    train(run, [Averaging(decay), watch])
    assert len(watch.steps) == 6  # and averaging changes nothing of the training
    assert all(torch.equal(tensor, plain.steps[-1][name]) for name, tensor in watch.steps[-1].items())
    for name, tensor in run.model.state_dict().items():
        if name not in names:
            assert torch.equal(tensor, watch.steps[-1][name]), name
            continue
        average = watch.steps[0][name].double()
        for step in watch.steps[1:]:
            average = decay * average + (1 - decay) * step[name].double()
        torch.testing.assert_close(tensor, average.float(), atol=1e-6, rtol=1e-5)
        assert not torch.equal(tensor, watch.steps[-1][name]), name
    assert {name for name, _ in run.model.named_parameters()} == names and not run.model.training


def test_without_a_step_nothing_is_averaged(make_run: Callable[..., Run]) -> None:
    run = make_run(network(), epochs=0)
    before = copy.deepcopy(run.model.state_dict())
    train(run, [Averaging(0.9)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


def averaged(data: Prepared, resume: Resume | None, killer: Killer) -> Run | None:
    """One process's part in an averaged training; None where it was killed."""
    run = run_on(data, network(expand=True), fit())
    try:
        train(run, [kflo.Hook(), BiasRate(2.0), Averaging(0.9), killer], resume)
    except Killed:
        return None
    return run


def test_a_killed_training_ends_with_the_same_average(tiny: Prepared, tmp_path: Path) -> None:
    undisturbed = averaged(tiny, None, Killer())
    assert undisturbed is not None
    resume = Resume(tmp_path, "train-0", "0" * 16)
    for killer in (Killer(step=5), Killer(after_epoch=2), Killer(step=5)):
        assert averaged(tiny, resume, killer) is None
    run = averaged(tiny, resume, Killer())
    assert run is not None and outcome(run) == outcome(undisturbed)
    again = averaged(tiny, resume, Killer(step=1))  # after the last epoch only the end is left
    assert again is not None and outcome(again) == outcome(undisturbed)


def test_biases_learn_at_their_rate_beside_the_methods_own_rules(tiny: Prepared) -> None:
    model = network(expand=True)
    run = run_on(tiny, model, fit(weight_decay=0.01, epochs=1))
    train(run, [kflo.Hook(mixer_decay=1e-9), BiasRate(2.0)])
    assert run.optimizer is not None
    found = {id(p): (group["weight_decay"], group["lr_scale"]) for group in run.optimizer.param_groups for p in group["params"]}
    wanted = {}
    for name, parameter in model.named_parameters():
        decay = 0.0 if name.endswith("original") else 1e-9 if "mixers" in name else 0.01
        wanted[id(parameter)] = (decay, 2.0 if name.endswith((".bias", "bias.original")) else 1.0)
    assert found == wanted
    assert set(found.values()) == {(0.0, 1.0), (0.0, 2.0), (1e-9, 1.0), (0.01, 1.0), (0.01, 2.0)}
    assert all(group["lr"] == run.lr * group["lr_scale"] for group in run.optimizer.param_groups)


def test_rules_of_several_hooks_are_one_rule() -> None:
    usual = ParameterRule(0.1)
    assert usual.then(ParameterRule(lr_scale=2.0)) == ParameterRule(0.1, 2.0)
    assert usual.then(ParameterRule(0.0)).then(ParameterRule(None, 3.0)).then(ParameterRule(0.2, 0.5)) == ParameterRule(0.2, 1.5)


def zoo(classes: int = 10, seed: int = 0, name: str = "cifar_quick", **arguments: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = models.build(name, input_shape=(3, 16, 16), classes=classes, **arguments)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]:
            tensor += torch.rand_like(tensor) / 10
    return model.eval()


KFLO = {"method": "kflo", "layers": ["*"], "depth": 2, "width": 3, "narrow": False, "l2_factor": 1.0, "mixer_decay": 1e-9}
METHODS: list[dict[str, Any]] = [
    {"method": "none"},
    KFLO,
    {"method": "do_conv", "layers": ["*"]},
    {"method": "expandnet", "layers": ["*"], "ratio": 2, "linear": True, "exact": True},
    {"method": "acnet", "layers": ["*"], "gamma": None, "norms": "replace"},
    {"method": "dbb", "layers": ["*"], "gamma": None, "norms": "replace"},
]
every_method = pytest.mark.parametrize("expansion", METHODS, ids=lambda expansion: expansion["method"])
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@every_method
def test_one_network_to_start_from_gives_every_method_its_weights(expansion: dict[str, Any]) -> None:
    source, model = zoo(seed=1), zoo(seed=2)
    assert begin(model, [source], expansion) == []
    torch.testing.assert_close(model.eval()(IMAGES), source(IMAGES), atol=1e-5, rtol=1e-5)
    model = zoo(seed=2)
    assert begin(model, [], expansion) == []
    torch.testing.assert_close(model.eval()(IMAGES), zoo(seed=2)(IMAGES), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depth", [2, 3])
def test_kflo_stacks_several_networks_and_starts_as_the_first(depth: int) -> None:
    sources = [zoo(seed=seed) for seed in (1, 2, 3)]
    states, model = [copy.deepcopy(source.state_dict()) for source in sources], zoo(seed=4)
    assert begin(model, sources, KFLO | {"depth": depth}) == []
    assert torch.equal(model.eval()(IMAGES), sources[0](IMAGES))
    for name, layer in filtering_layers(model):
        computed: Any = layer.parametrizations
        for tensor in computed:
            rows = torch.cat([state[f"{name}.{tensor}"] for state in states])
            assert torch.equal(computed[tensor].original, rows)
    for source, state in zip(sources, states, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in source.state_dict().items())
    others = {name: tensor for name, tensor in model.state_dict().items() if "parametrizations" not in name}
    assert others and all(torch.equal(tensor, states[0][name]) for name, tensor in others.items())


def test_with_fewer_networks_than_the_width_the_last_filters_stay_fresh() -> None:
    sources, model = [zoo(seed=1), zoo(seed=2)], zoo(seed=4)
    begin(model, sources, KFLO)
    assert torch.equal(model.eval()(IMAGES), sources[0](IMAGES))
    for name, layer in filtering_layers(model):
        original, outputs = layer.parametrizations.weight.original, len(layer.weight)  # type: ignore[union-attr]
        assert torch.equal(original[:outputs], sources[0].get_parameter(f"{name}.weight"))
        assert torch.equal(original[outputs : 2 * outputs], sources[1].get_parameter(f"{name}.weight"))
        fresh, stacked = original[2 * outputs :].flatten(1), original[: 2 * outputs].flatten(1)
        assert fresh.shape == (outputs, stacked.shape[1]) and torch.cdist(fresh, stacked).min() > 0.01
    with pytest.raises(InputError, match=r"kflo: 4 networks do not fit into \S+, whose width is 3"):
        begin(zoo(), [zoo(seed=seed) for seed in range(4)], KFLO)


def test_stacking_covers_transposed_and_grouped_layers() -> None:
    make = lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6))  # noqa: E731
    networks = [make().eval() for _ in range(4)]
    model = overparameterize(make(), "kflo", width=4).eval()
    x = torch.randn(2, 4, 5, 5)
    assert kflo.stack(model, networks) == [] and torch.equal(model(x), networks[0](x))
    original = model.get_parameter("0.parametrizations.weight.original")  # (24, 2, 3, 3): filters
    for index, plain in enumerate(networks):
        kernel, rows = plain.get_parameter("0.weight"), original[6 * index : 6 * index + 6]
        for output in range(6):  # of group output // 3, which reads two of the four inputs
            assert torch.equal(rows[output], kernel[2 * (output // 3) : 2 * (output // 3) + 2, output % 3])


@pytest.mark.parametrize("count", [1, 3])
def test_a_classifier_of_other_classes_stays_fresh_and_is_named(count: int) -> None:
    sources, model = [zoo(seed=seed) for seed in range(1, count + 1)], zoo(classes=7, seed=4)
    classifier = [name for name, _ in filtering_layers(model)][-1]
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(classifier)}
    assert begin(model, sources, KFLO) == [
        f"not taken over from the networks of train.start: {classifier}.weight, {classifier}.bias"
    ]
    features = {name: layer for name, layer in filtering_layers(model) if name != classifier}
    assert all(torch.equal(layer.weight, sources[0].get_parameter(f"{name}.weight")) for name, layer in features.items())
    fresh: Any = model.get_submodule(classifier)
    for name in ("weight", "bias"):
        assert torch.equal(getattr(fresh, name), kept[f"{classifier}.{name}"])


@every_method
def test_several_networks_are_refused_by_a_method_that_cannot_stack(expansion: dict[str, Any]) -> None:
    if expansion["method"] == "kflo":
        begin(zoo(), [zoo(seed=1), zoo(seed=2)], expansion)
        return
    wanted = f"train.start has 2 networks, but .*method = {expansion['method']!r} a network starts from one"
    with pytest.raises(InputError, match=wanted):
        begin(zoo(), [zoo(seed=1), zoo(seed=2)], expansion)


def test_a_network_with_nothing_in_common_is_refused() -> None:
    model, source = zoo(), nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="a Sequential has no tensor in common with this CifarQuick to start from"):
        transfer(model, source)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(InputError, match="has no tensor in common"):
        begin(model, [source], KFLO)
