"""Partial restart against gradients taken by hand, the published counts of filters, and its stop conditions."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import models
from pipeline.errors import InputError
from pipeline.layers import convolutions
from pipeline.overparameterize import overparameterize
from pipeline.revive.restart import Options, Restart, draw, least_useful, reset_filters, taylor_scores


class Net(nn.Module):
    """1x16x16 images, ten classes; biases, one batch norm, dropout, a grouped and a 1x1 convolution. 60 filters."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, stride=2)
        self.relu1 = nn.ReLU(inplace)
        self.conv2 = nn.Conv2d(12, 16, 3, groups=2)
        self.bn2 = nn.BatchNorm2d(16)
        self.relu2 = nn.ReLU(inplace)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.conv3 = nn.Conv2d(16, 32, 1)
        self.relu3 = nn.ReLU(inplace)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.bn2(self.conv2(self.relu1(self.conv1(x)))))
        x = self.gap(self.relu3(self.conv3(self.pool(x))))
        return self.fc(self.dropout(self.flatten(x)))


def network(expanded: bool = False, inplace: bool = False) -> Net:
    torch.manual_seed(0)
    model = Net(inplace)
    assert model.bn2.running_mean is not None and model.bn2.running_var is not None
    for tensor in (model.bn2.weight, model.bn2.bias, model.bn2.running_mean, model.bn2.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    if expanded:
        overparameterize(model, depth=2, width=2)
    return model.eval()


def some_batches() -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(1)
    sizes = (5, 3)
    return [(torch.randn(n, 1, 16, 16, generator=draws), torch.randint(10, (n,), generator=draws)) for n in sizes]


WATCHED = {"conv1": "conv1", "conv2": "bn2", "conv3": "conv3"}


def maps_and_gradients(model: Net, scale: float) -> Iterable[dict[str, tuple[Tensor, Tensor]]]:
    """For each single image z and dC/dz of every watched map, C the cross-entropy times `scale`."""
    for images, labels in some_batches():
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            conv1 = model.conv1(image)
            bn2 = model.bn2(model.conv2(conv1.relu()))
            conv3 = model.conv3(model.pool(bn2.relu()))
            cost = scale * F.cross_entropy(model.fc(conv3.relu().mean((2, 3))), label)
            maps = {"conv1": conv1, "conv2": bn2, "conv3": conv3}
            gradients = torch.autograd.grad(cost, list(maps.values()))
            yield {name: (z[0].detach(), g[0]) for (name, z), g in zip(maps.items(), gradients, strict=True)}


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("criterion", ["per_example", "batch_signed", "elementwise"])
def test_scores_are_the_taylor_criterion_and_the_scale_of_the_loss_does_not_matter(criterion: str, scale: float) -> None:
    model = network()
    sums: dict[str, Tensor] = {}
    for image in maps_and_gradients(model, scale):
        for name, (z, gradient) in image.items():
            product = z * gradient
            theta = torch.stack([(p.abs() if criterion == "elementwise" else p).sum() / p.numel() for p in product])
            sums[name] = sums.get(name, 0) + (theta.abs() if criterion == "per_example" else theta)
    found = taylor_scores(model, WATCHED, some_batches(), criterion=criterion)
    assert list(found) == list(WATCHED)
    for name, total in sums.items():
        torch.testing.assert_close(found[name], total.abs() / total.square().sum().sqrt(), rtol=1e-3, atol=1e-5)
        assert found[name].square().sum() == pytest.approx(1)


@pytest.mark.parametrize("inplace", [False, True])
def test_scores_are_the_same_before_and_behind_the_activation(inplace: bool) -> None:
    activations = {"conv1": "relu1", "conv2": "relu2", "conv3": "relu3"}
    for criterion in ("per_example", "batch_signed", "elementwise"):
        before = taylor_scores(network(), WATCHED, some_batches(), criterion=criterion)
        model = network(inplace=inplace)
        for watched in (WATCHED, activations):
            found = taylor_scores(model, watched, some_batches(), criterion=criterion)
            torch.testing.assert_close(found, before)


def test_an_activation_that_overwrites_its_input_does_not_change_the_scores() -> None:
    found = []
    for inplace in (False, True):
        model = network()
        model.relu1 = model.relu3 = nn.LeakyReLU(0.3, inplace)  # type: ignore[assignment]
        found.append(taylor_scores(model, WATCHED, some_batches(), criterion="per_example"))
    torch.testing.assert_close(found[0], found[1])


def test_signed_scores_behind_a_batch_norm_follow_from_the_gradients_of_its_parameters() -> None:
    model = network()
    images, labels = (torch.cat(parts) for parts in zip(*some_batches(), strict=True))
    F.cross_entropy(model(images), labels).backward()
    gamma, beta = model.bn2.weight, model.bn2.bias
    assert gamma.grad is not None and beta.grad is not None
    wanted = F.normalize((gamma * gamma.grad + beta * beta.grad).abs().detach(), dim=0)
    torch.testing.assert_close(taylor_scores(model, WATCHED, some_batches(), criterion="batch_signed")["conv2"], wanted)


def test_ranking_leaves_the_network_as_it_was_and_drops_only_where_asked() -> None:
    model, expanded = network().train(), network(expanded=True)
    model.fc.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = taylor_scores(model, WATCHED, some_batches(), criterion="per_example")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and model.dropout.training and model.conv1.weight.requires_grad and not model.fc.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    dropped = taylor_scores(model, WATCHED, some_batches(), criterion="per_example", dropout=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not torch.allclose(dropped["conv3"], plain["conv3"], rtol=1e-2)
    torch.testing.assert_close(taylor_scores(expanded, WATCHED, some_batches(), criterion="per_example"), plain)


def test_the_least_useful_filters_are_the_first_of_all_in_one_ranking() -> None:
    torch.manual_seed(2)
    scores = {"a": torch.rand(20).round(decimals=1), "b": torch.rand(13), "c": 5 + torch.rand(4)}
    flat = sorted((float(value), place, i) for place, values in enumerate(scores.values()) for i, value in enumerate(values))
    for divisor in (2, 3, 3.5, 8):
        wanted: dict[str, list[int]] = {}
        for _, place, i in flat[: int(37 / divisor) - 1]:
            wanted.setdefault("abc"[place], []).append(i)
        assert least_useful(scores, divisor) == {name: sorted(wanted[name]) for name in "abc" if name in wanted}


def alexnet(*widths: int) -> nn.Sequential:
    """The features of AlexNet with an eleven-, a five- and more three-pixel convolutions."""
    layers: list[nn.Module] = []
    for place, (inputs, outputs) in enumerate(zip((3, *widths), widths, strict=False)):
        kernel, stride, padding = [(11, 4, 2), (5, 1, 2), (3, 1, 1)][min(place, 2)]
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.ReLU()]
        if place in (0, 1, len(widths) - 1):
            layers.append(nn.MaxPool2d(3, stride=2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 36, 10))


FOUR, FIVE = (64, 192, 384, 256), (64, 192, 384, 256, 256)


@pytest.mark.parametrize(("widths", "count"), [((), 73), (FOUR, 297), (FIVE, 383)], ids=["MiniNet", "AlexNet", "torchvision's"])
def test_one_restart_resets_as_many_filters_as_published(widths: tuple[int, ...], count: int) -> None:
    with torch.device("meta"):
        mininet = models.build("mininet", input_shape=(3, 224, 224), classes=10, dropout=0.5)
        model = alexnet(*widths) if widths else mininet
    restart = Restart(options())
    assert restart.coverage(model, (3, 224, 224)) == []
    scores = {name: torch.rand(layer.out_channels, device="cpu") for name, layer in convolutions(model) if name in restart.watched}
    assert sum(map(len, least_useful(scores, 3).values())) == count


def options(**changes: Any) -> Options:
    fit = {"epochs": 1, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0}
    fit |= {"schedule": "constant", "label_smoothing": 0.0, "select": "last", "precision": "fp32"} | changes.pop("fit", {})
    usual = {"method": "restart", "reset": "uniform", "scope": "filter", "criterion": "per_example", "ranking_batches": 2}
    usual |= {
        "ranking_dropout": False,
        "divisor": 3,
        "train_first": False,
        "restarts": 2,
        "stop_on_repeat": True,
        "final_epochs": 0,
        "patience": None,
        "max_drop": 1.0,
    }
    usual |= {"target": None, "include_residual": False, "batchnorm": "reset", "fit": fit}
    return Options.model_validate(usual | changes)


@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "kflo"])
@pytest.mark.parametrize("batchnorm", ["reset", "keep"])
def test_a_reset_changes_the_useless_filters_their_biases_and_batch_norm_and_nothing_else(batchnorm: str, expanded: bool) -> None:
    model, useless = network(expanded), {"conv1": [0, 7], "conv2": [2, 3, 11], "conv3": [31]}
    restart = Restart(options())
    restart.coverage(model, (1, 16, 16))

    def tensors() -> dict[str, Tensor]:
        effective = {f"{n}.{t}": getattr(m, t) for n, m in convolutions(model) for t in ("weight", "bias")}
        others = {name: t for name, t in model.state_dict().items() if not name.startswith("conv")}
        return {name: tensor.detach().clone() for name, tensor in (effective | others).items()}

    before, parameters = tensors(), list(model.parameters())
    draws = torch.Generator().manual_seed(4)
    reset_filters(model, useless, restart.channels, reset="uniform", scope="filter", batchnorm=batchnorm, generator=draws)
    after = tensors()
    exact = {"rtol": 1e-4, "atol": 1e-6} if expanded else {"rtol": 0, "atol": 0}
    neutral = {"bn2.weight": 1.0, "bn2.bias": 0.0, "bn2.running_mean": 0.0, "bn2.running_var": 1.0}
    for name, old in before.items():
        layer, _, tensor = name.partition(".")
        rows = useless.get(layer, [])
        if layer == "bn2" and tensor in ("weight", "bias", "running_mean", "running_var"):
            rows = useless["conv2"] if batchnorm == "reset" else []
            assert (after[name][rows] == neutral[name]).all()
        others = [i for i in range(len(old)) if i not in rows] if old.dim() else ...
        torch.testing.assert_close(after[name][others], old[others], **exact)
        if layer in useless and tensor == "bias":
            torch.testing.assert_close(after[name][rows], torch.zeros(len(rows)), **exact)
        elif layer in useless:
            assert after[name][rows].abs().max() <= 0.05 + 1e-6 and (after[name][rows] != old[rows]).all()
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))


# sqrt(3 / 64), sqrt(6) / 128, sqrt(6 / (36 + 576)), sqrt(6 / 36)
BOUNDS = {"uniform": 0.05, "he": 0.21650635, "he_literal": 0.01913660, "xavier": 0.09901475, "he_fan_in": 0.40824829}


@pytest.mark.parametrize(("reset", "bound"), BOUNDS.items())
def test_symmetric_resets_are_uniform_within_their_bound(reset: str, bound: float) -> None:
    draws = torch.Generator().manual_seed(0)
    new = draw(torch.zeros(64, 4, 3, 3), list(range(0, 64, 2)) * 20, reset, "filter", draws)
    assert new.shape == (640, 4, 3, 3) and 0.999 * bound < new.abs().max() <= bound * (1 + 1e-6)
    assert float(new.mean()) == pytest.approx(0, abs=0.02 * bound)
    assert float(new.var()) == pytest.approx(bound**2 / 3, rel=0.02)


@pytest.mark.parametrize("scope", ["filter", "layer"])
def test_imitating_resets_follow_the_old_values_of_the_filter_or_the_layer(scope: str) -> None:
    draws = torch.Generator().manual_seed(0)
    kernels = torch.randn(6, 40, 5, 5, generator=draws) * torch.arange(6.0)[:, None, None, None] + 3
    filters = [0, 2, 5]
    for reset in ("minmax", "distribution"):
        for new, index in zip(draw(kernels, filters, reset, scope, draws), filters, strict=True):
            old = kernels[index] if scope == "filter" else kernels
            if reset == "minmax":
                assert old.min() <= new.min() and new.max() <= old.max()
                assert float(new.max() - new.min()) >= 0.98 * float(old.max() - old.min())
            else:
                std = float(old.std(correction=0)) or 0.05 / 3**0.5
                assert float(new.mean()) == pytest.approx(float(old.mean()), abs=0.15 * std)
                assert float(new.std()) == pytest.approx(std, rel=0.1)


def test_filters_that_join_a_residual_add_are_left_unless_asked_for() -> None:
    model = models.build("resnet", input_shape=(3, 16, 16), classes=10, depth=14)
    restart = Restart(options())
    (note,) = restart.coverage(model, (3, 16, 16))
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1)]
    assert restart.watched == {f"{block}.conv1": f"{block}.bn1" for block in blocks}
    assert note.endswith(": conv1, " + ", ".join(f"{block}.conv2" for block in blocks))
    restart = Restart(options(include_residual=True))
    assert restart.coverage(model, (3, 16, 16)) == [] and len(restart.watched) == 13
    with pytest.raises(InputError, match="9 filters / divisor 5.0 - 1 leaves nothing"):
        Restart(options(divisor=5.0)).coverage(nn.Sequential(nn.Conv2d(3, 9, 3)), (3, 16, 16))
    with pytest.raises(ValueError, match="fit.epochs must be at least 1"):
        options(fit={"epochs": 0})
