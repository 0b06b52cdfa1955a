"""Small charts as SVG text, for the page and for MLflow: no dependency, equal input gives equal text.

Colours are CSS variables with a fallback, so that the page's light or dark scheme decides and a file of its own is readable.
Everything that comes from records is escaped here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

FALLBACK = ("#0b63a5", "#b3500a", "#0f766e", "#8a3a8f", "#7a6200", "#b0243f", "#4b5563", "#3f6212")
SHAPES = ("circle", "square", "triangle", "diamond", "down", "cross")
Marked = TypeVar("Marked")
SIDE = 76  # left of charts over epochs
LETTER = 10  # width to keep free for a letter: narrow screens write larger
MOST_LINES = 24  # below more triangles than this, lines would hide the curves
STYLE = (
    "text{font:13px system-ui,sans-serif}text:not([fill]){fill:#1f2328}.grid{stroke:#d8dee4;fill:none}"
    ".line{fill:none;stroke-width:2}.mark{stroke:#57606a;stroke-opacity:.6;"
    "stroke-dasharray:2 3}.event{fill:#57606a}.full{fill:none;stroke:#8c959f}.kept{fill:#0b63a5}.error{stroke-width:1.5}"
    ".halo{paint-order:stroke;stroke:#fff;stroke-width:3px}.dead{fill:none;stroke:#b0243f;stroke-width:1.5;"
    "stroke-dasharray:6 4}.gone{fill:#b0243f;fill-opacity:.25}.dying{stroke:#b0243f}.move{fill:#1f2328;stroke:#1f2328;"
    "stroke-width:1.5}.change{stroke:#57606a}.was{fill:#fff;stroke:#57606a}.is{fill:#0b63a5}"
)


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


def curves(
    series: Sequence[Series], spans: Sequence[tuple[float, str]], marks: Sequence[tuple[float, str]], y_title: str, percent: bool
) -> str:
    """Curves over epochs. `spans` are (first epoch, stage), written above; `marks` (epoch, what happened) have a triangle and a
    title."""
    width, height = 460, 240
    factor = 100 if percent else 1
    x = axis([value for line in series for value in line.x], SIDE, width - 12, zero=True)
    y = axis([factor * value for line in series for value in line.y], height - 44, 30)
    body = grid(x, y, height, "epoch", y_title)
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
        body.append(f'<text fill="{color(index)}" x="{at:.1f}" y="16">{escape(name)}</text>')
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


def grid(x: Axis, y: Axis, height: float, x_title: str, y_title: str) -> list[str]:
    """Both axes of a chart of that height, with their lines, labels and titles."""
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
