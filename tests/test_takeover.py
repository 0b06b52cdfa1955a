"""Channels that take over from others: against least squares by lstsq, losses counted on data, and a brute-force search."""

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import takeover
from pipeline.overparameterize import overparameterize
from pipeline.takeover import Moments, moments, rank, take_over, taken


def drawn(outputs: int = 5, inputs: int = 6, kernel: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Kernels, and correlated data (samples, inputs) with means."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=draw, dtype=torch.float64) * torch.linspace(0.2, 1.5, inputs).double()
    data = torch.randn(4000, inputs, generator=draw, dtype=torch.float64) @ mixing + torch.arange(inputs)
    return torch.randn(outputs, inputs, kernel, kernel, generator=draw, dtype=torch.float64), data


def known(data: Tensor) -> Moments:
    return Moments(data.mean(0), torch.cov(data.T, correction=0))


@pytest.fixture(autouse=True)
def no_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeover, "RIDGE", 1e-12)


def test_what_is_taken_over_is_the_least_squares_solution() -> None:
    weight, data = drawn()
    closed = torch.tensor([False, True, False, False, True, False])
    kernels, missing = taken(weight, known(data), closed)
    wanted = data @ weight[..., 0, 0].T
    staying = torch.cat([data[:, ~closed], torch.ones(len(data), 1)], 1)
    best = torch.linalg.lstsq(staying, wanted).solution
    assert torch.allclose(kernels[:, ~closed, 0, 0], best[:-1].T, atol=1e-6) and torch.allclose(missing, best[-1], atol=1e-6)
    assert torch.equal(kernels[:, closed], weight[:, closed])


def residual(weight: Tensor, data: Tensor, closed: Tensor) -> float:
    """The share of the outputs' variance that no linear function of open channels explains."""
    wanted = (data - data.mean(0)) @ weight[..., 0, 0].T
    staying = torch.cat([data[:, ~closed], torch.ones(len(data), 1)], 1)
    rest = wanted - staying @ torch.linalg.lstsq(staying, wanted).solution
    return float(rest.square().sum() / wanted.square().sum())


@pytest.mark.parametrize("seed", range(4))
def test_the_ranking_is_greedy_and_its_losses_are_those_of_the_data(seed: int) -> None:
    weight, data = drawn(seed=seed)
    order, lost = rank(weight, known(data).covariance)
    closed = torch.zeros(6, dtype=torch.bool)
    for channel, share in zip(order.tolist()[:-1], lost.tolist(), strict=False):
        options = {}
        for other in (~closed).nonzero().flatten().tolist():
            options[other] = residual(weight, data, closed.index_fill(0, torch.tensor([other]), True))
        assert options[channel] == pytest.approx(min(options.values()), rel=1e-6)
        closed[channel] = True
        assert share == pytest.approx(options[channel], rel=1e-5)
    assert lost[-1] == pytest.approx(1.0, rel=1e-5)  # all that varies
    best = min(residual(weight, data, closed.zero_().index_fill(0, torch.tensor(pair), True)) for pair in permutations(range(6), 2))
    assert best <= lost[1] + 1e-9


def test_kernels_of_several_taps_count_every_tap() -> None:
    """Taps read the same channels at other pixels: for data without correlation from pixel to pixel the losses add up."""
    weight, data = drawn(kernel=3)
    flat = weight.permute(2, 3, 0, 1).reshape(45, 6, 1, 1)  # every tap as further outputs
    assert torch.equal(rank(weight, known(data).covariance).order, rank(flat, known(data).covariance).order)
    closed = torch.arange(6) < 2
    one, other = taken(weight, known(data), closed)[0], taken(flat, known(data), closed)[0]
    assert torch.allclose(one.permute(2, 3, 0, 1).reshape(45, 6, 1, 1), other)


def test_closed_channels_come_first_and_cost_nothing_more() -> None:
    weight, data = drawn()
    closed = torch.tensor([False, False, False, True, False, True])
    order, lost = rank(weight, known(data).covariance, closed)
    rest = [0, 1, 2, 4]
    inner = rank(weight[:, rest], known(data[:, rest]).covariance)
    assert order.tolist() == [3, 5, *(rest[i] for i in inner.order.tolist())]
    assert lost[:2].tolist() == [0, 0] and torch.allclose(lost[2:], inner.lost)


def test_wide_layers_go_several_channels_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, data = drawn(inputs=12, outputs=9)
    monkeypatch.setattr(takeover, "FINEST", 4)
    order, lost = rank(weight, known(data).covariance)
    assert sorted(order.tolist()) == list(range(12))
    for end in (3, 6, 9):
        closed = torch.zeros(12, dtype=torch.bool).index_fill(0, order[:end], True)
        assert lost[end - 1] == pytest.approx(residual(weight, data, closed), rel=1e-4)


@pytest.mark.parametrize("expand", [False, True], ids=["plain", "kflo"])
def test_moments_of_a_network_and_a_layer_in_place(expand: bool) -> None:
    """Of data without borders (1x1 kernels) the outputs keep their mean exactly, and lose what the ranking says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1, bias=False))
    if expand:
        overparameterize(model, "kflo", width=2)
    batches = [(torch.randn(16, 3, 6, 6) + 1, None) for _ in range(3)]
    found = moments(model, ["2"], batches, 2)["2"]
    x = torch.cat([images for images, _ in batches[:2]])
    with torch.no_grad():
        read = model[1](model[0](x)).transpose(0, 1).flatten(1).double()
        whole = model(x).transpose(0, 1).flatten(1).double()
        assert torch.allclose(found.mean, read.mean(1), atol=1e-6)
        assert torch.allclose(found.covariance, torch.cov(read, correction=0), atol=1e-5)
        layer: Any = model[2]
        order, lost = rank(layer.weight, found.covariance)
        closed = torch.zeros(8, dtype=torch.bool).index_fill(0, order[:3], True)
        missing = take_over(layer, found, closed)
        kernels = layer.weight[..., 0, 0].double() * ~closed
        rest = whole - kernels @ read - missing[:, None]
    assert rest.mean(1).abs().max() < 1e-5
    assert rest.square().sum() / (whole - whole.mean(1, keepdim=True)).square().sum() == pytest.approx(float(lost[2]), rel=1e-2)
