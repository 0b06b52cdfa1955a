"""Small charts as SVG text, for the page and for MLflow: no dependency, equal input gives equal text.

Colours are CSS variables with a fallback, so that the page's light or dark scheme decides and a file of its own is readable.
Everything that comes from records is escaped here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TypeVar

FALLBACK = ("#0b63a5", "#b3500a", "#0f766e", "#8a3a8f", "#7a6200", "#b0243f", "#4b5563", "#3f6212")
SHAPES = ("circle", "square", "triangle", "diamond", "down", "cross")
WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 84, 20, 18, 58
Marked = TypeVar("Marked")
SIDE = 76  # left of charts over epochs
LETTER = 10  # width to keep free for a letter: narrow screens write larger
MOST_LINES = 24  # below more triangles than this, lines would hide the curves
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2328}.grid{stroke:#d8dee4;fill:none}.front{stroke:#57606a;fill:none;"
    "stroke-width:1.5;stroke-dasharray:5 4}.line{fill:none;stroke-width:2}.mark{stroke:#57606a;stroke-opacity:.6;"
    "stroke-dasharray:2 3}.event{fill:#57606a}.full{fill:none;stroke:#8c959f}.kept{fill:#0b63a5}.error{stroke-width:1.5}"
    ".halo{paint-order:stroke;stroke:#fff;stroke-width:3px}.dead{fill:none;stroke:#b0243f;stroke-width:1.5;"
    "stroke-dasharray:6 4}.gone{fill:#b0243f;fill-opacity:.25}.dying{stroke:#b0243f}.move{fill:#1f2328;stroke:#1f2328;"
    "stroke-width:1.5}.change{stroke:#57606a}.was{fill:#fff;stroke:#57606a}.is{fill:#0b63a5}"
)


@dataclass(frozen=True)
class Point:
    """A variant in a scatter chart. `lines` are the tooltip's; `color` and `shape` count from 0 and repeat."""

    name: str
    x: float
    y: float
    color: int
    shape: int
    front: bool
    lines: Sequence[str]
    error: float = 0.0  # half the length of the vertical bar


@dataclass(frozen=True)
class Series:
    """A curve; `color` counts from 0, `dashed` tells two of one colour apart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """Values to positions: linear, or logarithmic where they span more than a factor of twenty."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Position of a value."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)


def axis(values: Sequence[float], start: float, end: float, *, zero: bool = False, may_log: bool = False) -> Axis:
    """An axis with a margin around `values`; with `zero` it starts there, unless it is logarithmic."""
    low, high = min(values), max(values)
    if may_log and low > 0 and high / low > 20:
        return Axis(low / 1.4, high * 1.4, start, end, log=True)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(0.0 if zero else low - margin, high + margin, start, end)


def ticks(scale: Axis, count: int = 5) -> list[float]:
    """Round values within the axis, about `count`: steps of 1, 2 or 5 times a power of ten; on a logarithmic axis those values
    themselves, or powers of ten where these are too many."""
    if scale.log:
        powers = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        inside = lambda digits: [v for p in powers for d in digits if scale.low <= (v := float(d * 10.0**p)) <= scale.high]  # noqa: E731
        found, whole = inside((1, 2, 5)), inside((1,))
        return found if len(found) <= 4 * count or len(whole) < 2 else whole[:: -(-len(whole) // (2 * count))]
    raw = (scale.high - scale.low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= raw)
    first = math.ceil(scale.low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(scale.high / step + 1e-9) + 1)]


def scatter(points: Sequence[Point], x_title: str, y_title: str, x_factor: float) -> str:
    """Accuracy (fractions, shown in percent) against a cost (shown divided by `x_factor`); the front is joined by a line."""
    x = axis([point.x / x_factor for point in points], LEFT, WIDTH - RIGHT, zero=True, may_log=True)
    y = axis([100 * (point.y + side * point.error) for point in points for side in (-1, 1)], HEIGHT - BOTTOM, TOP)
    body = _grid(x, y, WIDTH, HEIGHT, x_title, y_title)
    front = sorted((point.x / x_factor, 100 * point.y) for point in points if point.front)
    corners = [(x.at(a), y.at(b)) for a, b in front]
    steps = [*corners[:1], *(corner for one, two in pairwise(corners) for corner in ((two[0], one[1]), two))]
    body.append(f'<path class="front" d="{path(steps)}"/>')
    spots = _side_by_side([(x.at(point.x / x_factor), y.at(100 * point.y)) for point in points])
    placed = [(left - 9, top + 4, left + 9) for left, top in spots]  # no label on a marker
    labels = []
    for point, (left, top) in sorted(zip(points, spots, strict=True), key=lambda pair: not pair[0].front):
        if point.front:
            labels += _label(point.name, left, top, placed)
        ends = y.at(100 * (point.y - point.error)), y.at(100 * (point.y + point.error))
        body.append(_mark(point, left, top, ends))
    return svg(WIDTH, HEIGHT, f"{y_title} against {x_title}", [*body, *labels])


def curves(
    series: Sequence[Series], spans: Sequence[tuple[float, str]], marks: Sequence[tuple[float, str]], y_title: str, percent: bool
) -> str:
    """Curves over epochs. `spans` are (first epoch, stage), written above; `marks` (epoch, what happened) have a triangle and a
    title."""
    width, height = 460, 240
    factor = 100 if percent else 1
    x = axis([value for line in series for value in line.x], SIDE, width - 12, zero=True)
    y = axis([factor * value for line in series for value in line.y], height - 44, 30)
    body = _grid(x, y, width, height, "epoch", y_title)
    body += stages(spans, x, height - 44) + triangles(marks, x, height - 44)
    for line in series:
        corners = [(x.at(a), y.at(factor * b)) for a, b in zip(line.x, line.y, strict=True)]
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        stroke = f'stroke="{color(line.color)}"{dash}'
        body.append(f'<path class="line" {stroke} d="{path(corners)}"><title>{escape(line.name)}</title></path>')
    return svg(width, height, f"{y_title} by epoch", body)


def stages(spans: Sequence[tuple[float, str]], x: Axis, bottom: float) -> list[str]:
    """The names of stages, (first epoch, stage), above a chart, each in its colour and clear of the others, and lines between."""
    widths, free, right = [LETTER * len(name) for _, name in spans], 0.0, x.end + 12
    left = []
    for (epoch, _), width in zip(spans, widths, strict=True):
        left.append(max(x.at(epoch) + 5, free))
        free = left[-1] + width
    for index in reversed(range(len(spans))):
        right = left[index] = min(left[index], right - widths[index])
    body = [f'<path class="grid" d="M{x.at(epoch):.1f} 4V{bottom}"/>' for epoch, _ in spans]
    for index, (at, (_, name)) in enumerate(zip(left, spans, strict=True)):
        body.append(f'<text style="fill:{color(index)}" x="{at:.1f}" y="16">{escape(name)}</text>')
    return body


def triangles(marks: Sequence[tuple[float, str]], x: Axis, bottom: float, *, points: bool = False) -> list[str]:
    """Marks, (epoch, what happened), above a chart, with a dotted line down where they are few. Those too near to be told apart
    share a wider one. `points` can be reached by keyboard."""
    groups = near(marks, x)
    body = []
    for group in groups:
        texts = [text for _, text in group]
        told = escape("\n".join([*texts[:3], f"and {len(texts) - 3} more"] if len(texts) > 4 else texts))
        start, end = (x.at(group[place][0]) for place in (0, -1))
        line = f'<path class="mark" d="M{start:.1f} 30V{bottom}"/>' if len(groups) <= MOST_LINES else ""
        hold = (
            f'<path fill-opacity="0" d="M{start - 9:.1f} 20H{end + 9:.1f}V40H{start - 9:.1f}z"/>' if points else ""
        )  # for fingers
        drawn = f'{line}{hold}<path class="event" d="M{start - 5:.1f} 25H{end + 5:.1f}L{end:.1f} 34H{start:.1f}z"/>'
        reach = f' class="point" tabindex="0" role="img" aria-label="{told}"' if points else ""
        body.append(f"<g{reach}><title>{told}</title>{drawn}</g>")
    return body


def near(marks: Sequence[tuple[float, Marked]], x: Axis) -> list[list[tuple[float, Marked]]]:
    """Marks in the order of their epochs, those within the width of a triangle of the first of them together."""
    groups: list[list[tuple[float, Marked]]] = []
    for mark in sorted(marks, key=lambda mark: mark[0]):
        if groups and x.at(mark[0]) - x.at(groups[-1][0][0]) < 11:
            groups[-1].append(mark)
        else:
            groups.append([mark])
    return groups


def bars(layers: Sequence[tuple[str, int, int]]) -> str:
    """Channels of each layer, (name, kept, full): kept filled, the full width outlined."""
    names = [name if len(name) <= 24 else f"…{name[-23:]}" for name, _, _ in layers]
    left, row, width = 16 + LETTER * max(map(len, names)), 24, 640
    longest = max(full for _, _, full in layers)
    body = []
    for index, (name, (_, kept, full)) in enumerate(zip(names, layers, strict=True)):
        top, scale = index * row + 4, (width - left - 110) / longest
        share = f"{kept} of {full}"
        body.append(f'<text x="{left - 8}" y="{top + 12}" text-anchor="end">{escape(name)}</text>')
        body.append(f'<rect class="kept" x="{left}" y="{top}" width="{kept * scale:.1f}" height="15"/>')
        body.append(f'<rect class="full" x="{left}" y="{top}" width="{full * scale:.1f}" height="15"/>')
        body.append(f'<text x="{left + full * scale + 8:.1f}" y="{top + 12}">{share}</text>')
    return svg(width, len(layers) * row + 4, "Output channels of each layer, kept and full", body)


def standalone(svg: str) -> str:
    """A chart as a file of its own: with the namespace, its size in pixels, a style and a white ground."""
    head, body = svg.split(">", 1)
    width, height = head.split('viewBox="0 0 ')[1].split('"')[0].split()
    size = f'xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    return f'{head} {size}><style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>{body}\n'


def color(index: int) -> str:
    """The colour of a category, as CSS."""
    index %= len(FALLBACK)
    return f"var(--c{index},{FALLBACK[index]})"


def shape(kind: int, x: float, y: float, r: float) -> str:
    """Path data of a marker around (x, y)."""
    corners = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1.25), (1.2, 0.95), (-1.2, 0.95)],
        "diamond": [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)],
        "down": [(0, 1.25), (1.2, -0.95), (-1.2, -0.95)],
        "cross": [(-1.3, -.4), (-.4, -.4), (-.4, -1.3), (.4, -1.3), (.4, -.4), (1.3, -.4), (1.3, .4), (.4, .4), (.4, 1.3),
                  (-.4, 1.3), (-.4, .4), (-1.3, .4)],
    }  # fmt: skip
    name = SHAPES[kind % len(SHAPES)]
    if name == "circle":
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    return path([(x + r * dx, y + r * dy) for dx, dy in corners[name]]) + "z"


def _side_by_side(spots: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Positions at which no marker hides another: those within 5 units of each other stand in a row, 15 apart."""
    groups: list[list[int]] = []
    for index, (left, top) in enumerate(spots):
        near = (g for g in groups if abs(spots[g[0]][0] - left) < 5 and abs(spots[g[0]][1] - top) < 5)
        group = next(near, None)
        if group is None:
            groups.append([index])
        else:
            group.append(index)
    shifts = {index: 15 * (place - (len(group) - 1) / 2) for group in groups for place, index in enumerate(group)}
    return [(left + shifts[index], top) for index, (left, top) in enumerate(spots)]


def _mark(point: Point, left: float, top: float, ends: tuple[float, float]) -> str:
    """A marker that can be reached by keyboard: filled on the front, hollow elsewhere."""
    paint = color(point.color)
    bar = f'<path class="error" stroke="{paint}" d="M{left:.1f} {ends[0]:.1f}V{ends[1]:.1f}"/>' if point.error else ""
    fill = paint if point.front else "var(--card,#fff)"
    told = escape("\n".join([point.name, *point.lines]))
    drawn = f'<path d="{shape(point.shape, left, top, 7)}" fill="{fill}" stroke="{paint}" stroke-width="2"/>'
    return f'<g class="point" tabindex="0" role="img" aria-label="{told}"><title>{told}</title>{bar}{drawn}</g>'


def _label(name: str, left: float, top: float, placed: list[tuple[float, float, float]]) -> list[str]:
    """The name beside a marker, at the first of four places that is free, or nowhere."""
    width = 7.2 * len(name)
    for dx, dy in ((12, -8), (-12 - width, -8), (12, 20), (-12 - width, 20)):
        x, y = left + dx, top + dy
        clear = all(abs(y - other) > 15 or x > end or x + width < start for start, other, end in placed)
        if clear and LEFT < x and x + width < WIDTH and y > TOP:
            placed.append((x, y, x + width))
            return [f'<text class="name" x="{x:.1f}" y="{y:.1f}">{escape(name)}</text>']
    return []


def _grid(x: Axis, y: Axis, width: float, height: float, x_title: str, y_title: str) -> list[str]:
    return [*upright(x, y, y_title, [(value, f"{value:g}") for value in ticks(y)]), *level(x, y.start, x_title, height)]


def upright(x: Axis, y: Axis, title: str, labels: Sequence[tuple[float, str]]) -> list[str]:
    """A vertical axis at the left of `x`: a line and a label for each of `labels`, (value, text), and its title."""
    body = []
    for value, text in labels:
        body.append(f'<path class="grid" d="M{x.start:.1f} {y.at(value):.1f}H{x.end:.1f}"/>')
        place = f'x="{x.start - 8:.1f}" y="{y.at(value) + 4:.1f}"'
        body.append(f'<text class="tick" {place} text-anchor="end">{escape(text)}</text>')
    turn = f'transform="translate(16 {(y.start + y.end) / 2:.1f}) rotate(-90)"'
    return [*body, f'<text class="title" {turn} text-anchor="middle">{escape(title)}</text>']


def level(x: Axis, top: float, title: str, height: float) -> list[str]:
    """A horizontal axis at `top`, its title at the foot of a chart of that height."""
    body = []
    for value in ticks(x):
        body.append(f'<path class="grid" d="M{x.at(value):.1f} {top:.1f}v5"/>')
        body.append(f'<text class="tick" x="{x.at(value):.1f}" y="{top + 20:.1f}" text-anchor="middle">{value:g}</text>')
    body.append(f'<path class="grid" d="M{x.start:.1f} {top:.1f}H{x.end:.1f}"/>')
    middle = f'x="{(x.start + x.end) / 2:.1f}" y="{height - 6}"'
    return [*body, f'<text class="title" {middle} text-anchor="middle">{escape(title)}</text>']


def path(corners: Sequence[tuple[float, float]]) -> str:
    """Path data through `corners`."""
    return "".join(f"{'L' if index else 'M'}{x:.1f} {y:.1f}" for index, (x, y) in enumerate(corners))


def svg(width: float, height: float, title: str, body: Sequence[str]) -> str:
    """A chart of that size, named by `title` for those who do not see it."""
    return f'<svg viewBox="0 0 {width} {height}" role="group" aria-label="{escape(title)}">{"".join(body)}</svg>'
