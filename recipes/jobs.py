"""One training of a table: its parameters, its folder, and the trainings that it starts from."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import parse
from pipeline.errors import InputError
from recipes.tables import Row, StartFrom, Table, check, naming, parameters, read_table, shorten
from stages import OUTPUTS

OUT = OUTPUTS / "recipes"


@dataclass(frozen=True)
class Job:
    """One training: a row with one seed. `sources` are those whose networks it starts from, in their order."""

    table: str
    row: Row
    seed: int
    params: dict[str, Any]
    out: Path
    sources: tuple["Job", ...]


def job(name: str, table: Table, row: Row, seed: int, asked: argparse.Namespace, source: bool = False) -> Job:
    """The training, checked as far as it can be before it runs. A `source` is one that others start from."""
    with naming(f"recipes/{name}.yaml, {'/'.join(row)}: "):
        params = parameters(table, row)
        root = asked.start_data if source else asked.data
        if root is not None:
            params["data"] = {**params["data"], "root": root}
        wanted = params["train"].pop("start_from", None)
        params["train"]["start"] = "data/start"
        check(params)
        length = "full"
        if asked.epochs and asked.epochs != params["train"]["fit"]["epochs"]:
            length, params = f"{asked.epochs}-epochs", shorten(params, asked.epochs)
        out = OUT / name / "/".join(row) / length / str(seed)
        sources = []
        if wanted is not None:
            start = parse("train.start_from", wanted, StartFrom)
            if source or start.count > start.of:
                raise InputError("params.yaml: train.start_from: must have count <= of, and name a method that starts afresh")
            there = read_table(start.table)
            if start.method not in there.expected.get(row[0], {}):
                raise InputError(f"params.yaml: train.start_from: {start.table} has no row {row[0]}/{start.method}")
            seeds = [(seed + index) % start.of for index in range(start.count)]
            sources = [job(start.table, there, (row[0], start.method), number, asked, source=True) for number in seeds]
        return Job(name, row, seed, params, out, tuple(sources))
