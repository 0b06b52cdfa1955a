"""The variant to ship: of all that are within the limits of a rule, the one with the best figure.

A score counts as the exported file has it on the validation split: a choice by the test split would make the test's figures too
good. "accuracy" in a rule is the headline score of the data's task. Figures are equal where the numbers are: a score is a share
of so many images. Of equals the faster is chosen (by the paired speed-up where all have one), then the smaller, then the first
of the grid.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.deployment import Champion
from pipeline.errors import InputError
from pipeline.lineage import Chain, Record, chains
from pipeline.scores import PERCENT, Names

DECIDED = {"champion", "reason"}
GAINS = ("speedup_", "throughput_")  # of these more is better
MEDIAN = re.compile(r"latency_(\w+_b\d+\w*)_p50_ms")


@dataclass(frozen=True)
class _Candidate:
    """A chain, its figures, and for each figure of the rule that it misses: value, limit, excess (relative), why."""

    chain: Chain
    figures: dict[str, float]
    missed: dict[str, dict[str, Any]]

    @property
    def distance(self) -> tuple[int, float, float]:
        """How far from the limits: figures that are unknown, the largest relative excess, the sum of all."""
        known = [miss["excess"] for miss in self.missed.values() if miss["excess"] is not None]
        return len(self.missed) - len(known), max(known, default=0.0), math.fsum(known)


def decided(outputs: Path) -> dict[str, Any]:
    """The decision in champion/champion.json below `outputs`; `InputError` where it is missing or damaged."""
    path = outputs / "champion" / "champion.json"
    found = files.read_json(path)
    if not isinstance(found, dict) or not DECIDED <= found.keys():
        raise InputError(f"{path} holds no decision: delete it and run `dvc repro`")
    return found


def choose(records: Iterable[Record], rule: Champion) -> dict[str, Any]:
    """The decision about the variants of `records` (one grid, see `lineage.select`), as champion.json holds it.

    Where no variant is within the limits, "champion" is null, "nearest" the one with the smallest relative excess (its largest
    over the limits; unknown figures count more than any), and "missed" its figures. Raises `InputError` for a figure that there
    is not, or that only the test split tells.
    """
    found = chains(records)
    if not found:
        raise InputError("no variant of the present grid has a record: run `dvc repro`")
    _check(rule, found)
    candidates = [_candidate(chain, rule) for chain in found]
    within = [one for one in candidates if not one.missed]
    ordered = _ordered(within, rule) if within else sorted(_ordered(candidates, rule), key=lambda one: one.distance)
    first, names = ordered[0], found[0].names
    chain = first.chain if within else None
    return {
        "champion": chain.name if chain else None,
        "revive": chain.revive if chain else None,
        "compress": chain.compress if chain else None,
        "seed": chain.seed if chain else None,
        "precision": chain.precision if chain else None,
        "feasible": bool(within),
        "reason": _reason(ordered, rule, names, len(found)) if within else _refusal(first, rule, len(found)),
        "nearest": None if chain else first.chain.name,
        "missed": first.missed,
        "rule": rule.model_dump(),
        "candidates": len(found),
        "within": len(within),
        "values": {name: first.figures[name] for name in _names(rule) if name in first.figures},
    }


def figures(chain: Chain) -> dict[str, float]:
    """What a rule may name: all that was measured of a chain but on the test split."""
    exported = chain.records.get("export", {}).get("metrics", {})
    found = {name: value for name, value in exported.items() if name.startswith("validation_") or name == "size_mb"}
    found |= chain.records.get("profile", {}).get("metrics", {})
    score, headline = found.get(f"validation_{chain.names.headline}"), chain.names.headline
    return found if score is None else {"accuracy": score, headline: score} | found


def _names(rule: Champion) -> list[str]:
    return list(dict.fromkeys([rule.best, *rule.at_most, *rule.at_least]))


def _check(rule: Champion, found: list[Chain]) -> None:
    """`InputError` for a name that no variant can have a figure of, and for limits that exclude everything."""
    known = list(dict.fromkeys(name for chain in found for name in figures(chain)))
    tested = {name for chain in found for name in chain.records.get("export", {}).get("metrics", {})}
    for name in _names(rule):
        if name not in known and name in tested:
            raise InputError(
                f"params.yaml: champion: {name} is of the test split, by which nothing is chosen: name accuracy instead"
            )
        if name not in known and not any(_asked(name, chain, known) for chain in found):
            raise InputError(f"params.yaml: champion names {name!r}, which no variant has; there are {', '.join(known)}")
        if rule.at_least.get(name, -math.inf) > rule.at_most.get(name, math.inf):
            raise InputError(f"params.yaml: champion: at_least.{name} is above at_most.{name}: no variant can be within both")


def _asked(name: str, chain: Chain, known: list[str]) -> bool:
    """Whether a name is of a provider and a batch that were to be timed, of which nothing is known."""
    options = chain.records.get("profile", {}).get("parameters", {}).get("profile", {})
    settings = [f"{provider}_b{batch}" for provider in options.get("providers", []) for batch in options.get("batch_sizes", [])]
    away = [setting for setting in settings if not any(re.search(rf"_{setting}(_|$)", other) for other in known)]
    return any(re.fullmatch(rf"(latency|speedup|throughput)_{setting}(_\w+)?", name) for setting in away)


def _candidate(chain: Chain, rule: Champion) -> _Candidate:
    known, missed = figures(chain), {}
    limits = [(name, limit, 1) for name, limit in rule.at_most.items()] + [
        (name, limit, -1) for name, limit in rule.at_least.items()
    ]
    for name, limit, sign in limits:
        excess = sign * (known[name] - limit) / (abs(limit) or 1) if name in known else None
        if excess is None or excess > 0:
            why = None if name in known else _why(chain, name)
            missed[name] = {"value": known.get(name), "limit": limit, "excess": excess, "why": why}
    if rule.best not in known:
        missed.setdefault(rule.best, {"value": None, "limit": None, "excess": None, "why": _why(chain, rule.best)})
    return _Candidate(chain, known, missed)


def _why(chain: Chain, name: str) -> str:
    """Why a chain has no figure of this name."""
    for event in chain.records.get("profile", {}).get("events", []):
        if event["kind"] == "absent" and f"_{event['provider']}_b" in name:
            return f"{event['provider']} is absent: {event['reason']}"
    stage = "export" if name.startswith("validation_") or name in PERCENT else "profile"
    return "it was not measured" if stage in chain.records else f"there is no record of the stage {stage}"


def _ordered(within: list[_Candidate], rule: Champion) -> list[_Candidate]:
    """The best first; one without the figure last."""
    sign = -1 if _is_gain(rule.best) else 1
    value = lambda one: sign * one.figures[rule.best] if rule.best in one.figures else math.inf  # noqa: E731
    timed = sorted(dict.fromkeys(name for one in within for name in one.figures), key=_cpu_first)
    medians = [name for name in (*_names(rule), *timed) if MEDIAN.fullmatch(name)]
    latency = medians[0] if medians else ""
    speedup = MEDIAN.sub(r"speedup_\1", latency)
    paired = all(one.figures.get(speedup) for one in within)
    time = lambda one: 1 / one.figures[speedup] if paired else one.figures.get(latency, math.inf)  # noqa: E731
    return sorted(within, key=lambda one: (value(one), time(one), one.figures.get("size_mb", math.inf)))


def _cpu_first(name: str) -> tuple[bool, int]:
    batch = re.search(r"_b(\d+)", name)
    return not name.startswith("latency_cpu_"), int(batch[1]) if batch else 0


def _is_gain(name: str) -> bool:
    return name.startswith(GAINS) or name.removeprefix("validation_") in PERCENT


def _reason(ordered: list[_Candidate], rule: Champion, names: Names, total: int) -> str:
    """highest validation accuracy (98.9 %) of the 11 of 18 that keep size_mb <= 1; next: restart-none-0-int8 (98.6 %)"""
    title = f"validation {names.title}" if rule.best.removeprefix("validation_") in ("accuracy", names.headline) else rule.best
    best, limits = ordered[0].figures[rule.best], _limits(rule)
    if len(ordered) == 1:
        kept = f"the only one of {total} that keeps {limits}" if limits else "the only variant"
        return f"{kept}; its {title} is {_shown(rule.best, best)}"
    of = f"the {len(ordered)} of {total} that keep {limits}" if limits else f"all {total}"
    second = ordered[1].figures[rule.best]
    beside = "equal, but not faster or smaller" if second == best else _shown(rule.best, second)
    order = "highest" if _is_gain(rule.best) else "lowest"
    return f"{order} {title} ({_shown(rule.best, best)}) of {of}; next: {ordered[1].chain.name} ({beside})"


def _refusal(nearest: _Candidate, rule: Champion, total: int) -> str:
    """none of the 18 keeps size_mb <= 0.1; nearest: restart-diet-0, whose size_mb of 0.112 misses it by 12 %"""
    parts = []
    for name, miss in nearest.missed.items():
        if miss["excess"] is None:
            parts.append(f"whose {name} is unknown ({miss['why']})")
        else:
            parts.append(f"whose {name} of {_shown(name, miss['value'])} misses the limit by {100 * miss['excess']:.3g} %")
    kept = f"keeps {_limits(rule)}" if _limits(rule) else f"has the figure {rule.best}"
    return f"none of the {total} {kept}; nearest: {nearest.chain.name}, {' and '.join(parts)}"


def _limits(rule: Champion) -> str:
    most = [f"{name} <= {limit:g}" for name, limit in rule.at_most.items()]
    return " and ".join([*most, *(f"{name} >= {limit:g}" for name, limit in rule.at_least.items())])


def _shown(name: str, value: float) -> str:
    if name.removeprefix("validation_") in PERCENT:
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
