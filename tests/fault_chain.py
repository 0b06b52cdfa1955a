"""The small chain that faults are put into: its parameters, its stages, and what of their outputs must be the same each time."""

import functools
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.small_chain import parameters

DATA, OUTPUTS, RESUME = "outputs/prepare/data/*", ("outputs", "repository"), "outputs/resume"
LOCKS = (".dvc", "dvc.lock", "machine")
RECORDS = "outputs/*/**/record.json"
VARIANT = ("restart", "diet", "0")
TIMED = ("images_per_s", "loader_share")
KEPT = ("parameters", "macs", "size_mb")  # what a profile says that no clock decides


@dataclass(frozen=True)
class Stage:
    """A stage of the chain with its words, what it writes and, by patterns, what it reads of others' outputs."""

    words: tuple[str, ...]
    outs: tuple[str, ...]
    reads: tuple[str, ...] = ()
    epochs: int = 0

    @property
    def name(self) -> str:
        return self.words[0]

    @property
    def target(self) -> str:
        """As dvc.yaml calls it."""
        return f"{self.name}@{'-'.join(self.words[1:])}" if len(self.words) > 1 else self.name


def of_variant(name: str, *reads: str, words: tuple[str, ...] = VARIANT, epochs: int = 0) -> Stage:
    return Stage((name, *words), (f"outputs/{name}/{'-'.join(words)}",), reads, epochs)


STAGES = (
    Stage(("prepare",), ("outputs/prepare",)),
    Stage(("coverage",), ("outputs/coverage",), ("outputs/prepare/data/data.json",)),
    Stage(("code",), ("outputs/code",)),
    of_variant("train", DATA, words=("0",), epochs=4),
    of_variant("revive", DATA, "outputs/train/0/model/*", words=("restart", "0"), epochs=4),
    of_variant("compress", DATA, "outputs/revive/restart-0/model/*", epochs=3),
    of_variant("collapse", DATA, "outputs/compress/restart-diet-0/model/*"),
    of_variant("export", DATA, "outputs/collapse/restart-diet-0/model/*"),
    of_variant("profile", "outputs/collapse/restart-diet-0/model/*", "outputs/export/restart-diet-0/*/model.onnx"),
    Stage(("champion",), ("outputs/champion",), (RECORDS,)),
    Stage(("repository",), ("outputs/repository", "repository"), (RECORDS, "outputs/export/*/*/*.onnx", "outputs/champion/*.json")),
    Stage(("report",), ("outputs/report",), (RECORDS, "outputs/champion/*.json")),
)
TRAINING = tuple(stage for stage in STAGES if stage.epochs)
END = "report"  # the last stage that needs no server of MLflow's
AFTER = {stage: STAGES[place + 1] for place, stage in enumerate(STAGES[:-1])}


def small() -> dict[str, Any]:
    """params.yaml: small networks of two variants, a few short epochs each, saved all the time."""
    params = parameters()
    fit = params["train"]["fit"] | {"batch_size": 16, "lr": 0.02}
    params["train"]["fit"] = fit | {"epochs": 4}
    params["runtime"]["save_s"] = 0.3
    params["variants"] = {"revive": ["restart"], "compress": ["none", "diet"]}
    params["revive"] = {"restart": params["revive"]["restart"] | {"fit": fit | {"epochs": 2}}}
    params["compress"]["diet"]["fit"] = fit | {"epochs": 3}
    params["export"]["precisions"] = ["fp32", "fp16"]
    params["profile"]["control"] = "restart-none"
    params["data"]["root"] = "data/raw"
    return params


def chain(project: Path, end: str) -> list[tuple[str, ...]]:
    """The words of every stage up to `end`, in the order of dvc.yaml."""
    params, found = yaml.safe_load((project / "params.yaml").read_text()), [("hardware",)]  # machine/dvc.yaml
    for name, stage in yaml.safe_load((project / "dvc.yaml").read_text())["stages"].items():
        keys = [place.strip("${}").split(".") for place in stage.get("matrix", {}).values()]
        values = [functools.reduce(lambda value, key: value[key], path, params) for path in keys]
        found += [(name, *map(str, words)) for words in itertools.product(*values)]
    return found[: 1 + max(place for place, words in enumerate(found) if words[0] == end)]


def same(name: str, one: bytes | None, other: bytes | None) -> bool:
    """Whether two files say the same, apart from times and from what was there already."""
    if one is None or other is None or not name.endswith(("record.json", "written.json")):
        return one == other
    try:
        first, second = (facts(json.loads(content)) for content in (one, other))
    except ValueError:
        return False
    return first == second


def facts(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the computation, and what written.json says of the repository."""
    if "models" in record:
        return record | {"models": [model | {"added": None} for model in record["models"]]}
    found = {key: record.get(key) for key in ("stage", "variant", "precision", "parameters", "metrics", "events", "layers", "data")}
    if record.get("stage") == "profile":
        found["events"] = None
        found["metrics"] = {key: record["metrics"].get(key) for key in KEPT}
    return found | {"history": [{key: row[key] for key in row if key not in TIMED} for row in record.get("history", [])]}
