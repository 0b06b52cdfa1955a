"""The chain, from data to a proven ONNX file, with each compress method selected: on classes with over-parameterised layers, on
masks and depths, on learned groups, and behind a first training that redirected channels. `test_tasks_chain.py` has the diet."""

import contextlib
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from small_chain import call, parameters, record, write_parameters
from test_laws import COMPRESS, REVIVE
from test_tasks_chain import settings
from torch import nn

from pipeline import checkpoint, methods, models
from pipeline.measure import count
from pipeline.redirect import Redirect
from pipeline.scores import NAMES

INSTALLED = importlib.util.find_spec("torch_pruning") is not None
METHODS = [method for method in COMPRESS if method != "torch_pruning" or INSTALLED]
EPOCHS = {"selective": 2, "slimming": 2, "lgc": 1}  # they work while training goes on; the others are through before it
KINDS = {"selective": "dealloc", "lgc": "condense"}  # of the event that a method leaves; the others' is their own name


def half(of: str = "macs", fraction: float = 0.5) -> dict[str, Any]:
    """A target, in widths of any number."""
    return {"target": {"of": of, "fraction": fraction}, "multiple": 1}


# Chain -> name of a block -> the method and what differs from the usual options.
BLOCKS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "classify": {
        "diet": ("diet", {"groups": None, **half()}),
        "dealloc": ("selective", {}),
        "dealloc_target": ("selective", {"gamma": None, **half("params", 0.4)}),
        "takeover": ("takeover", {"gamma": None, **half()}),
        "l1": ("l1", {"share": None, **half("keep")}),
        "slimming": ("slimming", {"share": None, **half()}),
        "random": ("random", {"share": None, **half("params")}),
        "torch_pruning": ("torch_pruning", {"share": None, **half()}),
    },
    "segment": {method: (method, {}) for method in METHODS if method not in ("finetune", "lgc")},
    "depth": {method: (method, {}) for method in METHODS if method not in ("finetune", "lgc")},
    "groups": {"lgc": ("lgc", {})},
    "redirected": {"takeover": ("takeover", {"gamma": 0.02}), "l1": ("l1", {})},
}
BLOCKS["segment"]["diet"] = BLOCKS["depth"]["diet"] = ("diet", {"groups": None, **half()})
if not INSTALLED:
    del BLOCKS["classify"]["torch_pruning"]
CASES = [(chain, block) for chain, blocks in BLOCKS.items() for block in blocks]
# An export takes seconds: of methods that leave the same kinds of layers, one a chain. test_tasks_chain.py has those of diets.
EXPORTED = [*(("classify", block) for block in BLOCKS["classify"] if block != "dealloc")]
EXPORTED += [("segment", "takeover"), ("depth", "takeover"), ("groups", "lgc"), ("redirected", "takeover")]


def params_of(chain: str) -> dict[str, Any]:
    """A small params.yaml: the usual one, or that of a task, with the chain's network and blocks."""
    params = settings(chain) if chain in ("segment", "depth") else parameters()
    fit = params["train"]["fit"]
    if chain in ("segment", "depth"):
        params["data"]["per_class"] = 64
    if chain == "groups":
        params["model"] = {"name": "condensenet", "depth": 8, "growth": 4, "groups": 4, "dropout": 0.1}
        params["train"]["overparameterize"] = {"method": "none"}
    if chain == "redirected":
        params["model"] = {"name": "densenet", "depth": 10, "growth": 8, "compression": 0.5, "stem": "tiny"}
        params["train"] |= {"fit": fit | {"epochs": 4}, "compress": compress("selective", realloc={"1x1": 3})}
        params["revive"] = {"finetune": {"method": "reactivation", **REVIVE["reactivation"], "fit": fit | {"epochs": 2}}}
    blocks = {name: compress(method, **changes) for name, (method, changes) in BLOCKS[chain].items()}
    params["compress"] = {name: block | {"fit": fit | {"epochs": EPOCHS.get(block["method"], 0)}} for name, block in blocks.items()}
    params["variants"] = {"revive": ["finetune"], "compress": list(blocks)}
    params["profile"]["control"] = f"finetune-{next(iter(blocks))}"
    return params


def compress(method: str, **changes: Any) -> dict[str, Any]:
    return {"method": method, **COMPRESS[method], "distill": None, "sensitivity": None, **changes}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """built(CHAIN): the folder in which it is there up to `revive`."""

    @cache
    def build(chain: str) -> Path:
        folder = tmp_path_factory.mktemp(chain)
        with contextlib.chdir(folder):
            write_parameters(Path(), params_of(chain))
            Path("data/start").mkdir(parents=True)
            for words in (("check",), ("prepare",), ("coverage",), ("train", "0"), ("revive", "finetune", "0")):
                assert call(*words) == 0, words
        return folder

    return build


def model(stage: str, variant: str) -> nn.Module:
    return checkpoint.load(Path(f"outputs/{stage}/{variant}/model"))[0]


def size(network: nn.Module) -> dict[str, float]:
    """Multiply-adds, parameters, and the outputs of all layers."""
    found = count(network, (1, 16, 16))
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    outputs = [layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features for layer in layers]
    return {"macs": found["macs"], "params": sum(parameter.numel() for parameter in network.parameters()), "keep": sum(outputs)}


def test_every_method_is_tested() -> None:
    absent = {"finetune"} if INSTALLED else {"finetune", "torch_pruning"}  # the control; an extra
    assert {method for blocks in BLOCKS.values() for method, _ in blocks.values()} == set(methods.names("compress")) - absent
    for task in NAMES:
        assert {"diet", "takeover"} <= {method for method, _ in BLOCKS[task].values()}, task


@pytest.mark.parametrize(("chain", "block"), CASES)
def test_the_chain_runs_from_data_to_a_proven_onnx_file(
    chain: str, block: str, built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(built(chain))
    method, changes = BLOCKS[chain][block]
    variant = f"finetune-{block}-0"
    stages = ("compress", "collapse", *(["export"] if (chain, block) in EXPORTED else []))
    for stage in stages:
        assert call(stage, "finetune", block, "0") == 0, stage
    kinds = [event["kind"] for event in record("compress", variant)["events"]]
    assert KINDS.get(method, method) in kinds, kinds
    before, after = (record(stage, variant)["metrics"] for stage in ("compress", "collapse"))
    names = NAMES[chain if chain in NAMES else "classify"]
    score = f"test_{names.headline}"
    assert before[score] == pytest.approx(after[score], abs=1e-3)
    assert after["parameters"] < record("train", "0")["metrics"]["parameters"]
    if "export" in stages:
        metrics = record("export", variant)["metrics"]
        assert metrics[score] == pytest.approx(metrics[f"torch_{score}"], abs=1e-4)
        assert metrics[names.agreement] > 0.999 and metrics["max_abs_difference"] < 1e-4
    if chain == "classify" and "target" in changes:
        reached(model("collapse", variant), changes["target"])
    elif chain == "redirected":
        redirected_to_the_end(variant)
    elif chain == "groups":
        layers = [layer for layer in model("collapse", variant).modules() if isinstance(layer, nn.Conv2d)]
        assert [layer.groups for layer in layers if layer.kernel_size == (1, 1)] == [COMPRESS["lgc"]["groups"]] * 3


def reached(network: nn.Module, target: dict[str, Any]) -> None:
    """The target, of the plain network as it is in the end: the expansion counts on neither side."""
    whole = models.build("cifar_quick", input_shape=(1, 16, 16), classes=10)
    share = size(network)[target["of"]] / size(whole)[target["of"]]
    assert 0.98 * target["fraction"] <= share <= target["fraction"]


def redirected_to_the_end(variant: str) -> None:
    """Slots that the first training redirected are there behind a revive method that edits kernels and one that cuts."""

    def moved(stage: str, variant: str) -> int:
        return sum(len(module.moved) for module in model(stage, variant).modules() if isinstance(module, Redirect))

    surgery = next(event for event in record("train", "0")["events"] if event["kind"] == "surgery")
    assert moved("train", "0") == moved("revive", "finetune-0") == sum(surgery["redirected"].values()) > 3
    assert any(event["kind"] == "reactivation" for event in record("revive", "finetune-0")["events"])
    assert 0 < moved("collapse", variant) <= moved("revive", "finetune-0")
