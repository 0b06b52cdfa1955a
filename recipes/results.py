"""Ours beside the paper's, as a Markdown table."""

import statistics
from pathlib import Path
from typing import Any

from pipeline import files, methods
from pipeline.errors import InputError
from recipes.tables import Row, Table, decisive, differences, parameters, rows_of, shorten
from stages import SEED

Result = tuple[Row, dict[str, Any]]  # a row and the record of one training of it
COLUMNS = ("row", "epochs", "seeds", "accuracy, %", "paper, %", "difference", "images/s", "commit", "hardware")
RIGHT = COLUMNS[1:7]


def report(table: Table, results: list[Result]) -> str:
    """One line for each row, length and data; the deviation is that of a sample (n - 1)."""
    groups: dict[tuple[Row, int, str], list[dict[str, Any]]] = {}
    for row, record in results:
        groups.setdefault((row, _epochs(record), record["data"]), []).append(record)
    ruler = [("---:" if name in RIGHT else "---") for name in COLUMNS]
    lines = [_cells(table, row, records) for (row, _, _), records in groups.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (COLUMNS, ruler, *lines))


def _cells(table: Table, row: Row, records: list[dict[str, Any]]) -> list[str]:
    scores = [100 * record["metrics"]["test_accuracy"] for record in records]
    ours, published = statistics.mean(scores), table.expected[row[0]][row[1]]
    mean, std = published or (None, None)
    done, full = sorted({int(record["metrics"]["epochs"]) for record in records}), _planned(parameters(table, row)["train"])
    epochs = " to ".join(map(str, done[:: max(1, len(done) - 1)]))
    speeds = [epoch["images_per_s"] for record in records for epoch in record["history"]]
    return [
        "/".join(row),
        epochs if done == [full] else f"{epochs} of {full}",
        " ".join(str(record["seed"]) for record in records),
        f"{ours:.2f}" + (f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""),
        "" if mean is None else f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else ""),
        "" if mean is None else f"{ours - mean:+.2f}",
        f"{statistics.median(speeds):,.0f}" if speeds else "",
        ", ".join(dict.fromkeys(_commit(record["commit"]) for record in records)),
        ", ".join(dict.fromkeys(_hardware(record) for record in records)),
    ]


def _epochs(record: dict[str, Any]) -> int:
    """Epochs of the training, or of each of its rounds."""
    return record["parameters"]["train"]["fit"]["epochs"]


def _planned(train: dict[str, Any]) -> int:
    """Epochs of all rounds of a row at full length."""
    revive = {**train["revive"], "fit": train["fit"]}
    options = methods.options("revive", "train.revive", revive)
    return sum(methods.load("revive", revive["method"]).create(options).rounds(train["fit"]["epochs"]))


def _commit(commit: str | None) -> str:
    name, dirty, _ = (commit or "none").partition("-dirty")
    return name[:7] + dirty


def _hardware(record: dict[str, Any]) -> str:
    """The GPU, or the CPU with its threads."""
    runtime, hardware = record["parameters"]["runtime"], record["hardware"]
    if hardware["gpus"] and runtime["device"] != "cpu":
        return hardware["gpus"][0]["name"]
    return f"{hardware['cpu']['name']}, threads: {runtime['threads']}"


def write_report(folder: Path, table: Table) -> None:
    """Write `folder`/table.md: every row of the table that has been run and lies in `folder`."""
    results, passed = [], []
    for row in rows_of(table, ["*"]):
        paths = [path for path in (folder / "/".join(row)).glob("*/*/record.json") if SEED.fullmatch(path.parent.name)]
        for path in sorted(paths, key=lambda path: (path.parts[-3] != "full", path.parts[-3], int(path.parts[-2]))):
            record = files.read_json(path)
            if why := _differs(parameters(table, row), record):
                passed.append(f"- {path.parent.relative_to(folder)}: {why}\n")
            else:
                results.append((row, record))
    said = f"Accuracy on the test images; mean ± standard deviation (n - 1) over seeds. {table.runs}"
    text = f"# {table.paper}\n\n{said}\n\n{report(table, results)}"
    if passed:
        text += f"\nPassed over, trained with other parameters than the table says now:\n\n{''.join(passed)}"
    files.write_bytes(folder / "table.md", text.encode())


def _differs(params: dict[str, Any], record: dict[str, Any]) -> str:
    """What is not as in the row, but for the number of epochs; empty where nothing is."""
    train = {key: value for key, value in params["train"].items() if key != "start_from"}
    try:
        wanted = shorten({**params, "train": {**train, "start": "data/start"}}, _epochs(record))
        return "; ".join(differences(decisive(record["parameters"]), decisive(wanted)))
    except (InputError, KeyError, TypeError):
        return "parameters of another version"
