"""Records put together: the stages behind each variant of the grid, in the order of the chain."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.scores import Names, of_metrics

STAGES = ("prepare", "train", "revive", "compress", "collapse", "export", "profile")
OWN = STAGES[3:]  # the stages that no other variant shares
TRAINING = ("train", "revive", "compress")

Record = dict[str, Any]


@dataclass(frozen=True)
class Chain:
    """One variant. `records` holds its records by stage, in the order of the chain; a stage without a record is absent."""

    revive: str
    compress: str
    seed: int
    records: dict[str, Record]

    @property
    def name(self) -> str:
        """As DVC names it: restart-diet-0."""
        return f"{self.revive}-{self.compress}-{self.seed}"

    @property
    def names(self) -> Names:
        """What the scores of the chain's task are called."""
        return of_metrics(record.get("metrics", {}) for record in self.records.values())

    def metric(self, stage: str, name: str) -> float | None:
        """A final number of a stage, None where the stage or the number is missing."""
        return self.records.get(stage, {}).get("metrics", {}).get(name)


def select(records: Iterable[Record], revive: Sequence[str], compress: Sequence[str], seeds: Sequence[int]) -> list[Record]:
    """The records that belong to the grid `revive` x `compress` x `seeds`, in the grid's order; all others are stale."""
    axes = (("revive", list(revive)), ("compress", list(compress)), ("seed", list(seeds)))
    wanted = [r for r in records if all(r[axis] is None or r[axis] in allowed for axis, allowed in axes)]
    place = lambda r: [-1 if r[axis] is None else allowed.index(r[axis]) for axis, allowed in axes]  # noqa: E731
    return sorted(wanted, key=place)


def chains(records: Iterable[Record]) -> list[Chain]:
    """A chain for each variant that has at least one stage of its own, in the order of `records`."""
    records = list(records)
    found = {(r["stage"], r["revive"], r["compress"], r["seed"]): r for r in records}
    variants = dict.fromkeys((r["revive"], r["compress"], r["seed"]) for r in records if r["stage"] in OWN)
    result = []
    for revive, compress, seed in variants:
        keys = [("prepare", None, None, None), ("train", None, None, seed), ("revive", revive, None, seed)]
        keys += [(stage, revive, compress, seed) for stage in OWN]
        result.append(Chain(revive, compress, seed, {key[0]: found[key] for key in keys if key in found}))
    return result


def flat_parameters(records: dict[str, Record]) -> dict[str, str]:
    """Every parameter behind `records` (by stage) under its dotted place in params.yaml: "compress.fit.lr" -> "0.05".

    A block keeps the name of its section (revive.alpha, not revive.reactivate.alpha). Lists are JSON. Where two stages were
    given different values under one name, the later one stands under STAGE.NAME.
    """
    flat: dict[str, str] = {}
    for stage, record in records.items():
        for key, value in _leaves(record["parameters"]):
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            place = key if flat.get(key, text) == text else f"{stage}.{key}"
            flat[place] = text
    return flat


def _leaves(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, value
