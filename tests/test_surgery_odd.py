"""Networks that look like what surgery understands and are not: each is cut rightly, kept or refused, never wrong in silence."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import difference, draw_reads, masked, randomise
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pipeline.channels import follow
from pipeline.costs import Costs
from pipeline.errors import InputError
from pipeline.layers import ChannelSelect, insert
from pipeline.measure import count
from pipeline.surgery import shrink

SHAPE = (3, 8, 8)
CLOSE = 1e-5


class Around(nn.Module):
    """Convolutions around something odd, (B, 8, 8, 8) -> (B, 8, 8, 8)."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last, self.head = nn.Conv2d(3, 8, 3, padding=1), middle, nn.Conv2d(8, 8, 3), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.middle(self.first(x).relu()).relu()).mean((2, 3)))


class Only(nn.Module):
    """A block whose one child is called `layer`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.layer(x))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Pixels(nn.Module):
    """A linear layer over pixels, for which the channels count as images."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.view(x.shape[0] * x.shape[1], -1)).view(x.shape)


class Rows(nn.Module):
    """A pooling that takes channels and columns for an image."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.conv = nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.pool(x[:, :, 0])[:, :, None]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x).relu())


class Asking(nn.Module):
    """Reads a width and a kernel size while it runs."""

    def __init__(self, width: bool) -> None:
        super().__init__()
        self.conv, self.width = nn.Conv2d(8, 8, 3), width

    def forward(self, x: Tensor) -> Tensor:
        pad = self.conv.kernel_size[0] // 2
        y = self.conv(F.pad(x, (pad, pad, pad, pad)))
        return y * self.conv.in_channels if self.width else y


ODD: dict[str, Any] = {
    "a child called layer": Only,
    "weight standardisation": lambda: Standardised(8, 8, 3, padding=1),
    "pixels as features": Pixels,
    "pooling over channels": Rows,
    "one weight in two layers": Tied,
    "weight norm": lambda: weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "a kernel size asked for": lambda: Asking(False),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_networks_are_never_cut_wrongly(name: str) -> None:
    torch.manual_seed(0)
    model = Around(ODD[name]()).eval()
    for seed in range(4):
        reads = draw_reads(model, SHAPE, seed)
        smaller = shrink(model, SHAPE, reads)
        assert difference(masked(model, reads), smaller, SHAPE) < CLOSE


def test_a_network_that_uses_its_widths_as_numbers_is_refused() -> None:
    torch.manual_seed(0)
    model = Around(Asking(True)).eval()
    with pytest.raises(InputError, match="a cut Around differs by .* depends on widths"):
        shrink(model, SHAPE, {"middle.conv": torch.arange(8) < 4})


def test_layers_that_are_not_called_are_named() -> None:
    model = Around(nn.Conv2d(8, 8, 1))
    model.extra = nn.Linear(8, 2)
    assert follow(model, SHAPE).uncalled == ["extra is not called in evaluation: what it reads is not known"]


@pytest.mark.parametrize("dim", [{"dim": 1}, {"dim": -3}, {"axis": 1}])
def test_arguments_by_name_and_from_the_end_are_understood(dim: dict[str, int]) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.out = nn.Conv2d(8, 4, 1), nn.Conv2d(12, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat(tensors=(self.left(x), x), **dim))

    model = randomise(Around(Joined())).eval()
    assert not follow(model, SHAPE).untreated
    reads = draw_reads(model, SHAPE, 1)
    assert difference(masked(model, reads), shrink(model, SHAPE, reads), SHAPE) < CLOSE


def test_an_optimiser_goes_through_a_cut_beside_a_shuffle() -> None:
    model = randomise(Around(nn.Conv2d(8, 8, 1)))
    insert(model, "middle", "shuffle", ChannelSelect(torch.arange(8).flip(0)))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, *SHAPE)).sum().backward()
    optimizer.step()
    smaller = shrink(model, SHAPE, {"middle.layer": torch.arange(8) < 5}, optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in smaller.parameters()}


def test_multiply_adds_of_layers_that_are_not_understood_are_counted() -> None:
    torch.manual_seed(0)
    model = Around(Pixels())
    channels = follow(model, SHAPE)
    assert Costs(model, channels).whole["macs"] == count(model, SHAPE)["macs"]
