"""The report's table as text: how each figure is written, Markdown, and a form for terminals."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.rows import ACCURACY, Report, Row

MISSING = "–"
STAGE_COLUMNS = ("accuracy_train", "accuracy_revive", "accuracy_compress", "accuracy_collapse")
DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
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
        *(Column(key, title, form) for key, (title, form) in names.beside.items()),
        Column("parameters", "parameters", "count"),
        Column("macs", "MACs", "millions"),
        Column("size_mb", "size", "mb"),
    ]
    timed = []
    for setting in report.settings:
        device = describe_setting(setting)
        timed.append(Column(f"latency_{setting}_p50_ms", f"latency {device}", "ms", device.replace("batch ", "b")))
        timed.append(Column(f"speedup_{setting}", f"speed-up {device}", "times", "speed-up"))
    return [*fixed, *timed]


def describe_setting(setting: str) -> str:
    """cpu_b32 -> CPU batch 32."""
    provider, _, batch = setting.rpartition("_b")
    return f"{DEVICES.get(provider, provider)} batch {batch}"


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
    """table.md: the means (with several seeds), every variant, and what was not measured."""
    shown = columns(report, stages=True)
    parts = [_markdown_table(report.rows, shown), explanation(report)]
    if report.means:
        head = "Mean ± sample standard deviation over n seeds:"
        parts = [head, _markdown_table(report.means, shown), "Every variant:", *parts]
    notes = "\n".join(f"- {_plain(note)}" for note in missing_notes(report))
    return "\n\n".join([*parts, notes] if notes else parts) + "\n"


def explanation(report: Report) -> str:
    """What the columns are."""
    return f"{report.names.meaning}, of the ONNX file unless it says after which stage. {EXPLANATION}"


EXPLANATION = (
    "MAC: one multiply-add counts one; for one "
    "image. Size: of the ONNX file, 10^6 bytes. Latency: median of one call, [95 % interval]. Speed-up: median of the paired "
    "ratios to the control, marked *, measured call by call beside it; ~ before a time or "
    "a speed-up: still noisy after all attempts. Change: against the control of the same seed, in points."
)


def text(rows: Sequence[Row], shown: Sequence[Column]) -> str:
    """The table for a terminal: one line a row, columns aligned; the control is marked *."""
    several = any(row.count > 1 for row in rows)
    count = lambda text: [text] if several else []  # noqa: E731
    lines = [["variant", *count("n"), *(column.short or column.title for column in shown)]]
    lines += [[_name(row), *count(str(row.count)), *(cell(row, column, detail=row.count > 1) for column in shown)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    first = [line[0].ljust(widths[0]) for line in lines]
    rest = ["  ".join(map(str.rjust, line[1:], widths[1:])) for line in lines]
    return "\n".join(map("  ".join, zip(first, rest, strict=True)))


def _markdown_table(rows: list[Row], shown: Sequence[Column]) -> str:
    several = any(row.count > 1 for row in rows)
    head = ["variant", *(["n"] if several else []), *(column.title for column in shown)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in rows:
        lines.append([_plain(_name(row)), *([str(row.count)] if several else []), *(cell(row, column) for column in shown)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(row: Row) -> str:
    return f"{row.name} *" if row.control else row.name


def _plain(text: str) -> str:
    """Text that Markdown, and HTML within it, takes literally."""
    for sign, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", " "), ("*", "\\*"), ("_", "\\_"), ("`", "\\`")):
        text = text.replace(sign, safe)
    return text
