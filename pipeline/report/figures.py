"""The table of the page: every figure of every row, sortable, with the reason where one was not measured."""

from collections.abc import Sequence
from html import escape

from pipeline.report.rows import Report, Row
from pipeline.report.table import Column, cell, columns
from pipeline.report.tradeoff import AXES


def tables(report: Report) -> str:
    """The rows to decide by; where they are means, those of every seed folded below them."""
    shown = columns(report)
    if not report.means:
        return _table(report, report.rows, shown)
    every = _table(report, report.rows, shown)
    return f"{_table(report, report.means, shown)}<details><summary>Every seed</summary>{every}</details>"


def anchor(report: Report, row: Row) -> str:
    """The id of the part of the page that tells of a row; a mean leads to its first seed's."""
    first = next(chain for chain in report.chains if row.stands_for(chain))
    variant = next(index for index, group in enumerate(report.variants) if first in group)
    place = report.variants[variant].index(first)
    return f"variant{variant}" if place == 0 else f"variant{variant}p{place}"


def link(report: Report, row: Row) -> str:
    """A row's name, as a link to what happened to it."""
    return f'<a href="#{anchor(report, row)}">{escape(row.name)}</a>'


def _table(report: Report, rows: list[Row], shown: Sequence[Column]) -> str:
    titles = ["variant", "precision", *(column.title for column in shown)]
    head = "".join(f"<th scope=col><button type=button>{escape(title)}</button></th>" for title in titles)
    body = [_line(report, row, shown) for row in rows]
    return (
        '<div class="wide tall" role=region aria-label="All figures, a table" tabindex=0><table class="grid sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _line(report: Report, row: Row, shown: Sequence[Column]) -> str:
    marks = [*(["★ champion"] if report.chosen(row) else []), *(["control"] if row.control else [])]
    marks += [f"n = {row.count}"] if row.count > 1 else []
    told = f"<small>{', '.join(marks)}</small>" if marks else ""
    group = "".join(f' data-{axis}="{escape(getattr(row, axis))}"' for axis in AXES)
    kind = " class=champion" if report.chosen(row) else ""
    name = f'<th scope=row data-value="{escape(row.name)}">{link(report, row)}{told}</th>'
    precision = f'<td data-value="{escape(row.precision)}">{escape(row.precision)}</td>'
    return f"<tr{kind}{group}>{name}{precision}{''.join(_cell(report, row, column) for column in shown)}</tr>"


def _cell(report: Report, row: Row, column: Column) -> str:
    value = row.values.get(column.key)
    if value is None:
        return f'<td class=missing title="{escape(report.why_missing(row, column.key))}">not measured</td>'
    figure, _, rest = cell(row, column).replace(" ±", "\t±").replace(" [", "\t[").partition("\t")
    return f'<td data-value="{value!r}">{escape(figure)}{f"<small>{escape(rest)}</small>" if rest else ""}</td>'
