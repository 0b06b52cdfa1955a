"""The chain, from data to a proven ONNX file, with each over-parameterisation method selected: a revive method edits its kernels, a
compress method cuts them, and what is exported is the plain network."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
from small_chain import call, parameters, write_parameters

from pipeline import checkpoint, files, methods
from pipeline.measure import parameters as count

# One block of options for each method; a method without one fails.
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "kflo": parameters()["train"]["overparameterize"],
    "acnet": {"layers": ["*"], "gamma": 0.333, "norms": "replace"},
    "dbb": {"layers": ["*"], "gamma": 1.0, "norms": "add"},
    "do_conv": {"layers": ["*"]},
    "expandnet": {"layers": ["conv*"], "ratio": 2, "linear": False, "exact": False},
}


def test_every_method_is_tested() -> None:
    assert set(OPTIONS) == set(methods.names("overparameterize"))


@pytest.mark.parametrize("method", OPTIONS)
def test_the_chain_runs_from_data_to_a_proven_onnx_file(method: str, tmp_path: Path) -> None:
    params = parameters()
    params["train"] |= {"overparameterize": {**OPTIONS[method], "method": method}, "bias_lr": 2.0}
    params["train"]["ema"] = 0.9 if method == "none" else None
    params["variants"] = {"revive": ["restart"], "compress": ["diet"]}
    params["profile"]["control"] = "restart-diet"
    params["compress"]["diet"]["fit"] = params["compress"]["none"]["fit"]
    variant = ("restart", "diet", "0")
    with contextlib.chdir(tmp_path):
        Path("data/start").mkdir(parents=True)
        write_parameters(tmp_path, params)
        words = [("check",), ("prepare",), ("coverage",), ("train", "0"), ("revive", "restart", "0")]
        for stage in [*words, *((stage, *variant) for stage in ("compress", "collapse", "export", "profile"))]:
            assert call(*stage) == 0, stage
        outputs = tmp_path / "outputs"
        trained, card = checkpoint.load(outputs / "train/0/model")
        assert (card["expansion"] or {"method": "none"})["method"] == method
        collapsed, after = checkpoint.load(outputs / "collapse/restart-diet-0/model")
        exported = files.read_json(outputs / "export/restart-diet-0/fp32/record.json")["metrics"]
        revived = files.read_json(outputs / "revive/restart-0/record.json")
    assert after["expansion"] is None and count(collapsed) < count(trained)
    plain = {name: type(module) for name, module in checkpoint.build(after | {"expansion": None}).named_modules()}
    assert {name: type(module) for name, module in collapsed.named_modules()} == plain
    assert exported["test_accuracy"] == exported["torch_test_accuracy"] and exported["top1_agreement"] == 1
    assert any(event["kind"] == "restart" and event["filters"] > 0 for event in revived["events"])
