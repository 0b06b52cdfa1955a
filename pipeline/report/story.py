"""What happened to one variant, stage by stage, as text and small charts: for the page and for MLflow."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from pipeline.lineage import TRAINING, Chain
from pipeline.report import chart, edits, strength
from pipeline.scores import is_share

MOST_LINES = 6  # events of one kind in a row that are told one by one
MOST_NAMED = 8  # entries of a list that are named one by one
SILENT = (
    "counts",
    "latency",
    "absent",
    "predictions",
    "quantized",
    "sensitivity",
)  # events that the table, a note or a picture already tells


def total_channels(record: dict[str, Any]) -> tuple[int, int] | None:
    """Output channels of all layers, (kept, full); None where the record lists no layers."""
    layers = record["layers"]
    return (sum(row["outputs"] for row in layers), sum(row["full_outputs"] for row in layers)) if layers else None


def method(record: dict[str, Any]) -> str:
    """The methods that a stage ran, as its parameters name them; empty where they name none."""
    options = record["parameters"].get(record["stage"], {})
    within = [options.get("overparameterize", {}).get("method"), options.get("revive", {}).get("method")]
    named = [options.get("method"), *(name for name in within if name != "finetune")]  # that one does nothing beside the training
    return ", ".join(str(name) for name in named if name)


def happenings(record: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The events and notes of a stage, a line each; of many events of one kind in a row their sum, with the lines behind it."""
    told: list[tuple[str, list[str]]] = []
    for events in edits.runs(event for event in record["events"] if event["kind"] not in SILENT):
        lines = [describe(event) for event in events]
        told += [(_sum(events), lines)] if len(events) > MOST_LINES else [(line, []) for line in lines]
    return told + [(note, []) for note in record["notes"]]


def describe(event: dict[str, Any]) -> str:
    """An event on one line: its epoch, kind and the facts that are single values or short lists; of layers how many, and the mean
    norms of what was touched in them."""
    hidden = ("kind", "epoch", "round", *(["layers"] if edits.touched(event) is not None else []))
    facts = [f"{key.replace('_', ' ')} {_value(key, v)}" for key, v in event.items() if key not in hidden]
    facts += _in_layers([event])
    told = f"{event['kind']}: {', '.join(facts)}" if facts else event["kind"]
    return f"epoch {event['epoch']}: {told}" if "epoch" in event else told


def trainings(chain: Chain) -> list[tuple[int, str, dict[str, Any]]]:
    """The stages of a chain that trained: how many epochs came before each, its name and record."""
    trained = [(stage, chain.records[stage]) for stage in TRAINING if chain.records.get(stage, {}).get("history")]
    starts = [0, *accumulate(len(record["history"]) for _, record in trained)]
    return [(start, stage, record) for start, (stage, record) in zip(starts, trained, strict=False)]


def curves(chain: Chain, quantity: str) -> str | None:
    """Training and validation curves through all trainings of a chain as SVG, of the "loss" or the "accuracy" (or what the task has
    in its place); None where nothing trained.

    Epochs are counted on from stage to stage; the marks say where a method changed the model.
    """
    series, called = [], chain.names.title if quantity == "accuracy" else quantity
    for index, (start, stage, record) in enumerate(trainings(chain)):
        history = record["history"]
        epochs = [start + row["epoch"] for row in history]
        for part, dashed in (("train", True), ("validation", False)):
            key = f"{part}_{chain.names.rename(quantity)}"
            if all(key in row for row in history):
                series.append(chart.Series(f"{stage}: {part} {called}", epochs, [row[key] for row in history], index, dashed))
    percent = quantity == "accuracy"
    title = f"{called}, %" if percent else called
    return chart.curves(series, _spans(chain), _marks(chain), title, percent) if series else None


def filters(chain: Chain) -> str | None:
    """The norms of the filters through all trainings of a chain as SVG; None where no record holds them."""
    stretches, trained = strengths(chain), trainings(chain)
    epochs = sum(len(record["history"]) for _, _, record in trained)
    return strength.fan(stretches, epochs, _spans(chain), _marks(chain), moves(chain)) if stretches else None


def strengths(chain: Chain) -> list[strength.Stretch]:
    """The filter norms of each training that recorded them."""
    found = [strength.stretch(s, index, start, record["history"]) for index, (start, s, record) in enumerate(trainings(chain))]
    return [part for part in found if part]


def moves(chain: Chain) -> list[strength.Move]:
    """What events did to whole filters; of a method that edits kernels within filters, whose norms are others, nothing."""
    found = []
    for start, stage, record in trainings(chain):
        for event in record["events"]:
            rows = edits.touched(event) or []
            pair = None if any("kernels" in row for row in rows) else edits.norms(rows)
            if pair and "epoch" in event:
                found.append(strength.Move(start + event["epoch"], *pair, f"{stage}, {describe(event)}"))
    return found


def channels(chain: Chain) -> str | None:
    """Surviving channels of each layer as SVG; None where no record lists layers."""
    for stage in ("collapse", "compress"):
        layers = chain.records.get(stage, {}).get("layers")
        if layers:
            return chart.bars([(row["name"], row["outputs"], row["full_outputs"]) for row in layers])
    return None


def _spans(chain: Chain) -> list[tuple[float, str]]:
    return [(start, stage) for start, stage, _ in trainings(chain)]


def _marks(chain: Chain) -> list[tuple[float, str]]:
    return [
        (start + event["epoch"], f"{stage}, {describe(event)}")
        for start, stage, record in trainings(chain)
        for event in record["events"]
        if "epoch" in event and event["kind"] not in SILENT
    ]


def _sum(events: Sequence[dict[str, Any]]) -> str:
    """Many events of one kind on one line."""
    facts = [f"{len(events)} times {edits.when(events)}".strip()]
    for key in ("filters", "kernels"):
        if all(isinstance(event.get(key), int) for event in events):
            facts.append(f"{key} {sum(event[key] for event in events):,} in all")
    return f"{events[0]['kind']}: {', '.join([*facts, *_in_layers(events)])}"


def _in_layers(events: Sequence[dict[str, Any]]) -> list[str]:
    layers = edits.by_layer(events)
    rows = [row for found in layers.values() for row in found]
    told = [f"in {len(layers)} layer{'s' if len(layers) != 1 else ''}"] if any(edits.touched(e) is not None for e in events) else []
    if pair := edits.norms(rows):
        told.append(f"mean norm of {'kernels' if any('kernels' in row for row in rows) else 'filters'} {edits.arrow(pair)}")
    if shares := [row["weight"] for row in rows if "weight" in row]:
        told.append(f"own share {min(shares):.2f} to {max(shares):.2f}")
    return told


def _value(key: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{100 * value:.2f} %" if is_share(key) else f"{value:.4g}"
    if isinstance(value, dict):
        if len(value) > MOST_NAMED and all(isinstance(item, int) for item in value.values()):
            return f"{sum(value.values()):,} in {sum(map(bool, value.values()))} of {len(value)}"
        return " ".join(f"{name} {_value(name, item)}" for name, item in value.items())
    if isinstance(value, list):
        rows = [" ".join(map(str, row.values())) if isinstance(row, dict) else _value(key, row) for row in value]
        more = [f"and {len(rows) - MOST_NAMED} more"] if len(rows) > MOST_NAMED + 1 else []
        return f"({', '.join(rows[:MOST_NAMED] + more if more else rows)})"
    return str(value)
