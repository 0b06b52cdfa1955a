"""Run rows of a published table over seeds and print ours beside the paper's.

    python -m recipes.run kflo_cifar10 'cifar_quick/*' --seeds 0 1 2 [--epochs 30] [--data data/cifar10.npz]

A row is NETWORK/METHOD of recipes/TABLE.yaml (tables.py says how it is made). Trainings that are there already are not repeated,
one that was interrupted goes on where it was saved last, and one that was made with other parameters or data is refused, not
reused. Several runners may work at once; one that needs what another is making waits. Everything lies under outputs/recipes/:

    data/KEY/                                           prepared data
    TABLE/NETWORK/METHOD/full or N-epochs/SEED/         model/, record.json, and start*/ with the networks it started from
    TABLE/table.md                                      every row of the table that has been run so far

`--params` prints a row as params.yaml instead, so that the whole chain can be built from it.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pipeline import files
from pipeline.config import Data, parse, read_params
from pipeline.data.prepare import prepare
from pipeline.errors import InputError
from pipeline.first_training import first_training
from recipes.jobs import OUT, Job, job
from recipes.results import report, write_report
from recipes.tables import SECTIONS, Row, Table, decisive, differences, read_table, rows_of
from stages import SEED, guard


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other runner works in `folder`. The system ends the claim with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: waiting for another runner that works on it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepared(data: dict[str, Any]) -> Path:
    """The folder of the prepared data, which is made where it is not there yet, or where the raw file is another one."""
    raw = Path(data["root"])
    state = [raw.stat().st_size, raw.stat().st_mtime_ns] if raw.is_file() else None
    folder = OUT / "data" / hashlib.sha256(json.dumps([data, state], sort_keys=True).encode()).hexdigest()[:12]
    with alone(OUT / "data"):
        if not (folder / "data.json").exists():
            prepare(parse("data", data, Data), folder)
    return folder


def finished(job: Job) -> dict[str, Any] | None:
    """The job's record, or None where it has none; `InputError` where it was made with something else than is asked now."""
    path = job.out / "record.json"
    if not path.exists():
        return None
    record = files.read_json(path)
    try:
        found = differences(decisive(record["parameters"]), decisive(job.params))
        if start_name(job) not in (None, Path(record["parameters"]["train"]["start"]).name):
            found.append("other networks to start from")
    except (InputError, KeyError, TypeError):
        found = ["parameters of another version"]
    if record["data"] != files.read_json(prepared(job.params["data"]) / "data.json")["fingerprint"]:
        found.append(f"other data than {job.params['data']['root']} holds")
    if found:
        raise InputError(f"{job.out} was trained with {'; '.join(found)}: move it away to train again")
    return record


def start_name(job: Job) -> str | None:
    """The name of the folder with the networks that the job starts from: other weights, another name. None: not all are there."""
    networks = job.networks()
    cards = [path if path.is_file() else path / "model.json" for path in networks]
    if not all(card.exists() for card in cards) or not all((source.out / "record.json").exists() for source in job.sources):
        return None
    weights = "".join(
        files.read_json(card)["weights_sha256"] if card.name == "model.json" else files.sha256(card) for card in cards
    )
    return f"start-{hashlib.sha256(weights.encode()).hexdigest()[:12]}" if weights else "start"


def start_folder(job: Job) -> Path:
    """Links to what the job starts from, made anew each time; empty where it starts afresh."""
    for old in job.out.glob("start*"):
        shutil.rmtree(old)
    folder = job.out / (start_name(job) or "start")
    folder.mkdir()
    for index, path in enumerate(job.networks()):
        name = f"{index:03}{path.suffix if path.is_file() else ''}"
        (folder / name).symlink_to(os.path.relpath(path, folder), target_is_directory=path.is_dir())
    return folder


def train(job: Job) -> dict[str, Any]:
    """The record of the job, which is run where it has none yet."""
    with alone(job.out):
        if (record := finished(job)) is not None:
            return record
        for source in job.sources:
            train(source)
        data, resume = prepared(job.params["data"]), job.out / "resume"
        print(f"{job.table} {'/'.join(job.row)} seed {job.seed}:", flush=True)
        params = {**job.params, "train": {**job.params["train"], "start": str(start_folder(job))}}
        first_training(params, job.seed, prepared=data, resume=resume, out=job.out)
        shutil.rmtree(resume, ignore_errors=True)
        return files.read_json(job.out / "record.json")


def as_params(name: str, table: Table, rows: list[Row], asked: argparse.Namespace) -> str:
    """The row as a whole params.yaml: what it does not say is as in the present one."""
    if len(rows) > 1:
        raise InputError(f"--params prints one row; give one of {', '.join('/'.join(row) for row in rows)}")
    made = job(name, table, rows[0], 0, asked)
    params = read_params()
    params |= {key: made.params[key] for key in SECTIONS} | {"seed": asked.seeds or params.get("seed")}
    lines = [f"# {'/'.join(rows[0])} of recipes/{name}.yaml; the blocks after `train` are those of params.yaml as it was"]
    if made.start is None:
        for index, path in enumerate(made.networks()):
            lines.append(f"# To start as the row does, copy {path} to data/start/{index:03}")
    return "\n".join([*lines, yaml.safe_dump(json.loads(json.dumps(params)), sort_keys=False, width=132)])


def _options(arguments: list[str] | None) -> argparse.Namespace:
    def number(text: str, least: int = 0) -> int:
        if not SEED.fullmatch(text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} up")
        return int(text)

    def share(text: str) -> float:
        if not re.fullmatch(r"0?\.\d+|1(\.0*)?", text) or not float(text):
            raise argparse.ArgumentTypeError(f"{text!r} is no share above 0 and up to 1")
        return float(text)

    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m recipes.run", description=__doc__.splitlines()[0])
    parser.add_argument("table", metavar="TABLE", help="a file of recipes/, without .yaml")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="NETWORK/METHOD, * for any text; all where none is given")
    parser.add_argument("--seeds", type=number, nargs="+", help="0 1 2 where none is given")
    parser.add_argument(
        "--epochs", type=partial(number, least=1), help="another number than published, also for networks to start from"
    )
    parser.add_argument("--share", type=share, help="a share of the published epochs of each training, instead")
    parser.add_argument("--data", help="where the raw data lies, instead of the table's data.root")
    parser.add_argument("--start-data", help="the same for the networks that transfer learning starts from")
    parser.add_argument("--params", action="store_true", help="print the one row as params.yaml and train nothing")
    asked = parser.parse_intermixed_args(arguments)
    if asked.epochs and asked.share:
        raise InputError("--epochs and --share both say how long to train: give one")
    if len(set(asked.seeds or [])) < len(asked.seeds or []):
        raise InputError(f"--seeds {' '.join(map(str, asked.seeds))}: each must be there once")
    for option, path in (("--data", asked.data), ("--start-data", asked.start_data)):
        if path is not None and not Path(path).exists():
            raise InputError(f"{option} {path} does not exist: give the folder or the .npz file of the raw data")
    return asked


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing and print the table."""
    asked = _options(arguments)
    table = read_table(asked.table)
    rows = rows_of(table, asked.rows or ["*"])
    if asked.params:
        print(as_params(asked.table, table, rows, asked), end="")
        return
    jobs = [job(asked.table, table, row, seed, asked) for row in rows for seed in asked.seeds or (0, 1, 2)]
    for each in jobs:
        finished(each)  # refuse now rather than after hours of the trainings before it
    results = []
    try:
        for each in jobs:
            results.append((each.row, train(each)))
            write_report(OUT / asked.table, table)
    except KeyboardInterrupt:
        print("\nrecipes.run: interrupted; the same command goes on where it was saved last", file=sys.stderr)
        sys.exit(130)
    print(f"\n{table.paper}\n\n{report(table, results)}\nAll rows that have been run: {OUT / asked.table / 'table.md'}")


if __name__ == "__main__":
    guard("recipes.run", main)
