"""A table of recipes/ that is small enough for tests, and the runner in this process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mistakes import CUT
from small_chain import _torch_as_before, parameters

import recipes.run as runner
from pipeline import files
from stages import guard


def small() -> dict[str, Any]:
    """A table of digits and Cifar-quick that two epochs train."""
    params = parameters()
    fit = params["train"]["fit"] | {"epochs": 2, "schedule": {"every": 1, "factor": 0.1}}
    kflo = params["train"]["overparameterize"] | {"width": 2}
    start = {"table": "small", "method": "plain", "count": 2, "of": 2}
    return {
        "paper": "A small table",
        "runs": "Nobody ran it.",
        **{key: params[key] for key in ("augment", "runtime")},
        "data": params["data"] | {"validation": 0.7, "test": 0.5},
        "train": {
            "start_layers": ["*"],
            "bias_lr": 1.0,
            "ema": None,
            "overparameterize": {"method": "none"},
            "revive": {"method": "finetune"},
            "compress": {"method": "finetune", "distill": None, "sensitivity": None},
            "fit": fit,
        },
        "methods": {"plain": {}, "kflo": {"overparameterize": kflo}, "transfer": {"overparameterize": kflo, "start_from": start}},
        "networks": {"quick": {"model": {"name": "cifar_quick"}}},
        "expected": {"quick": {"plain": [50.0, 0.5], "kflo": [60.0, None], "transfer": [70.0, 0.25]}},
    }


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project that has only the small table."""
    monkeypatch.chdir(tmp_path)
    write(small())
    with _torch_as_before():
        yield tmp_path


def write(table: dict[str, Any], name: str = "small") -> None:
    Path("recipes").mkdir(exist_ok=True)
    Path("recipes", f"{name}.yaml").write_text(yaml.safe_dump(table, sort_keys=False))


def run(*words: str) -> int:
    """`python -m recipes.run WORDS` in this process; its exit code."""
    try:
        guard("recipes.run", lambda: runner.main(list(words)))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def out(row: str, seed: int = 0, length: str = "1-epochs") -> Path:
    return Path("outputs/recipes/small", row, length, str(seed))


def record(*place: Any) -> dict[str, Any]:
    return files.read_json(out(*place) / "record.json")


def weights(*place: Any) -> str:
    return files.read_json(out(*place) / "model" / "model.json")["weights_sha256"]


def changed(key: str, value: Any) -> dict[str, Any]:
    """The small table with one value changed, or cut out."""
    table = place = small()
    *way, last = key.split(".")
    for part in way:
        place = place[part]
    place.pop(last) if value is CUT else place.update({last: value})
    return table
