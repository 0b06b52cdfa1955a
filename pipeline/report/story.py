"""What happened to one variant, stage by stage, as text and small charts: for the page and for MLflow."""

from itertools import accumulate
from typing import Any

from pipeline.lineage import TRAINING, Chain
from pipeline.report import chart

SILENT = ("counts", "latency", "absent")  # events that the table or a note already tells


def total_channels(record: dict[str, Any]) -> tuple[int, int] | None:
    """Output channels of all layers, (kept, full); None where the record lists no layers."""
    layers = record["layers"]
    return (sum(row["outputs"] for row in layers), sum(row["full_outputs"] for row in layers)) if layers else None


def method(record: dict[str, Any]) -> str:
    """The method that a stage ran, as its parameters name it; empty where they name none."""
    options = record["parameters"].get(record["stage"], {})
    return str(options.get("method") or options.get("overparameterize", {}).get("method") or "")


def happenings(record: dict[str, Any]) -> list[str]:
    """The events and notes of a stage, a line each."""
    return [describe(event) for event in record["events"] if event["kind"] not in SILENT] + list(record["notes"])


def describe(event: dict[str, Any]) -> str:
    """An event on one line: its epoch, kind and the facts that are single values or lists of names or numbers by name."""
    facts = [f"{key.replace('_', ' ')} {_value(key, v)}" for key, v in event.items() if key not in ("kind", "epoch", "round")]
    told = f"{event['kind']}: {', '.join(facts)}" if facts else event["kind"]
    return f"epoch {event['epoch']}: {told}" if "epoch" in event else told


def curves(chain: Chain, quantity: str) -> str | None:
    """Training and validation curves ("loss" or "accuracy") through all trainings of a chain as SVG; None where nothing trained.

    Epochs are counted on from stage to stage; the marks say where a method changed the model.
    """
    series, marks = [], []
    trained = [(stage, chain.records[stage]) for stage in TRAINING if chain.records.get(stage, {}).get("history")]
    starts = [0, *accumulate(len(record["history"]) for _, record in trained)]
    for index, (stage, record) in enumerate(trained):
        start, history = starts[index], record["history"]
        epochs = [start + row["epoch"] for row in history]
        for part, dashed in (("train", True), ("validation", False)):
            key = f"{part}_{quantity}"
            if all(key in row for row in history):
                series.append(chart.Series(f"{stage}: {part} {quantity}", epochs, [row[key] for row in history], index, dashed))
        marks += [(start + e["epoch"], f"{stage}, {describe(e)}") for e in record["events"] if "epoch" in e]
    percent = quantity == "accuracy"
    spans = [(start, stage) for start, (stage, _) in zip(starts, trained, strict=False)]
    return chart.curves(series, spans, marks, f"{quantity}, %" if percent else quantity, percent) if series else None


def channels(chain: Chain) -> str | None:
    """Surviving channels of each layer as SVG; None where no record lists layers."""
    for stage in ("collapse", "compress"):
        layers = chain.records.get(stage, {}).get("layers")
        if layers:
            return chart.bars([(row["name"], row["outputs"], row["full_outputs"]) for row in layers])
    return None


def _value(key: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{100 * value:.2f} %" if "accuracy" in key else f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{name} {_value(name, item)}" for name, item in value.items())
    if isinstance(value, list):
        rows = [" ".join(map(str, row.values())) if isinstance(row, dict) else _value(key, row) for row in value]
        return f"({', '.join(rows)})"
    return str(value)
