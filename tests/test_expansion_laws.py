"""Over every network and every over-parameterisation: it starts as the network was, and merges into it, on real images."""

import copy
from typing import Any

import pytest
import torch
from networks import ZOO, build, plain, shape_of
from torch import Tensor, nn

from pipeline import methods
from pipeline.overparameterize import overparameterize

# A method without an entry fails; the arguments that promise an exact start.
EXACT: dict[str, dict[str, Any]] = {
    "kflo": {"depth": 3, "width": 2},
    "do_conv": {},
    "expandnet": {"ratio": 2, "linear": True, "exact": True},
    "acnet": {"gamma": None},
    "dbb": {"gamma": None},
}


def digits(network: str) -> Tensor:
    """Handwritten digits in the network's size and number of channels, from 0 to 1."""
    from sklearn.datasets import load_digits

    channels, height, width = shape_of(network)
    images = torch.from_numpy(load_digits().images[:24]).float()[:, None] / 16
    return nn.functional.interpolate(images, (height, width), mode="bilinear").expand(-1, channels, -1, -1)


def test_every_method_is_tested() -> None:
    assert set(EXACT) == set(methods.names("overparameterize")) - {"none"}


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("network", ZOO)
def test_a_network_starts_as_it_was_and_merges_after_training(network: str, method: str) -> None:
    torch.manual_seed(0)
    model, images = build(network, expand=False).double(), digits(network).double()
    before, kinds = model(images).detach(), {name: type(module) for name, module in model.named_modules()}
    overparameterize(model, method, **EXACT[method])
    torch.testing.assert_close(model(images), before, rtol=1e-9, atol=1e-9 * float(before.abs().max()))
    rate = 1e-5 if network == "rednet" else 0.01  # drawn involutions multiply: steps of the usual size diverge
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(24) % 10).backward()
        optimizer.step()
    after = model.eval()(images).detach()
    assert float((after - before).abs().max()) > 1e-3 * float(before.abs().max()), "two steps that changed nothing say nothing"
    merged = plain(copy.deepcopy(model))
    assert {name: type(module) for name, module in merged.named_modules()} == kinds
    torch.testing.assert_close(merged(images), after, rtol=1e-9, atol=1e-9 * float(after.abs().max()))
