"""The report's plots as SVG and PNG files, for papers and READMEs. Equal records give equal bytes."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import files
from pipeline.lineage import TRAINING, Chain
from pipeline.report import sensitive, strength, widths
from pipeline.report.chart import MOST_LINES
from pipeline.report.rows import ACCURACY, Report, Row, pareto
from pipeline.report.story import SILENT, strengths, trainings
from pipeline.report.table import columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0b63a5", "#b3500a", "#0f766e", "#8a3a8f", "#7a6200", "#b0243f", "#4b5563", "#3f6212")
DYING = "#b0243f"
MARKERS = ("o", "s", "^", "D", "v", "P")
SETTINGS: Any = {
    "svg.hashsalt": "winnow",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def write(report: Report, folder: Path) -> None:
    """Write tradeoff-COST, and for each seed curves-SEED, filters-SEED, channels-SEED, widths-SEED and sensitivity-SEED, where the
    records hold what they show, as .svg and .png into `folder`."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        for cost in report.costs:
            _save(tradeoff(report, cost), folder / f"tradeoff-{cost}")
        trained = [group[0] for group in report.variants]  # what happened before the export is the same in all precisions
        for seed in dict.fromkeys(chain.seed for chain in trained):
            of_seed = [chain for chain in trained if chain.seed == seed]
            _save(curves(of_seed), folder / f"curves-{seed}")
            for name, draw in (("filters", filters), ("widths", narrowed), ("sensitivity", sensitivity)):
                if drawn := draw(of_seed):
                    _save(drawn, folder / f"{name}-{seed}")
            _save(channels(of_seed), folder / f"channels-{seed}")


def tradeoff(report: Report, cost: str) -> "Figure":
    """Accuracy against a cost: colour is the compress block, shape the revive block, a ring tells a lower precision; the Pareto
    front is filled and joined, a star is on the champion."""
    figure, axes = _figure(8.4, 4.2)
    rows = [row for row in report.compared if cost in row.values and ACCURACY in row.values]
    scale = 1e6 if cost == "macs" else 1.0
    front = pareto([(row.values[cost], row.values[ACCURACY]) for row in rows])
    revive, compress, precision = map(report.axis, ("revive", "compress", "precision"))
    joined = sorted((row.values[cost] / scale, 100 * row.values[ACCURACY]) for row, on in zip(rows, front, strict=True) if on)
    axes.step(*zip(*joined, strict=True), where="post", color="0.4", linestyle="--", linewidth=1, zorder=1)
    for row, on_front in zip(rows, front, strict=True):
        color = COLORS[compress.index(row.compress) % len(COLORS)]
        _point(axes, row, cost, scale, color, MARKERS[revive.index(row.revive) % len(MARKERS)], on_front)
        place, ring = (row.values[cost] / scale, 100 * row.values[ACCURACY]), precision.index(row.precision)
        if ring:
            axes.plot(*place, "o", markersize=9 + 3 * ring, markerfacecolor="none", color=color, markeredgewidth=0.8)
        if report.chosen(row):
            axes.plot(*place, "*", markersize=9, color="#9a6700", markeredgecolor="white", markeredgewidth=0.6, zorder=5)
    for ring, name in list(enumerate(precision))[1:]:
        axes.plot([], [], "o", markersize=9 + 3 * ring, markerfacecolor="none", color="0.4", label=f"ring: {_plain(name)}")
    unit = {"macs": "millions", "size_mb": "MB"}.get(cost, "ms")
    title = next(column.title for column in columns(report) if column.key == cost)
    axes.set(xlabel=f"{title}, {unit}", ylabel=f"test {report.names.title}, %")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right upper", frameon=False)
    return figure


def _point(axes: "Axes", row: Row, cost: str, scale: float, color: str, marker: str, on_front: bool) -> None:
    x, y = row.values[cost] / scale, 100 * row.values[ACCURACY]
    error = 100 * row.spread[ACCURACY] if ACCURACY in row.spread else None
    face = color if on_front else "white"
    style: dict[str, Any] = {"fmt": marker, "color": color, "markerfacecolor": face, "markersize": 7, "linewidth": 1}
    axes.errorbar(x, y, yerr=error, label=_plain(row.name), **style)


def curves(chains: list[Chain]) -> "Figure":
    """A panel a variant: validation accuracy (or what the task has in its place) and training loss by epoch through its trainings;
    events as dotted lines."""
    figure, panels = _grid(chains)
    for chain, axes in zip(chains, panels, strict=True):
        losses = axes.twinx()
        for index, (start, stage, record) in enumerate(trainings(chain)):
            _curve(axes, chain.names.rename("validation_accuracy"), 100, record, start, label=stage, color=COLORS[index])
            _curve(losses, "train_loss", 1, record, start, color=COLORS[index], linestyle=":")
        _events(axes, chain)
        losses.spines["right"].set_visible(True)
        axes.set(title=_plain(chain.name), xlabel="epoch", ylabel=f"validation {chain.names.title}, %")
        losses.set_ylabel("training loss (dotted)")
        if trainings(chain):
            axes.legend(fontsize=7, loc="center right")
    return figure


def filters(chains: list[Chain]) -> "Figure | None":
    """A panel a variant: the fan of its filter norms, weakest to strongest, and below it the share of dead filters; None where no
    record holds them."""
    known = {chain.name: strengths(chain) for chain in chains}
    if not any(known.values()):
        return None
    figure, panels = _grid(chains, strip=True)
    for chain, (axes, strip) in zip(chains, zip(panels[::2], panels[1::2], strict=True), strict=True):
        axes.set_title(_plain(chain.name))
        if not known[chain.name]:
            axes.set_axis_off()
            strip.set_axis_off()
            axes.text(0.5, 0.5, "no filter norms recorded", transform=axes.transAxes, ha="center", color="0.4")
            continue
        _fan(axes, strip, known[chain.name])
        _events(axes, chain)
    lines = {str(line.get_label()): line for axes in panels[::2] for line in axes.get_lines()}
    named = [stage for stage in TRAINING if stage in lines]
    figure.legend([lines[stage] for stage in named], named, loc="outside upper left", ncols=len(named), fontsize=8, frameon=False)
    return figure


def _fan(axes: "Axes", strip: "Axes", parts: list[strength.Stretch]) -> None:
    for part in parts:
        color = COLORS[part.color % len(COLORS)]
        norms = {p: [max(value, strength.FLOOR) for value in values] for p, values in part.norms.items()}
        for low, high, opacity in strength.BANDS:
            axes.fill_between(part.epochs, norms[low], norms[high], color=color, alpha=opacity, linewidth=0)
        marker = "." if len(part.epochs) == 1 else None
        axes.plot(part.epochs, norms[50], color=color, linewidth=1.2, marker=marker, label=part.stage)
        strip.fill_between(part.epochs, [100 * share for share in part.dead], color=DYING, alpha=0.25, linewidth=0)
        strip.plot(part.epochs, [100 * share for share in part.dead], color=DYING, linewidth=1.2, marker=marker)
    axes.axhline(strength.DEAD, color=DYING, linestyle="--", linewidth=1)
    axes.annotate(
        f"dead below {strength.DEAD:g}", (0, strength.DEAD), (3, 3), ("axes fraction", "data"), "offset points", fontsize=7
    )
    edge = f" (≥ {strength.FLOOR:g})" if strength.clipped(parts) else ""
    axes.set(yscale="log", ylim=strength.bounds(parts), ylabel=f"filter norm{edge}")
    axes.minorticks_off()
    axes.tick_params(labelbottom=False)
    for panel in (axes, strip):
        panel.locator_params(axis="x", integer=True)
    strip.set(ylim=(0, strength.ceiling(parts)), xlabel="epoch", ylabel="dead, %", xlim=axes.get_xlim())


def _events(axes: "Axes", chain: Chain) -> None:
    """Dotted lines at events; where they are many, marks above them alone."""
    epochs = [
        start + event["epoch"]
        for start, _, record in trainings(chain)
        for event in record["events"]
        if "epoch" in event and event["kind"] not in SILENT
    ]
    if len(epochs) > MOST_LINES:
        style: dict[str, Any] = {"marker": "|", "color": "0.4", "linestyle": "", "markersize": 5, "clip_on": False}
        axes.plot(epochs, [1.0] * len(epochs), transform=axes.get_xaxis_transform(), **style)
        return
    for epoch in epochs:
        axes.axvline(epoch, color="0.6", linestyle=":", linewidth=0.8)


def channels(chains: list[Chain]) -> "Figure":
    """A panel a variant: output channels of each layer, kept (filled) of full (outlined)."""
    figure, panels = _grid(chains)
    for chain, axes in zip(chains, panels, strict=True):
        layers = chain.records.get("collapse", chain.records.get("compress", {})).get("layers", [])
        places = range(len(layers))
        axes.barh(places, [row["full_outputs"] for row in layers], facecolor="none", edgecolor="0.5")
        axes.barh(places, [row["outputs"] for row in layers], color=COLORS[0])
        axes.set_yticks(places, [_plain(row["name"]) for row in layers])
        axes.invert_yaxis()
        axes.set(title=_plain(chain.name), xlabel="output channels")
    return figure


def narrowed(chains: list[Chain]) -> "Figure | None":
    """A panel for each variant that became narrower: its widths before and after; None where none did."""
    chains = [chain for chain in chains if widths.layers(chain)]
    if not chains:
        return None
    figure, panels = _grid(chains)
    for chain, axes in zip(chains, panels, strict=True):
        widths.draw(axes, chain, COLORS[0])
        axes.set_title(_plain(chain.name))
    return figure


def sensitivity(chains: list[Chain]) -> "Figure | None":
    """A panel for each variant whose last such events say what removals cost; None where none does."""
    known = [(chain, record) for chain in chains if (record := sensitive.last(chain))]
    if not known:
        return None
    figure, panels = _grid([chain for chain, _ in known])
    for (chain, record), axes in zip(known, panels, strict=True):
        sensitive.draw(axes, record, COLORS[0])
        axes.set_title(f"{_plain(chain.name)}, {record['stage']}")
    return figure


def _curve(axes: "Axes", key: str, factor: float, record: dict[str, Any], start: int, **style: Any) -> None:
    rows = [row for row in record["history"] if key in row]
    axes.plot([start + row["epoch"] for row in rows], [factor * row[key] for row in rows], linewidth=1.2, **style)


def _grid(chains: list[Chain], *, strip: bool = False) -> tuple["Figure", list["Axes"]]:
    """A figure with a panel a chain, those of one revive block in one row; with `strip` a panel and a narrow one below it."""
    from matplotlib.figure import Figure

    across = max(1, len({chain.compress for chain in chains}))
    down = -(-len(chains) // across)
    figure = Figure(figsize=(4 * across, (3.4 if strip else 2.8) * down), layout="constrained")
    if not strip:
        return figure, list(figure.subplots(down, across, squeeze=False).flat)[: len(chains)]
    rows = figure.subplots(2 * down, across, squeeze=False, height_ratios=[3, 1] * down)
    pairs = [axes for row in range(down) for pair in zip(rows[2 * row], rows[2 * row + 1], strict=True) for axes in pair]
    return figure, pairs[: 2 * len(chains)]


def _figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: "Figure", stem: Path) -> None:
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once for both files: it takes as long as drawing
    for form, facts in (("svg", {"Date": None}), ("png", {"Software": None})):
        content = io.BytesIO()
        figure.savefig(content, format=form, dpi=110, metadata=facts)
        files.write_bytes(stem.with_suffix(f".{form}"), content.getvalue())


def _plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics, nor as a name to be left out of a legend."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
