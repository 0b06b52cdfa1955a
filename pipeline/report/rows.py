"""What every variant costs and gains: one row a variant and precision, its ratios to the control, and the Pareto front.

A figure that was not measured is missing in a row's `values`, never zero; `Report.why_missing` says why. Ratios are
control / variant, so that larger is better, as a speed-up is; the change of accuracy is variant - control, as a fraction.
"Accuracy" here is the headline score of the data's task; what is written calls it by its own name (`Report.names`).
Over several seeds a row a variant holds the mean and the sample standard deviation (n - 1), n being `count`.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.lineage import BASE, Chain, chains, name_of
from pipeline.scores import NAMES, Names

ACCURACY = "accuracy_onnx"
COSTS = ("macs", "size_mb")  # and every latency_..._p50_ms
QUANTIZED = "accuracy_quantized"  # the change that the precision alone made: against the same network in fp32
TIE = 0.02  # share by which costs may differ and count as equal: the text in an ONNX file alone makes sizes differ
RATIOS = {"parameters_ratio": "parameters", "macs_ratio": "macs", "size_ratio": "size_mb"}
SOURCES = {  # column: the stages that may hold it and its name there (for classes), the first found counts
    "accuracy_train": [("train", "test_accuracy")],
    "accuracy_revive": [("revive", "test_accuracy")],
    "accuracy_compress": [("compress", "test_accuracy")],
    "accuracy_collapse": [("collapse", "test_accuracy")],
    ACCURACY: [("export", "test_accuracy")],
    "parameters": [("profile", "parameters"), ("collapse", "parameters")],
    "macs": [("profile", "macs")],
    "size_mb": [("profile", "size_mb"), ("export", "size_mb")],
    "peak_memory_mb": [("profile", "peak_memory_mb")],
}


@dataclass(frozen=True)
class Row:
    """One variant in one precision, or the mean of one over its seeds (`seed` None)."""

    revive: str
    compress: str
    seed: int | None
    precision: str
    values: dict[str, float]
    control: bool
    count: int = 1
    spread: dict[str, float] = field(default_factory=dict)  # sample standard deviation, of a mean alone

    @property
    def name(self) -> str:
        """restart-diet-0, restart-diet-0-int8, or restart-diet and restart-diet-int8 for means."""
        return name_of(self.revive, self.compress, self.seed, self.precision)

    def stands_for(self, chain: Chain) -> bool:
        """Whether its figures are of that chain, alone or with those of other seeds."""
        same = (self.revive, self.compress, self.precision) == (chain.revive, chain.compress, chain.precision)
        return same and self.seed in (None, chain.seed)


@dataclass(frozen=True)
class Report:
    """Everything that the table, the plots and the page show."""

    chains: list[Chain]
    rows: list[Row]  # a variant and precision each, as `chains`
    means: list[Row]  # over the seeds; empty where there is one seed
    settings: list[str]  # what was timed, as "cpu_b1", "cpu_b1_idle"
    absent: dict[str, str]  # a provider that was asked for: why it was not measured
    champion: Mapping[str, Any] | None = None  # champion.json; None where nothing was chosen yet

    @property
    def names(self) -> Names:
        """What the scores of the data's task are called."""
        return self.chains[0].names if self.chains else NAMES["classify"]

    @property
    def compared(self) -> list[Row]:
        """The rows to decide by: the means where there are several seeds."""
        return self.means or self.rows

    @property
    def plain(self) -> list[str]:
        """The settings to decide by; others, as "cpu_b1_idle", are told in the variants' stories."""
        return [setting for setting in self.settings if re.fullmatch(r"[^_]+_b\d+", setting)]

    @property
    def variants(self) -> list[list[Chain]]:
        """The chains of each variant, its precisions together."""
        groups: dict[tuple[str, str, int], list[Chain]] = {}
        for chain in self.chains:
            groups.setdefault((chain.revive, chain.compress, chain.seed), []).append(chain)
        return list(groups.values())

    def axis(self, name: str) -> list[str]:
        """The values of "revive", "compress" or "precision" among the rows, in the grid's order."""
        return list(dict.fromkeys(getattr(row, name) for row in self.rows))

    def chosen(self, row: Row) -> bool:
        """Whether `row` is the champion, or its mean over the seeds."""
        name = (self.champion or {}).get("champion")
        return name is not None and any(chain.name == name and row.stands_for(chain) for chain in self.chains)

    @property
    def costs(self) -> list[str]:
        """The columns that accuracy is traded for, those that any compared row has beside its accuracy."""
        keys = [*COSTS, *(f"latency_{setting}_p50_ms" for setting in self.plain)]
        return [key for key in keys if any({key, ACCURACY} <= row.values.keys() for row in self.compared)]

    def why_missing(self, row: Row, key: str) -> str:
        """Why `row` has no figure in the column `key`."""
        for provider, reason in self.absent.items():
            if f"_{provider}_b" in key:
                return f"not measured: provider {provider} absent ({reason})"
        stage, _ = SOURCES.get(RATIOS.get(key, key), [("profile", key)])[0]
        without = [chain.name for chain in self.chains if row.stands_for(chain) and stage not in chain.records]
        if without:
            return f"not measured: no record of the stage {stage} for {', '.join(without)}"
        return "not measured: the control has no such figure" if key in RATIOS else "not measured"


def build(records: Iterable[dict[str, Any]], champion: Mapping[str, Any] | None = None) -> Report:
    """Rows, means and what is missing, from the records of one grid (see `lineage.select`) and what champion.json says of it."""
    found = chains(records)
    profiles = [chain.records["profile"] for chain in found if "profile" in chain.records]
    control = next((p["parameters"]["profile"]["control"] for p in profiles if "profile" in p["parameters"]), None)
    plain = {chain.name: _values(chain) for chain in found}
    rows = []
    for chain in found:
        beside = plain.get(f"{control}-{chain.seed}", {})
        values = plain[chain.name] | _ratios(plain[chain.name], beside)
        is_control = f"{chain.revive}-{chain.compress}" == control and chain.precision == BASE
        rows.append(Row(chain.revive, chain.compress, chain.seed, chain.precision, values, is_control))
    absent = {event["provider"]: event["reason"] for p in profiles for event in p["events"] if event["kind"] == "absent"}
    keys = dict.fromkeys(key for row in rows for key in row.values)
    settings = [key[len("latency_") : -len("_p50_ms")] for key in keys if key.startswith("latency_") and key.endswith("_p50_ms")]
    return Report(found, rows, _means(rows), settings, absent, champion)


def pareto(points: Sequence[tuple[float | None, float | None]]) -> list[bool]:
    """Whether each (cost, gain) is on the front: no other point costs at most as much and gains at least as much, and is better
    in one of the two. Equal points are on it together; a point that lacks a coordinate is not.
    """
    known = [(cost, gain) for cost, gain in points if cost is not None and gain is not None]
    best: dict[float, float] = {}  # the largest gain at each cost
    for cost, gain in known:
        best[cost] = max(gain, best.get(cost, gain))
    front, highest = set(), None
    for cost, gain in sorted(best.items()):
        if highest is None or gain > highest:
            front.add((cost, gain))
            highest = gain
    return [point in front for point in points]


def picks(report: Report) -> dict[str, Row]:
    """The rows a reader looks for: "most accurate", "smallest" and "fastest". Costs within `TIE` of the least count as equal, and
    the more accurate of them is picked. Speed is compared by the paired speed-ups where all rows have one: times taken in
    different processes differ by more. A pick whose figures are missing is left out."""
    latency = [cost for cost in report.costs if cost.startswith("latency_")]
    latency = [*(cost for cost in latency if cost.startswith("latency_cpu")), *latency][:1]  # the CPU's first, where it was timed
    wanted = [("most accurate", "size_mb", math.inf), ("smallest", "size_mb", TIE), *(("fastest", key, TIE) for key in latency)]
    chosen: dict[str, Row] = {}
    for title, key, tie in wanted:
        known = [row for row in report.compared if key in row.values and ACCURACY in row.values]
        if known:
            paired = key.replace("latency_", "speedup_").removesuffix("_p50_ms")
            by_pairs = paired != key and all(row.values.get(paired) for row in known)
            costs = {row.name: 1 / row.values[paired] if by_pairs else row.values[key] for row in known}
            cheap = [row for row in known if costs[row.name] <= min(costs.values()) * (1 + tie)]
            chosen[title] = min(cheap, key=lambda row: (-row.values[ACCURACY], costs[row.name]))  # noqa: B023
    return chosen


def _values(chain: Chain) -> dict[str, float]:
    found, names = {}, chain.names
    beside = {name: [("export", f"test_{name}")] for name in names.beside}
    for key, places in (SOURCES | beside).items():
        known = [value for stage, name in places if (value := chain.metric(stage, names.rename(name))) is not None]
        if known:
            found[key] = known[0]
    profile = chain.records.get("profile", {})
    loss = 0.0 if chain.precision == BASE else chain.metric("export", "loss")
    if loss is not None and ACCURACY in found:
        found[QUANTIZED] = 0.0 - loss
    timings = [event for event in profile.get("events", []) if event["kind"] == "latency"]
    noisy = [event for event in timings if not event["stable"] and event.get("mode") != "idle"]  # few calls: wide by nature
    found |= {f"unstable_{timing(event)}": 1.0 for event in noisy}
    timed = profile.get("metrics", {})
    return found | {key: value for key, value in timed.items() if key.startswith(("latency_", "speedup_", "throughput_"))}


def timing(event: Mapping[str, Any]) -> str:
    """The setting of a latency event, as in the names of its metrics: cpu_b1, cpu_b1_idle."""
    name = f"{event['provider']}_b{event['batch']}"
    return f"{name}_{event['mode']}" if event.get("mode") else name


def _ratios(values: dict[str, float], control: dict[str, float]) -> dict[str, float]:
    found = {new: control[key] / values[key] for new, key in RATIOS.items() if values.get(key) and key in control}
    if ACCURACY in values and ACCURACY in control:
        found["accuracy_change"] = values[ACCURACY] - control[ACCURACY]
    return found


def _means(rows: list[Row]) -> list[Row]:
    """Means over the seeds; a figure that any seed lacks is missing in the mean. Intervals within one run are not averaged."""
    if len({row.seed for row in rows}) < 2:
        return []
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.revive, row.compress, row.precision), []).append(row)
    result = []
    for (revive, compress, precision), group in groups.items():
        shared = [key for key in group[0].values if "_ci_" not in key and all(key in row.values for row in group)]
        collect: Callable[[Callable], dict[str, float]] = lambda of: {k: of([row.values[k] for row in group]) for k in shared}  # noqa: B023, E731
        spread = collect(statistics.stdev) if len(group) > 1 else {}
        noisy = {key: 1.0 for row in group for key in row.values if key.startswith("unstable_")}
        values = collect(statistics.fmean) | noisy
        result.append(Row(revive, compress, None, precision, values, group[0].control, len(group), spread))
    return result
