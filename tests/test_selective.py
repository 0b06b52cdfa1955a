"""Selective convolution as a compress method: what it treats, when and what it closes, and the network without closed channels."""

import copy
from typing import Any

import pytest
import torch
from conftest import FIT
from pydantic import ValidationError
from test_ecdm import scan
from torch import Tensor, nn

from pipeline import models
from pipeline.compress.selective import Options, Selective, create
from pipeline.ecdm import activity
from pipeline.errors import InputError
from pipeline.evaluation import evaluate, reestimate_batchnorm
from pipeline.hooks import Hook, Run
from pipeline.layers import ChannelSelect
from pipeline.overparameterize import collapse, kflo, overparameterize
from pipeline.selection import measured_means
from pipeline.training import train


class Net(nn.Module):
    """1x16x16 images, ten classes: every way in which a convolution can get its input."""

    def __init__(self, norms: bool = True) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if norms else nn.Identity
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1, self.relu1 = norm(8), nn.ReLU()
        self.rectified = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2, self.relu2, self.pool2 = norm(8), nn.ReLU(), nn.AvgPool2d(2)
        self.averaged = nn.Conv2d(8, 12, 1)
        self.pool3 = nn.MaxPool2d(2)
        self.pooled = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(12, 12, 3, groups=3)
        self.depthwise = nn.Conv2d(12, 12, 1, groups=12)
        self.gap, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        first = self.relu1(self.bn1(self.first(x)))
        x = self.relu2(self.bn2(self.rectified(first) + first))
        x = self.pool3(self.averaged(self.pool2(x)))
        return self.fc(self.flatten(self.gap(self.depthwise(self.grouped(self.pooled(x))))))


def network(expanded: bool = False, norms: bool = True) -> Net:
    torch.manual_seed(1)
    model = Net(norms)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -1.0, 1.0)
    if expanded:
        overparameterize(model, depth=2, width=2)
    return model


def options(**changes: Any) -> Options:
    usual: dict[str, Any] = {"method": "selective", "gamma": 0.05, "target": None, "multiple": 1, "until": 0.5, "mean_batches": 2}
    usual |= {
        "realloc": {},
        "max_pointers": None,
        "reset_momentum": False,
        "compensate": False,
        "distill": None,
        "sensitivity": None,
        "fit": FIT,
    }
    return Options.model_validate(usual | changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gamma": None}, "either gamma or target"),
        ({"target": {"of": "macs", "fraction": 0.5}}, "either gamma or target"),
        ({"gamma": None, "target": {"of": "macs", "fraction": 0.5}, "realloc": {"1x1": 3}}, "realloc needs gamma"),
        ({"realloc": {"1": 3}}, "sizes of kernels, as {1x1: 3}"),
        ({"realloc": {"1x1": -1}}, "greater than or equal to 0"),
        ({"max_pointers": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        options(**changes)


def test_ungrouped_convolutions_behind_the_first_are_treated_and_the_rest_is_told() -> None:
    hook = Selective(options())
    notes = hook.coverage(network(), (1, 16, 16))
    assert hook.names == ["rectified", "averaged", "pooled"] and hook.measured == ["pooled"]
    assert hook.channels.relu_source == {"rectified": "bn1", "averaged": "bn2"}
    assert notes == [
        "selective leaves the inputs of first, grouped, fc whole",
        "selective measures the activity that enters pooled: no batch norm and ReLU",
    ]
    resnet = models.build("resnet", input_shape=(3, 16, 16), classes=10, depth=8)
    hook.coverage(resnet, (3, 16, 16))
    assert hook.names == [f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)]
    assert hook.measured == ["layer2.0.conv1", "layer3.0.conv1"]  # they read a sum; the first reads bn1's ReLU
    bottleneck = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 4, 1))
    hook.coverage(bottleneck, (3, 16, 16))
    assert hook.names == ["1", "4"]
    with pytest.raises(InputError, match="no ungrouped convolution behind its first"):
        hook.coverage(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)), (3, 16, 16))


PAPER: dict[str, tuple[dict[str, Any], str, str, str]] = {  # K = 3, K = 0 and untouched layers, by how their names end
    "densenet": (
        {"depth": 10, "growth": 4, "compression": 0.5, "stem": "cifar"},
        "conv1 transition1.conv transition2.conv",
        "conv2",
        "",
    ),
    "resnet_preact": ({"depth": 11, "stem": "cifar"}, "0.conv1 0.conv3", "conv2", "conv1"),
    "resnext": ({"depth": 11, "cardinality": 2, "width": 4, "stem": "cifar"}, "0.conv1 0.conv3", "", "conv1 conv2"),
    "condensenet": ({"depth": 8, "growth": 4, "groups": 4, "dropout": 0.1}, "conv1", "", "conv2"),
}


@pytest.mark.parametrize("network", PAPER)
def test_the_published_networks_are_treated_as_published(network: str) -> None:
    arguments, redirected, closed, whole = PAPER[network]
    model = models.build(network, input_shape=(3, 8, 8), classes=10, **arguments)
    hook = Selective(options(realloc={"1x1": 3}))
    notes = hook.coverage(model, (3, 8, 8))
    assert hook.sources and set(hook.sources.values()) == {3} and not hook.measured
    ends = lambda names, wanted: all(any(name.endswith(end) for end in wanted.split()) for name in names)  # noqa: E731
    assert ends(hook.sources, redirected) and ends({*hook.names} - {*hook.sources}, closed)
    others = {name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)} - {*hook.names}
    assert ends(others, f"{whole} conv0") and len(notes) == 1 and all(name in notes[0] for name in others)
    assert len(hook.names) + len(others) == sum(isinstance(layer, nn.Conv2d) for layer in model.modules())


def test_slots_are_redirected_only_where_batch_norm_and_relu_are_the_convolutions_own() -> None:
    hook = Selective(options(realloc={"3x3": 2, "1x1": 5}))
    notes = hook.coverage(network(), (1, 16, 16))
    assert hook.sources == {"averaged": 5}  # the ReLU before `rectified` goes into a sum too, `pooled` reads no ReLU
    assert "selective closes channels of rectified, pooled for good: no batch norm and ReLU of their own to redirect" in notes
    hook.coverage(models.build("resnet", input_shape=(3, 16, 16), classes=10, depth=8), (3, 16, 16))
    assert hook.sources == {f"layer{i}.0.conv2": 2 for i in (1, 2, 3)}  # the first convolution's ReLU also goes into the shortcut
    with pytest.raises(InputError, match="no convolution of such a size has a batch norm and ReLU of its own"):
        Selective(options(realloc={"5x5": 3})).coverage(network(), (1, 16, 16))
    shared: Any = network()
    shared.relu2 = shared.relu1  # one module, called twice
    hook.coverage(shared, (1, 16, 16))
    assert hook.sources == {"averaged": 5}


def test_measured_means_are_those_of_what_the_layer_reads(make_run: Any) -> None:
    model, run = network().train(), make_run(nn.Identity())
    batches = [batch for batch, _ in zip(run.train.epoch(0), range(3), strict=False)]
    means, sizes = measured_means(model, ["pooled"], iter(batches), 2)["pooled"]
    read = model.pool3(model.averaged(model.pool2(rectified(model.eval(), torch.cat([images for images, _ in batches[:2]])))))
    torch.testing.assert_close(means, read.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sizes, read.abs().mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert (sizes > means.abs() + 0.01).any()  # else the two say the same


def rectified(model: Net, x: Tensor) -> Tensor:
    first = model.bn1(model.first(x)).relu()
    return model.bn2(model.rectified(first) + first).relu()


@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "kflo"])
def test_closing_uses_the_batch_norm_or_the_measured_mean_and_only_ever_closes(make_run: Any, expanded: bool) -> None:
    model: Any = network(expanded)
    hook, run = Selective(options(gamma=0.3)), make_run(model)
    hook.coverage(model, run.input_shape)
    hook.prepare(run)
    means = {"rectified": activity(model.bn1.weight, model.bn1.bias), "averaged": activity(model.bn2.weight, model.bn2.bias)}
    opened: dict[str, Tensor] = {}
    for _ in range(2):
        means["pooled"] = measured_means(model, ["pooled"], run.train.epoch(run.epoch), 2)["pooled"][1]
        wanted = {}
        for name in hook.names:
            layer = model.get_submodule(name)
            wanted[name] = scan(means[name] * layer.gate.open * layer.weight.detach().sum((2, 3)), 0.3)
        hook.rewire(run, 1.0)
        for name in hook.names:
            gate = model.get_submodule(name).gate.open
            assert set((gate == 0).nonzero().flatten().tolist()) == wanted[name] and wanted[name]
            assert name not in opened or (gate <= opened[name]).all()
            opened[name] = gate.clone()
    assert run.events[-1]["open"] == sum(int(gate.sum()) for gate in opened.values())


def test_a_closed_column_keeps_its_weights_and_gets_no_gradient_from_the_data(make_run: Any) -> None:
    model: Any = network()
    hook, run = Selective(options()), make_run(model)
    hook.coverage(model, run.input_shape)
    hook.prepare(run)
    assert {f"{name}.gate.open" for name in hook.names} <= set(model.state_dict())  # so that a resumed run has them
    model.averaged.gate.open[[1, 5]] = 0
    before = model.averaged.weight.detach().clone()
    model(torch.randn(4, 1, 16, 16)).square().sum().backward()
    gradient = model.averaged.weight.grad
    assert (gradient[:, [1, 5]] == 0).all() and (gradient[:, [0, 2, 3, 4, 6, 7]] != 0).any((0, 2, 3)).all()
    assert torch.equal(model.averaged.weight, before)


@pytest.mark.parametrize(("epochs", "until", "closed"), [(4, 0.5, 2), (5, 0.5, 3), (3, 1.0, 2), (10, 0.3, 3), (2, 0.1, 1)])
def test_deallocation_follows_the_epochs_that_begin_in_the_first_part_but_not_the_last(
    make_run: Any, epochs: int, until: float, closed: int
) -> None:
    layers = [nn.Conv2d(1, 2, 9, stride=7), nn.Conv2d(2, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 10)]
    run = make_run(nn.Sequential(*layers), epochs=epochs)
    train(run, [create(options(until=until))])
    assert [event["epoch"] for event in run.events if event["kind"] == "dealloc"] == list(range(1, closed + 1))


class Before(Hook):
    """Keeps the gated network as it is when training ends."""

    model: Any

    def finish(self, run: Run) -> None:
        self.model = copy.deepcopy(run.model)


@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "kflo"])
@pytest.mark.parametrize("norms", [False, True], ids=["bare", "batch norms"])
def test_cutting_the_closed_channels_changes_no_output(make_run: Any, norms: bool, expanded: bool) -> None:
    run, before = make_run(network(expanded, norms), epochs=3, lr=0.02), Before()
    small: Any = train(run, [*([kflo.Hook()] if expanded else []), before, create(options(gamma=0.2))])
    gates = {name: before.model.get_submodule(name).gate.open for name in ("rectified", "averaged", "pooled")}
    surgery, batchnorm = run.events[-2:]
    assert surgery["removed"] == {name: int((gate == 0).sum()) for name, gate in gates.items()}
    assert all(surgery["removed"].values()) and batchnorm["batches"] == len(run.train) * norms
    reestimate_batchnorm(before.model, run.train, run.epoch)  # as `finish` does
    x = torch.randn(16, 1, 16, 16)
    torch.testing.assert_close(small(x), before.model(x), rtol=1e-4, atol=1e-4)
    assert batchnorm["validation_accuracy_after"] == evaluate(small, run.validation).accuracy
    assert not any("gate" in name for name in small.state_dict())
    assert not any(module._forward_pre_hooks for module in small.modules())
    # What nobody reads any more is gone; a selection stands only in front of a layer that reads less than others do.
    collapse(small)
    trunk = int((gates["rectified"] + gates["averaged"] > 0).sum())
    for name, gate in gates.items():
        layer, left, there = getattr(small, name), int(gate.sum()), trunk if name != "pooled" else int(gates["pooled"].sum())
        assert isinstance(layer, nn.Sequential) is (left < there)
        assert (layer.layer if left < there else layer).weight.shape[1] == left
    assert len(small.first.weight) == trunk < 8 and (norms or any(isinstance(m, ChannelSelect) for m in small.modules()))
