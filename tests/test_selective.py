"""Selective convolution against Monte-Carlo activities, a scan over single channels, and the network with closed gates."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import models
from pipeline.compress.selective import Options, Selective, activity, create, deallocate, ecdm, measured_means
from pipeline.errors import InputError
from pipeline.evaluation import evaluate, reestimate_batchnorm
from pipeline.hooks import Hook, Run
from pipeline.layers import ChannelSelect
from pipeline.overparameterize import collapse, kflo, overparameterize
from pipeline.training import train


def test_activity_has_the_values_of_the_published_form() -> None:
    scale, shift = torch.tensor([1, 0.5, 0.01, 1, 0.02, 0.8]), torch.tensor([0, 0.1, -0.5, 0.2, -0.3, 0])
    wanted = torch.tensor([0.398942, 0.253447, 0, 0.506895, 0, 0.319154])
    torch.testing.assert_close(activity(scale, shift), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(activity(-scale, shift), wanted, rtol=0, atol=1e-6)
    flat = activity(torch.zeros(3), torch.tensor([-1.0, 0.0, 2.0]))
    torch.testing.assert_close(flat, torch.tensor([0.0, 0.0, 2.0]))


def test_activity_is_the_mean_of_a_rectified_normal() -> None:
    draws = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scale, shift in ((1.0, 0.3), (0.7, -0.9), (-2.0, 0.5), (0.1, 1.0)):
        samples = (scale * draws + shift).relu()
        error = 4 * float(samples.std()) / len(draws) ** 0.5
        assert float(activity(torch.tensor(scale), torch.tensor(shift))) == pytest.approx(float(samples.mean()), abs=error)


def test_the_damage_matrix_sums_each_kernel_with_its_sign_activity_and_gate() -> None:
    torch.manual_seed(0)
    weight, mean, gate = torch.randn(4, 5, 3, 2), torch.rand(5), torch.tensor([1.0, 0, 1, 1, 0])
    matrix = ecdm(weight, mean, gate)
    assert matrix.shape == (4, 5)
    for o in range(4):
        for i in range(5):
            wanted = float(mean[i]) * float(gate[i]) * sum(weight[o, i].flatten().tolist())
            assert float(matrix[o, i]) == pytest.approx(wanted, abs=1e-5)


def scan(matrix: Tensor, gamma: float) -> set[int]:
    """The prefix that the authors' loop closes, channel by channel."""
    shares = [[abs(v) / (sum(map(abs, row)) + 1e-8) for v in row] for row in matrix.double().tolist()]
    order = sorted(range(matrix.shape[1]), key=lambda i: max(row[i] for row in shares))
    closed: list[int] = []
    for i in order:
        if max(sum(row[j] for j in [*closed, i]) for row in shares) > gamma:
            return set(closed)
        closed.append(i)
    return set()  # all of it could go: nothing does


@pytest.mark.parametrize("gamma", [0.001, 0.05, 0.3, 0.9])
def test_deallocation_closes_the_longest_prefix_whose_damage_stays_within_gamma(gamma: float) -> None:
    torch.manual_seed(0)
    for trial in range(60):
        outputs, inputs = int(torch.randint(1, 9, ())), int(torch.randint(1, 20, ()))
        matrix = torch.randn(outputs, inputs) * torch.rand(inputs) ** 8
        matrix[:, torch.rand(inputs) < 0.2 * (trial % 3)] = 0
        closed = deallocate(matrix, gamma)
        assert set(closed.nonzero().flatten().tolist()) == scan(matrix, gamma)
        shares = matrix.abs() / matrix.abs().sum(1, keepdim=True).clamp(min=1e-30)
        if closed.any():
            assert shares[:, closed].sum(1).max() <= gamma + 1e-6
            following = shares.amax(0).masked_fill(closed, 2.0).argmin()
            assert shares[:, closed].sum(1).add(shares[:, following]).max() > gamma - 1e-6


def test_a_multiple_keeps_the_most_damaging_channels_up_to_it() -> None:
    torch.manual_seed(0)
    for multiple in (1, 3, 4, 8, 40):
        matrix = torch.randn(5, 26) * torch.rand(26) ** 4
        free, kept = deallocate(matrix, 0.3), deallocate(matrix, 0.3, multiple)
        left = 26 - int(kept.sum())
        assert left == min(26, -(-(26 - int(free.sum())) // multiple) * multiple)
        assert not (kept & ~free).any()
        shares = (matrix.abs() / matrix.abs().sum(1, keepdim=True)).amax(0)
        assert not kept.any() or shares[kept].max() <= shares[~kept].min()


def test_closed_channels_stay_closed_and_without_any_damage_nothing_is_closed() -> None:
    matrix = torch.tensor([[0.0, 5.0, 0.0, 4.0, 0.001], [0.0, 4.0, 0.0, 5.0, 0.0]])
    assert deallocate(matrix, 0.05).tolist() == [True, False, True, False, True]
    assert not deallocate(torch.zeros(3, 4), 0.05).any()
    assert not deallocate(torch.eye(4), 0.5).any()  # each channel is all that one output has


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
    fit = {"epochs": 1, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0}
    fit |= {"schedule": "cosine", "label_smoothing": 0.0, "select": "last", "precision": "fp32"}
    usual = {"method": "selective", "gamma": 0.05, "multiple": 1, "until": 0.5, "mean_batches": 2}
    usual |= {"distill": None, "fit": fit}
    return Options.model_validate(usual | changes)


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
    assert hook.names == ["1"]  # the last reads groups, which must stay of equal width
    with pytest.raises(InputError, match="no ungrouped convolution behind its first"):
        hook.coverage(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)), (3, 16, 16))


def test_measured_means_are_those_of_what_the_layer_reads(make_run: Any) -> None:
    model, run = network().train(), make_run(nn.Identity())
    batches = [batch for batch, _ in zip(run.train.epoch(0), range(3), strict=False)]
    found = measured_means(model, ["pooled"], iter(batches), 2)["pooled"]
    read = model.pool3(model.averaged(model.pool2(rectified(model.eval(), torch.cat([images for images, _ in batches[:2]])))))
    torch.testing.assert_close(found, read.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


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
        means |= measured_means(model, ["pooled"], run.train.epoch(run.epoch), 2)
        wanted = {}
        for name in hook.names:
            layer = model.get_submodule(name)
            wanted[name] = scan(means[name] * layer.gate * layer.weight.detach().sum((2, 3)), 0.3)
        hook.close(run)
        for name in hook.names:
            gate = model.get_submodule(name).gate
            assert set((gate == 0).nonzero().flatten().tolist()) == wanted[name] and wanted[name]
            assert name not in opened or (gate <= opened[name]).all()
            opened[name] = gate.clone()
    assert run.events[-1]["open"] == sum(int(gate.sum()) for gate in opened.values())


def test_a_closed_column_keeps_its_weights_and_gets_no_gradient_from_the_data(make_run: Any) -> None:
    model: Any = network()
    hook, run = Selective(options()), make_run(model)
    hook.coverage(model, run.input_shape)
    hook.prepare(run)
    assert {f"{name}.gate" for name in hook.names} <= set(model.state_dict())  # so that a resumed run has them
    model.averaged.gate[[1, 5]] = 0
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

    def finish(self, run: Run) -> None:
        self.model = copy.deepcopy(run.model)


@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "kflo"])
@pytest.mark.parametrize("norms", [False, True], ids=["bare", "batch norms"])
def test_cutting_the_closed_channels_changes_no_output(make_run: Any, norms: bool, expanded: bool) -> None:
    run, before = make_run(network(expanded, norms), epochs=3, lr=0.02), Before()
    small: Any = train(run, [*([kflo.Hook()] if expanded else []), before, create(options(gamma=0.2))])
    gates = {name: before.model.get_submodule(name).gate for name in ("rectified", "averaged", "pooled")}
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
