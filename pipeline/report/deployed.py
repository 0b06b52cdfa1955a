"""What is shipped of a variant: each precision with its certificate and its price, its speed, and how to load and serve it."""

from collections.abc import Sequence
from html import escape
from typing import Any

from pipeline.lineage import BASE, Chain
from pipeline.report import predictions, speed, story, usage
from pipeline.report.rows import Report
from pipeline.report.table import write_figure
from pipeline.report.widths import table


def render(report: Report, group: Sequence[Chain]) -> str:
    """The part of a story below what happened, for the precisions of one variant; empty where nothing was exported."""
    exported = [chain for chain in group if "export" in chain.records]
    if not exported:
        return ""
    rows = [row for row in report.rows if any(row.stands_for(chain) for chain in group)]
    parts = [_certificates(exported), *map(_quantized, exported), speed.section(report, rows), _use(exported)]
    return "".join(parts)


def mistakes(group: Sequence[Chain], beside: Chain | None) -> str:
    """Pictures of the lower precisions, folded."""
    lower = [chain for chain in group if chain.precision != BASE]
    parts = [(chain, predictions.render(chain, beside)) for chain in lower]
    return "".join(
        f"<details><summary>the same in {escape(chain.precision)}</summary>{drawn}</details>" for chain, drawn in parts if drawn
    )


def _certificates(exported: Sequence[Chain]) -> str:
    names, lines = exported[0].names, []
    for chain in exported:
        metrics = chain.records["export"]["metrics"]
        of = f"against {BASE}" if chain.precision != BASE else "against torch"
        figures = [(f"test_{names.headline}", "percent"), ("loss", "points"), (names.agreement, "percent")]
        cells = [write_figure(metrics[key], form) if key in metrics else "" for key, form in figures]
        cells[1] = write_figure(-metrics["loss"], "points") if "loss" in metrics else ""
        cells.append(f"{metrics['max_abs_difference']:.1e} {of}" if "max_abs_difference" in metrics else "")
        cells.append(write_figure(metrics["size_mb"], "mb") if "size_mb" in metrics else "")
        lines.append(
            f"<tr><th scope=row>{escape(chain.precision)}</th>{''.join(f'<td>{escape(text)}</td>' for text in cells)}</tr>"
        )
    heads = ("precision", f"test {names.title}", f"against {BASE}", names.agree, "largest difference", "size")
    return f"<h4>shipped as</h4>{table(heads, lines)}"


def _quantized(chain: Chain) -> str:
    """Which layers a lower precision left out, and what is known of why."""
    events = [event for event in chain.records["export"]["events"] if event["kind"] == "quantized"]
    return "".join(f"<p>{escape(_told(chain, event))}</p>" for event in events)


def _told(chain: Chain, event: dict[str, Any]) -> str:
    kept, share = event.get("kept", []), event.get(f"share_{chain.precision}")
    parts = [f"{100 * share:.1f} % of the multiply-adds are in {chain.precision}"] if share is not None else []
    parts.append(f"in {BASE} stayed {', '.join(map(str, kept))}" if kept else "no layer stayed in " + BASE)
    rest = {key: value for key, value in event.items() if key not in ("kind", "kept", f"share_{chain.precision}")}
    facts = story.describe({"kind": "quantized", **rest}).removeprefix("quantized").removeprefix(": ")
    return f"{chain.precision}: {'; '.join([*parts, *([facts] if facts else [])])}."


def _use(exported: Sequence[Chain]) -> str:
    parts = [usage.snippets(chain) for chain in exported]
    return "<h4>load and serve it</h4>" + "".join(parts)
