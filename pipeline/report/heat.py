"""A map of events: a row a layer, a column an event, the darker the more of the layer was touched; beside it the norms, as SVG."""

import math
from html import escape

from pipeline.report import chart, edits
from pipeline.report.edits import Treated

WIDTH, TOP, FOOT = 720, 30, 44
CELL = 30  # the widest column
LEAST, MOST = 7, 20  # height of a row
PALEST = 0.12  # opacity of the smallest share
SPAN = 1e4  # norms smaller than the largest by more than this are drawn at the edge


def layers(found: Treated) -> str:
    """The map of all layers of the network, or those that events name."""
    names = [name if len(name) <= 24 else f"…{name[-23:]}" for name in found.layers]
    left = 20 + 8 * max(map(len, names), default=0)
    row = max(LEAST, min(MOST, 440 // max(1, len(names))))
    pairs = {name: edits.norms(rows) for name, rows in edits.by_layer(found.events).items()}
    beside = 220 if any(pairs.values()) else 0
    column = min(CELL, (WIDTH - 14 - left - beside) / len(found.columns))
    bottom, right = TOP + row * len(names), left + column * len(found.columns)
    body = _names(found, names, left, row)
    body.append(f'<path class="grid" d="M{left} {TOP}H{right:.1f}V{bottom}H{left}z"/>')
    body += _cells(found, left, row, column) + _epochs(found, left, column, bottom) + _scale(found, left)
    if beside:
        body += _norms(found, pairs, max(right + 44, left + 120), row, bottom)
    title = f"{found.kind} in {found.stage}: {found.meaning}, for {len(names)} layers and {len(found.events)} events"
    return chart.svg(WIDTH, bottom + FOOT, title, body)


def opacity(share: float, most: float) -> float:
    """How dark a share is drawn, where `most` is the largest."""
    return PALEST + (1 - PALEST) * share / most if most else PALEST


def largest(found: Treated) -> float:
    """The largest share, drawn darkest."""
    return max((cell.share or 0.0 for cell in found.cells.values()), default=0.0)


def _names(found: Treated, names: list[str], left: float, row: int) -> list[str]:
    """Every name, or where rows are narrow every second or third; the others are shown by the cells."""
    body, each = [], -(-14 // row)
    for index, (name, whole) in enumerate(zip(names, found.layers, strict=True)):
        if index % each == 0:
            place = f'x="{left - 8}" y="{TOP + (index + 0.5) * row + 4:.1f}"'
            body.append(f'<text class="tick" {place} text-anchor="end">{escape(name)}<title>{escape(whole)}</title></text>')
    return body


def _cells(found: Treated, left: float, row: int, column: float) -> list[str]:
    places, most, gap = {name: index for index, name in enumerate(found.layers)}, largest(found), 1 if column > 5 else 0
    body = []
    for (name, place), cell in sorted(found.cells.items(), key=lambda item: (places[item[0][0]], item[0][1])):
        box = f'x="{left + place * column:.1f}" y="{TOP + places[name] * row}" width="{column - gap:.1f}" height="{row - 1}"'
        if cell.share is None:
            paint = 'class="full"'
        else:
            paint = f'fill-opacity="{opacity(cell.share, most):.2f}"'
        body.append(f"<rect {box} {paint}><title>{escape(cell.text)}</title></rect>")
    return [f'<g class="kept" aria-hidden="true">{"".join(body)}</g>']  # a page has their text in a table


def _epochs(found: Treated, left: float, column: float, bottom: float) -> list[str]:
    """The epoch below the columns that have room for it, and what happened in each column."""
    room = 10 + 8 * max((len(str(events[0].get("epoch", ""))) for events in found.columns), default=0)
    each = math.ceil(room / column)
    body = []
    for place, events in enumerate(found.columns):
        if place % each == 0 and "epoch" in events[0]:
            at = left + (place + 0.5) * column
            body.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{events[0]["epoch"]}</text>')
    title = f'<text class="title" x="{left}" y="{bottom + 38}">after epoch</text>'
    return [*body, title]


def _scale(found: Treated, left: float) -> list[str]:
    """What the darkness means."""
    most = largest(found)
    span = f"0 to {100 * most:.3g} %" if most else "0 %"
    boxes = [
        f'<rect class="kept" x="{left + 16 * index}" y="4" width="15" height="13" fill-opacity="{opacity(share, 1):.2f}"/>'
        for index, share in enumerate((0.0, 0.25, 0.5, 0.75, 1.0))
    ]
    return [*boxes, f'<text class="tick" x="{left + 88}" y="15">{span}: {escape(found.meaning)}</text>']


def _norms(found: Treated, pairs: dict[str, tuple[float, float] | None], start: float, row: int, bottom: float) -> list[str]:
    """For each layer its mean norm before (hollow) and after (filled), over all events."""
    known = [(index, pair) for index, name in enumerate(found.layers) if (pair := pairs.get(name))]
    end, least = min(WIDTH - 14, start + 340), max(value for _, pair in known for value in pair) / SPAN or 1.0
    x = chart.axis([max(value, least) for _, pair in known for value in pair], start, end, may_log=True)
    body = [f'<path class="grid" d="M{start:.1f} {bottom}H{end:.1f}"/>']
    for value in chart.ticks(x, 1 if x.log else 3):
        body.append(f'<path class="grid" d="M{x.at(value):.1f} {TOP}V{bottom + 4}"/>')
        body.append(f'<text class="tick" x="{x.at(value):.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
    for index, pair in known:
        y, (before, after) = TOP + (index + 0.5) * row, (x.at(max(value, least)) for value in pair)
        told = f"<title>{escape(found.layers[index])}: {edits.arrow(pair)}</title>"
        dots = (
            f'<circle class="was" cx="{before:.1f}" cy="{y:.1f}" r="3"/><circle class="is" cx="{after:.1f}" cy="{y:.1f}" r="3.5"/>'
        )
        body.append(f'<g>{told}<path class="change" d="M{before:.1f} {y:.1f}H{after:.1f}"/>{dots}</g>')
    title = f"mean norm of touched {found.norm_of}, ○ before, ● after"
    return [*body, f'<text class="title" x="{min(start, WIDTH - 330):.1f}" y="{bottom + 38}">{title}</text>']
