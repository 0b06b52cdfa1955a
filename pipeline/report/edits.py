"""What the events of a training did to each layer: how much of it they touched, and the norms before and after.

An event lists the layers it touched with, by method, `filters` and `kernels` (how many), `open` (inputs that are left) or `weight`
(the share that stays its own); how many a layer has is in the record's table of layers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

MOST_COLUMNS = 48  # more events than this share columns
MEANINGS = {
    "filters": "share of a layer's filters that one event touched",
    "open": "share of a layer's inputs that are closed",
    "weight": "share of a layer's weights that comes from the other network",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One layer in the events of one column: the mean share that an event touched (None: unknown), and that in words."""

    share: float | None
    text: str


@dataclass(frozen=True)
class Treated:
    """The events of one kind in one stage. `columns` holds consecutive events, `cells` is by (layer, column)."""

    stage: str
    kind: str
    meaning: str
    norm_of: str  # what the norms are those of
    layers: list[str]
    sizes: dict[str, dict[str, int]]
    columns: list[list[Row]]
    cells: dict[tuple[str, int], Cell]

    @property
    def events(self) -> list[Row]:
        """All events, in their order."""
        return [event for column in self.columns for event in column]


def treated(record: Row) -> Iterator[Treated]:
    """Each kind of events in `record` that names layers."""
    found: dict[str, list[Row]] = {}
    for event in record["events"]:
        if touched(event) is not None:
            found.setdefault(event["kind"], []).append(event)
    sizes = {row["name"]: _size(row) for row in record["layers"]}
    for kind, events in found.items():
        rows = [row for event in events for row in touched(event) or []]
        keys, named = {key for row in rows for key in row}, dict.fromkeys(map(_name, rows))
        inside = [row["name"] for row in record["layers"] if row["type"] == "Conv2d" or row["name"] in named]
        span = -(-len(events) // MOST_COLUMNS)
        columns = [events[start : start + span] for start in range(0, len(events), span)]
        yield Treated(
            record["stage"],
            kind,
            next((told for key, told in MEANINGS.items() if key in keys), "layers that the events name"),
            "kernels" if "kernels" in keys else "filters",
            list(dict.fromkeys([*inside, *named])),
            sizes,
            columns,
            {
                (name, place): _cell(name, column, rows, sizes.get(name, {}))
                for place, column in enumerate(columns)
                for name, rows in by_layer(column).items()
            },
        )


def touched(event: Row) -> list[Row] | None:
    """The layers that an event names, a dict each; None where it is not of that kind."""
    rows = event.get("layers")
    return rows if isinstance(rows, list) and all(isinstance(row, dict) and "name" in row for row in rows) else None


def norms(rows: Iterable[Row]) -> tuple[float, float] | None:
    """The mean norms before and after over all filters or kernels of `rows`; None where these do not say."""
    known = [
        (row, row.get("kernels", row.get("filters", 1))) for row in rows if {"mean_norm_before", "mean_norm_after"} <= row.keys()
    ]
    total = sum(count for _, count in known)
    if not total:
        return None
    before, after = (sum(row[f"mean_norm_{when}"] * count for row, count in known) / total for when in ("before", "after"))
    return before, after


def counts(rows: Sequence[Row], size: dict[str, int]) -> dict[str, str]:
    """How much of one layer was touched by each of `rows`, in all, by what it is; of one row with how many there are."""
    found = {}
    for key in ("filters", "kernels"):
        if any(key in row for row in rows):
            full = f" of {size[key]:,}" if len(rows) == 1 and key in size else ""
            found[key] = f"{sum(row.get(key, 0) for row in rows):,}{full}"
    if any("open" in row for row in rows):
        last = rows[-1]  # closed inputs stay closed
        found["closed inputs"] = f"{last['inputs'] - last['open']:,} of {last['inputs']:,}"
    if any("weight" in row for row in rows):
        found["from the other network"] = f"{100 * sum(1 - row['weight'] for row in rows) / len(rows):.0f} %"
    return found


def by_layer(events: Iterable[Row]) -> dict[str, list[Row]]:
    """What `events` say of each layer that they touched."""
    found: dict[str, list[Row]] = {}
    for event in events:
        for row in touched(event) or []:
            found.setdefault(_name(row), []).append(row)
    return found


def when(events: Sequence[Row]) -> str:
    """The epochs after which `events` happened."""
    epochs = [event["epoch"] for event in events if "epoch" in event]
    if not epochs:
        return ""
    return f"after epoch {epochs[0]}" if epochs[0] == epochs[-1] else f"after epochs {epochs[0]} to {epochs[-1]}"


def runs(events: Iterable[Row]) -> list[list[Row]]:
    """Consecutive events of one kind together."""
    return [list(group) for _, group in groupby(events, key=lambda event: event["kind"])]


def arrow(pair: tuple[float, float] | None) -> str:
    """Norms before and after, as text."""
    return f"{pair[0]:.3g} → {pair[1]:.3g}" if pair else ""


def _cell(layer: str, column: Sequence[Row], rows: Sequence[Row], size: dict[str, int]) -> Cell:
    shares = [_share(row, size) for row in rows]
    known = [share for share in shares if share is not None]
    facts = [f"{layer}, {when(column)}" if when(column) else layer]
    facts += [f"{len(rows)} of {len(column)} events"] if len(column) > 1 else []
    facts += [f"{number} {what}" for what, number in counts(rows, size).items()]
    facts += [f"mean norm {arrow(pair)}"] if (pair := norms(rows)) else []
    return Cell(sum(known) / len(column) if len(known) == len(shares) else None, ", ".join(facts))


def _share(row: Row, size: dict[str, int]) -> float | None:
    if "filters" in row:
        return row["filters"] / size["filters"] if size.get("filters") else None
    if "open" in row:
        return 1 - row["open"] / row["inputs"] if row.get("inputs") else None
    return 1 - row["weight"] if "weight" in row else None


def _name(row: Row) -> str:
    return row["name"].removesuffix(".layer")  # branches wrap a layer; the table of layers names it without


def _size(row: Row) -> dict[str, int]:
    return {"filters": row["outputs"], "kernels": row["outputs"] * row["inputs"] // row.get("groups", 1)}
