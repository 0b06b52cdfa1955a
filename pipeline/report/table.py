"""The report's table as text: how each figure is written, Markdown, and a form for terminals."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.lineage import BASE
from pipeline.report.rows import ACCURACY, QUANTIZED, Report, Row

MISSING = "–"
STAGE_COLUMNS = ("accuracy_train", "accuracy_revive", "accuracy_compress", "accuracy_collapse")
DEVICES = {"cpu": "CPU", "cuda": "CUDA", "tensorrt": "TensorRT", "cuda_graph": "CUDA graphs"}
MODES = {"idle": "after a pause", "copies": "with host copies", "graph": "as a CUDA graph"}
CONTROL, CHAMPION = "*", "★"  # behind a name
UNITS = {"percent": " %", "points": " pt", "count": "", "millions": " M", "mb": " MB", "ms": " ms", "times": "×", "metres": " m"}


@dataclass(frozen=True)
class Column:
    """A column of the table: its key in a row, its title, how it is written."""

    key: str
    title: str
    form: str  # one of UNITS
    short: str = ""  # a title for terminals


def columns(report: Report, *, stages: bool = False) -> list[Column]:
    """The columns worth showing: what was measured for any row. `stages` adds the accuracy along the chain."""
    names = report.names
    along = [Column(key, f"after {key.removeprefix('accuracy_')}", "percent") for key in STAGE_COLUMNS if stages]
    fixed = [
        *along,
        Column(ACCURACY, names.title, "percent"),
        Column("accuracy_change", "change", "points"),
        *([Column(QUANTIZED, f"against {BASE}", "points")] if report.axis("precision") != [BASE] else []),
        *(Column(key, title, form) for key, (title, form) in names.beside.items()),
        Column("parameters", "parameters", "count"),
        Column("macs", "MACs", "millions"),
        Column("size_mb", "size", "mb"),
    ]
    return [*fixed, *timed(report.plain)]


def timed(settings: Sequence[str]) -> list[Column]:
    """Latency and speed-up at each setting."""
    found = []
    for setting in settings:
        device = describe_setting(setting)
        found.append(Column(f"latency_{setting}_p50_ms", f"latency {device}", "ms", device.replace("batch ", "b")))
        found.append(Column(f"speedup_{setting}", f"speed-up {device}", "times", "speed-up"))
    return found


def describe_setting(setting: str) -> str:
    """cpu_b32 -> CPU batch 32; cpu_b1_idle -> CPU batch 1, after a pause."""
    provider, _, rest = setting.partition("_b")
    batch, _, mode = rest.partition("_")
    return f"{DEVICES.get(provider, provider)} batch {batch}" + (f", {MODES.get(mode, mode)}" if mode else "")


def titled(report: Report, key: str) -> str:
    """What a column is called, with its unit where that is not part of every figure: for rules."""
    column = next((c for c in [*columns(report), *timed(report.settings)] if c.key == key), None)
    if column is None:
        return report.names.title if key in ("accuracy", report.names.headline) else key.replace("_", " ")
    return column.title + {"ms": " (ms)", "mb": " (MB)"}.get(column.form, "")


def write_figure(value: float, form: str, *, unit: bool = True) -> str:
    """A figure, with its unit or without: three digits where it is a measurement."""
    number = {
        "percent": lambda: f"{100 * value:.2f}",
        "points": lambda: f"{round(100 * value, 2) + 0.0:+.2f}",  # + 0.0: no -0.00
        "count": lambda: f"{value:,.0f}",
        "millions": lambda: _digits(value / 1e6),
        "mb": lambda: _digits(value),
        "ms": lambda: _digits(value),
        "times": lambda: f"{value:.2f}",
        "metres": lambda: f"{value:.3f}",
    }[form]()
    return number + UNITS[form] if unit else number


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".removesuffix(".")


def interval(row: Row, key: str) -> tuple[float, float] | None:
    """The 95 % interval of a latency's median or of a speed-up, where the row has one."""
    stem, unit = (key.removesuffix("_p50_ms"), "_ms") if key.endswith("_p50_ms") else (key, "")
    ends = row.values.get(f"{stem}_ci_low{unit}"), row.values.get(f"{stem}_ci_high{unit}")
    return None if ends[0] is None or ends[1] is None else (ends[0], ends[1])


def cell(row: Row, column: Column, *, detail: bool = True) -> str:
    """A figure with ± its standard deviation or [its interval], or the sign of a missing one."""
    value = row.values.get(column.key)
    if value is None:
        return MISSING
    shown = ("~" if unstable(row, column.key) else "") + write_figure(value, column.form)
    if detail and row.spread.get(column.key, 0.0) > 1e-9 * abs(value):
        return f"{shown} ± {_spread(row.spread[column.key], column.form)}"
    if detail and (ends := interval(row, column.key)):
        return f"{shown} [{', '.join(write_figure(end, column.form, unit=False) for end in ends)}]"
    return shown


def unstable(row: Row, key: str) -> bool:
    """Whether the figure is a time, or a ratio of times, that was still noisy after all attempts."""
    setting = key.removeprefix("latency_").removeprefix("speedup_").removesuffix("_p50_ms")
    return f"unstable_{setting}" in row.values and key != setting


def _spread(value: float, form: str) -> str:
    """A standard deviation in the unit of its figure: two digits, and no fewer decimals than the figure has."""
    if form in ("percent", "points", "times"):
        return write_figure(value, form, unit=False).lstrip("+")
    value = value / 1e6 if form == "millions" else value
    return f"{value:,.0f}" if form == "count" or value >= 100 else f"{value:#.2g}".removesuffix(".")


def missing_notes(report: Report) -> list[str]:
    """One line for each figure that any row lacks, and for each provider that was absent."""
    notes = [f"{DEVICES.get(name, name)}: not measured: provider {name} absent ({why})" for name, why in report.absent.items()]
    for column in columns(report, stages=True):
        reasons: dict[str, list[str]] = {}
        for row in [*report.rows, *report.means]:
            if column.key not in row.values:
                reasons.setdefault(report.why_missing(row, column.key), []).append(row.name)
        notes += [f"{column.title}, {', '.join(names)}: {why}" for why, names in reasons.items()]
    return notes


def markdown(report: Report) -> str:
    """table.md, aligned so that a terminal shows it too: the means (with several seeds), every variant, the score along the chain,
    the latencies with their intervals, and what was not measured."""
    shown = columns(report)
    parts = [_aligned(report, report.rows, shown), marks(report)]
    if report.means:
        head = "Mean ± sample standard deviation over n seeds:"
        parts = [head, _aligned(report, report.means, shown), "Every variant:", *parts]
    trained = [row for row in report.rows if any(row.stands_for(group[0]) for group in report.variants)]
    along = [column for column in columns(report, stages=True) if column.key in STAGE_COLUMNS]
    parts += [f"{report.names.title[0].upper()}{report.names.title[1:]} along the chain:", _aligned(report, trained, along)]
    if times := timed(report.plain):
        parts += ["With 95 % intervals:", _aligned(report, report.rows, times, detail=True)]
    notes = "\n".join(f"- {_plain(note)}" for note in missing_notes(report))
    return "\n\n".join([*parts, explanation(report), *([notes] if notes else [])]) + "\n"


def marks(report: Report) -> str:
    """What the signs behind names mean, and who was chosen or came nearest."""
    told, signs = report.champion or {}, [f"\\{CONTROL} the control"] if any(row.control for row in report.rows) else []
    if told.get("champion"):
        signs.append(f"{CHAMPION} the champion: {_plain(str(told.get('reason') or ''))}")
    elif told:
        signs.append(f"no champion: {_plain(str(told.get('reason') or ''))}")
    return "; ".join(signs)


def explanation(report: Report) -> str:
    """What the columns are."""
    return f"{report.names.meaning}, of the ONNX file unless it says after which stage. {EXPLANATION}"


EXPLANATION = (
    "MAC: one multiply-add counts one; for one "
    "image. Size: of the ONNX file, 10^6 bytes. Latency: median of one call, [95 % interval]. Speed-up: median of the paired "
    "ratios to the control, marked *, measured call by call beside it; ~ before a time or "
    "a speed-up: still noisy after all attempts. Change: against the control of the same seed, in points."
)


def text(report: Report, rows: Sequence[Row], shown: Sequence[Column]) -> str:
    """The table for a terminal: one line a row, columns aligned; the control is marked *, the champion ★."""
    lines = _cells(report, rows, shown, detail=False)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(_padded(line, widths)) for line in lines)


def _aligned(report: Report, rows: Sequence[Row], shown: Sequence[Column], *, detail: bool = False) -> str:
    """The same in Markdown."""
    lines = [[_plain(cell) for cell in line] for line in _cells(report, rows, shown, detail=detail)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if index < 2 else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    head, *body = (_padded(line, widths) for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def _cells(report: Report, rows: Sequence[Row], shown: Sequence[Column], *, detail: bool) -> list[list[str]]:
    """Titles and rows; `detail` adds intervals, standard deviations are always there."""
    several = any(row.count > 1 for row in rows)
    lines = [["variant", "precision", *(["n"] if several else []), *(column.short or column.title for column in shown)]]
    for row in rows:
        sign = [CONTROL] * row.control + [CHAMPION] * report.chosen(row)
        figures = (cell(row, column, detail=detail or row.count > 1) for column in shown)
        lines.append([" ".join([row.name, *sign]), row.precision, *([str(row.count)] if several else []), *figures])
    return lines


def _padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Texts to the left, figures to the right."""
    return [
        text.ljust(width) if place < 2 else text.rjust(width) for place, (text, width) in enumerate(zip(line, widths, strict=True))
    ]


def _plain(text: str) -> str:
    """Text that Markdown, and HTML within it, takes literally."""
    for sign, safe in (("&", "&amp;"), ("|", "&#124;"), ("\n", " "), ("*", "\\*"), ("`", "\\`")):
        text = text.replace(sign, safe)
    return re.sub(r"<(?![=\s])", "&lt;", re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text))
