"""What the library functions and weight files refuse, and that the network is then as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import weights
from pipeline.channels import follow
from pipeline.errors import InputError
from pipeline.models import build
from pipeline.revive.reactivation import reactivate
from pipeline.revive.restart import least_useful, reset_filters, taylor_scores
from pipeline.revive.weight_evolution import evolve

SHARES: dict[str, Any] = {"alpha": 0.5, "beta": 0.5, "gamma": 0.5}
EVOLVE: dict[str, Any] = {"rule": "code", "share": 0.5, "norm_share": 0.5, "local": 0.5, "force": 0}


def reset(model: nn.Module, **changes: Any) -> None:
    usual = {"reset": "uniform", "scope": "filter", "batchnorm": "reset", "generator": torch.Generator()}
    reset_filters(model, {"conv1": [0, 1]}, follow(model, (3, 32, 32)), **{**usual, **changes})


def score(model: nn.Module, criterion: str) -> dict[str, Tensor]:
    return taylor_scores(model, {"conv1": "bn1"}, [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))], criterion=criterion)


WRONG: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "share above 1": (lambda m: reactivate(m, **{**SHARES, "alpha": 1.5}), "alpha = 1.5: must lie in \\[0, 1\\]"),
    "share that is none": (lambda m: reactivate(m, **{**SHARES, "gamma": float("nan")}), "gamma = nan: must lie in"),
    "rounding": (lambda m: reactivate(m, **SHARES, rounding="flor"), "rounding = 'flor': must be one of floor, round, ceil"),
    "momentum": (lambda m: reactivate(m, **SHARES, momentum="zeros"), "momentum = 'zeros': must be one of keep, zero, scale"),
    "rule": (lambda m: evolve(m, **{**EVOLVE, "rule": "codes"}), "rule = 'codes': must be one of code, paper"),
    "reset": (lambda m: reset(m, reset="unifrm"), "reset = 'unifrm': must be one of uniform, he,"),
    "criterion": (lambda m: score(m, "per_exampl"), "criterion = 'per_exampl': must be one of per_example, batch_signed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_misspelt_word_or_an_impossible_share_changes_nothing(case: str) -> None:
    torch.manual_seed(0)
    model = build("cifar_quick", input_shape=(3, 32, 32), classes=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    act, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        act(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("divisor", [1e6, 8.0, 7.9, 1.0, 0.5, -3.0, float("inf")])
def test_a_divisor_that_leaves_nothing_or_takes_all_is_refused(divisor: float) -> None:
    with pytest.raises(InputError, match=r"restart: 8 filters / divisor \S+ - 1 leaves nothing to reset"):
        least_useful({"a": torch.rand(5), "b": torch.rand(3)}, divisor)


def test_the_largest_and_smallest_possible_numbers_are_reset() -> None:
    scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([0.0])}
    assert least_useful(scores, 2.0) == {"b": [0]}
    assert least_useful(scores, 1.0001) == {"a": [1], "b": [0]}
    with pytest.raises(InputError, match="restart: 0 filters"):
        least_useful({}, 3)


@pytest.mark.parametrize("model", [nn.Conv2d(4, 4, 1), nn.Linear(4, 4), nn.Conv1d(4, 4, 3)])
def test_a_network_without_kernels_to_compare_is_left_alone(model: nn.Module) -> None:
    before = [parameter.clone() for parameter in model.parameters()]
    assert reactivate(model, **SHARES) == {"kernels": 0, "dead_filters": 0, "layers": []}
    assert all(map(torch.equal, before, model.parameters()))


SPOILT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nan": (lambda t: t * float("nan"), "conv1.weight has values that are not finite: no network can start from it"),
    "inf": (lambda t: t / 0, "conv1.weight has values that are not finite"),
    "meta": (lambda t: t.to("meta"), "must be a state dict, and has conv1.weight without plain values"),
    "sparse": (lambda t: t.to_sparse(), "must be a state dict, and has conv1.weight without plain values"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_weight_file_that_holds_no_numbers_is_refused_by_tensor(case: str, tmp_path: Path) -> None:
    spoil, message = SPOILT[case]
    state = {"bn1.weight": torch.ones(4), "conv1.weight": spoil(torch.rand(4, 3, 3, 3) + 1)}
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(InputError, match=rf"net\.pth:? .*{message}|net\.pth: {message}"):
        weights.read(tmp_path / "net.pth")
