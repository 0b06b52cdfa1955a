"""index.html: one page that opens without a network and lets a reader choose a variant.

Everything that comes from records passes `escape`; style, script and charts are inline. The page's own policy forbids all else: it
runs the script and style whose hashes it names, shows pictures that it holds itself, and asks no network for anything.
"""

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from pipeline.lineage import Chain, flat_parameters
from pipeline.report import deployed, figures, section, speed, summary, tradeoff, usage
from pipeline.report.rows import Report
from pipeline.report.table import MISSING, explanation, missing_notes

POLICY = "default-src 'none'; style-src {style}; script-src {script}; img-src data:; base-uri 'none'; form-action 'none'"


def render(report: Report) -> str:
    """The page as HTML text."""
    template, style, script = (Path(__file__).with_name(f"page.{form}").read_text() for form in ("html", "css", "js"))
    return Template(template).substitute(
        policy=POLICY.format(style=_hash(style), script=_hash(script)),
        style=style,
        script=script,
        title=escape(_title(report)),
        champion=summary.champion(report),
        summary=summary.cards(report),
        sure=escape(summary.certainty(report)),
        filters=tradeoff.filters(report),
        charts=tradeoff.charts(report),
        table=figures.tables(report),
        explanation=escape(explanation(report).replace(", marked *,", "")),
        missing=section.bullets(missing_notes(report), "missing"),
        variants="\n".join(_variant(report, group) for group in report.variants),
        conditions=_conditions(report),
        score=escape(summary.capital(report.names.title)),
        use=usage.guide(report),
    )


def _hash(text: str) -> str:
    """The source expression for an inline element of that text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _title(report: Report) -> str:
    count, seeds = len(report.compared), len({row.seed for row in report.rows})
    several = f"{count} variants" if count != 1 else "1 variant"
    several += f", {seeds} seeds each," if seeds > 1 else ""
    flat = flat_parameters(report.chains[0].records) if report.chains else {}
    network, data = flat.get("model.name"), flat.get("data.name")
    return several + (f" of {network}" if network else "") + (f" on {data}" if data else "")


def _variant(report: Report, group: Sequence[Chain]) -> str:
    """One variant's story, its precisions together."""
    rows = [next(row for row in report.rows if row.stands_for(chain)) for chain in group]
    marks = [" <em class=champion>★ champion</em>"] * any(map(report.chosen, rows)) + [" <em>control</em>"] * any(
        r.control for r in rows
    )
    told = [f"{row.precision}: {summary.brief(report, row) or MISSING}" for row in rows]
    head = f"<b>{escape(rows[0].name)}</b>{''.join(marks)}"
    head += "".join(f"<span>{escape(text)}</span>" for text in told)
    control = next((r.name for r in report.rows if r.control and r.seed == rows[0].seed), None)
    beside = next((other for other in report.chains if other.name == control), None)
    ends = "".join(f'<a id="{figures.anchor(report, row)}"></a>' for row in rows[1:])
    inside = section.render(group[0], beside, deployed.render(report, group), deployed.mistakes(group, beside))
    return f'<details class=variant id="{figures.anchor(report, rows[0])}"><summary>{head}</summary>{ends}{inside}</details>'


def _conditions(report: Report) -> str:
    """Hardware, versions, commit and dates, each distinct one once, with the stages it holds for."""
    seen: dict[str, dict[str, list[str]]] = {}
    for chain in report.chains:
        for stage, record in chain.records.items():
            day = record["started"][:10]
            for title, value in (("hardware", speed.machine(record["hardware"])), ("versions", record["versions"]), ("day", day)):
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
