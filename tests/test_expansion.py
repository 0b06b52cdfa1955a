"""Laws of every over-parameterisation over layers drawn at random: start, merging, assigning, slicing; and what is refused."""

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from drawn_layers import EXACT, METHODS, branching, build, expand, images, layers, randomise, snapshot, treats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline import methods
from pipeline.errors import InputError
from pipeline.layers import edit
from pipeline.overparameterize import collapse
from pipeline.surgery import keep

START = 2e-6  # of the largest |output|: the same kernel in another memory order; in branches, times a scale
MERGED = 1e-5  # of the largest |output|: a bias goes into a batch norm in fp32
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
every_method = pytest.mark.parametrize("label", METHODS)
some = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def expanded(drawn: dict[str, Any], label: str, dtype: torch.dtype = torch.float32) -> Any:
    """The network of `drawn`, expanded in evaluation mode, every factor of it drawn."""
    return randomise(expand(build(drawn).to(dtype), label), drawn["seed"] + 1).eval()


def share(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and wanted.abs().max() > 1e-3
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_every_method_is_tested() -> None:
    assert {method for method, _ in METHODS.values()} | {"none"} == set(methods.names("overparameterize"))


@pytest.mark.parametrize("label", EXACT)
@some
@given(data=st.data())
@torch.no_grad()
def test_a_trained_layer_starts_as_it_was(label: str, data: st.DataObject) -> None:
    drawn = data.draw(layers(suits=label))
    plain, model = build(drawn), expand(build(drawn), label)
    x = images(drawn, plain[0])
    assert model.training is plain.training and parametrize.is_parametrized(model[0], "weight")
    if not branching(label):  # kernels bit for bit
        assert torch.equal(model[0].weight, plain[0].weight) and share(model(x), plain(x)) < START
        assert (model[0].bias is None) is (plain[0].bias is None)
        assert plain[0].bias is None or torch.equal(model[0].bias, plain[0].bias)
    assert share(model.eval()(x), plain.eval()(x)) < START


@every_method
@some
@given(data=st.data())
@torch.no_grad()
def test_merging_changes_no_output_and_leaves_the_plain_network(label: str, data: st.DataObject) -> None:
    drawn = data.draw(layers(suits=label))
    plain, model = build(drawn).eval(), expanded(drawn, label)
    x = images(drawn, plain[0])
    before, kernel = model(x), model[0].weight.clone()
    assert collapse(model) is model and not parametrize.is_parametrized(model[0])
    assert torch.equal(model[0].weight, kernel) and kernel.dtype == plain[0].weight.dtype
    assert share(model(x), before) < MERGED if branching(label) else torch.equal(model(x), before)
    wanted, found = plain.state_dict(), model.state_dict()
    if branching(label) and drawn["norm"] == "none" and plain[0].bias is None:
        assert torch.equal(found.pop("0.bias"), model[0].bias) and model[0].bias.shape == (len(plain[0].weight),)
    assert [(name, tensor.shape) for name, tensor in found.items()] == [(name, tensor.shape) for name, tensor in wanted.items()]
    assert model[0].weight.is_contiguous()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert [set(vars(module)) for module in model.modules()] == [set(vars(module)) for module in plain.modules()]
    assert all(not hasattr(model[0], walk) for walk in ("fuse", "reparameterize", "switch_to_deploy"))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


@every_method
@some
@given(data=st.data())
def test_what_is_assigned_is_read_back_and_only_its_own_tensor_moves(label: str, data: st.DataObject) -> None:
    layer = expanded(data.draw(layers(suits=label)), label, torch.float64)[0]
    moving = {"weight": "parametrizations.weight.original"}
    if layer.bias is not None:
        usual = "parametrizations.bias.original" if METHODS[label][0] in ("kflo", "expandnet") else "bias"
        moving["bias"] = "parametrizations.weight.0.norms.0.bias" if branching(label) else usual
    for name, owner in moving.items():
        before = {key: (id(tensor), tensor.detach().clone()) for key, tensor in layer.named_parameters()}
        effective = {key: getattr(layer, key).detach().clone() for key in moving}
        wanted = effective[name] + torch.randn_like(effective[name])
        edit(layer, name, lambda old, wanted=wanted: wanted)
        torch.testing.assert_close(getattr(layer, name).detach(), wanted, atol=1e-7, rtol=1e-7)
        for key, tensor in layer.named_parameters():
            assert id(tensor) == before[key][0] and torch.equal(tensor, before[key][1]) is (key != owner), key
        for other in {"weight"} & {*moving} - {name}:
            assert torch.equal(getattr(layer, other), effective[other])


@every_method
@some
@given(data=st.data())
def test_an_untreated_layer_is_refused_and_left_as_it_was(label: str, data: st.DataObject) -> None:
    model = build(data.draw(layers()))
    before = snapshot(model)
    if treats(label, model[0]):
        assert parametrize.is_parametrized(expand(model, label)[0], "weight")
    else:
        with pytest.raises(InputError, match=f"{METHODS[label][0]}: among the chosen layers there is none that it treats"):
            expand(model, label)
        assert snapshot(model) == before


@every_method
@some
@given(data=st.data())
@torch.no_grad()
def test_a_slice_is_the_slice_of_the_merged_layer(label: str, data: st.DataObject) -> None:
    drawn = data.draw(layers(suits=label, planar=True))
    layer = expanded(drawn, label, torch.float64)[0]
    x, weight = images(drawn, layer), layer.weight.clone()
    bias = None if layer.bias is None else layer.bias.clone()
    groups, generator = getattr(layer, "groups", 1), np.random.default_rng(drawn["seed"])
    subset = lambda count: np.sort(generator.permutation(count)[: generator.integers(1, count + 1)])  # noqa: E731
    staying, per_group = subset(groups), len(weight) // groups
    many = int(generator.integers(1, per_group + 1))
    outputs = np.concatenate([group * per_group + np.sort(generator.permutation(per_group)[:many]) for group in staying])
    inputs = subset(weight.shape[1])
    rows, columns = torch.from_numpy(outputs), torch.from_numpy(inputs)
    read = torch.from_numpy(np.concatenate([group * weight.shape[1] + inputs for group in staying]))
    zeroed = torch.zeros_like(x)
    zeroed[:, read] = x[:, read]
    wanted = [copy.deepcopy(layer).train(mode)(zeroed)[:, rows] for mode in (False, True)]
    keep(layer, rows, columns)
    if groups > 1:
        layer.groups, layer.in_channels = len(staying), len(read)
    torch.testing.assert_close(layer.weight, weight[rows][:, columns], atol=1e-12, rtol=0)
    assert bias is None or torch.allclose(layer.bias, bias[rows], atol=1e-12, rtol=0)
    for mode, result in zip((False, True), wanted, strict=True):
        torch.testing.assert_close(copy.deepcopy(layer).train(mode)(x[:, read]), result, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(layer.eval()(x[:, read]), wanted[0], atol=1e-9, rtol=1e-9)


def moments(layer: Any, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    return {
        f"{name} {key}": moment.detach().numpy().copy()
        for name, parameter in layer.named_parameters()
        for key, moment in optimizer.state[parameter].items()
        if key != "step"
    }


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("label", ["kflo 2", "kflo 3", "acnet", "acnet drawn"])
def test_editing_momenta_goes_through_the_layers_linear_map(label: str, rule: str) -> None:
    torch.manual_seed(0)
    layer = randomise(expand(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), label)).double().eval()[0]
    given, x = dict(layer.named_parameters()), torch.randn(3, 4, 7, 7, dtype=torch.float64)
    optimizer: Any = torch.optim.SGD(given.values(), 0.01, 0.9) if rule == "sgd" else torch.optim.Adam(given.values(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    before, values = moments(layer, optimizer), {key: tensor.detach().clone() for key, tensor in given.items()}
    kernel = "momentum_buffer" if rule == "sgd" else "exp_avg"
    names = ["weight", "bias"] if METHODS[label][0] == "kflo" else ["weight"]
    for name in names:
        edit(layer, name, lambda moment: torch.cat([torch.zeros_like(moment[:2]), moment[2:]]), optimizer)
    after = moments(layer, optimizer)
    if METHODS[label][0] == "kflo":
        mixers = [mixer.detach().numpy() for mixer in layer.parametrizations.weight[0].mixers]
        matrix = functools.reduce(lambda product, mixer: mixer @ product, mixers)
    for key in before:
        moved = key in {f"parametrizations.{name}.original {kernel}" for name in names}
        assert np.array_equal(before[key], after[key]) is not moved, key
    for name in names:
        old, new = (found[f"parametrizations.{name}.original {kernel}"] for found in (before, after))
        old, new = old.reshape(len(old), -1), new.reshape(len(new), -1)
        if METHODS[label][0] == "kflo":
            wanted = matrix @ old
            wanted[:2] = 0
            expected = old + np.linalg.lstsq(matrix, wanted - matrix @ old, rcond=None)[0]
        else:  # a scale for each row: rows to 0 are rows to 0
            expected = np.where(np.arange(6)[:, None] < 2, 0, old)
        np.testing.assert_allclose(new, expected, atol=1e-12)
    assert all(torch.equal(tensor, values[key]) for key, tensor in layer.named_parameters())
