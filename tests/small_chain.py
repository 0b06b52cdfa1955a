"""The chain's stages in this process, on a workspace small enough for tests: digits, one epoch of training, one variant."""

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import stages
from pipeline.lineage import DEPLOYED

VARIANT = ("finetune", "none", "0")
CHAIN = [
    ("check",),
    ("prepare",),
    ("coverage",),
    ("train", "0"),
    ("revive", "finetune", "0"),
    *((stage, *VARIANT) for stage in ("compress", "collapse", "export", "profile")),
    ("champion",),
]


def parameters() -> dict[str, Any]:
    """A params.yaml, as plain values, that trains for one epoch and measures for a moment."""
    fit: dict[str, Any] = {"epochs": 1, "batch_size": 64, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False}
    fit |= {"weight_decay": 1e-4, "schedule": "cosine", "label_smoothing": 0.0, "select": "last", "precision": "fp32"}
    data = {"name": "digits", "root": "raw", "download": False, "image_size": 16, "storage": "auto", "validation": 0.4}
    restart = {"reset": "uniform", "scope": "filter", "criterion": "per_example", "ranking_batches": 1, "ranking_dropout": False}
    restart |= {
        "divisor": 3,
        "train_first": False,
        "restarts": 1,
        "stop_on_repeat": False,
        "final_epochs": 0,
        "patience": None,
        "max_drop": 0.5,
        "target": None,
    }
    diet = {
        "groups": 2,
        "target": None,
        "multiple": 8,
        "concat": "aware",
        "weights": "inherited",
        "score": "sum",
        "select": "max",
        "protect": [],
        "distill": None,
        "sensitivity": None,
    }
    expansion = {
        "method": "kflo",
        "layers": ["*"],
        "depth": 2,
        "width": 1.5,
        "narrow": False,
        "l2_factor": 1.0,
        "mixer_decay": 1e-9,
    }
    return {
        "seed": [0],
        "data": data | {"crop": None, "test": 0.4, "per_class": None, "split_seed": 0, "mean": "auto", "std": "auto"},
        "augment": {"pad": 1, "pad_mode": "zero", "flip": False, "scale": None},
        "runtime": {"device": "cpu", "threads": 1, "workers": 0, "processes": 1, "hosts": 1, "save_s": 60, "launch": "eager"},
        "model": {"name": "cifar_quick"},
        "train": {
            "start": "data/start",
            "start_layers": ["*"],
            "overparameterize": expansion,
            "revive": {"method": "finetune"},
            "compress": {"method": "finetune", "distill": None, "sensitivity": None},
            "bias_lr": 1.0,
            "ema": None,
            "fit": dict(fit),
        },
        "variants": {"revive": ["finetune"], "compress": ["none", "diet"]},
        "revive": {
            "finetune": {"method": "finetune", "fit": fit | {"epochs": 0}},
            "restart": {"method": "restart", "include_residual": False, "batchnorm": "reset", "fit": dict(fit)} | restart,
        },
        "compress": {
            "none": {"method": "finetune", "distill": None, "sensitivity": None, "fit": fit | {"epochs": 0}},
            "diet": {"method": "diet", "fit": fit | {"epochs": 0}} | diet,
        },
        "export": {"opset": 20, "atol": 1e-4, "rtol": 1e-3, "precisions": ["fp32", "int8"], "max_loss": 0.1, "resize": True}
        | {"int8": {"images": 64, "calibration": "minmax", "keep": [], "least": 0.5}},
        "profile": {"control": "finetune-none", "providers": ["cpu"], "threads": 1, "batch_sizes": [1]}
        | {"warmup_s": 0.01, "repeats": 20, "stability": 10.0, "attempts": 1}
        | {"idle_ms": None, "copies": False, "cuda_graph": False},
        "champion": {"best": "accuracy", "at_most": {"size_mb": 1.0}, "at_least": {}},
        "repository": {"folder": "repository", "models": "all", "forms": ["pictures", "tensors"], "max_batch": 64}
        | {"queue_delay_us": 500, "tensorrt": False, "versions": 2},
        "tracking": {"experiment": "winnow", "timeout_s": 10},
    }


def write_parameters(folder: Path, params: dict[str, Any]) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def call(*words: str) -> int:
    """Run `python -m stages.WORDS[0] WORDS[1:]` in this process, in the working directory; its exit code."""
    with pytest.MonkeyPatch.context() as patch, _torch_as_before():
        patch.setattr(sys, "argv", [f"stages/{words[0]}.py", *words[1:]])
        try:
            stages.run(importlib.import_module(f"stages.{words[0]}").main)
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def build(folder: Path) -> None:
    """Write params.yaml into `folder` and build the chain's outputs there."""
    with contextlib.chdir(folder):
        write_parameters(folder, parameters())
        Path("data/start").mkdir(parents=True)
        for words in CHAIN:
            assert call(*words) == 0, words
        Path("raw").rmdir()  # `check` made it for a download


def record(stage: str, variant: str, precision: str = "fp32") -> dict[str, Any]:
    """What a stage wrote of a variant, of one precision where it is deployed, in the working directory."""
    inside = f"{precision}/" if stage in DEPLOYED else ""
    return json.loads(Path(f"outputs/{stage}/{variant}/{inside}record.json").read_text())


def outputs() -> dict[Path, bytes]:
    """Every output, but for states of unfinished trainings."""
    return {path: path.read_bytes() for path in stages.OUTPUTS.rglob("*") if path.is_file() and stages.RESUME not in path.parents}


def refused(words: tuple[str, ...], capfd: pytest.CaptureFixture[str], lines: int = 1) -> str:
    """What the stage says when it refuses; checks that it says nothing else and leaves every output as it was."""
    before = outputs()
    capfd.readouterr()
    code = call(*words)
    said = capfd.readouterr().err
    assert code == 2, said
    assert len(said.splitlines()) == lines and said.endswith("\n"), said
    assert before and outputs() == before
    return said


@contextlib.contextmanager
def _torch_as_before() -> Iterator[None]:
    """A stage is the only one in its process and sets torch up for itself."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only, state = torch.is_deterministic_algorithms_warn_only_enabled(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_rng_state(state)
