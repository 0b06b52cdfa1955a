"""One training of a table: its parameters, its folder, and the trainings that it starts from."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import parse
from pipeline.errors import InputError
from pipeline.weights import start_paths
from recipes.tables import Row, StartFrom, Table, check, naming, parameters, read_table, shorten
from stages import OUTPUTS

OUT = OUTPUTS / "recipes"


@dataclass(frozen=True)
class Job:
    """One training: a row with one seed. It starts from the networks of `sources`, in their order, or from what lies in `start`."""

    table: str
    row: Row
    seed: int
    params: dict[str, Any]
    out: Path
    sources: tuple["Job", ...]
    start: Path | None

    def networks(self) -> list[Path]:
        """Model folders and weight files to start from, whether they are there yet or not; none where it starts afresh.
        `InputError` where the row names a folder that holds nothing."""
        if self.start is None:
            return [source.out / "model" for source in self.sources]
        if not (found := start_paths(self.start)):
            raise InputError(
                f"{self.start} holds no weights that {self.table} {'/'.join(self.row)} could start from: put them there"
            )
        return found


def job(name: str, table: Table, row: Row, seed: int, asked: argparse.Namespace, starts: str = "") -> Job:
    """The training, checked as far as it can be before it runs. `starts` is the table of the row that starts from this one."""
    with naming(f"recipes/{name}.yaml, {'/'.join(row)}: "):
        params = parameters(table, row)
        root = asked.start_data if starts not in ("", name) else asked.data
        if root is not None:
            params["data"] = {**params["data"], "root": root}
        wanted, start = params["train"].pop("start_from", None), params["train"].pop("start", None)
        params["train"]["start"] = "data/start"
        check(params)
        full = params["train"]["fit"]["epochs"]
        epochs = asked.epochs or max(1, round((asked.share or 1) * full))
        length = "full" if epochs == full else f"{epochs}-epochs"
        out = OUT / name / "/".join(row) / length / str(seed)
        sources = _sources(name, row, seed, asked, starts, wanted) if wanted else ()
        params = params if epochs == full else shorten(params, epochs)
        return Job(name, row, seed, params, out, sources, Path(start) if start else None)


def _sources(name: str, row: Row, seed: int, asked: argparse.Namespace, starts: str, wanted: Any) -> tuple[Job, ...]:
    """The trainings that `train.start_from` of a row asks for."""
    start = parse("train.start_from", wanted, StartFrom)
    if starts or start.count > start.of:
        raise InputError("params.yaml: train.start_from: must have count <= of, and name a method that starts afresh")
    there = read_table(start.table)
    if start.method not in there.expected.get(row[0], {}):
        raise InputError(f"params.yaml: train.start_from: {start.table} has no row {row[0]}/{start.method}")
    seeds = [(seed + index) % start.of for index in range(start.count)]
    return tuple(job(start.table, there, (row[0], start.method), number, asked, starts=name) for number in seeds)
