"""What a diet can do besides halving: reach a target, take kernels naively behind a concatenation, start anew; and its controls."""

from typing import Any

import pytest
import torch
from networks import build, difference, shape_of
from test_diet import SHAPE, UNet, network, options
from torch import nn

from pipeline import models
from pipeline.channels import follow
from pipeline.compress import l1
from pipeline.compress.diet import create, diet
from pipeline.config import Target
from pipeline.costs import Costs
from pipeline.measure import count
from pipeline.overparameterize import collapse, overparameterize
from pipeline.structure import structure
from pipeline.training import train


@pytest.mark.parametrize("of", ["macs", "params", "keep"])
@pytest.mark.parametrize("name", ["resnet", "vgg16", "wide_resnet"])
def test_windows_reach_a_target(name: str, of: Any) -> None:
    shape, model = shape_of(name), build(name, expand=False)
    smaller, facts = diet(model, shape, groups=None, target=Target(of=of, fraction=0.6), multiple=1, score="abs")
    if of == "keep":
        outputs = [sum(widths[1] for widths in structure(net)["filtering"].values()) for net in (smaller, model)]
    else:
        outputs = [count(net, shape)["macs" if of == "macs" else "parameters"] for net in (smaller, model)]
    assert 0.6 * 0.98 <= outputs[0] / outputs[1] <= 0.6 and facts[of] == pytest.approx(outputs[0] / outputs[1], abs=2e-3)


def test_windows_lie_side_by_side_and_are_scored_like_groups() -> None:
    """Of 8, 12 and 16 channels 3, 4 and 6 stay or so: the kernels of window 1 begin where those of window 0 end."""
    full: Any = network("stack")
    found = {}
    for window in (0, 1):
        target = Target(of="keep", fraction=0.5)
        small: Any = diet(full, SHAPE, groups=None, target=target, multiple=1, select=window)[0]
        kept = len(small.features[0].weight)
        found[window] = kept
        whole = full.features[0].weight[window * kept : (window + 1) * kept]
        assert torch.equal(small.features[0].weight, whole)
    assert found[0] == found[1] < 8


def test_naive_slices_take_the_first_segments_kernels() -> None:
    """[skip (8) | up (24)]: group 0 has the kernels of inputs 0..15, not those of 0..3 and 8..19; group 1 of 16..31."""
    full: Any = network("unet")
    assert isinstance(full, UNet)
    for group in (0, 1):
        aware: Any = diet(full, SHAPE, select=group)[0]
        naive: Any = diet(full, SHAPE, select=group, concat="naive")[0]
        rows = slice(group * 6, group * 6 + 6)
        assert torch.equal(naive.join[0].weight, full.join[0].weight[rows, group * 16 : group * 16 + 16])
        halves = [*range(group * 4, group * 4 + 4), *range(8 + group * 12, 20 + group * 12)]
        assert torch.equal(aware.join[0].weight, full.join[0].weight[rows][:, halves])
        assert structure(aware) == structure(naive)
        others = [name for name, tensor in aware.state_dict().items() if not torch.equal(tensor, naive.state_dict()[name])]
        assert others == ["join.0.weight"]
    expanded: Any = network("unet", True)
    merged = diet(collapse(network("unet", True)), SHAPE, select=0, concat="naive")[0]
    assert difference(collapse(diet(expanded, SHAPE, select=0, concat="naive")[0]), merged, SHAPE) < 1e-4


@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "kflo"])
def test_random_weights_have_the_small_networks_spread_and_structure(expanded: bool, make_run: Any) -> None:
    model = network("cifar_quick", expanded)
    run = make_run(models_of(expanded), epochs=0)
    run.blank = lambda: models_of(expanded)
    train(run, [create(options(weights="random"))])
    torch.manual_seed(9)
    small = collapse(run.model)
    fresh: Any = nn.Conv2d(16, 16, 5)
    for name in ("conv2", "conv3"):
        weight = small.get_parameter(f"{name}.weight").detach()
        assert weight.shape[1] == 16 and float(weight.std()) == pytest.approx(float(fresh.weight.detach().std()), rel=0.1)
    again = make_run(models_of(expanded), epochs=0)
    again.blank = lambda: models_of(expanded)
    train(again, [create(options(weights="random"))])
    assert torch.equal(collapse(again.model).get_parameter("conv2.weight"), small.get_parameter("conv2.weight"))
    assert model is not run.model


def models_of(expanded: bool) -> nn.Module:
    model = models.build("cifar_quick", input_shape=(1, 16, 16), classes=10)
    return overparameterize(model, "kflo", depth=2, width=2) if expanded else model


@pytest.mark.parametrize("name", ["cifar_quick", "resnet", "resnet50", "vgg16", "wide_resnet", "densenet"])
def test_l1_at_half_of_each_layer_is_the_matched_size_control(name: str) -> None:
    """The same architecture as the diet's, filters chosen by their norms: what a contiguous group has to beat."""
    shape, model = shape_of(name), build(name, expand=False)
    dieted = diet(model, shape)[0]
    control, _ = l1.prune(model, shape, share=0.5, target=None, multiple=1, scope="layer")
    whole = Costs(model, follow(model, shape)).whole["macs"]
    widths = [structure(net)["norms"] for net in (dieted, control)]
    assert widths[0] == widths[1] and whole > count(control, shape)["macs"] == count(dieted, shape)["macs"]
