"""The trade-off charts of the page: accuracy against each cost, drawn for wide and for narrow screens, and the filters of both.

Colour is the compress block, shape the revive block, a ring tells the precision; filled is on the Pareto front. The page's script
finds what it needs to draw the front anew in the markers' data attributes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from pipeline.report import chart
from pipeline.report.rows import ACCURACY, Report, Row, pareto
from pipeline.report.table import cell, columns

MARGINS = {"wide": (720.0, 400.0, 74.0), "narrow": (380.0, 380.0, 62.0)}  # width, height and left of the plot
RIGHT, TOP, BOTTOM = 20, 26, 58
SIZE, APART = 6.5, 14  # of markers: half their width, and how far they stand apart where they would meet
REACH = 15  # radius of the circle that shows where the focus is
RINGS = ("", "2 2.5", "5 2.5", "1 3")  # dashes of the rings of the second precision, the third, ...
AXES = ("revive", "compress", "precision")


@dataclass(frozen=True)
class Point:
    """A row in a chart. `lines` are the tooltip's; `color`, `shape` and `ring` count from 0, `group` are its values of `AXES`."""

    name: str
    x: float
    y: float
    color: int
    shape: int
    front: bool
    lines: Sequence[str]
    error: float = 0.0  # half the length of the vertical bar
    ring: int = 0  # 0: none
    champion: bool = False
    group: Sequence[str] = ()


def charts(report: Report) -> str:
    """A chart for each cost, behind radio buttons that work without a script."""
    titles = {column.key: column for column in columns(report)}
    inputs, labels, panels = [], [], []
    for index, cost in enumerate(report.costs):
        column, checked = titles[cost], " checked" if index == 0 else ""
        unit, factor = {"macs": ("millions", 1e6), "size_mb": ("MB", 1.0)}.get(cost, ("ms", 1.0))
        inputs.append(f'<input type=radio name=cost id="cost{index}"{checked}>')
        labels.append(f'<label for="cost{index}">{escape(column.title)}</label>')
        words = f"{column.title}, {unit}", f"test {report.names.title}, %"
        drawn = [scatter(points(report, cost), *words, factor, layout) for layout in MARGINS]
        panels.append(f"<figure>{''.join(drawn)}</figure>")
    if not panels:
        return f"<p>Nothing to draw: no {escape(report.names.title)} or no cost was measured.</p>"
    return f"<div class=tabs>{''.join(inputs)}<div class=labels>{''.join(labels)}</div>{''.join(panels)}</div>"


def points(report: Report, cost: str) -> list[Point]:
    """The rows that have both figures."""
    rows = [row for row in report.compared if cost in row.values and ACCURACY in row.values]
    front = pareto([(row.values[cost], row.values[ACCURACY]) for row in rows])
    places = {axis: report.axis(axis) for axis in AXES}
    found = []
    for row, on_front in zip(rows, front, strict=True):
        group = [getattr(row, axis) for axis in AXES]
        shape, color, ring = (places[axis].index(value) for axis, value in zip(AXES, group, strict=True))
        error = row.spread.get(ACCURACY, 0.0)
        x, y = row.values[cost], row.values[ACCURACY]
        found.append(Point(row.name, x, y, color, shape, on_front, told(report, row), error, ring, report.chosen(row), group))
    return found


def told(report: Report, row: Row) -> list[str]:
    """What a tooltip tells of a row."""
    lines = [f"{column.title}: {cell(row, column)}" for column in columns(report) if column.key in row.values]
    return [*(["the champion"] if report.chosen(row) else []), *(["the control"] if row.control else []), *lines]


def scatter(points: Sequence[Point], x_title: str, y_title: str, x_factor: float, layout: str = "wide") -> str:
    """Accuracy (fractions, shown in percent) against a cost (shown divided by `x_factor`); the front is joined by a line."""
    width, height, left = MARGINS[layout]
    x = chart.axis([point.x / x_factor for point in points], left, width - RIGHT, zero=True, may_log=True)
    y = chart.axis([100 * (point.y + side * point.error) for point in points for side in (-1, 1)], height - BOTTOM, TOP)
    body = chart.grid(x, y, height, x_title, y_title)
    exact = [(x.at(point.x / x_factor), y.at(100 * point.y)) for point in points]
    steps = _steps({place for place, point in zip(exact, points, strict=True) if point.front})
    body.append(f'<path class="frontier" d="{chart.path(steps)}"/>')
    spots = _side_by_side(exact)
    placed = [(across - 10, down + 4, across + 10) for across, down in spots]  # no label on a marker
    order = sorted(range(len(points)), key=lambda index: (not points[index].champion, not points[index].front))
    for index in order:  # labels of the champion and of the front have the first choice
        point = points[index]
        ends = y.at(100 * (point.y - point.error)), y.at(100 * (point.y + point.error))
        label = _label(point, *spots[index], placed, (left, width))
        body.append(_mark(point, spots[index], exact[index], ends, label))
    drawn = chart.svg(width, height, f"{y_title} against {x_title}", body)
    return drawn.replace("<svg ", f'<svg class="tradeoff {layout}" ', 1)


def filters(report: Report) -> str:
    """What colours, shapes and rings mean, as boxes that hide all else; without a script the key alone."""
    shape = lambda index: f'<path d="{chart.shape(index, 10, 10, 6)}"/>'  # noqa: E731
    signs = {
        "compress": lambda i: f'<g color="{chart.color(i)}">{shape(1)}</g>',
        "revive": shape,
        "precision": lambda i: f'<circle class="core" cx="10" cy="10" r="4"/>{_ring(i, 10, 10, 8)}',
    }
    groups = []
    for axis, sign in signs.items():
        boxes = []
        for index, value in enumerate(report.axis(axis)):
            box = f'<input type=checkbox checked hidden data-axis={axis} value="{escape(value)}">'
            boxes.append(f'<label>{box}<svg viewBox="0 0 20 20" aria-hidden="true">{sign(index)}</svg>{escape(value)}</label>')
        groups.append(f"<fieldset><legend>{axis}</legend>{''.join(boxes)}</fieldset>")
    state = "<p class=state hidden><output></output> <button type=button>Show all</button></p>"
    return f"<div class=filters>{''.join(groups)}</div>{state}"


def _steps(front: set[tuple[float, float]]) -> list[tuple[float, float]]:
    """The stairs through the points of a front, from the cheapest to the dearest."""
    corners = sorted(front)
    return [*corners[:1], *(corner for one, two in pairwise(corners) for corner in ((two[0], one[1]), two))]


def _side_by_side(spots: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Positions at which no marker hides another: those within 5 units of each other stand in a row."""
    groups: list[list[int]] = []
    for index, (left, top) in enumerate(spots):
        near = (g for g in groups if abs(spots[g[0]][0] - left) < 5 and abs(spots[g[0]][1] - top) < 5)
        group = next(near, None)
        if group is None:
            groups.append([index])
        else:
            group.append(index)
    shifts = {index: APART * (place - (len(group) - 1) / 2) for group in groups for place, index in enumerate(group)}
    return [(left + shifts[index], top) for index, (left, top) in enumerate(spots)]


def _mark(point: Point, spot: tuple[float, float], exact: tuple[float, float], ends: tuple[float, float], label: str) -> str:
    """A marker that can be reached by keyboard: filled on the front, hollow elsewhere; a star on the champion."""
    left, top = spot
    parts = [f'<circle class="reach" cx="{left:.1f}" cy="{top:.1f}" r="{REACH}"/>']
    parts += [f'<path class="error" d="M{left:.1f} {ends[0]:.1f}V{ends[1]:.1f}"/>'] if point.error else []
    parts += [f'<path class="spot" d="{chart.shape(point.shape, left, top, SIZE)}"/>', _ring(point.ring, left, top, 10.5)]
    parts += [f'<path class="star" d="{_star(left, top, 6.5)}"/>'] if point.champion else []
    kind = " ".join(["point", *(["front"] if point.front else []), *(["champion"] if point.champion else [])])
    group = "".join(f' data-{axis}="{escape(value)}"' for axis, value in zip(AXES, point.group, strict=False))
    place = f'data-cost="{point.x!r}" data-gain="{point.y!r}" data-at="{exact[0]:.1f} {exact[1]:.1f}"'
    lines = escape("\n".join([point.name, *point.lines]))
    head = f'<g class="{kind}" color="{chart.color(point.color)}" tabindex="0" role="img"{group} {place}>'
    return f"{head}<title>{lines}</title>{''.join(parts)}{label}</g>"


def _ring(number: int, left: float, top: float, radius: float) -> str:
    if not number:
        return ""
    dash = RINGS[(number - 1) % len(RINGS)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<circle class="ring" cx="{left:.1f}" cy="{top:.1f}" r="{radius}"{dashed}/>'


def _star(left: float, top: float, radius: float) -> str:
    """Path data of a star of five points."""
    angles = [math.pi * (index / 5 - 0.5) for index in range(10)]
    lengths = [radius, 0.42 * radius] * 5
    return (
        chart.path([(left + r * math.cos(angle), top + r * math.sin(angle)) for r, angle in zip(lengths, angles, strict=True)])
        + "z"
    )


def _label(point: Point, left: float, top: float, placed: list[tuple[float, float, float]], sides: tuple[float, float]) -> str:
    """The name beside a marker, at the first of four places that is free, or nowhere. It shows while its point is on the front."""
    width = 7.2 * len(point.name)
    for dx, dy in ((14, -8), (-14 - width, -8), (14, 20), (-14 - width, 20)):
        x, y = left + dx, top + dy
        clear = all(abs(y - other) > 15 or x > end or x + width < start for start, other, end in placed)
        if clear and sides[0] < x and x + width < sides[1] and y > TOP - 12:
            placed.append((x, y, x + width))
            return f'<text class="name" x="{x:.1f}" y="{y:.1f}">{escape(point.name)}</text>'
    return ""
