"""How wide every layer was and is: what it reads and makes, before and after compression, as pairs of bars."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any

from pipeline.lineage import Chain
from pipeline.report import chart

WIDTH, TOP = 720, 26
LEAST, MOST, SUM = 13, 28, 900  # height of a row in pixels, and of all rows where they may be lower than the largest
NUMBERS = 100  # width kept free for "512 → 256"
FAR = 8  # widths beyond so many times the middle one are not drawn to scale
SIDES = ("inputs", "outputs")


@dataclass(frozen=True)
class Layer:
    """Channels (of a linear layer features), (before, after), by side."""

    name: str
    widths: dict[str, tuple[int, int]]


def layers(chain: Chain) -> list[Layer]:
    """The layers of the smallest network that the records list; empty where no layer of it lost a channel."""
    for stage in ("collapse", "compress"):
        if rows := chain.records.get(stage, {}).get("layers"):
            found = [Layer(row["name"], {side: (row[f"full_{side}"], row[side]) for side in SIDES}) for row in rows]
            return found if any(before != after for layer in found for before, after in layer.widths.values()) else []
    return []


def ends(found: Sequence[Layer]) -> dict[str, int]:
    """For each side the widest bar that is drawn to scale."""
    longest = {}
    for side in SIDES:
        full = [layer.widths[side][0] for layer in found]
        longest[side] = max(value for value in full if value <= FAR * median(full))
    return longest


def picture(chain: Chain) -> str | None:
    """A row a layer, what it reads at the left, what it makes at the right; None where nothing became narrower."""
    found = layers(chain)
    if not found:
        return None
    row = max(LEAST, min(MOST, SUM // len(found)))
    names, left, each = shown([layer.name for layer in found], row)
    panel, longest = (WIDTH - left) / 2, ends(found)
    starts = {side: left + panel * index for index, side in enumerate(SIDES)}
    body = [f'<text class="title" x="{starts[side]:.1f}" y="16">{side}</text>' for side in SIDES]
    for index, layer in enumerate(found):
        top = TOP + index * row
        drawn = [f'<rect width="{WIDTH}" height="{row}" y="{top}" fill-opacity="0"/>']
        if index % each == 0:
            drawn.append(
                f'<text class="tick" x="{left - 8}" y="{top + row / 2 + 4:.1f}" text-anchor="end">{escape(names[index])}</text>'
            )
        for side in SIDES:
            drawn += _pair(layer.widths[side], starts[side], top, row, (panel - NUMBERS) / longest[side], longest[side])
        told = escape(", ".join([layer.name, *(f"{side} {arrow(layer.widths[side])}" for side in SIDES)]))
        line = f'<path class="grid" d="M{left} {top + row - 0.5}H{WIDTH}"/>'
        body.append(f'<g class="point" tabindex="0" role="img" aria-label="{told}"><title>{told}</title>{"".join(drawn)}{line}</g>')
    return chart.svg(WIDTH, TOP + row * len(found), "Widths of all layers before and after compression", body)


def shown(names: Sequence[str], row: int) -> tuple[list[str], int, int]:
    """Names at the left of rows of that height, the width they take, and that every n-th can be written."""
    cut = [name if len(name) <= 24 else f"…{name[-23:]}" for name in names]
    return cut, 20 + 8 * max(map(len, cut)), -(-14 // row)


def arrow(pair: tuple[int, int]) -> str:
    """A width before and after."""
    before, after = pair
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def section(chain: Chain) -> str:
    """The picture under its heading, how to read it, and its numbers; empty where nothing became narrower."""
    drawn, found = picture(chain), layers(chain)
    if not drawn:
        return ""
    key = "Outlined: the full network; filled: what is left."
    if any(layer.widths[side][0] > end for side, end in ends(found).items() for layer in found):
        key += " Bars that end in a point are too long to be drawn to scale: of these the filled part shows the share that is left."
    lines = []
    for layer in found:
        cells = [f"{value:,}" for side in SIDES for value in layer.widths[side]]
        before, after = layer.widths["outputs"]
        cells.append(f"{100 * after / before:.0f} %")
        lines.append(f"<tr><th scope=row>{escape(layer.name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    heads = ("layer", "inputs before", "after", "outputs before", "after", "outputs left")
    return (
        f"<h4>widths of the layers, before and after</h4><div class='wide heat'><figure>{drawn}</figure></div>"
        f"<p class=quiet>{key}</p><details><summary>the numbers</summary>{table(heads, lines)}</details>"
    )


def draw(axes: Any, chain: Chain, color: str) -> None:
    """The same into a matplotlib panel: what layers read towards the left, what they make towards the right."""
    found = layers(chain)
    longest, each = ends(found), -(-len(found) // 24)
    high, shift = (0.4, 0.2) if each == 1 else (0.8, 0.0)  # of very many layers one bar over the other
    for side, sign in zip(SIDES, (-1, 1), strict=True):
        for index, layer in enumerate(found):
            before, after = layer.widths[side]
            long = min(before, 1.06 * longest[side])  # beyond the frame: not to scale
            axes.barh(index - shift, sign * long / longest[side], high, facecolor="none", edgecolor="0.5", linewidth=0.8)
            axes.barh(index + shift, sign * long * after / before / longest[side], high, color=color)
    axes.set_yticks(range(0, len(found), each), [layer.name for layer in found[::each]], parse_math=False)
    marks = [-1.0, -0.5, 0.0, 0.5, 1.0]
    axes.set_xticks(marks, [f"{abs(mark) * longest[SIDES[mark > 0]]:g}" for mark in marks])
    axes.set(xlim=(-1.04, 1.04), ylim=(len(found) - 0.4, -0.6), xlabel="← inputs, outputs →")
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.tick_params(axis="y", labelsize=6 if len(found) > 12 else 8)


def table(heads: Sequence[str], lines: Sequence[str]) -> str:
    """Rows below their heads."""
    head = "".join(f"<th scope=col>{escape(title)}</th>" for title in heads)
    return f"<div class=wide><table class=numbers><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _pair(pair: tuple[int, int], left: float, top: float, row: int, scale: float, end: int) -> list[str]:
    """Before, outlined, and after, filled, one above the other; and the numbers where there is room."""
    before, after = pair
    high, far = (row - 5) / 2, before > end
    long, short = (end * scale, end * scale * after / before) if far else (before * scale, after * scale)
    tip = f"l{high / 2:.1f} {high / 2:.1f}l-{high / 2:.1f} {high / 2:.1f}" if far else f"v{high:.1f}"
    body: list[Any] = [f'<path class="full" d="M{left:.1f} {top + 1.5}h{long:.1f}{tip}H{left:.1f}z"/>']
    body.append(f'<rect class="kept" x="{left:.1f}" y="{top + 2.5 + high:.1f}" width="{short:.1f}" height="{high:.1f}"/>')
    if row >= 18:
        place = f'x="{left + long + high / 2 + 6:.1f}" y="{top + row / 2 + 4:.1f}"'
        body.append(f'<text class="tick" {place}>{arrow(pair)}</text>')
    return body
