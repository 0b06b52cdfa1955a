"""Reviving on CUDA edits what it edits on the CPU."""

import copy

import pytest
import torch
from networks import build
from torch import nn

from pipeline.channels import follow
from pipeline.filters import strength
from pipeline.layers import convolutions, filtering_layers
from pipeline.revive.grafting import graft
from pipeline.revive.reactivation import reactivate
from pipeline.revive.restart import least_useful, reset_filters, taylor_scores
from pipeline.revive.weight_evolution import evolve

SHAPE = (3, 16, 16)


def restart(model: nn.Module) -> None:
    device = next(model.parameters()).device
    images = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    channels = follow(model, SHAPE)
    maps = {name: channels.norm_after.get(name, name) for name, _ in convolutions(model)}
    scores = taylor_scores(model, maps, [(images, torch.arange(8, device=device))], criterion="per_example")
    chosen = least_useful({name: values.cpu().round(decimals=3) for name, values in scores.items()}, 3)
    draws = torch.Generator().manual_seed(1)
    reset_filters(model, chosen, channels, reset="uniform", scope="filter", batchnorm="reset", generator=draws)


def graft_with_another(model: nn.Module) -> None:
    other = build("cifar_quick", seed=1).to(next(model.parameters()).device)
    graft([other, model], strength=0.4, steepness=500.0, bins=10)


ACTS = {
    "reactivation": lambda model: reactivate(model, alpha=0.6, beta=0.6, gamma=0.3),
    "random": lambda model: reactivate(model, alpha=0.6, beta=0.6, gamma=0.3, random=torch.Generator().manual_seed(0)),
    "weight evolution": lambda model: evolve(model, rule="code", share=0.5, norm_share=0.5, local=0.9, force=2),
    "restart": restart,
    "grafting": graft_with_another,
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("act", ACTS)
def test_cuda_edits_what_the_cpu_edits(act: str) -> None:
    model = build("cifar_quick")
    here, there = copy.deepcopy(model), copy.deepcopy(model).to("cuda")
    ACTS[act](here)
    ACTS[act](there)
    layers = dict(filtering_layers(there))
    for name, layer in filtering_layers(here):
        torch.testing.assert_close(layers[name].weight.detach().cpu(), layer.weight.detach(), rtol=1e-3, atol=1e-4)
    found = strength(there)
    assert found == pytest.approx(strength(here), rel=1e-3) and set(found) == set(strength(model))
