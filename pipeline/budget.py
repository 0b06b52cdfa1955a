"""What to remove so that a network comes to a given size: the units with the least scores, in widths that processors like.

Where all scores are comparable (`global`), one threshold ranks all units of the network. `layer` removes the same share of every
family, `costs` (as `pipeline.sensitivity.layer_costs` measures them) such shares that every family suffers alike: both rank units
by what a family has lost when they go, weakest first.

Widths are rounded to the nearest number that a family may have. The threshold is the lowest at which the rounded network is not
above the target; what it is below is filled up by the rounding steps with the most score for their size, and where the network
is still more than 2 % below the target, by exchanging a step of one family for one of another, by leaving the family whose step led
too far as it was, and, where there are few enough, by looking at all widths. The result is never above the target.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pipeline.costs import Counted
from pipeline.errors import InputError
from pipeline.families import Families, Family

Scores = Mapping[int, float]  # of units, by their labels: the higher, the longer a unit stays
FamilyCosts = Mapping[str, Sequence[Mapping[str, float]]]  # by a family's first layer: what losing a share costs
Scope = Literal["global", "layer"]
TOLERANCE = 0.02  # how far below the target a network may be, as a share of the target
EXCHANGES = 100  # at most
ENUMERATED = 100_000  # networks to choose from, at most, when every one is looked at
LAST = 1e100  # the key of what goes after all others


@dataclass
class Choice:
    """What goes, and what is left. `kept` has for each family the units that stay and all of them, `shares` the outputs,
    multiply-adds and parameters that are left as shares of the whole's, `note` what the user should know."""

    channels: set[int]  # ids, as `surgery.drop` takes them
    kept: dict[str, tuple[int, int]]
    removed: dict[str, int]  # outputs, by layer
    shares: dict[str, float]
    note: str | None = None
    latency: dict[str, float] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """For an event."""
        return {"removed": self.removed, **self.shares, **self.latency} | ({"note": self.note} if self.note else {})


class Budget:
    """The order in which the units of a network go."""

    def __init__(self, families: Families, scores: Scores, scope: Scope = "global", costs: FamilyCosts | None = None) -> None:
        """Families without a score for each of their units stay whole. With `costs`, `scope` does not matter. `InputError` for a
        score that is no number, and where nothing may go."""
        self.families = families
        self.scope: Scope = scope
        self.treated = [all(unit in scores for unit in family.units) for family in families.all]
        self.order: list[list[int]] = []  # of each family its units, weakest first
        keys = []  # where each unit stands among all
        for family, treated in zip(families.all, self.treated, strict=True):
            values = np.array([scores[unit] for unit in family.units] if treated else [], dtype=np.float64)
            if not np.isfinite(values).all():
                raise InputError(f"the scores of layer {family.name} are not finite; train the network with a lower learning rate")
            ranked = np.argsort(values, kind="stable")
            self.order.append([family.units[position] for position in ranked])
            keys.append(_keys(values[ranked], scope) if costs is None else _by_costs(len(values), family, costs))
        self.keys = keys
        self.flat = np.concatenate([np.zeros(0), *keys])
        self.owner = np.repeat(np.arange(len(keys)), [len(each) for each in keys])
        if not any(len(family.allowed) > 1 for family, treated in zip(families.all, self.treated, strict=True) if treated):
            raise InputError(
                "every channel is protected, pinned, without a score or in a layer too narrow; there is nothing to remove"
            )
        self.rank = np.argsort(self.flat, kind="stable")
        self.most = families.sizes
        pairs = zip(families.all, self.treated, strict=True)
        self.choices = [family.allowed if treated else family.allowed[-1:] for family, treated in pairs]
        self.least = np.array([choices[0] for choices in self.choices])

    def share(self, share: float) -> Choice:
        """Remove a share of all units by their rank. As published: among all, those not above the one at int(n * share) in
        ascending order (network slimming); of each layer all but int(n * (1 - share)) (L1 pruning)."""
        if self.scope == "layer" and self.flat.size:
            raw = np.array([int(round(size * (1 - share), 9)) for size in self.most])
        else:
            threshold = self.flat[self.rank[min(int(len(self.rank) * share), len(self.rank) - 1)]]
            raw = np.array([int((keys > threshold).sum()) for keys in self.keys])
        return self._choice(self._rounded(np.where(self.treated, raw, self.most)))

    def target(self, kind: Counted, fraction: float) -> Choice:
        """Remove so much that `kind` comes to this share of the whole network's. `InputError` where that is less than is left when
        as much as possible goes."""
        whole = float(self.families.amounts(kind, self.most))
        wanted, least = fraction * whole * (1 + 1e-12), float(self.families.amounts(kind, self.least))
        if least > wanted:
            raise InputError(
                f"target: {kind} = {fraction:g} cannot be reached: {least / whole:.4f} is left when as much as possible goes; "
                "ask for more than that, allow a smaller `multiple` or protect less"
            )
        choice = self._choice(self._searched(kind, wanted))
        if choice.shares[kind] < (1 - TOLERANCE) * fraction:
            choice.note = f"{kind} comes to {choice.shares[kind]:.4f} instead of {fraction:g}: no nearer widths were found"
        return choice

    def smallest(self, kind: Counted) -> float:
        """The share of `kind` that is left when as much as possible goes."""
        return float(self.families.amounts(kind, self.least) / self.families.amounts(kind, self.most))

    def _searched(self, kind: Counted, wanted: float) -> np.ndarray:
        """What stays: near enough below the target, or the nearest found. A family whose step leads too far below it keeps what it
        has, and the search begins anew with the others."""
        held = np.full(len(self.most), -1)
        best = self.least
        for _ in range(len(self.most)):
            if self._amount(kind, self._after(len(self.rank), held)) > wanted:
                break
            low, high = 0, len(self.rank)  # so many of the lowest units go
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if self._amount(kind, self._after(middle, held)) <= wanted else (middle + 1, high)
            kept = self._after(low, held)
            filled = self._filled(kind, kept, wanted)
            best = max(best, filled, key=lambda counts: self._amount(kind, counts))
            before = self._after(low - 1, held) if low else kept
            if self._amount(kind, best) >= (1 - TOLERANCE) * wanted or (before == kept).all():
                break
            held = np.where(before != kept, before, held)
        near = self._amount(kind, best) >= (1 - TOLERANCE) * wanted
        return best if near or math.prod(map(len, self.choices)) > ENUMERATED else self._best_of_all(kind, wanted)

    def _best_of_all(self, kind: Counted, wanted: float) -> np.ndarray:
        """Of all networks near enough to the target the one with the most score, or else the nearest below."""
        every = np.array(list(itertools.product(*self.choices)), dtype=np.int64)
        amounts = self.families.amounts(kind, every)
        near = every[(amounts <= wanted) & (amounts >= (1 - TOLERANCE) * wanted)]
        if not len(near):
            return every[np.where(amounts <= wanted, amounts, -1).argmax()]
        left = [np.append(0.0, keys[::-1].cumsum()) for keys in self.keys]  # the score of as many units as the index says
        totals = sum(scores[counts] for scores, counts in zip(left, near.T, strict=True) if len(scores) > 1)
        return near[np.argmax(totals)]

    def _after(self, count: int, held: np.ndarray) -> np.ndarray:
        """What stays of each family when the lowest `count` units go and widths are rounded; -1 in `held`: it is not held."""
        gone = np.bincount(self.owner[self.rank[:count]], minlength=len(self.most))
        return np.where(held >= 0, held, self._rounded(self.most - gone))

    def _rounded(self, kept: np.ndarray) -> np.ndarray:
        """The nearest numbers allowed, of two the larger."""
        nearest = lambda choices, count: min(choices, key=lambda n: (abs(n - count), -n))  # noqa: E731
        return np.array([nearest(choices, count) for choices, count in zip(self.choices, kept.tolist(), strict=True)])

    def _amount(self, kind: Counted, kept: np.ndarray) -> float:
        return float(self.families.amounts(kind, kept))

    def _filled(self, kind: Counted, kept: np.ndarray, wanted: float) -> np.ndarray:
        """Take back what fits, and exchange steps while that brings the network nearer and it is not near enough."""
        for _ in range(EXCHANGES):
            ups = self._steps(kept, up=True)
            while ups:
                amounts = self.families.amounts(kind, np.array([_with(kept, up) for up in ups]))
                now = self._amount(kind, kept)
                gains = [up.score / max(amount - now, 1.0) for up, amount in zip(ups, amounts, strict=True)]
                fits = [i for i, amount in enumerate(amounts) if amount <= wanted]
                if not fits:
                    break
                kept = _with(kept, ups[max(fits, key=lambda i: gains[i])])
                ups = self._steps(kept, up=True)
            found = self._exchanged(kind, kept, wanted, ups)
            if found is None:
                break
            kept = found
        return kept

    def _exchanged(self, kind: Counted, kept: np.ndarray, wanted: float, ups: "list[_Step]") -> np.ndarray | None:
        """One family a step wider and another a step narrower: of those near enough to the target the exchange that loses the
        least score, or else the nearest; None where the network is near enough already or none brings it nearer."""
        now = self._amount(kind, kept)
        pairs = [(up, down) for up in ups for down in self._steps(kept, up=False) if up.family != down.family]
        if now >= (1 - TOLERANCE) * wanted or not pairs:
            return None
        candidates = np.array([_with(_with(kept, up), down) for up, down in pairs])
        amounts = self.families.amounts(kind, candidates)
        near = [i for i, amount in enumerate(amounts) if (1 - TOLERANCE) * wanted <= amount <= wanted]
        if near:
            return candidates[max(near, key=lambda i: (pairs[i][0].score - pairs[i][1].score, amounts[i]))]
        nearer = [i for i, amount in enumerate(amounts) if now < amount <= wanted]
        return candidates[max(nearer, key=lambda i: amounts[i])] if nearer else None

    def _steps(self, kept: np.ndarray, *, up: bool) -> "list[_Step]":
        """For every family the next number allowed above or below, and the score of the units between."""
        found = []
        for index, (choices, count) in enumerate(zip(self.choices, kept.tolist(), strict=True)):
            position = choices.index(count) + (1 if up else -1)
            if 0 <= position < len(choices):
                new, size = choices[position], choices[-1]
                between = self.keys[index][size - max(new, count) : size - min(new, count)]
                found.append(_Step(index, new, float(between.sum())))
        return found

    def _choice(self, kept: np.ndarray) -> Choice:
        removed: dict[str, int] = {}
        gone: list[int] = []
        counts = {}
        for family, order, count in zip(self.families.all, self.order, kept.tolist(), strict=True):
            lost = len(family.units) - count
            counts[family.name] = (count, len(family.units))
            gone += order[:lost]
            for name, outputs in family.layers.items():
                removed[name] = removed.get(name, 0) + lost * outputs
        places = [name for name in self.families.channels.outputs if removed.get(name)]
        channels = self.families.members(gone)
        return Choice(channels, counts, {name: removed[name] for name in places}, self.families.shares(kept))


@dataclass(frozen=True)
class _Step:
    """A family with so many units instead."""

    family: int
    count: int
    score: float


def _with(kept: np.ndarray, step: _Step) -> np.ndarray:
    changed = kept.copy()
    changed[step.family] = step.count
    return changed


def _keys(scores: np.ndarray, scope: Scope) -> np.ndarray:
    """Where a family's units, weakest first, stand among all."""
    return scores if scope == "global" else (np.arange(len(scores)) + 0.5) / max(len(scores), 1)


def _by_costs(count: int, family: Family, costs: FamilyCosts) -> np.ndarray:
    """What it costs a family to lose each unit and those before it: on straight lines between the points measured, from nothing at
    no loss, never falling, and behind the last point as before it."""
    points = costs.get(next(iter(family.layers)))
    if not points:
        return np.full(count, LAST)  # not measured: it goes last
    shares = np.array([0.0, *(point["share"] for point in points)])
    levels = np.maximum.accumulate(np.array([0.0, *(point["cost"] for point in points)]))
    lost = (np.arange(count) + 0.5) / count
    slope = (levels[-1] - levels[-2]) / (shares[-1] - shares[-2])
    return np.interp(lost, shares, levels) + np.maximum(lost - shares[-1], 0) * slope
