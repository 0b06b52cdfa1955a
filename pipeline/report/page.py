"""index.html: one page that opens without a network and lets a reader choose a variant.

Everything that comes from records passes `escape`; style, script and charts are inline.
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from pipeline.lineage import Chain, flat_parameters
from pipeline.report import chart, section
from pipeline.report.rows import ACCURACY, Report, Row, pareto, picks
from pipeline.report.table import MISSING, Column, cell, columns, describe_setting, explanation, missing_notes

LOAD = """\
import json
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
mean, std = (np.float32(json.loads(facts[name])).reshape(-1, 1, 1) for name in ("mean", "std"))
images = (pixels.astype(np.float32) / 255 - mean) / std  # pixels: uint8 (N, C, H, W), C, H, W as facts["shape"] says
# where facts["crop"] is not null, pixels are the middle of an image whose shorter side was resized to facts["crop"]["resize"]
"""
ANSWERS = {
    "classify": """\
(logits,) = session.run(["logits"], {"images": images})  # (N, classes)
answers = [json.loads(facts["classes"])[index] for index in logits.argmax(1)]
""",
    "segment": """\
(logits,) = session.run(["logits"], {"images": images})  # (N, 1, H, W)
answers = logits[:, 0] > 0  # masks (N, H, W)
""",
    "depth": """\
(depth,) = session.run(["depth"], {"images": images})  # (N, 1, H, W)
answers = depth[:, 0]  # metres (N, H, W)
""",
}


def render(report: Report) -> str:
    """The page as HTML text."""
    template = Template(Path(__file__).with_name("page.html").read_text())
    return template.substitute(
        title=escape(_title(report)),
        summary=_summary(report),
        sure=escape(_certainty(report)),
        charts=_charts(report),
        legend=_legend(report),
        table=_tables(report),
        explanation=escape(explanation(report).replace("marked *,", "")),
        missing=section.bullets(missing_notes(report), "missing"),
        variants="\n".join(_variant(report, row, chain) for row, chain in zip(report.rows, report.chains, strict=True)),
        conditions=_conditions(report),
        score=escape(_capital(report.names.title)),
        load=escape(LOAD + ANSWERS[report.names.task]),
    )


def _title(report: Report) -> str:
    count, seeds = len(report.compared), len({row.seed for row in report.rows})
    several = f"{count} variants" if count != 1 else "1 variant"
    several += f", {seeds} seeds each," if seeds > 1 else ""
    flat = flat_parameters(report.chains[0].records) if report.chains else {}
    network, data = flat.get("model.name"), flat.get("data.name")
    return several + (f" of {network}" if network else "") + (f" on {data}" if data else "")


def _summary(report: Report) -> str:
    """The best by each measure and the control, a card each; one that is best twice appears once."""
    titles: dict[str, list[str]] = {}
    chosen = picks(report)
    for title, row in chosen.items():
        titles.setdefault(row.name, []).append(title)
    control = next((row for row in report.compared if row.control), None)
    if control is not None and chosen:
        titles.setdefault(control.name, []).append("control")
        chosen["control"] = control
    rows, best = {row.name: row for row in chosen.values()}, f"highest {report.names.title}"
    cards = []
    for name, told in titles.items():
        row = rows[name]
        told = [best if word == "most accurate" and report.names.task != "classify" else word for word in told]
        title = " and ".join([", ".join(told[:-1]), told[-1]] if told[1:] else told)
        compared = "the same training without a method" if row.control else _against_control(row)
        cards.append(
            f"<li><h3>{escape(_capital(title))}</h3><p class=who><a href='#{_anchor(report, row)}'>{escape(name)}</a></p>"
            f"<p class=big>{escape(_brief(report, row))}</p><p>{escape(compared)}</p></li>"
        )
    return f"<ul class=cards>{''.join(cards)}</ul>" if cards else "<p>No variant has an exported model yet.</p>"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:] if text[0].isascii() else text  # δ1 keeps its sign


def _brief(report: Report, row: Row) -> str:
    shown = [c for c in columns(report) if c.key in (ACCURACY, "size_mb") or c.key == _latency(report)]
    return " · ".join(cell(row, column, detail=row.count > 1) for column in shown if column.key in row.values)


def _latency(report: Report) -> str | None:
    return next((cost for cost in report.costs if cost.startswith("latency_")), None)


def _against_control(row: Row) -> str:
    parts = []
    if (change := row.values.get("accuracy_change")) is not None:
        parts.append(f"{100 * change:+.2f} points")
    for key, word in (("macs_ratio", "MACs"), ("size_ratio", "size")):
        if (ratio := row.values.get(key)) is not None:
            parts.append(f"same {word}" if abs(ratio - 1) < 0.005 else f"{word} ÷ {ratio:.2f}")
    speedup = next((key for key in row.values if key.startswith("speedup_") and "_ci_" not in key), None)
    if speedup:
        parts.append(f"speed × {row.values[speedup]:.2f} ({describe_setting(speedup.removeprefix('speedup_'))})")
    return f"against the control: {', '.join(parts)}" if parts else "there is no control to compare with"


def _certainty(report: Report) -> str:
    """How far the test split can tell accuracies apart."""
    images = next((n for chain in report.chains if (n := chain.metric("prepare", "test_images"))), None)
    known = [row.values[ACCURACY] for row in report.compared if ACCURACY in row.values]
    if not images or not known:
        return ""
    seeds = len({row.seed for row in report.rows})
    means = f" Figures are means ± sample standard deviations over {seeds} seeds." if report.means else " Only one seed was run."
    if report.names.task != "classify":
        return (
            f"{images:,.0f} test images, whose pixels are not independent: how far their {report.names.title} is certain, only"
            f" several seeds can tell.{means}"
        )
    best = max(known)
    half = 1.96 * math.sqrt(max(best * (1 - best), 0.25 / images) / images)
    text = (
        f"{images:,.0f} test images tell an accuracy of {100 * best:.1f} % to about ± {100 * half:.1f} points (95 %): "
        "smaller differences may be chance."
    )
    return text + means


def _charts(report: Report) -> str:
    """A chart for each cost, behind radio buttons that work without a script."""
    titles = {column.key: column for column in columns(report)}
    inputs, labels, panels = [], [], []
    for index, cost in enumerate(report.costs):
        column, checked = titles[cost], " checked" if index == 0 else ""
        unit, factor = {"macs": ("millions", 1e6), "size_mb": ("MB", 1.0)}.get(cost, ("ms", 1.0))
        inputs.append(f'<input type=radio name=cost id="cost{index}"{checked}>')
        labels.append(f'<label for="cost{index}">{escape(column.title)}</label>')
        drawn = chart.scatter(_points(report, cost), f"{column.title}, {unit}", f"test {report.names.title}, %", factor)
        panels.append(f"<figure>{drawn}</figure>")
    if not panels:
        return f"<p>Nothing to draw: no {escape(report.names.title)} or no cost was measured.</p>"
    return f"<div class=tabs>{''.join(inputs)}<div class=labels>{''.join(labels)}</div>{''.join(panels)}</div>"


def _points(report: Report, cost: str) -> list[chart.Point]:
    rows = [row for row in report.compared if cost in row.values and ACCURACY in row.values]
    front = pareto([(row.values[cost], row.values[ACCURACY]) for row in rows])
    revive, compress = (list(dict.fromkeys(getattr(row, axis) for row in report.rows)) for axis in ("revive", "compress"))
    points = []
    for row, on_front in zip(rows, front, strict=True):
        lines = [f"{column.title}: {cell(row, column)}" for column in columns(report)]
        place = compress.index(row.compress), revive.index(row.revive)
        error = row.spread.get(ACCURACY, 0.0)
        points.append(chart.Point(row.name, row.values[cost], row.values[ACCURACY], *place, on_front, lines, error))
    return points


def _legend(report: Report) -> str:
    """Colours are the compress blocks, shapes the revive blocks."""
    revive, compress = (list(dict.fromkeys(getattr(row, axis) for row in report.rows)) for axis in ("revive", "compress"))
    swatch = '<svg viewBox="0 0 20 20" aria-hidden="true"><path d="{}" fill="{}"/></svg>{}'
    colors = [swatch.format(chart.shape(1, 10, 10, 6), chart.color(i), escape(name)) for i, name in enumerate(compress)]
    shapes = [swatch.format(chart.shape(i, 10, 10, 6), "currentColor", escape(name)) for i, name in enumerate(revive)]
    item = lambda entries: "".join(f"<li>{entry}</li>" for entry in entries)  # noqa: E731
    return f"<ul class=legend><li>compress</li>{item(colors)}</ul><ul class=legend><li>revive</li>{item(shapes)}</ul>"


def _tables(report: Report) -> str:
    shown = columns(report)
    if not report.means:
        return _table(report, report.rows, shown)
    return (
        f"{_table(report, report.means, shown)}<details><summary>Every seed</summary>{_table(report, report.rows, shown)}</details>"
    )


def _table(report: Report, rows: list[Row], shown: Sequence[Column]) -> str:
    several = any(row.count > 1 for row in rows)
    head = "".join(f"<th scope=col><button type=button>{escape(column.title)}</button></th>" for column in shown)
    body = []
    for row in rows:
        name = f"<a href='#{_anchor(report, row)}'>{escape(row.name)}</a>{' <small>control</small>' if row.control else ''}"
        counted = f"<small> n = {row.count}</small>" if several else ""
        cells = "".join(_cell(report, row, column) for column in shown)
        body.append(f'<tr><th scope=row data-value="{escape(row.name)}">{name}{counted}</th>{cells}</tr>')
    first = "<th scope=col><button type=button>variant</button></th>"
    return (
        f"<div class=wide><table class=sortable><thead><tr>{first}{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(report: Report, row: Row, column: Column) -> str:
    value = row.values.get(column.key)
    if value is None:
        return f'<td class=missing title="{escape(report.why_missing(row, column.key))}">not measured</td>'
    figure, _, rest = cell(row, column).replace(" ±", "\t±").replace(" [", "\t[").partition("\t")
    return f'<td data-value="{value!r}">{escape(figure)}{f"<small>{escape(rest)}</small>" if rest else ""}</td>'


def _variant(report: Report, row: Row, chain: Chain) -> str:
    head = f"<b>{escape(row.name)}</b> <span>{escape(_brief(report, row) or MISSING)}</span>"
    control = next((r.name for r in report.rows if r.control and r.seed == row.seed), None)
    beside = next((other for other in report.chains if other.name == control), None)
    inside = section.render(chain, beside)
    return f'<details class=variant id="{_anchor(report, row)}"><summary>{head}</summary>{inside}</details>'


def _conditions(report: Report) -> str:
    """Hardware, versions, commit and dates, each distinct one once, with the stages it holds for."""
    seen: dict[str, dict[str, list[str]]] = {}
    for chain in report.chains:
        for stage, record in chain.records.items():
            day = record["started"][:10]
            for title, value in (("hardware", _machine(record["hardware"])), ("versions", record["versions"]), ("day", day)):
                text = value if isinstance(value, str) else ", ".join(f"{k} {v}" for k, v in value.items())
                stages = seen.setdefault(title, {}).setdefault(text, [])
                stages += [stage] if stage not in stages else []
            for title in ("commit", "data"):
                stages = seen.setdefault(title, {}).setdefault(str(record[title] or "unknown"), [])
                stages += [stage] if stage not in stages else []
    items = []
    for title, texts in seen.items():
        for text, stages in texts.items():
            where = f" <small>({escape(', '.join(stages))})</small>" if len(texts) > 1 else ""
            items.append(f"<dt>{title}</dt><dd>{escape(text)}{where}</dd>")
    return f"<dl>{''.join(items)}</dl>"


def _machine(hardware: dict[str, Any]) -> str:
    cpu, gpus = hardware.get("cpu", {}), hardware.get("gpus", [])
    parts = [f"{cpu.get('name', 'unknown CPU')}, {cpu.get('usable_cores', '?')} cores usable"]
    parts += [f"{hardware['memory_gib']} GiB"] if hardware.get("memory_gib") else []
    parts += [" ".join(str(gpu.get(key, "")) for key in ("name", "driver")) for gpu in gpus] or ["no GPU"]
    return ", ".join([*parts, str(hardware.get("system", "")), f"Python {hardware.get('python', '?')}"])


def _anchor(report: Report, row: Row) -> str:
    """The id of a variant's section; a mean leads to its first seed's."""
    same = [i for i, other in enumerate(report.rows) if (other.revive, other.compress) == (row.revive, row.compress)]
    return f"variant{next(i for i in same if row.seed in (None, report.rows[i].seed))}"
