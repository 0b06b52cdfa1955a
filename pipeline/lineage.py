"""Records put together: the stages behind each variant of the grid, in the order of the chain."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Variants, read_params, section
from pipeline.deployment import Export
from pipeline.records import read_records
from pipeline.scores import Names, of_metrics

STAGES = ("prepare", "train", "revive", "compress", "collapse", "export", "profile")
OWN = STAGES[3:]  # the stages that no other variant shares
DEPLOYED = ("export", "profile")  # the stages that have a record for each precision
BASE = "fp32"  # the precision that all others are compared with
TRAINING = ("train", "revive", "compress")

Record = dict[str, Any]


@dataclass(frozen=True)
class Chain:
    """One variant in one precision. `records` holds its records by stage, in the order of the chain; a stage without a record is
    absent."""

    revive: str
    compress: str
    seed: int
    precision: str
    records: dict[str, Record]

    @property
    def name(self) -> str:
        """restart-diet-0 in fp32, restart-diet-0-int8 in another precision."""
        return name_of(self.revive, self.compress, self.seed, self.precision)

    @property
    def names(self) -> Names:
        """What the scores of the chain's task are called."""
        return of_metrics(record.get("metrics", {}) for record in self.records.values())

    def metric(self, stage: str, name: str) -> float | None:
        """A final number of a stage, None where the stage or the number is missing."""
        return self.records.get(stage, {}).get("metrics", {}).get(name)


def name_of(revive: str, compress: str, seed: int | None, precision: str) -> str:
    """The name of a variant in one precision; without a seed, of all its seeds together."""
    return "-".join([revive, compress, *([] if seed is None else [str(seed)]), *([] if precision == BASE else [precision])])


def select(
    records: Iterable[Record], revive: Sequence[str], compress: Sequence[str], seeds: Sequence[int], precisions: Sequence[str]
) -> list[Record]:
    """The records that belong to the grid `revive` x `compress` x `seeds` x `precisions`, in the grid's order; all others are
    stale."""
    axes = (("revive", list(revive)), ("compress", list(compress)), ("seed", list(seeds)), ("precision", list(precisions)))
    wanted = [r for r in records if all(r[axis] is None or r[axis] in allowed for axis, allowed in axes)]
    place = lambda r: [-1 if r[axis] is None else allowed.index(r[axis]) for axis, allowed in axes]  # noqa: E731
    return sorted(wanted, key=place)


def present(root: Path) -> list[Record]:
    """The records below `root` (outputs/) that belong to the grid of params.yaml."""
    grid, params = section("variants", Variants), read_params()
    return select(read_records(root), grid.revive, grid.compress, params["seed"], section("export", Export).precisions)


def chains(records: Iterable[Record]) -> list[Chain]:
    """A chain for each variant that has at least one stage of its own and each precision that it is deployed in, in the order of
    `records`; of a variant that is not exported yet, one in fp32."""
    records = list(records)
    found = {(r["stage"], r["revive"], r["compress"], r["seed"], r["precision"]): r for r in records}
    precisions: dict[tuple[Any, ...], dict[str, None]] = {}
    for record in records:
        if record["stage"] in OWN:
            variant = precisions.setdefault((record["revive"], record["compress"], record["seed"]), {})
            variant |= {record["precision"]: None} if record["stage"] in DEPLOYED else {}
    result = []
    for (revive, compress, seed), deployed in precisions.items():
        for precision in deployed or [BASE]:
            keys = [("prepare", None, None, None, None), ("train", None, None, seed, None), ("revive", revive, None, seed, None)]
            keys += [(stage, revive, compress, seed, precision if stage in DEPLOYED else None) for stage in OWN]
            result.append(Chain(revive, compress, seed, precision, {key[0]: found[key] for key in keys if key in found}))
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
