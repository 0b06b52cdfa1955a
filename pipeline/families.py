"""What a budget chooses among: the channels of a network in families, and how large it is when so many of each family stay.

A unit is a set of channels that can only go together (`Channels.units`). Units that are made and read by the same layers, equally
often, are a family: it does not matter for the network's size which of them stay, only how many, and so its multiply-adds and
parameters are sums of products of a few numbers, for thousands of candidates at once.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import numpy as np
from torch import nn

from pipeline.channels import Channels
from pipeline.costs import Costs, Counted
from pipeline.errors import InputError
from pipeline.surgery import Cut, plan

Signature = tuple[tuple[str, str, int], ...]  # where a unit occurs ("read", "made" or "own"), in which layer, and how often


@dataclass(frozen=True)
class Family:
    """Units that cost the same. `name` is that of the first layer that makes them, `layers` all that do and how many outputs one
    unit is there; `allowed` says how many units may stay, ascending, all of them last."""

    name: str
    units: tuple[int, ...]
    layers: Mapping[str, int]
    allowed: tuple[int, ...]


class Families:
    """The families of a network, and the size of every network that they lead to."""

    def __init__(self, model: nn.Module, channels: Channels, *, protect: Sequence[str] = (), multiple: int = 8) -> None:
        """Layers of which a name in `protect` (* for any text) speaks keep all their outputs, and pinned channels stay. In the
        end a layer has a multiple of `multiple` outputs of each family, or as many as before; where it has fewer than that of one,
        any number. None goes below one multiple, or one channel. `InputError`: a name that no layer has."""
        self.channels = channels
        whole = plan(channels, {})
        self.label = _labels(channels)
        found = _occurrences(channels, whole, self.label)
        stays = {self.label[channel] for channel in fixed(channels, protect)}
        grouped: dict[Signature, list[int]] = defaultdict(list)
        for unit, where in found.items():
            if unit not in stays and any(side == "made" for side, _, _ in where):
                grouped[where].append(unit)
        order = {name: position for position, name in enumerate(channels.outputs)}
        self.all: list[Family] = []
        for where, units in grouped.items():
            layers = dict(sorted(((name, n) for side, name, n in where if side == "made"), key=lambda item: order[item[0]]))
            name = _free_name(next(iter(layers)), {family.name for family in self.all})
            self.all.append(Family(name, tuple(units), layers, allowed(len(units), layers.values(), multiple)))
        self._count(Costs(model, channels), whole, found, list(grouped))

    def members(self, units: Iterable[int]) -> set[int]:
        """The channels of some units, as `surgery.drop` takes them."""
        wanted = set(units)
        return {channel for channel, unit in self.label.items() if unit in wanted}

    def amounts(self, kind: Counted, kept: np.ndarray) -> np.ndarray:
        """`kind` of networks in which so many units of each family stay: (..., F) -> (...)."""
        inputs, outputs = self._read[0] + kept @ self._read[1], self._made[0] + kept @ self._made[1]
        if kind == "keep":
            return outputs.sum(-1)
        weights, own = inputs * outputs / self._groups * self._taps, self._own[0] + kept @ self._own[1]
        if kind == "macs":
            return self._constant_macs + weights @ self._pixels + own @ self._own_macs
        return self._constant + weights.sum(-1) + outputs @ self._biases + own @ self._own_parameters

    def shares(self, kept: np.ndarray) -> dict[str, float]:
        """What is left of the whole network's outputs, multiply-adds and parameters."""
        return {kind: float(self.amounts(kind, kept) / self.amounts(kind, self.sizes)) for kind in ("keep", "macs", "params")}

    @property
    def sizes(self) -> np.ndarray:
        """How many units each family has: (F,)."""
        return np.array([len(family.units) for family in self.all], dtype=np.int64)

    def _count(self, costs: Costs, whole: Cut, found: Mapping[int, Signature], signatures: Sequence[Signature]) -> None:
        """Widths as a fixed part and a part for each unit of each family, and what a channel of each layer costs."""
        channels, names, own = self.channels, list(whole.columns), list(self.channels.own)
        free = {unit for family in self.all for unit in family.units}
        index = {"read": _numbered(names), "made": _numbered(names), "own": _numbered(own)}
        table = {side: (np.zeros(len(at)), np.zeros((len(signatures), len(at)))) for side, at in index.items()}
        for unit, where in found.items():
            for side, name, count in where if unit not in free else ():
                table[side][0][index[side][name]] += count
        for row, where in enumerate(signatures):
            for side, name, count in where:
                table[side][1][row, index[side][name]] = count
        self._read, self._made, self._own = table["read"], table["made"], table["own"]
        self._groups = np.array([len(whole.columns[name]) for name in names])
        self._taps = np.array([costs.taps[name] for name in names])
        self._pixels = np.array([channels.pixels[name] for name in names])
        self._biases = np.array([costs.biases[name] for name in names])
        self._constant, self._constant_macs = costs.constant, costs.constant_macs
        filters = [costs.taps.get(name, 0) for name in own]  # depthwise layers; batch norms have none
        self._own_macs = np.array([taps * channels.pixels.get(name, 0) for name, taps in zip(own, filters, strict=True)])
        self._own_parameters = np.array([costs.numbers[name] for name in own])


def allowed(units: int, outputs: Iterable[int], multiple: int) -> tuple[int, ...]:
    """How many of a family's units may stay, where each is so many outputs of each layer that makes it."""
    step = math.lcm(*(multiple // math.gcd(multiple, count) for count in outputs))
    step = step if step <= units else 1
    return (*range(step, units, step), units)


def _labels(channels: Channels) -> dict[int, int]:
    """The unit of every channel. A redirected slot goes with the channel that it reads."""
    labels = channels.units()
    for _, slots, sources in channels.redirects.values():
        for slot, source in zip(slots, sources, strict=True):
            old, new = labels[slot], labels[source]
            labels = {channel: new if label == old else label for channel, label in labels.items()} if old != new else labels
    return labels


def fixed(channels: Channels, protect: Sequence[str]) -> set[int]:
    """The channels that stay."""
    for pattern in protect:
        if not any(fnmatch(name, pattern) for name in channels.outputs):
            raise InputError(f"protect = {pattern!r} matches no layer; layers are {', '.join(channels.outputs)}")
    kept = set(channels.pins())
    for name, ids in channels.outputs.items():
        if any(fnmatch(name, pattern) for pattern in protect):
            kept.update(ids)
    return kept


def _occurrences(channels: Channels, whole: Cut, label: Mapping[int, int]) -> dict[int, Signature]:
    """Where each unit is read, made or treated channel by channel in the whole network, and how often; in the order of layers."""
    counts: dict[int, Counter[tuple[str, str]]] = defaultdict(Counter)
    for name, ids in channels.outputs.items():
        for position in whole.outputs[name]:
            counts[label[ids[position]]]["made", name] += 1
    for name, parts in whole.columns.items():
        for position in (column for part in parts for column in part):
            counts[label[channels.inputs[name][position]]]["read", name] += 1
    for name, ids in channels.own.items():
        for channel in ids:
            if channel in whole.alive:
                counts[label[channel]]["own", name] += 1
    return {unit: tuple(sorted((*key, count) for key, count in where.items())) for unit, where in counts.items()}


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: position for position, name in enumerate(names)}


def _free_name(name: str, taken: set[str]) -> str:
    """`name`, or where another family of the same layer has it, `name` with a number."""
    return next(new for new in (name, *(f"{name} ({n})" for n in range(2, len(taken) + 3))) if new not in taken)
