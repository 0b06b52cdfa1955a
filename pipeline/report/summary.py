"""The top of the page: the champion and why it was chosen, the best by each measure, and how sure the figures are."""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from pipeline.report.figures import link
from pipeline.report.rows import ACCURACY, Report, Row, picks
from pipeline.report.table import cell, columns, describe_setting, titled

ABOVE = {"at_most": "≤", "at_least": "≥"}


def champion(report: Report) -> str:
    """Who was chosen by the rule and why, or that nobody was, and who came nearest; nothing where no choice was made yet."""
    told = report.champion
    if not told:
        return ""
    row = next((row for row in report.compared if report.chosen(row)), None)
    reason = f"<p>{escape(capital(str(told.get('reason') or 'no reason given')))}.</p>{_rule(report, told)}"
    if row is None and told.get("champion"):
        return f"<aside class=chosen><h2>Champion</h2><p class=who>{escape(told['champion'])}</p>{reason}</aside>"
    if row is None:
        nearest = next((one for one in report.rows if one.name == told.get("nearest")), None)
        who = f"<p>The nearest: {link(report, nearest)}, {escape(brief(report, nearest))}</p>" if nearest else ""
        return f'<aside class="chosen none"><h2>No champion</h2>{who}{reason}</aside>'
    of = "" if row.seed is not None else f" <small>seed {told.get('seed')}; figures over all seeds</small>"
    figures = f"<p class=big>{escape(brief(report, row))}</p><p class=quiet>{escape(against_control(row))}</p>"
    return f"<aside class=chosen><h2>★ Champion</h2><p class=who>{link(report, row)}{of}</p>{figures}{reason}</aside>"


def cards(report: Report) -> str:
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
    made = []
    for name, told in titles.items():
        row = rows[name]
        told = [best if word == "most accurate" and report.names.task != "classify" else word for word in told]
        title = " and ".join([", ".join(told[:-1]), told[-1]] if told[1:] else told)
        compared = "the same training without a method" if row.control else against_control(row)
        made.append(
            f"<li><h3>{escape(capital(title))}</h3><p class=who>{link(report, row)}</p>"
            f"<p class=big>{escape(brief(report, row))}</p><p>{escape(compared)}</p></li>"
        )
    return f"<ul class=cards>{''.join(made)}</ul>" if made else "<p>No variant has an exported model yet.</p>"


def capital(text: str) -> str:
    """With a capital letter at its start."""
    return text[0].upper() + text[1:] if text[0].isascii() else text  # δ1 keeps its sign


def brief(report: Report, row: Row) -> str:
    """Score, size and the first latency."""
    latency = next((cost for cost in report.costs if cost.startswith("latency_")), None)
    shown = [column for column in columns(report) if column.key in (ACCURACY, "size_mb", latency)]
    return " · ".join(cell(row, column, detail=row.count > 1) for column in shown if column.key in row.values)


def against_control(row: Row) -> str:
    """Gains and losses beside the control."""
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


def certainty(report: Report) -> str:
    """How far the test split can tell scores apart."""
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


def _rule(report: Report, told: Mapping[str, Any]) -> str:
    """The limits of the rule and what the chosen one has, or the nearest."""
    rule, values, missed = told.get("rule") or {}, told.get("values") or {}, told.get("missed") or {}
    items = []
    for kind, sign in ABOVE.items():
        for key, limit in (rule.get(kind) or {}).items():
            value = f"{values[key]:.3g}" if key in values else "not measured"
            mark = ' <b class=wrong title="missed">✗</b>' if key in missed else ""
            items.append(f"<li>{escape(f'{titled(report, key)}: {value} {sign} {limit:g}')}{mark}</li>")
    note = "Chosen on the validation split; the figures of this page are of the test split."
    return f"{f'<ul class=limits>{chr(10).join(items)}</ul>' if items else ''}<p class=quiet>{note}</p>"
