"""KFLO against hand formulas, the cascade of convolutions that it stands for, and the published numbers of parameters."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import hooks, models
from pipeline.errors import InputError
from pipeline.layers import filtering_layers
from pipeline.overparameterize import collapse, kflo, none, overparameterize
from pipeline.training import train

LAYERS: dict[str, Any] = {
    "conv": lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1),
    "grouped": lambda: nn.Conv2d(6, 9, (3, 1), groups=3),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False),
    "pointwise": lambda: nn.Conv2d(6, 4, 1, bias=False),
    "linear": lambda: nn.Linear(6, 4),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def expanded(kind: str, depth: int = 2, width: float = 4, mixed: bool = True) -> Any:
    """One layer, over-parameterised; with mixers that are no identities unless `mixed` is false."""
    torch.manual_seed(3)
    layer = LAYERS[kind]()
    kflo.expand_layer(layer, depth=depth, width=width)
    for mixer in mixers(layer) if mixed else []:
        nn.init.normal_(mixer, 0, 0.3)
    return layer


def mixers(layer: Any) -> list[Tensor]:
    return list(layer.parametrizations.weight[0].mixers)


def mixing(layer: Any) -> np.ndarray:
    """W_B ... W_2, by numpy."""
    product = mixers(layer)[0].detach().numpy().astype(np.float64)
    for mixer in mixers(layer)[1:]:
        product = mixer.detach().numpy().astype(np.float64) @ product
    return product


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("depth", [2, 3, 4])
@every_layer
def test_the_kernel_at_the_start_is_the_old_one_bit_for_bit(kind: str, depth: int) -> None:
    torch.manual_seed(3)
    plain = LAYERS[kind]()
    layer = expanded(kind, depth, mixed=False)
    assert torch.equal(layer.weight, plain.weight)
    assert plain.bias is None or torch.equal(layer.bias, plain.bias)
    assert [tuple(mixer.shape) for mixer in mixers(layer)] == [(4 * len(plain.weight),) * 2] * (depth - 2) + [
        (len(plain.weight), 4 * len(plain.weight))
    ]
    bound = plain.weight[0].numel() ** -0.5
    for name in ("weight", "bias") if plain.bias is not None else ("weight",):
        added = layer.parametrizations[name].original[len(plain.weight) :]
        assert added.abs().max() <= bound and (added.numel() < 30 or added.abs().max() > 0.8 * bound)
        assert added.flatten().unique().numel() > 0.9 * added.numel()


@pytest.mark.parametrize("depth", [2, 3])
@every_layer
def test_the_effective_kernel_is_a_linear_combination_of_all_filters(kind: str, depth: int) -> None:
    layer = expanded(kind, depth)
    matrix, filters = mixing(layer), layer.parametrizations.weight.original.detach().numpy()
    for output, kernel in enumerate(layer.weight.detach().numpy()):
        combined = sum(matrix[output, j] * filters[j] for j in range(len(filters)))
        np.testing.assert_allclose(kernel, combined, atol=1e-5)
    if layer.bias is not None:
        biases = layer.parametrizations.bias.original.detach().numpy()
        np.testing.assert_allclose(layer.bias.detach().numpy(), matrix @ biases, atol=1e-5)


@pytest.mark.parametrize("depth", [2, 3])
def test_an_ungrouped_convolution_equals_its_cascade_of_pointwise_convolutions(depth: int) -> None:
    layer, x = expanded("conv", depth), torch.randn(2, 6, 9, 9)
    y = F.conv2d(x, layer.parametrizations.weight.original, layer.parametrizations.bias.original, stride=2, padding=1)
    for mixer in mixers(layer):
        y = F.conv2d(y, mixer[:, :, None, None])
    torch.testing.assert_close(layer(x), y, atol=1e-4, rtol=1e-4)


def test_width_counts_filters_by_pythons_round() -> None:
    layer = nn.Linear(3, 5)
    kflo.expand_layer(layer, depth=2, width=2.5)  # 12.5, to even
    assert mixers(layer)[0].shape == (5, 12)
    layer = nn.Linear(3, 5)
    kflo.expand_layer(layer, depth=2, width=2.3)  # 11.5, to even
    assert mixers(layer)[0].shape == (5, 12)


@pytest.mark.parametrize(("name", "arguments"), [("cifar_quick", {}), ("mininet", {"dropout": 0.5}), ("resnet", {"depth": 8})])
def test_collapsing_changes_no_output_and_leaves_a_plain_network(name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = models.build(name, input_shape=(3, 64, 64), classes=10, **arguments)
    model = overparameterize(models.build(name, input_shape=(3, 64, 64), classes=10, **arguments), depth=3, width=2).eval()
    assert all(hasattr(layer, "parametrizations") for _, layer in filtering_layers(model))
    for _, layer in filtering_layers(model):
        for mixer in mixers(layer):
            mixer.data += 0.02 * torch.randn_like(mixer)
    x = torch.randn(4, 3, 64, 64)
    before = model(x)
    assert collapse(model) is model
    assert torch.equal(model(x), before)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_penalty_has_the_gradient_of_the_l2_norm_of_composed_kernels(make_run: Any) -> None:
    model = nn.Sequential(expanded("conv", depth=2), nn.BatchNorm2d(5))
    run = make_run(model, weight_decay=0.01)
    nothing = torch.empty(0)
    for factor in (1.0, 0.5):
        model.zero_grad()
        penalty = kflo.Hook(l2_factor=factor).penalty(run, nothing, nothing, nothing)
        assert penalty is not None
        penalty.backward()
        layer = model[0]
        at_kernel = 2 * factor * 0.01 * layer.weight.detach().flatten(1)  # factor 0.5: SGD's weight decay
        filters, mixer = layer.parametrizations.weight.original, mixers(layer)[0]
        torch.testing.assert_close(penalty.detach(), factor * 0.01 * (layer.weight**2).sum())
        torch.testing.assert_close(filters.grad.flatten(1), mixer.detach().T @ at_kernel)
        torch.testing.assert_close(mixer.grad, at_kernel @ filters.detach().flatten(1).T)
        assert model[1].weight.grad is None and layer.parametrizations.bias.original.grad is None
    assert kflo.Hook(l2_factor=0.0).penalty(run, nothing, nothing, nothing) is None
    assert none.Hook().penalty(run, nothing, nothing, nothing) is None


def test_the_optimiser_decays_filters_by_0_mixers_by_their_own_and_the_rest_as_ever(make_run: Any) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    run = make_run(overparameterize(model, width=2), weight_decay=0.01)
    train(run, [kflo.Hook(mixer_decay=1e-9)])
    assert run.optimizer is not None
    decay = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {group["lr_scale"] for group in run.optimizer.param_groups} == {1.0}
    expected = {}
    for name, parameter in model.named_parameters():
        value = 0.01 if name.startswith("1.") else 0.0 if name.endswith("original") else 1e-9
        expected[id(parameter)] = value
    assert decay == expected and sorted(set(decay.values())) == [0.0, 1e-9, 0.01]
    # One epoch moves the filters beyond the layer's own into play.
    assert (mixers(model[0])[0][:, 4:] != 0).all()


@pytest.mark.parametrize("depth", [2, 3])
@every_layer
def test_assigning_a_kernel_is_exact_and_moves_the_filters_least(kind: str, depth: int) -> None:
    layer = expanded(kind, depth)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in layer.named_parameters()}
    filters = before["parametrizations.weight.original"][1].flatten(1).numpy().astype(np.float64)
    wanted = torch.randn_like(layer.weight)
    with torch.no_grad():
        layer.weight = wanted
    torch.testing.assert_close(layer.weight, wanted, atol=1e-5, rtol=1e-4)
    matrix, moved = mixing(layer), layer.parametrizations.weight.original.detach().flatten(1).numpy() - filters
    least = np.linalg.lstsq(matrix, wanted.flatten(1).numpy() - matrix @ filters, rcond=None)[0]
    np.testing.assert_allclose(moved, least, atol=1e-4)
    for name, parameter in layer.named_parameters():
        assert parameter is before[name][0]
        assert name == "parametrizations.weight.original" or torch.equal(parameter, before[name][1])


def test_assigning_where_the_mixers_lost_rank_is_least_squares() -> None:
    layer = expanded("conv")
    mixers(layer)[0].data[3] = mixers(layer)[0].data[4]  # outputs 3 and 4 cannot differ any more
    wanted = torch.randn_like(layer.weight)
    with torch.no_grad():
        layer.weight = wanted
    nearest = wanted.clone()
    nearest[3] = nearest[4] = (wanted[3] + wanted[4]) / 2
    torch.testing.assert_close(layer.weight.detach(), nearest, atol=1e-5, rtol=1e-4)


def test_filters_of_several_networks_under_identity_mixers_start_as_the_first_network() -> None:
    torch.manual_seed(1)
    networks = [LAYERS["conv"]() for _ in range(4)]
    x, wanted = torch.randn(2, 6, 9, 9), networks[0].weight.detach().clone()
    first = networks[0](x)
    kflo.expand_layer(networks[0], depth=2, width=4)
    for name in ("weight", "bias"):
        original = networks[0].parametrizations[name].original
        original.data[5:] = torch.cat([getattr(network, name).detach() for network in networks[1:]])
    assert torch.equal(networks[0].weight, wanted) and torch.equal(networks[0](x), first)


def test_a_slice_of_the_layer_is_exactly_the_slice_of_its_kernel() -> None:
    layer = expanded("conv", depth=3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    outputs, inputs = torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5])
    for name in ("weight", "bias"):
        layer.parametrizations[name][0].keep(outputs, inputs)
    torch.testing.assert_close(layer.weight, weight[outputs][:, inputs], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer.bias, bias[outputs], atol=1e-6, rtol=1e-5)


def test_kernels_are_composed_in_fp32_under_autocast() -> None:
    layer = expanded("conv")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.weight.dtype == layer.bias.dtype == torch.float32
        inside = layer.weight.detach().clone()
    assert torch.equal(inside, layer.weight)


def vgg16_of_acnet() -> nn.Sequential:
    """13 convolutions without biases, batch norms, two linear layers: 14,986,698 parameters."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 512), nn.Linear(512, 10))


@pytest.mark.parametrize(("depth", "width", "published"), [(2, 1, 17.06e6), (2, 2, 34.11e6), (2, 4, 68.21e6), (3, 2, 42.40e6)])
def test_vgg16_trains_as_many_parameters_as_published(depth: int, width: float, published: float) -> None:
    with torch.device("meta"):
        model = vgg16_of_acnet()
        assert parameters(model) == 14_986_698
    overparameterize(model, depth=depth, width=width)
    assert parameters(model) == pytest.approx(published, abs=5e3)
    assert parameters(collapse(model)) == 14_986_698


def test_cifar_quick_trains_as_many_parameters_as_published() -> None:
    model = models.build("cifar_quick", input_shape=(3, 32, 32), classes=10)
    by_hand = 2 * (32 + 32 + 64)  # batch norms
    for _, layer in filtering_layers(model):
        outputs, inputs = len(layer.weight), layer.weight[0].numel() + (layer.bias is not None)
        by_hand += 4 * outputs * inputs + 4 * outputs * outputs
    assert parameters(overparameterize(model, depth=2, width=4)) == by_hand == pytest.approx(0.509e6, abs=500)


def test_impossible_expansions_are_refused_and_change_nothing() -> None:
    for arguments in ({"depth": 1}, {"width": 0.5}):
        with pytest.raises(InputError, match="depth must be at least 2 and width at least 1"):
            overparameterize(nn.Sequential(nn.Linear(2, 2)), **arguments)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    kflo.expand_layer(model[1], depth=2, width=2)
    with pytest.raises(InputError, match="layer 1 is over-parameterised already"):
        overparameterize(model)
    assert not hasattr(model[0], "parametrizations")
    assert isinstance(none.Hook(), hooks.Hook)
