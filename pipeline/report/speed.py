"""Speed of a variant beside what its multiply-adds promise: a picture with a row for each precision and setting, and figures."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipeline.report import chart
from pipeline.report.rows import Report, Row, timing
from pipeline.report.table import describe_setting, interval, unstable, write_figure
from pipeline.report.widths import table

WIDTH, TOP, ROW, FOOT = 720, 8, 34, 44
NUMBERS = 172  # kept free for "2.25× of 3.61×"
HEADS = ("", "median", "p90", "p99", "images/s", "speed-up", "by MACs", "reached")


def picture(report: Report, rows: Sequence[Row]) -> str | None:
    """Outlined: the speed-up by MACs alone; filled: the measured one, with its interval; None where there is neither."""
    known = [(row, s) for row in rows if not row.control for s in report.settings if f"speedup_{s}" in row.values]
    if not known:
        return None
    names = [f"{row.precision}, {describe_setting(setting)}" for row, setting in known]
    left = 20 + 7.4 * max(map(len, names))
    most = max(max(row.values[f"speedup_{setting}"], row.values.get("macs_ratio", 1.0)) for row, setting in known)
    x, bottom = chart.Axis(0.0, 1.04 * max(most, 1.0), left, WIDTH - NUMBERS), TOP + ROW * len(known)
    body = chart.level(x, bottom, "speed-up against the control", bottom + FOOT)
    body.append(f'<path class="mark" d="M{x.at(1):.1f} {TOP}V{bottom}"/>')
    for index, ((row, setting), name) in enumerate(zip(known, names, strict=True)):
        body.append(_bar(row, setting, name, x, TOP + ROW * index))
    return chart.svg(WIDTH, bottom + FOOT, "Measured speed-up beside that by MACs", body)


def section(report: Report, rows: Sequence[Row]) -> str:
    """The picture under its heading, how to read it, and what was timed; empty where nothing was."""
    lines = [_line(row, setting) for row in rows for setting in report.settings if f"latency_{setting}_p50_ms" in row.values]
    if not lines:
        return ""
    drawn = picture(report, rows)
    key = (
        "Outlined: what the multiply-adds alone promise; filled: measured call by call beside the control, with its 95 % "
        "interval. The dotted line is the control. Lower precisions have as many multiply-adds, each of them cheaper."
    )
    figure = f"<div class='wide heat'><figure>{drawn}</figure></div><p class=quiet>{key}</p>" if drawn else ""
    told = _conditions(report, rows) + _timings(report, rows)
    return f"<h4>speed, by multiply-adds and measured</h4>{figure}{table(HEADS, lines)}{told}"


def _bar(row: Row, setting: str, name: str, x: chart.Axis, top: float) -> str:
    measured, predicted = row.values[f"speedup_{setting}"], row.values.get("macs_ratio")
    ends = interval(row, f"speedup_{setting}")
    parts = [f'<rect width="{WIDTH}" height="{ROW}" y="{top}" fill-opacity="0"/>']
    parts.append(f'<text class="tick" x="{x.start - 8:.1f}" y="{top + 20}" text-anchor="end">{escape(name)}</text>')
    if predicted:
        parts.append(f'<rect class="full" x="{x.start:.1f}" y="{top + 4}" width="{x.at(predicted) - x.start:.1f}" height="10"/>')
    parts.append(f'<rect class="kept" x="{x.start:.1f}" y="{top + 17}" width="{x.at(measured) - x.start:.1f}" height="10"/>')
    if ends:
        parts.append(f'<path class="event error" d="M{x.at(ends[0]):.1f} {top + 22}H{x.at(ends[1]):.1f}"/>')
    shown = f"{measured:.2f}×" + (f" of {predicted:.2f}×" if predicted else "")
    parts.append(f'<text class="tick" x="{x.end + 10:.1f}" y="{top + 20}">{shown}</text>')
    told = [f"{name}: measured {measured:.2f}×", *([f"{ends[0]:.2f} to {ends[1]:.2f} (95 %)"] if ends else [])]
    told += [f"by MACs {predicted:.2f}×"] if predicted else []
    text = escape("\n".join(told))
    return f'<g class="point" tabindex="0" role="img" aria-label="{text}"><title>{text}</title>{"".join(parts)}</g>'


def _line(row: Row, setting: str) -> str:
    times = [row.values.get(f"latency_{setting}_{key}_ms") for key in ("p50", "p90", "p99")]
    cells = ["" if value is None else write_figure(value, "ms") for value in times]
    if unstable(row, f"latency_{setting}_p50_ms"):
        cells[0] = f"~{cells[0]}"
    if ends := interval(row, f"latency_{setting}_p50_ms"):
        cells[0] += f" [{', '.join(write_figure(end, 'ms', unit=False) for end in ends)}]"
    rate, measured = row.values.get(f"throughput_{setting}_images_per_s"), row.values.get(f"speedup_{setting}")
    predicted = row.values.get("macs_ratio")
    cells.append("" if rate is None else f"{rate:,.0f}")
    cells.append("" if measured is None else f"{measured:.2f}×")
    if measured is not None and (ends := interval(row, f"speedup_{setting}")):
        cells[-1] += f" [{ends[0]:.2f}, {ends[1]:.2f}]"
    cells.append("" if predicted is None else f"{predicted:.2f}×")
    cells.append(f"{100 * measured / predicted:.0f} %" if measured and predicted else "")
    name = escape(f"{row.precision}, {describe_setting(setting)}")
    return f"<tr><th scope=row>{name}</th>{''.join(f'<td>{escape(text)}</td>' for text in cells)}</tr>"


def _conditions(report: Report, rows: Sequence[Row]) -> str:
    """How and where it was timed."""
    chain = next((c for row in rows for c in report.chains if row.stands_for(c) and "profile" in c.records), None)
    if chain is None:
        return ""
    record = chain.records["profile"]
    asked = record["parameters"].get("profile", {})
    named = {"threads": "CPU threads {}", "repeats": "at least {} calls each", "warmup_s": "after {} s or more of warm-up"}
    parts = [text.format(asked[key]) for key, text in named.items() if asked.get(key) is not None]
    parts += [f"pauses of {asked['idle_ms']:g} ms"] if asked.get("idle_ms") else []
    return f"<p class=quiet>{escape(', '.join([*parts, machine(record['hardware'])]))}</p>"


def _timings(report: Report, rows: Sequence[Row]) -> str:
    """What each measurement took and how the machine was right after it, folded; empty where no event tells."""
    lines = []
    for row in rows:
        records = [c.records["profile"] for c in report.chains if row.stands_for(c) and "profile" in c.records]
        for event in (event for record in records for event in record["events"] if event["kind"] == "latency"):
            cells = _timing(event)
            name = escape(f"{row.precision}, {describe_setting(timing(event))}")
            lines.append(f"<tr><th scope=row>{name}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    heads = ("", "pairs of calls", "measurements", "noise", "CPU MHz", "load", "GPU", "libraries", "left to others")
    return f"<details><summary>how each was timed</summary>{table(heads, lines)}</details>" if lines else ""


def _timing(event: Mapping[str, Any]) -> list[str]:
    """The cells of a latency event; empty where it does not tell."""
    now = event.get("machine", {})
    cpu, gpu = now.get("cpu", {}), now.get("gpu", {})
    clock = [f"{gpu['sm_mhz']:g} of {gpu.get('sm_max_mhz', 0):g} MHz"] if isinstance(gpu.get("sm_mhz"), float | int) else []
    clock += list(gpu.get("clock_reasons", []))
    others = [f"{name}: {nodes}" for name, nodes in event.get("elsewhere", {}).items()]
    return [
        f"{event['pairs']:,}" if "pairs" in event else "",
        f"{event['attempts']}" if "attempts" in event else "",
        f"{100 * event['noise']:.1f} %" if "noise" in event else "",
        " to ".join(f"{value:,}" for value in sorted(set(cpu.get("mhz", [])))),
        f"{now['load']:g}" if "load" in now else "",
        ", ".join(clock),
        ", ".join(f"{name} {version}" for name, version in now.get("libraries", {}).items()),
        ", ".join(others),
    ]


def machine(hardware: Mapping[str, Any]) -> str:
    """CPU, memory, GPUs with their driver and clocks, system."""
    cpu, gpus = hardware.get("cpu", {}), hardware.get("gpus", [])
    parts = [f"{cpu.get('name', 'unknown CPU')}, {cpu.get('usable_cores', '?')} cores usable"]
    parts += [f"{hardware['memory_gib']} GiB"] if hardware.get("memory_gib") else []
    for gpu in gpus:
        rest = [f"{key.replace('_', ' ')} {value}" for key, value in gpu.items() if key not in ("name", "memory_mib") and value]
        parts.append(f"{gpu.get('name', 'GPU')} ({', '.join(rest)})" if rest else str(gpu.get("name", "GPU")))
    parts += [] if gpus else ["no GPU"]
    return ", ".join([*parts, str(hardware.get("system", "")), f"Python {hardware.get('python', '?')}"])
