"""Laws over every network, every method, plain and over-parameterised: compressing and collapsing commute, an edit of an
expanded network is the edit of the merged one, merging changes no output, and every result loads back from disk."""

import copy
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIT
from networks import ZOO, build, difference, is_expanded, masked, plain, randomise, shape_of
from torch import Tensor, nn

from pipeline import checkpoint, methods
from pipeline.certificate import certify
from pipeline.data.batches import Batches, Prepared
from pipeline.errors import InputError
from pipeline.hooks import Hook, Run
from pipeline.layers import filtering_layers
from pipeline.overparameterize import overparameterize
from pipeline.structure import structure

CLOSE = 1e-4  # of the largest |output| or |weight|: fp32 sums in another order
MERGED = 1e-5  # of the largest |output|: the same convolutions of the same kernels
# One block of options for each method; a method without one fails.
REVIVE: dict[str, dict[str, Any]] = {
    "finetune": {},
    "reactivation": {
        "alpha": 0.5, "beta": 0.5, "gamma": 0.5, "every": 1, "selection": "norm",
        "rounding": "floor", "max_ratio": None, "momentum": "keep",
    },
    "restart": {
        "reset": "uniform", "scope": "filter", "criterion": "per_example", "ranking_batches": 2, "ranking_dropout": False,
        "divisor": 3, "train_first": False, "restarts": 1, "stop_on_repeat": False, "final_epochs": 0, "patience": None,
        "max_drop": 0.5, "target": None, "include_residual": True, "batchnorm": "reset",
    },
    "weight_evolution": {
        "rule": "paper", "share": 0.9, "norm_share": 0.9, "local": 1.0, "force": 0, "period": 10, "divisors": [1.0],
        "steepness": 1.0,
    },
    "grafting": {
        "networks": 2, "strength": 0.4, "steepness": 500.0, "bins": 10, "learning_rates": "different", "data": "different",
        "ship": "own",
    },
}  # fmt: skip
REMOVE: dict[str, Any] = {"share": 0.4, "target": None, "multiple": 1, "scope": "global", "protect": []}
COMPRESS: dict[str, dict[str, Any]] = {
    "finetune": {},
    "diet": {
        "groups": 2, "target": None, "multiple": 8, "score": "sum", "select": "max", "concat": "aware", "weights": "inherited",
        "protect": [],
    },
    "selective": {
        "gamma": 0.5, "target": None, "multiple": 1, "until": 1.0, "mean_batches": 2, "realloc": {}, "max_pointers": None,
        "reset_momentum": False, "compensate": True,
    },
    "takeover": {"gamma": 0.3, "target": None, "multiple": 1, "batches": 2},
    "l1": REMOVE | {"residual": "tied"},
    "random": REMOVE,
    "slimming": REMOVE | {"sparsity": 1e-4, "cut_after": 0.5},
    "torch_pruning": REMOVE | {"importance": "l2", "search": "budget", "steps": 1, "batches": 1},
    "lgc": {"groups": 2, "until": 1.0, "lasso": 0.0, "linear": 1.0},
}  # fmt: skip
# What a method says it cannot treat: learned groups want plain 1x1 convolutions, slimming batch norms, and Torch-Pruning, where it
# is installed, does not follow zero-padded shortcuts and more.
REFUSED = re.compile("^(lgc|slimming|torch_pruning)(:| |$)")
every_network = pytest.mark.parametrize("network", ZOO)
SLOW = {"rednet": {"finetune", "reactivation", "diet", "selective"}}  # of the others, these methods are enough for it


def pairs(methods: Iterable[str]) -> Any:
    """Every network with every method."""
    found = [(network, method) for network in ZOO for method in methods if network not in SLOW or method in SLOW[network]]
    return pytest.mark.parametrize(("network", "method"), found)


Pictures = Callable[[tuple[int, int, int]], Prepared]


def hook(family: str, method: str) -> Hook:
    """The method as params.yaml would give it."""
    block = {"method": method, "fit": {**FIT, "epochs": 2}, **(REVIVE if family == "revive" else COMPRESS)[method]}
    options = methods.options(family, "block", block | ({"distill": None, "sensitivity": None} if family == "compress" else {}))
    return methods.load(family, method).create(options)


def run_of(model: nn.Module, method: Hook, data: Prepared, fresh: Callable[[int], nn.Module] | None = None) -> Run:
    """A run of two epochs whose first has just ended, without its steps."""
    batches = [Batches(data, split, 16, "cpu", None, split == "train", 0) for split in ("train", "validation")]
    fit: Any = method.options.fit if hasattr(method, "options") else None  # type: ignore[attr-defined]
    run = Run(model, fit, batches[0], batches[1], 0, torch.device("cpu"), rounds=[2], round=1, lr=0.1, fresh=fresh)
    run.notes += method.coverage(model, run.input_shape)
    method.prepare(run)
    return run


def compressed(model: nn.Module, method: str, data: Prepared) -> Run:
    chosen = hook("compress", method)
    run = run_of(copy.deepcopy(model), chosen, data)
    run.epoch = run.round_epoch = 1
    chosen.after_epoch(run)
    chosen.finish(run)
    return run


def revived(network: str, model: nn.Module, method: str, data: Prepared) -> nn.Module:
    def another(number: int) -> nn.Module:
        other = build(network, seed=number)
        return other if is_expanded(model) else plain(other)

    chosen = hook("revive", method)
    run = run_of(copy.deepcopy(model), chosen, data, another if method == "grafting" else None)
    assert chosen.begin_round(run)
    run.epoch = run.round_epoch = 1
    chosen.after_epoch(run)
    chosen.finish(run)
    assert run.model.training is False or run.model.train(False) is run.model
    return run.model


def effective(model: nn.Module) -> dict[str, Tensor]:
    """Kernels and biases as the layers use them, and every other tensor of the network."""
    layers = dict(filtering_layers(model))
    tensors = {f"{name}.weight": layer.weight.detach().clone() for name, layer in layers.items()}
    tensors |= {f"{name}.bias": layer.bias.detach().clone() for name, layer in layers.items() if layer.bias is not None}
    others = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(tuple(f"{name}." for name in layers))}
    return tensors | {key: tensor.clone() for key, tensor in others.items()}


def far(first: Tensor, second: Tensor) -> Tensor:
    """Where two tensors differ by more than CLOSE of the largest entry."""
    return (first.double() - second.double()).abs() > CLOSE * max(float(first.abs().max()), 1e-6)


def test_every_method_is_tested() -> None:
    assert set(REVIVE) == set(methods.names("revive")) and set(COMPRESS) == set(methods.names("compress"))
    dense = {"unet"}  # answers for every pixel: test_surgery_families.py and test_compressed_chain.py
    assert {name for name, *_ in ZOO.values()} == set(methods.names("models")) - dense


def facts(run: Run) -> list[dict[str, Any]]:
    """What the method decided: the group, the open gates, the channels removed."""
    return [{key: value for key, value in event.items() if key in ("kind", "group", "layers", "removed")} for event in run.events]


def store_and_load(folder: Path, model: nn.Module, network: str, data: Prepared) -> nn.Module:
    name, arguments, *_ = ZOO[network]
    card = checkpoint.new_card({"name": name, "arguments": arguments}, data)
    if is_expanded(model):
        card["expansion"] = {"method": "kflo", "arguments": {"depth": 2, "width": 1.5, "l2_factor": 1.0, "mixer_decay": 1e-9}}
    checkpoint.save(folder, model, card)
    return checkpoint.load(folder)[0]


@pairs(COMPRESS)
def test_compressing_and_collapsing_commute_and_load_back(network: str, method: str, pictures: Pictures, tmp_path: Path) -> None:
    shape, model = shape_of(network), build(network)
    data = pictures(shape)
    try:
        one, other = compressed(model, method, data), compressed(plain(model), method, data)
    except InputError as error:
        assert REFUSED.match(str(error)), error
        pytest.skip(str(error))
    assert facts(one) == facts(other)
    assert is_expanded(one.model) and not is_expanded(other.model)
    kept, whole = structure(one.model)["filtering"], structure(model)["filtering"]
    assert (kept == whole) is (method == "finetune")
    merged = plain(one.model)
    assert structure(merged) == structure(other.model)
    wanted = other.model.state_dict()
    assert merged.state_dict().keys() == wanted.keys()
    for name, tensor in merged.state_dict().items():
        assert tensor.shape == wanted[name].shape and not far(tensor, wanted[name]).any(), name
    assert difference(merged, other.model, shape) < CLOSE
    for index, result in enumerate((one.model, merged, other.model)):
        loaded = store_and_load(tmp_path / str(index), result, network, data)
        stored, found = result.state_dict(), loaded.state_dict()
        assert stored.keys() == found.keys() and all(torch.equal(tensor, found[key]) for key, tensor in stored.items())
        assert difference(result, loaded, shape) == 0 and not loaded.training


@pairs(REVIVE)
def test_an_edit_of_an_expanded_network_is_the_edit_of_the_merged_one(network: str, method: str, pictures: Pictures) -> None:
    model = build(network)
    data, before, exact = pictures(shape_of(network)), effective(model), dict(model.state_dict())
    one, other = revived(network, model, method, data), revived(network, plain(model), method, data)
    after, wanted = effective(one), effective(other)
    assert after.keys() == wanted.keys() == before.keys()
    changed = {key: wanted[key] != before[key] for key in before}
    assert any(bool(mask.any()) for mask in changed.values()) is (method != "finetune")
    for key, mask in changed.items():
        assert not far(after[key], wanted[key]).any(), key
        assert not far(after[key], before[key])[~mask].any(), key
    layers = dict(filtering_layers(model))
    for key, tensor in one.state_dict().items():
        owner = next((name for name in layers if key.startswith(f"{name}.")), None)
        concerned = [key] if owner is None else [f"{owner}.weight", f"{owner}.bias"]
        touched = any(bool(changed[name].any()) for name in concerned if name in changed)
        # Mixers, and all tensors of layers that are not edited, stay bit for bit.
        assert torch.equal(tensor, exact[key]) or (touched and "mixers" not in key), key


@pytest.mark.parametrize(("depth", "width"), [(2, 1), (3, 2.5)])
@every_network
def test_merging_changes_no_output(network: str, depth: int, width: float) -> None:
    model = randomise(overparameterize(build(network, expand=False), "kflo", depth=depth, width=width))
    merged = plain(model)
    assert is_expanded(model) and not is_expanded(merged)
    assert difference(model, merged, shape_of(network)) < MERGED


def test_a_certificate_holds_for_merging_and_for_nothing_else(pictures: Pictures) -> None:
    network = "resnet"
    model, data = build(network), pictures(shape_of(network))
    test = Batches(data, "test", 5, "cpu", None, False, 0)
    merged = plain(model)
    found = certify(model, merged, test)
    images, labels = (torch.cat(part) for part in zip(*test.epoch(0), strict=True))
    with torch.no_grad():
        expected = float((merged(images).argmax(1) == labels).float().mean())
        worst = float((merged(images) - model(images)).abs().max())
    assert found["test_accuracy"] == pytest.approx(expected)
    assert found["max_abs_difference"] == pytest.approx(worst, abs=1e-6) and found["max_abs_difference"] < 1e-4
    assert found["top1_agreement"] == 1.0
    wrong = masked(merged, {"fc": torch.arange(64) != 3})
    with pytest.raises(InputError, match="the merged network differs by"):
        certify(model, wrong, test)
    for value in (float("nan"), float("inf")):
        wrong = copy.deepcopy(merged)
        nn.init.constant_(wrong.get_parameter("fc.bias"), value)
        for pair in ((model, wrong), (wrong, model), (wrong, wrong)):
            with pytest.raises(InputError, match="differs by (nan|inf)"):
                certify(*pair, test)
