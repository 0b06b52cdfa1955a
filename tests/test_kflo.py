"""KFLO against hand formulas and the published numbers of parameters; what holds for every method is in test_expansion.py."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline import hooks, models
from pipeline.errors import InputError
from pipeline.layers import filtering_layers
from pipeline.overparameterize import collapse, kflo, overparameterize
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
    for name in ("weight", "bias") if plain.bias is not None else ("weight",):
        own, added = getattr(plain, name), layer.parametrizations[name].original[len(plain.weight) :]
        bound = (3 * own.square().mean()) ** 0.5  # a uniform distribution of the same standard deviation
        assert added.abs().max() <= bound and (added.numel() < 30 or added.abs().max() > 0.8 * bound)
        assert added.flatten().unique().numel() > 0.9 * added.numel()


def test_the_further_filters_are_like_the_layers_own_whatever_drew_those() -> None:
    torch.manual_seed(0)
    default, he = (
        nn.Conv2d(32, 64, 5),
        models.build("wide_resnet", input_shape=(3, 32, 32), classes=10, depth=10, width=4, dropout=0.0),
    )
    for layer in (default, he.get_submodule("layer2.0.conv1")):
        own: Any = layer
        std = own.weight.std()
        kflo.expand_layer(own, depth=2, width=4)
        added = own.parametrizations.weight.original.detach()[own.out_channels :]
        assert added.std().item() == pytest.approx(std.item(), rel=0.02) and added.mean().abs() < 0.02 * std
    fan_in = 32 * 5 * 5  # torch's default: U(-1 / sqrt(fan_in), 1 / sqrt(fan_in))
    extreme = default.parametrizations.weight.original.detach()[64:].abs().max().item()  # type: ignore[union-attr]
    assert extreme == pytest.approx(fan_in**-0.5, rel=0.02)


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


def test_the_penalty_is_the_plain_formula_over_every_kind_of_layer() -> None:
    torch.manual_seed(0)
    kinds = [nn.Conv1d(4, 6, 3, groups=2), nn.Conv3d(2, 3, 2), nn.ConvTranspose1d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3)]
    model = nn.ModuleList([*(make() for make in LAYERS.values()), *kinds, nn.ConvTranspose3d(2, 3, 2, bias=False)]).double()
    overparameterize(model, depth=3, width=1.5)
    model.extend([nn.Linear(3, 3), overparameterize(nn.Conv2d(3, 3, 3), "do_conv")])  # of no concern to it
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    found = kflo.penalty(model)
    assert found is not None
    wanted = torch.zeros((), dtype=torch.float64)
    for layer in list(model)[:-2]:
        first, last = mixers(layer)
        wanted = wanted + (last @ first @ layer.parametrizations.weight.original.flatten(1)).square().sum()  # type: ignore[union-attr]
    torch.testing.assert_close(found, wanted)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(3 * loss, parameters, allow_unused=True) for loss in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) is (other is None)
        torch.testing.assert_close(one, other)
    assert sum(gradient is not None for gradient in gradients[0]) == 3 * 10
    assert kflo.penalty(model[-2]) is None and kflo.penalty(model[-1]) is None


def test_kernels_are_composed_once_a_step_however_often_they_are_read(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reading(hooks.Hook):
        def penalty(self, run: Any, *tensors: Tensor) -> None:
            assert all(layer.weight is layer.weight for layer in (run.model[0], run.model[4]))

        def after_step(self, run: Any) -> None:
            counts.append(len(composed))
            composed.clear()

    composed: list[int] = []
    counts: list[int] = []
    plainly = kflo.Mixing.compose
    monkeypatch.setattr(kflo.Mixing, "compose", lambda self, original: composed.append(id(self)) or plainly(self, original))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10, bias=False))
    run = make_run(overparameterize(model, width=2))
    composed.clear()
    train(run, [kflo.Hook(), Reading(), kflo.Hook(l2_factor=0.5)])
    assert counts == [3] * len(run.train)  # two kernels and a bias


def test_the_penalty_is_computed_in_fp32_under_autocast() -> None:
    layer = expanded("conv")
    plain = kflo.penalty(layer)
    for precision in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=precision):
            inside = kflo.penalty(layer)
            assert layer.weight.dtype == layer.bias.dtype == torch.float32
        assert plain is not None and inside is not None and inside.dtype == torch.float32 and torch.equal(inside, plain)
        gradient, wanted = (torch.autograd.grad(value, mixers(layer), retain_graph=True)[0] for value in (inside, plain))
        assert torch.equal(gradient, wanted)


def training_parameters(name: str, depth: int, width: float, arguments: dict[str, Any]) -> tuple[int, int]:
    """Of the expanded network, and by hand: every filter and bias rho times, a mixer of rho O x O (and hidden ones), the rest."""
    with torch.device("meta"):
        model = models.build(name, input_shape=(3, 32, 32), classes=10, **arguments)
    plain = by_hand = parameters(model)
    for _, layer in filtering_layers(model):
        hidden, own = round(width * len(layer.weight)), layer.weight[0].numel() + (layer.bias is not None)
        by_hand += (hidden - len(layer.weight)) * own + hidden * len(layer.weight) + (depth - 2) * hidden**2
    expanded = parameters(overparameterize(model, depth=depth, width=width))
    assert parameters(collapse(model)) == plain
    return expanded, by_hand


@pytest.mark.parametrize(("depth", "width", "published"), [(2, 1, 17.06e6), (2, 2, 34.11e6), (2, 4, 68.21e6), (3, 2, 42.40e6)])
def test_vgg16_trains_as_many_parameters_as_published(depth: int, width: float, published: float) -> None:
    found, by_hand = training_parameters("vgg16", depth, width, {})
    assert found == by_hand == pytest.approx(published, abs=5e3)


def test_cifar_quick_trains_as_many_parameters_as_published() -> None:
    found, by_hand = training_parameters("cifar_quick", 2, 4, {})
    assert found == by_hand == pytest.approx(0.509e6, abs=500)


@pytest.mark.parametrize(("size", "depth", "width"), [((16, 8), 2, 4), ((28, 2), 2, 1), ((28, 5), 3, 2), ((28, 10), 2, 4)])
def test_wide_resnets_train_as_many_parameters_as_counted_by_hand(size: tuple[int, int], depth: int, width: float) -> None:
    arguments = {"depth": size[0], "width": size[1], "dropout": 0.3}
    found, by_hand = training_parameters("wide_resnet", depth, width, arguments)
    assert found == by_hand


def test_a_width_below_1_must_be_asked_for_and_starts_with_zeros() -> None:
    plain = nn.Linear(3, 5)
    layer: Any = overparameterize(nn.Sequential(copy.deepcopy(plain)), width=0.5, narrow=True)[0]  # type: ignore[index]
    assert mixers(layer)[0].shape == (5, 2)  # 2.5, to even
    for name in ("weight", "bias"):
        assert torch.equal(getattr(layer, name)[:2], getattr(plain, name)[:2]) and not getattr(layer, name)[2:].any()
    for width, narrow in ((0.0, True), (-1.0, True), (0.99, False)):
        with pytest.raises(InputError, match="kflo.*(width must be at least 1, or narrow true|must be greater than 0)"):
            overparameterize(nn.Sequential(nn.Linear(3, 5)), width=width, narrow=narrow)
    with pytest.raises(InputError, match="kflo: among the chosen layers there is none that it treats"):
        overparameterize(nn.Sequential(nn.Linear(3, 5)), width=0.1, narrow=True)  # no filter at all
