"""Reviving where something else has a say: branches with batch norms of their own, shared weights, dead kernels, averages, Adam."""

from typing import Any

import pytest
import torch
from conftest import FIT
from networks import randomise
from test_reactivation import TREATED, network
from test_restart import network as restarted
from test_restart import options
from torch import Tensor, nn

from pipeline.averaging import Averaging
from pipeline.channels import follow
from pipeline.errors import InputError
from pipeline.hooks import Run
from pipeline.layers import convolutions
from pipeline.overparameterize import overparameterize
from pipeline.revive.reactivation import reactivate
from pipeline.revive.restart import Restart, reset_filters
from pipeline.training import train


class Two(nn.Module):
    """1x8x8 images; each convolution has its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


@pytest.mark.parametrize("norms", ["replace", "add"])
@pytest.mark.parametrize("method", ["acnet", "dbb"])
def test_a_filter_of_branches_that_was_drawn_anew_stays_what_was_drawn_when_statistics_are_taken(method: str, norms: str) -> None:
    torch.manual_seed(0)
    model = randomise(overparameterize(Two(), method, norms=norms, gamma=1.0))
    filters = [1, 4, 6]
    others = [0, 2, 3, 5, 7]
    before = model.get_submodule("conv2").weight.detach().clone()  # type: ignore[operator]
    draws = torch.Generator().manual_seed(1)
    reset_filters(
        model, {"conv2": filters}, follow(model, (1, 8, 8)), reset="uniform", scope="filter", batchnorm="reset", generator=draws
    )
    drawn: Tensor = model.get_submodule("conv2").weight.detach().clone()  # type: ignore[assignment,operator]
    expected = torch.empty(3, 8, 3, 3).uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn[filters], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(drawn[others], before[others], rtol=0, atol=0)
    with torch.no_grad():
        for _ in range(100):
            model.train()(torch.randn(32, 1, 8, 8))
    model.eval()
    after: Tensor = model.get_submodule("conv2").weight.detach()  # type: ignore[assignment]
    likeness = torch.cosine_similarity(after[filters].flatten(1), expected.flatten(1))
    assert (likeness > 1 - 1e-5).all(), likeness


def test_of_layers_that_share_a_weight_one_is_edited() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3))
    model[1].weight = model[0].weight
    old = model[0].weight.detach().clone()
    done = reactivate(model, alpha=1.0, beta=1.0, gamma=0.5)
    norms, best = model[0].weight.detach().abs().sum((2, 3)), old.abs().sum((2, 3)).amax(1, keepdim=True)
    changed = (model[0].weight != old).any(3).any(2)
    assert [row["name"] for row in done["layers"]] == ["0"] and int(changed.sum()) == done["kernels"] == 6 * 3
    torch.testing.assert_close(norms[changed], best.expand(6, 6)[changed], rtol=1e-5, atol=0)
    assert [name for name, _ in convolutions(model)] == ["0"]


@pytest.mark.parametrize("dead", [0, 2, 4])
def test_the_random_control_edits_as_many_kernels_where_some_are_dead(dead: int) -> None:
    found = []
    for random in (None, torch.Generator().manual_seed(0)):
        model = network()
        with torch.no_grad():
            model.last.weight[:dead] = 0
            model.last.weight[dead + 1, :2] = 0
        rows = reactivate(model, alpha=1.0, beta=0.8, gamma=0.4, random=random)["layers"]
        found.append([(row["name"], row["filters"], row["kernels"]) for row in rows])
        assert all(layer.weight.isfinite().all() for _, layer in convolutions(model))
    assert found[0] == found[1] and {name for name, *_ in found[0]} == set(TREATED)


def test_an_average_begins_anew_with_each_round_of_restarts(make_run: Any) -> None:
    class Watch(Averaging):
        weights: list[Tensor] = []

        def after_step(self, run: Run) -> None:
            super().after_step(run)
            if run.round == 2:
                self.weights.append(run.model.get_parameter("conv1.weight").detach().clone())

    run, watch = make_run(restarted(), epochs=1, lr=0.05), Watch(0.5)
    train(run, [watch, Restart(options(restarts=2, stop_on_repeat=False))])
    mean = watch.weights[0]
    for weight in watch.weights[1:]:
        mean = 0.5 * mean + 0.5 * weight
    torch.testing.assert_close(run.model.get_parameter("conv1.weight").detach(), mean, rtol=1e-5, atol=1e-6)


def test_an_average_is_kept_where_a_restart_ends_the_training(make_run: Any) -> None:
    run, average = make_run(restarted(), epochs=1, lr=0.05), Averaging(0.999)
    last: list[Tensor] = []
    restart = Restart(options(restarts=3, target=1e-6))  # reached after the first round
    average_step = average.after_step
    average.after_step = lambda run: (average_step(run), last.append(run.model.get_parameter("conv1.weight").detach().clone()))[0]  # type: ignore[method-assign]
    train(run, [average, restart])
    assert run.events[-1]["kind"] == "stop" and not torch.equal(run.model.get_parameter("conv1.weight"), last[-1])


def test_a_network_that_is_not_trained_is_not_restarted(make_run: Any) -> None:
    run = make_run(restarted())
    run.fresh = lambda number: restarted()
    with pytest.raises(InputError, match="set train_first to true"):
        train(run, [Restart(options())])
    assert FIT["epochs"] and train(run, [Restart(options(train_first=True, restarts=1))])


def test_adams_second_moment_of_a_scaled_kernel_is_scaled_by_the_square() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    state = optimizer.state[model.last.weight]
    first, second, old = state["exp_avg"].clone(), state["exp_avg_sq"].clone(), model.last.weight.detach().clone()
    reactivate(model, alpha=1.0, beta=1.0, gamma=0.5, momentum="scale", optimizer=optimizer)
    ratio = (model.last.weight.detach() / old).mean((2, 3), keepdim=True)
    assert ratio.max() > 1.1
    torch.testing.assert_close(state["exp_avg"], first * ratio, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(state["exp_avg_sq"], second * ratio**2, rtol=1e-4, atol=1e-12)
