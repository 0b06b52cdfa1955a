"""The report's plots as SVG and PNG files, for papers and READMEs. Equal records give equal bytes."""

import io
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import files
from pipeline.lineage import TRAINING, Chain
from pipeline.report.rows import ACCURACY, Report, Row, pareto
from pipeline.report.story import SILENT
from pipeline.report.table import columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0b63a5", "#b3500a", "#0f766e", "#8a3a8f", "#7a6200", "#b0243f", "#4b5563", "#3f6212")
MARKERS = ("o", "s", "^", "D", "v", "P")
SETTINGS: Any = {
    "svg.hashsalt": "winnow",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def write(report: Report, folder: Path) -> None:
    """Write tradeoff-COST, and for each seed curves-SEED and channels-SEED, as .svg and .png into `folder`."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        for cost in report.costs:
            _save(tradeoff(report, cost), folder / f"tradeoff-{cost}")
        for seed in dict.fromkeys(chain.seed for chain in report.chains):
            of_seed = [chain for chain in report.chains if chain.seed == seed]
            _save(curves(of_seed), folder / f"curves-{seed}")
            _save(channels(of_seed), folder / f"channels-{seed}")


def tradeoff(report: Report, cost: str) -> "Figure":
    """Accuracy against a cost: colour is the compress block, shape the revive block; the Pareto front is filled and joined."""
    figure, axes = _figure(6.4, 4.2)
    rows = [row for row in report.compared if cost in row.values and ACCURACY in row.values]
    scale = 1e6 if cost == "macs" else 1.0
    front = pareto([(row.values[cost], row.values[ACCURACY]) for row in rows])
    revive, compress = (list(dict.fromkeys(getattr(row, axis) for row in report.rows)) for axis in ("revive", "compress"))
    joined = sorted((row.values[cost] / scale, 100 * row.values[ACCURACY]) for row, on in zip(rows, front, strict=True) if on)
    axes.step(*zip(*joined, strict=True), where="post", color="0.4", linestyle="--", linewidth=1, zorder=1)
    for row, on_front in zip(rows, front, strict=True):
        color = COLORS[compress.index(row.compress) % len(COLORS)]
        _point(axes, row, cost, scale, color, MARKERS[revive.index(row.revive) % len(MARKERS)], on_front)
    unit = {"macs": "millions", "size_mb": "MB"}.get(cost, "ms")
    title = next(column.title for column in columns(report) if column.key == cost)
    axes.set(xlabel=f"{title}, {unit}", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="best", framealpha=0.8)
    return figure


def _point(axes: "Axes", row: Row, cost: str, scale: float, color: str, marker: str, on_front: bool) -> None:
    x, y = row.values[cost] / scale, 100 * row.values[ACCURACY]
    error = 100 * row.spread[ACCURACY] if ACCURACY in row.spread else None
    face = color if on_front else "white"
    style: dict[str, Any] = {"fmt": marker, "color": color, "markerfacecolor": face, "markersize": 7, "linewidth": 1}
    axes.errorbar(x, y, yerr=error, label=_plain(row.name), **style)


def curves(chains: list[Chain]) -> "Figure":
    """A panel a variant: validation accuracy and training loss by epoch through its trainings; events as dotted lines."""
    figure, panels = _grid(chains)
    for chain, axes in zip(chains, panels, strict=True):
        trained = [(stage, chain.records[stage]) for stage in TRAINING if chain.records.get(stage, {}).get("history")]
        starts = [0, *accumulate(len(record["history"]) for _, record in trained)]
        losses = axes.twinx()
        for index, (stage, record) in enumerate(trained):
            _curve(axes, "validation_accuracy", 100, record, starts[index], label=stage, color=COLORS[index])
            _curve(losses, "train_loss", 1, record, starts[index], color=COLORS[index], linestyle=":")
            for event in record["events"]:
                if "epoch" in event and event["kind"] not in SILENT:
                    axes.axvline(starts[index] + event["epoch"], color="0.6", linestyle=":", linewidth=0.8)
        losses.spines["right"].set_visible(True)
        axes.set(title=_plain(chain.name), xlabel="epoch", ylabel="validation accuracy, %")
        losses.set_ylabel("training loss (dotted)")
        if trained:
            axes.legend(fontsize=7, loc="center right")
    return figure


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


def _curve(axes: "Axes", key: str, factor: float, record: dict[str, Any], start: int, **style: Any) -> None:
    rows = [row for row in record["history"] if key in row]
    axes.plot([start + row["epoch"] for row in rows], [factor * row[key] for row in rows], linewidth=1.2, **style)


def _grid(chains: list[Chain]) -> tuple["Figure", list["Axes"]]:
    """A figure with a panel a chain, those of one revive block in one row."""
    from matplotlib.figure import Figure

    across = max(1, len({chain.compress for chain in chains}))
    down = -(-len(chains) // across)
    figure = Figure(figsize=(4 * across, 2.8 * down), layout="constrained")
    return figure, list(figure.subplots(down, across, squeeze=False).flat)[: len(chains)]


def _figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: "Figure", stem: Path) -> None:
    for form, facts in (("svg", {"Date": None}), ("png", {"Software": None})):
        content = io.BytesIO()
        figure.savefig(content, format=form, dpi=110, metadata=facts)
        files.write_bytes(stem.with_suffix(f".{form}"), content.getvalue())


def _plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics, nor as a name to be left out of a legend."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
