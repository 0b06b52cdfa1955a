"""How strong the filters are, epoch by epoch: a fan of the percentiles of their norms and the share of dead ones, as SVG."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pipeline.report import chart

DEAD = 0.01  # as pipeline/filters.py, which needs torch, counts them; and its percentiles
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
BANDS = ((0, 100, 0.15), (5, 95, 0.2), (25, 75, 0.35))  # from percentile, to percentile, opacity
FLOOR = DEAD / 100  # norms below it are drawn on it: a logarithmic axis has no zero
WIDTH, HEIGHT = 460, 330
FAN, STRIP = (205.0, 30.0), (286.0, 238.0)  # bottom and top


@dataclass(frozen=True)
class Stretch:
    """The epochs of one stage: `norms` by percentile, `dead` as fractions."""

    stage: str
    color: int
    epochs: list[float]
    norms: dict[int, list[float]]
    dead: list[float]


@dataclass(frozen=True)
class Move:
    """What events did to the filters they touched: the mean norm before and after."""

    epoch: float
    before: float
    after: float
    text: str


def stretch(stage: str, color: int, start: int, history: Iterable[dict[str, Any]]) -> Stretch | None:
    """The filter norms in a stage's history, whose epochs are counted on from `start`; None where it has none."""
    keys = ["dead_filters", *map(_key, PERCENTILES)]
    rows = [row for row in history if all(math.isfinite(row.get(key, math.nan)) for key in keys)]
    norms = {p: [row[_key(p)] for row in rows] for p in PERCENTILES}
    made = Stretch(stage, color, [start + row["epoch"] for row in rows], norms, [row["dead_filters"] for row in rows])
    return made if rows else None


def fan(
    stretches: Sequence[Stretch],
    epochs: int,
    spans: Sequence[tuple[float, str]],
    marks: Sequence[tuple[float, str]],
    moves: Sequence[Move] = (),
) -> str:
    """Bands between percentiles and the median over `epochs` epochs, logarithmic; the share of dead filters in a strip below.

    `spans` and `marks` are as in `chart.curves`; `moves` are arrows.
    """
    x = chart.axis([0, epochs], chart.SIDE, WIDTH - 12, zero=True)
    lowest, highest = bounds(stretches, moves)
    y = chart.Axis(lowest, highest, *FAN, log=True)
    body = chart.upright(x, y, "filter norm", labels(stretches, y))
    body += chart.stages(spans, x, STRIP[0])
    for part in stretches:
        body += _bands(part, x, y)
    body += [_arrow([move for _, move in group], x, y) for group in chart.near([(move.epoch, move) for move in moves], x)]
    body.append(f'<path class="dead" d="M{x.start:.1f} {y.at(DEAD):.1f}H{x.end:.1f}"/>')
    body.append(f'<text class="halo" x="{x.start + 6:.1f}" y="{y.at(DEAD) - 6:.1f}">dead below {DEAD:g}</text>')
    body += _strip(stretches, x)
    body += chart.triangles(marks, x, STRIP[0], points=True)
    return chart.svg(WIDTH, HEIGHT, "Filter norms and the share of dead filters by epoch", body)


def bounds(stretches: Sequence[Stretch], moves: Sequence[Move] = ()) -> tuple[float, float]:
    """The ends of a logarithmic axis that holds every norm, and the line below which a filter is dead. It ends at `FLOOR` where
    a norm lies below."""
    values = [value for part in stretches for p in (0, 100) for value in part.norms[p]]
    values += [value for move in moves for value in (move.before, move.after)] + [DEAD]
    return (FLOOR if min(values) < FLOOR else min(values) / 1.4), 1.4 * max(values)


def clipped(stretches: Sequence[Stretch]) -> bool:
    """Whether some filter's norm lies below the axis."""
    return any(value < FLOOR for part in stretches for value in part.norms[0])


def labels(stretches: Sequence[Stretch], y: chart.Axis) -> list[tuple[float, str]]:
    """Where the axis is labelled; its bottom stands for everything below."""
    low = clipped(stretches)
    return [(value, "~0" if low and value == FLOOR else f"{value:g}") for value in chart.ticks(y, 2)]


def ceiling(stretches: Sequence[Stretch]) -> float:
    """The end of the axis of the share of dead filters, in percent: a round number, at least 1."""
    most = max(100 * share for part in stretches for share in part.dead)
    return next(top for top in (1, 2, 5, 10, 20, 50, 100) if most <= top)


def _key(percentile: int) -> str:
    return f"filter_norm_p{percentile}"


def _bands(part: Stretch, x: chart.Axis, y: chart.Axis) -> list[str]:
    paint = chart.color(part.color)
    edge = {p: list(zip(_places(part, x), [y.at(max(v, FLOOR)) for v in _wide(part.norms[p])], strict=True)) for p in PERCENTILES}
    body = []
    for low, high, opacity in BANDS:
        shape = chart.path([*edge[low], *reversed(edge[high])])
        told = escape(f"{part.stage}: percentiles {low} to {high}" if low else f"{part.stage}: weakest to strongest filter")
        body.append(f'<path fill="{paint}" fill-opacity="{opacity}" d="{shape}z"><title>{told}</title></path>')
    told = escape(f"{part.stage}: median filter")
    return [*body, f'<path class="line" stroke="{paint}" d="{chart.path(edge[50])}"><title>{told}</title></path>']


def _strip(stretches: Sequence[Stretch], x: chart.Axis) -> list[str]:
    """The share of dead filters, with an axis of its own."""
    top = ceiling(stretches)
    y = chart.Axis(0, top, *STRIP)
    body = chart.upright(x, y, "", [(0, "0"), (top, f"{top:g} %")]) + chart.level(x, STRIP[0], "epoch", HEIGHT)
    for part in stretches:
        places, heights = _places(part, x), [y.at(100 * share) for share in _wide(part.dead)]
        line = list(zip(places, heights, strict=True))
        area = chart.path([(places[0], STRIP[0]), *line, (places[-1], STRIP[0])])
        told = escape(f"{part.stage}: dead filters")
        body.append(f'<path class="gone" d="{area}z"/><path class="line dying" d="{chart.path(line)}"><title>{told}</title></path>')
    body.append(f'<text class="halo" x="{x.start + 6:.1f}" y="{STRIP[1] - 5:.1f}">dead filters</text>')
    return body


def _arrow(moves: Sequence[Move], x: chart.Axis, y: chart.Axis) -> str:
    """From before to after; of several that are too near to be told apart their means."""
    at = sum(x.at(move.epoch) for move in moves) / len(moves)
    before, after = (sum(getattr(move, when) for move in moves) / len(moves) for when in ("before", "after"))
    start, end = y.at(max(before, FLOOR)), y.at(max(after, FLOOR))
    if abs(start - end) < 1:
        return ""
    size = min(7.0, abs(start - end)) * (1 if end < start else -1)
    told = escape("\n".join([move.text for move in moves[:3]] + [f"and {len(moves) - 3} more"] * (len(moves) > 3)))
    lines = f'<path d="M{at:.1f} {start:.1f}V{end + size:.1f}"/><path d="M{at:.1f} {end:.1f}l-4 {size:.1f}h8z"/>'
    return f'<g class="move"><title>{told}</title>{lines}</g>'


def _places(part: Stretch, x: chart.Axis) -> list[float]:
    """One epoch alone is drawn half an epoch wide."""
    only = part.epochs[0]
    return [x.at(epoch) for epoch in (part.epochs if len(part.epochs) > 1 else (only - 0.25, only + 0.25))]


def _wide(values: list[float]) -> list[float]:
    return values if len(values) > 1 else values * 2
