"""The report's files: table.csv, table.md, metrics.json, plots and one page, from the records of a grid."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.report import page, plots, table
from pipeline.report.rows import ACCURACY, SOURCES, Report, build


def write(records: Iterable[dict[str, Any]], folder: Path, champion: Mapping[str, Any] | None = None) -> Report:
    """Write table.csv, table.md, metrics.json, the plots (SVG and PNG) and index.html into `folder`; `champion` is the content of
    champion.json. Equal records give equal bytes."""
    report = build(records, champion)
    files.write_bytes(folder / "table.csv", as_csv(report).encode())
    files.write_bytes(folder / "table.md", table.markdown(report).encode())
    files.write_json(folder / "metrics.json", flat_metrics(report))
    plots.write(report, folder)
    files.write_bytes(folder / "index.html", page.render(report).encode())
    return report


def as_csv(report: Report) -> str:
    """Every figure at full precision; an empty cell was not measured. Means follow the variants, their seed is empty."""
    keys = list(dict.fromkeys([*SOURCES, *(key for row in report.rows for key in row.values)]))
    spreads = [f"{key}_std" for key in keys] if report.means else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    titles = map(report.names.rename, [*keys, *spreads])
    writer.writerow(["variant", "revive", "compress", "seed", "precision", "n", "control", "champion", *titles])
    for row in [*report.rows, *report.means]:
        head = [row.name, row.revive, row.compress, "" if row.seed is None else row.seed, row.precision]
        head += [row.count, int(row.control), int(report.chosen(row))]
        figures = [row.values.get(key, "") for key in keys] + [row.spread.get(key, "") for key in keys if spreads]
        writer.writerow([*head, *figures])
    return out.getvalue()


def flat_metrics(report: Report) -> dict[str, dict[str, float]]:
    """Figures by variant for `dvc metrics show`: what a decision needs, what was not measured left out."""
    latencies = [f"{kind}_{setting}{end}" for setting in report.plain for kind, end in (("latency", "_p50_ms"), ("speedup", ""))]
    names = report.names
    keys = {ACCURACY: names.headline} | {key: key for key in (*names.beside, "parameters", "macs", "size_mb", *latencies)}
    return {row.name: {new: row.values[key] for key, new in keys.items() if key in row.values} for row in report.compared}


def format_table(report: Report) -> str:
    """The table for a terminal: the means where there are several seeds, then who was chosen and what was not measured."""
    lines = table.text(report, report.compared, table.columns(report))
    told = table.marks(report).replace("\\", "")
    return "\n".join([lines, *([told] if told else []), *table.missing_notes(report)])
