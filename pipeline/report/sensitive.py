"""What the removal of channels would cost, layer by layer, before and after a stage: the events of `pipeline.sensitivity`."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipeline.lineage import Chain
from pipeline.report import chart, widths

WIDTH, TOP, FOOT = 720, 34, 44
RANGE = 1e4  # costs smaller than the largest by more than this are drawn at the edge
TITLES = {
    "measured": "rise of the validation loss",
    "ecdm": "largest share of an output's expected activity that is lost",
}
WHEN = ("before", "after")

Event = dict[str, Any]
Found = dict[str, Event]  # by when: the event


def events(record: Mapping[str, Any]) -> Found:
    """The events of one stage; empty where it logged none."""
    return {event["when"]: event for event in record["events"] if event["kind"] == "sensitivity" and event["stretches"]}


def names(found: Found) -> list[str]:
    """The layers that any of the events names, in the order of the network."""
    return list(dict.fromkeys(row["name"] for when in WHEN if when in found for row in found[when]["stretches"]))


def costs(found: Found, name: str) -> dict[str, list[dict[str, float]]]:
    """What removals cost a layer, by when."""
    return {when: row["costs"] for when in WHEN if when in found for row in found[when]["stretches"] if row["name"] == name}


def axis(found: Found, start: float, end: float) -> chart.Axis:
    """Costs to positions: from 0, or logarithmic where they differ much; then what is no rise is drawn at its start."""
    values = [point["cost"] for event in found.values() for row in event["stretches"] for point in row["costs"]]
    most = max(values)
    rises = [value for value in values if value > most / RANGE]
    if most > 0 and most / min(rises) > 20:
        return chart.Axis(min(rises) / 1.4, most * 1.4, start, end, log=True)
    least = min(0.0, *values)
    return chart.Axis(least, most + 0.08 * (most - least) if most > least else least + 1.0, start, end)


def picture(record: Mapping[str, Any] | None) -> str | None:
    """A row a layer: hollow dots before, filled ones below them after, larger the more is removed; None without events."""
    found = events(record) if record else {}
    if not found:
        return None
    every = names(found)
    row = max(16, min(30, 900 // len(every)))
    cut, left, each = widths.shown(every, row)
    x, bottom = axis(found, left + 6, WIDTH - 14), TOP + row * len(every)
    body = _scale(found, x, bottom)
    for index, name in enumerate(every):
        top = TOP + index * row
        drawn = [f'<rect width="{WIDTH}" height="{row}" y="{top}" fill-opacity="0"/>']
        if index % each == 0:
            drawn.append(
                f'<text class="tick" x="{left - 8}" y="{top + row / 2 + 4:.1f}" text-anchor="end">{escape(cut[index])}</text>'
            )
        own = costs(found, name)
        for when, points in own.items():
            drawn.append(_dots(points, x, top + row * (0.5 if len(found) == 1 else 0.29 if when == "before" else 0.71), when))
        told = escape("\n".join([name, *(f"{when}: {told_of(points)}" for when, points in own.items())]))
        line = f'<path class="grid" d="M{left} {top + row - 0.5}H{WIDTH}"/>'
        body.append(f'<g class="point" tabindex="0" role="img" aria-label="{told}"><title>{told}</title>{"".join(drawn)}{line}</g>')
    return chart.svg(WIDTH, bottom + FOOT, f"Sensitivity of {len(every)} layers: {title(found)}", body)


def title(found: Found) -> str:
    """What the costs are."""
    return TITLES[next(iter(found.values()))["by"]]


def told_of(points: Sequence[Mapping[str, float]]) -> str:
    """Costs in words."""
    return ", ".join(f"{100 * point['share']:.0f} % removed {point['cost']:.3g}" for point in points)


def section(record: Mapping[str, Any]) -> str:
    """The picture under its heading, how to read it, and its numbers; empty without events."""
    drawn, found = picture(record), events(record)
    if not drawn:
        return ""
    one = next(iter(found.values()))
    how = (
        "measured on the first validation batches with those channels at zero for all that read them"
        if one["by"] == "measured"
        else "expected from the weights and batch norms alone"
    )
    key = f"The {title(found)} when a share of a layer's outputs goes, the smallest weights first: {how}. "
    key += "Dots are larger the more is removed; hollow: before, filled: after, of what is then left."
    low = axis(found, 0, 1)
    if low.log and any(point["cost"] < low.low for event in found.values() for row in event["stretches"] for point in row["costs"]):
        key += f" At the left edge: a rise below {low.low:.1g}, or none."
    return (
        f"<h4>{escape(record['stage'])}: sensitivity of the layers</h4><div class='wide heat'><figure>{drawn}</figure></div>"
        f"<p class=quiet>{escape(key)}</p><details><summary>the numbers</summary>{_numbers(found)}</details>"
    )


def last(chain: Chain) -> dict[str, Any] | None:
    """The record of the last stage with such events."""
    return next((record for record in reversed(chain.records.values()) if events(record)), None)


def draw(axes: Any, record: Mapping[str, Any], color: str) -> None:
    """The same into a matplotlib panel."""
    found, every = events(record), names(events(record))
    scale = axis(found, 0, 1)
    for when in found:
        shift, face = (0.2, color) if when == "after" else (-0.2, "white")
        for index, name in enumerate(every):
            points = costs(found, name).get(when, [])
            places = [max(point["cost"], scale.low) for point in points]
            rows = [index + (shift if len(found) > 1 else 0)] * len(places)
            axes.plot(places, rows, color="0.6", linewidth=0.8, zorder=1)
            sizes = [4 + 22 * point["share"] for point in points]
            axes.scatter(places, rows, sizes, face, edgecolor=color, linewidth=0.8, label=when if index == 0 else None)
    each = -(-len(every) // 24)
    axes.set_yticks(range(0, len(every), each), every[::each], parse_math=False)
    axes.set(xscale="log" if scale.log else "linear", xlim=(scale.low, scale.high), xlabel=title(found))
    axes.set_ylim(len(every) - 0.4, -0.6)
    axes.tick_params(axis="y", labelsize=6 if len(every) > 12 else 8)
    axes.legend(fontsize=7)


def _numbers(found: Found) -> str:
    heads, lines = ["layer", "removed"], []
    score = next(iter(found.values()))["score"]
    measured = any("score" in point for event in found.values() for row in event["stretches"] for point in row["costs"])
    for when in found:
        heads += [f"cost {when}", *([f"{score} {when}"] if measured else [])]
    for name in names(found):
        own = costs(found, name)
        for place in range(max(map(len, own.values()))):
            points = {when: own[when][place] if place < len(own.get(when, [])) else None for when in found}
            share = next(point["share"] for point in points.values() if point)
            cells = [f"{100 * share:.0f} %"]
            for point in points.values():
                cells.append(f"{point['cost']:.4g}" if point else "")
                cells += [f"{100 * point['score']:.2f} %" if point else ""] if measured else []
            lines.append(f"<tr><th scope=row>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return widths.table(heads, lines)


def _scale(found: Found, x: chart.Axis, bottom: float) -> list[str]:
    """Vertical lines with their values below, the key above."""
    body = []
    for value in chart.ticks(x, 2 if x.log else 5):
        body.append(f'<path class="grid" d="M{x.at(value):.1f} {TOP}V{bottom + 4}"/>')
        body.append(f'<text class="tick" x="{x.at(value):.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
    body.append(f'<text class="title" x="{x.start:.1f}" y="{bottom + 38}">{escape(title(found))}</text>')
    at = x.start
    for when in found:
        body.append(f'{_dot(at + 5, 14, 4.5, when)}<text class="tick" x="{at + 16:.1f}" y="18">{when}</text>')
        at += 90
    return body


def _dots(points: Sequence[Mapping[str, float]], x: chart.Axis, y: float, when: str) -> str:
    places = [x.at(max(point["cost"], x.low)) for point in points]
    line = f'<path class="change" d="M{min(places):.1f} {y:.1f}H{max(places):.1f}"/>'
    return line + "".join(_dot(at, y, 2.0 + 3.4 * point["share"], when) for at, point in zip(places, points, strict=True))


def _dot(x: float, y: float, radius: float, when: str) -> str:
    return f'<circle class="{"was" if when == "before" else "is"}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'
