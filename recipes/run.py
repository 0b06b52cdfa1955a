"""Run rows of a published table over seeds and print ours beside the paper's.

    python -m recipes.run kflo_cifar10 'cifar_quick/*' --seeds 0 1 2 [--epochs 30] [--data data/cifar10.npz]

A table is one file recipes/NAME.yaml: settings by network, methods, and what the paper reports for each pair. A row is
NETWORK/METHOD. Trainings that are there already are not repeated, and one that was interrupted goes on where it was; everything
lies under outputs/recipes/. `--params` prints a row as params.yaml instead, so that the whole chain can be built from it.
"""

import argparse
import hashlib
import json
import shutil
import statistics
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from pipeline import files
from pipeline.config import Data, Train, lookup, parse, read_params
from pipeline.data.prepare import prepare
from pipeline.errors import InputError
from pipeline.first_training import first_training
from stages import RESUME, guard

RECIPES, OUT = Path("recipes"), Path("outputs/recipes")
SECTIONS = ("data", "augment", "runtime", "model", "train")


def read_table(name: str) -> dict[str, Any]:
    """The table recipes/NAME.yaml."""
    path = RECIPES / f"{name}.yaml"
    table = read_params(path)
    if "expected" not in table:
        raise InputError(f"{path} is no table of a paper: it expects nothing (copy it to params.yaml and run make)")
    return table


def rows_of(table: dict[str, Any], patterns: list[str]) -> list[tuple[str, str]]:
    """The rows (network, method) that fit any of the patterns NETWORK/METHOD, in the table's order."""
    there = [(network, method) for network, methods in table["expected"].items() for method in methods]
    found = [row for row in there if any(fnmatchcase("/".join(row), pattern) for pattern in patterns)]
    if not found:
        raise InputError(f"no row fits {' '.join(patterns)}; there are {', '.join('/'.join(row) for row in there)}")
    return found


def parameters(table: dict[str, Any], network: str, method: str) -> dict[str, Any]:
    """The sections of params.yaml that make the row: shared ones, then the network's, the method's, and the network's own
    settings of the method."""
    settings = table["networks"][network]
    merged = {key: value for key, value in table.items() if key in SECTIONS}
    merged = merge(merged, {key: value for key, value in settings.items() if key in SECTIONS})
    merged = merge(merged, {"train": {**table["methods"][method]}})
    return merge(merged, {"train": settings.get("methods", {}).get(method, {})})


def merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """`first` with the values of `second`, mapping by mapping; {method: ...} of another method replaces the whole mapping."""
    merged = dict(first)
    for key, value in second.items():
        old = merged.get(key)
        mixes = isinstance(old, dict) and isinstance(value, dict) and value.get("method", old.get("method")) == old.get("method")
        merged[key] = merge(old, value) if mixes else value
    return merged


def shorten(params: dict[str, Any], epochs: int) -> dict[str, Any]:
    """The row with another number of epochs, its steps of the learning rate moved in proportion."""
    fit = params["train"]["fit"]
    schedule = fit["schedule"]
    if isinstance(schedule, dict):
        schedule = {**schedule, "every": max(1, round(schedule["every"] * epochs / fit["epochs"]))}
    return merge(params, {"train": {"fit": {"epochs": epochs, "schedule": schedule}}})


def prepared(data: dict[str, Any]) -> Path:
    """The folder of the prepared data, which is made where it is not there yet."""
    folder = OUT / "data" / hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
    if not (folder / "data.json").exists():
        prepare(parse("data", data, Data), folder)
    return folder


def train_row(name: str, table: dict[str, Any], row: tuple[str, str], seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """The record of one training of a row, which is run where there is none yet."""
    params = parameters(table, *row)
    if asked.data:
        params = merge(params, {"data": {"root": asked.data}})
    if asked.epochs:
        params = shorten(params, asked.epochs)
    out = OUT / name / "/".join(row) / (f"{asked.epochs}-epochs" if asked.epochs else "full") / str(seed)
    start = params["train"].pop("start_from", None)
    params["train"]["start"] = str(_start(out / "start", start, row[0], seed, asked))
    parse("train", params["train"], Train)
    if not (out / "record.json").exists():
        print(f"{name} {'/'.join(row)} seed {seed}:", flush=True)
        first_training(params, seed, prepared=prepared(params["data"]), resume=RESUME / name / "-".join(row), out=out)
    return files.read_json(out / "record.json")


def _start(folder: Path, wanted: dict[str, Any] | None, network: str, seed: int, asked: argparse.Namespace) -> Path:
    """The folder of the networks that the training starts from: `count` of another table's row, trained first if need be.
    Each seed puts another of them first."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    count = wanted["count"] if wanted else 0
    for index in range(count):
        assert wanted is not None
        source = argparse.Namespace(epochs=asked.epochs, data=asked.start_data)
        train_row(wanted["table"], read_table(wanted["table"]), (network, wanted["method"]), (seed + index) % count, source)
        there = OUT / wanted["table"] / network / wanted["method"] / (f"{asked.epochs}-epochs" if asked.epochs else "full")
        shutil.copytree(there / str((seed + index) % count) / "model", folder / str(index))
    return folder


def report(table: dict[str, Any], results: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """Ours beside the paper's, as a Markdown table."""
    lines = ["| row | epochs | seeds | accuracy, % | paper, % | difference | s an epoch |", "|---|---:|---:|---:|---:|---:|---:|"]
    for (network, method), records in results.items():
        scores = [100 * record["metrics"]["test_accuracy"] for record in records]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        mean, std = table["expected"][network][method]
        epochs = records[0]["metrics"]["epochs"]
        seconds = statistics.median(record["seconds"] / max(record["metrics"]["epochs"], 1) for record in records)
        ours = statistics.mean(scores)
        lines.append(
            f"| {network}/{method} | {epochs} | {len(scores)} | {ours:.2f}{spread} | {mean:.2f} ± {std:.2f} | {ours - mean:+.2f} | {seconds:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(prog="python -m recipes.run", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("table", help="a file of recipes/, without .yaml")
    parser.add_argument("rows", nargs="*", default=["*"], help="NETWORK/METHOD, * for any text; all where none is given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="another number of epochs than published")
    parser.add_argument("--data", help="where the raw data lies, instead of the table's data.root")
    parser.add_argument("--start-data", help="the same for the networks that transfer learning starts from")
    parser.add_argument("--params", action="store_true", help="print the (one) row as params.yaml and train nothing")
    asked = parser.parse_args(arguments)
    table = read_table(asked.table)
    rows = rows_of(table, asked.rows)
    if asked.params:
        row = parameters(table, *rows[0])
        row["train"].pop("start_from", None)
        print(yaml.safe_dump({**read_params(), **merge({"train": {"start": "data/start"}}, row)}, sort_keys=False), end="")
        return
    results = {row: [train_row(asked.table, table, row, seed, asked) for seed in asked.seeds] for row in rows}
    print(f"\n{lookup(table, 'paper')}\n\n{report(table, results)}")


if __name__ == "__main__":
    guard("recipes.run", main)
