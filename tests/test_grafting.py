"""Filter grafting against a slow reference, entry by entry, written from the authors' code."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIT
from networks import randomise
from torch import Tensor, nn

from pipeline.overparameterize import collapse, overparameterize
from pipeline.revive.grafting import Options, entropies, graft, histogram, own_share

PUBLISHED: dict[str, Any] = {"strength": 0.4, "steepness": 500.0, "bins": 10}
GENTLE: dict[str, Any] = {"strength": 0.9, "steepness": 2.0, "bins": 7}
State = dict[str, np.ndarray]


class Net(nn.Module):
    """1x16x16 images, ten classes; convolutions have "conv" in their names, as the authors look for them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(1)
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.conv3 = nn.Conv2d(6, 8, 3, stride=2, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(8, 12)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.bn1(self.conv1(self.bn0(x))).relu())
        x = self.bn3(self.conv3(x)).relu()
        return self.fc(self.hidden(self.dropout(x.mean((2, 3)))).relu())


def network(seed: int = 0, expansion: str = "", dropout: float = 0.0) -> nn.Module:
    """All numbers drawn."""
    torch.manual_seed(seed)
    model = Net(dropout)
    return randomise(overparameterize(model, expansion) if expansion else model, seed)


def options(**changes: Any) -> Options:
    usual = {"method": "grafting", "networks": 2, **PUBLISHED, "learning_rates": "different", "data": "different", "ship": "own"}
    return Options.model_validate({**usual, "fit": FIT, **changes})


def arrays(model: nn.Module) -> State:
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def part(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def assert_same(found: State, expected: State) -> None:
    assert list(found) == list(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def slow_entropy(weights: np.ndarray, bins: int) -> float:
    """One weight after the other, edges in fp32 as torch would have them."""
    low, high = weights.min(), weights.max()
    width = (high - low) / np.float32(bins)
    edges = [(low + np.float32(k) * width, low + np.float32(k + 1) * width) for k in range(bins)]
    counts = [sum(bool(start <= value < end) for value in weights.ravel()) for start, end in edges]
    return float(-sum(n / weights.size * np.log(n / weights.size) for n in counts if n))


def slow_share(own: np.ndarray, other: np.ndarray, strength: float, steepness: float, bins: int) -> float:
    return round(float(strength / np.pi * np.arctan(steepness * (slow_entropy(own, bins) - slow_entropy(other, bins)))) + 0.5, 2)


def reference(states: list[State], **settings: Any) -> list[State]:
    """What each process does to its state dict: w is computed at each entry with "conv" in its name and used until the next.
    (Before the first, where the authors' code has none, it is the first one's.)"""
    grafted = []
    for i, state in enumerate(states):
        other, new = states[i - 1], {}
        w = slow_share(state["conv1.weight"], other["conv1.weight"], **settings)
        for name, value in state.items():
            w = slow_share(value, other[name], **settings) if "conv" in name else w
            new[name] = value if value.dtype == np.int64 else value * np.float32(w) + other[name] * np.float32(1 - w)
        grafted.append(new)
    return grafted


@pytest.mark.parametrize("settings", [PUBLISHED, GENTLE], ids=["published", "gentle"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_network_takes_from_the_one_before_it_as_in_the_authors_code(count: int, settings: dict[str, Any]) -> None:
    networks = [network(seed) for seed in range(count)]
    states = [arrays(net) for net in networks]
    expected = reference(states, **settings)
    done = graft(networks, **settings)
    for i, net in enumerate(networks):
        assert_same(arrays(net), expected[i])
        for name, row in zip(("conv1", "conv2", "conv3"), done[i], strict=True):
            own, other = (state[f"{name}.weight"] for state in (states[i], states[i - 1]))
            norms = [float(np.abs(kernels).sum((1, 2, 3)).mean()) for kernels in (own, expected[i][f"{name}.weight"])]
            assert row["name"] == name and row["weight"] == slow_share(own, other, **settings)
            assert row["entropy"] == pytest.approx(slow_entropy(own, settings["bins"]), abs=1e-12)
            assert [row["mean_norm_before"], row["mean_norm_after"]] == pytest.approx(norms, rel=1e-6)
    shares = {row["weight"] for rows in done for row in rows}
    assert len(shares) >= (2 if settings is PUBLISHED else 3)
    assert count > 2 or all(a["weight"] + b["weight"] == pytest.approx(1) for a, b in zip(*done, strict=True))


def test_entropies_by_hand() -> None:
    """The largest weight lies in no bin, but where rounding puts the last edge above it."""
    steps = torch.arange(11.0)  # one in each of ten bins, one in none
    assert histogram(steps, 10).tolist() == [1] * 10
    model = nn.Sequential(nn.Conv2d(1, 11, 1), nn.Conv2d(11, 1, 2), nn.Conv2d(1, 4, 1))
    model[0].weight.data = steps.reshape(11, 1, 1, 1)
    model[1].weight.data.fill_(0.3)
    model[2].weight.data = torch.tensor([0.0, 1, 0, 0]).reshape(4, 1, 1, 1)
    assert entropies(model, 10) == pytest.approx({"0": 10 / 11 * math.log(11), "1": 0.0, "2": -0.75 * math.log(0.75)})
    assert entropies(model, 2)["0"] == pytest.approx(-2 * 5 / 11 * math.log(5 / 11))
    lifted = 0
    for seed in range(200):
        values = torch.randn(40, generator=torch.Generator().manual_seed(seed))
        last = values.min() + 10 * ((values.max() - values.min()) / 10)
        assert histogram(values, 10).sum() == 39 + int(last > values.max())
        lifted += int(last > values.max())
    assert 0 < lifted < 200


def test_the_share_of_ones_own_weights_by_hand() -> None:
    published: dict[str, float] = {"strength": 0.4, "steepness": 500.0}
    assert own_share(1.3, 1.3, **published) == 0.5
    assert own_share(1.002, 1.0, **published) == 0.6  # arctan(1) = pi / 4
    assert own_share(1.0, 1.002, **published) == 0.4
    assert own_share(1.01, 1.0, **published) == 0.67  # 0.4 / pi * 1.3734 + 0.5 = 0.67486
    assert own_share(9.0, 0.0, **published) == 0.7 and own_share(0.0, 9.0, **published) == 0.3
    assert own_share(9.0, 0.0, strength=0.0, steepness=500.0) == 0.5


@pytest.mark.parametrize("expansion", ["kflo", "do_conv", "expandnet", "acnet", "dbb"])
def test_of_an_expanded_network_effective_kernels_are_compared_and_mixed(expansion: str) -> None:
    networks = [network(seed, expansion).eval() for seed in (0, 1)]
    layers = [name for name, module in Net().named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    effective = lambda net: {  # noqa: E731
        f"{name}.{key}": tensor.detach().numpy().copy()
        for name in layers
        for key in ("weight", "bias")
        if (tensor := getattr(net.get_submodule(name), key)) is not None
    }
    before, states = [effective(net) for net in networks], [arrays(net) for net in networks]
    parameters = [list(net.parameters()) for net in networks]
    done = graft(networks, **PUBLISHED)
    for i, net in enumerate(networks):
        share = {row["name"]: row["weight"] for row in done[i]}
        for name in ("conv1", "conv2", "conv3"):
            assert share[name] == slow_share(before[i][f"{name}.weight"], before[i - 1][f"{name}.weight"], **PUBLISHED)
        for name, value in effective(net).items():
            w = share.get(name.partition(".")[0], share["conv3"])
            np.testing.assert_allclose(value, w * before[i][name] + (1 - w) * before[i - 1][name], rtol=1e-3, atol=1e-4)
        for name, value in arrays(net).items():
            if ".parametrizations." in name and name.endswith(("running_mean", "running_var")):
                w = share[name.partition(".")[0]]
                np.testing.assert_allclose(value, w * states[i][name] + (1 - w) * states[i - 1][name], rtol=1e-5, atol=1e-6)
            elif ".parametrizations." in name and "norm" not in name and not name.endswith(".original"):
                assert np.array_equal(value, states[i][name])
        assert all(new is old for new, old in zip(net.parameters(), parameters[i], strict=True))
        x = torch.randn(2, 1, 16, 16)
        torch.testing.assert_close(collapse(copy.deepcopy(net)).eval()(x), net(x), rtol=1e-3, atol=1e-4)
