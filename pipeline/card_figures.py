"""The figures of a model card: scores with what chance and the seed are worth, costs with the machine they were taken on."""

import math
import statistics
from collections.abc import Sequence

from pipeline.lineage import BASE, Chain
from pipeline.scores import PERCENT

Z = 1.959964  # of a normal distribution: 95 % lie within so many standard deviations


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share seen among `count` cases: Wilson 1927; unlike share +- error it stays within [0, 1]."""
    middle, spread = share + Z * Z / (2 * count), Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return (middle - spread) / (1 + Z * Z / count), (middle + spread) / (1 + Z * Z / count)


def scores(chain: Chain, siblings: Sequence[Chain]) -> str:
    """Scores of the exported file; the interval of a share of images, the spread over seeds."""
    names, metrics = chain.names, chain.records.get("export", {}).get("metrics", {})
    count = chain.metric("prepare", "test_images")
    rows = []
    for key, title in (
        (f"test_{names.headline}", f"{names.title}, test"),
        (f"validation_{names.headline}", f"{names.title}, validation"),
    ):
        if key in metrics:
            rows.append([title, f"{100 * metrics[key]:.2f} %", _spread(chain, siblings, key, 100, " %")])
    for name, (title, _) in names.beside.items():
        if (value := metrics.get(f"test_{name}")) is not None:
            scale, unit = (100, " %") if name in PERCENT or name == "abs_rel" else (1, "")
            rows.append([f"{title}, test", f"{scale * value:.4g}{unit}", _spread(chain, siblings, f"test_{name}", scale, unit)])
    said = [table(["score of the ONNX file", "this network", "over seeds"], rows), ""]
    score = metrics.get(f"test_{names.headline}")
    if names.task == "classify" and count and score is not None:
        low, high = wilson(score, int(count))
        said.append(f"95 % interval of a test with {count:,.0f} images (Wilson): {100 * low:.2f} to {100 * high:.2f} %.")
    if chain.precision != BASE and "loss" in metrics:
        said.append(f"Against {BASE} it loses {100 * metrics['loss']:.2f} points of test {names.title}.")
    if names.agreement in metrics:
        share, gap = metrics[names.agreement], metrics["max_abs_difference"]
        other = "the network in torch" if chain.precision == BASE else f"the {BASE} file"
        said.append(f"Beside {other}: {names.agree} for {100 * share:.2f} %, outputs differ by {gap:.2g} at most.")
    return "\n".join(said)


def costs(chain: Chain) -> str:
    """Size, multiply-adds and times, with the machine that they were taken on."""
    record = chain.records.get("profile")
    if record is None:
        return "Not measured."
    metrics, rows = record["metrics"], []
    for key, title, form in (
        ("parameters", "parameters", "{:,.0f}"),
        ("macs", "multiply-adds", "{:,.0f}"),
        ("size_mb", "MB", "{:.3f}"),
    ):
        if key in metrics:
            rows.append([title, form.format(metrics[key]), ""])
    for key, value in metrics.items():
        if key.startswith("latency_") and key.endswith("_p50_ms"):
            setting = key.removeprefix("latency_").removesuffix("_p50_ms")
            edges = [metrics.get(f"latency_{setting}_ci_{edge}_ms") for edge in ("low", "high")]
            interval = f"95 % of the median: {edges[0]:.3g} to {edges[1]:.3g}" if None not in edges else ""
            speed = f"; {metrics[f'speedup_{setting}']:.2f} times as fast as the control" if f"speedup_{setting}" in metrics else ""
            rows.append([f"ms, {setting} (median)", f"{value:.3g}", interval + speed])
    machine, options = record["hardware"], record["parameters"].get("profile", {})
    cpu = machine["cpu"]
    on = f"{cpu['name']}, {cpu['usable_cores']} usable cores, {options.get('threads', 'unknown')} threads"
    on += "".join(f"; {gpu['name']}, driver {gpu['driver']}" for gpu in machine["gpus"])
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if name.startswith("onnxruntime"))
    control = f" The control is {options['control']} in {BASE} of the same seed." if "control" in options else ""
    said = f"cpu_b1: on the CPU, one picture a call. Measured on {on}; {machine['system']}; {packages or 'ONNX Runtime'}.{control}"
    return "\n".join([table(["what", "figure", "remarks"], rows), "", said, *record["notes"]])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _spread(chain: Chain, siblings: Sequence[Chain], key: str, scale: float, unit: str) -> str:
    """Mean and sample standard deviation over the seeds of a figure of export; says so where there is one seed."""
    seeds = {one.seed: one.metric("export", key) for one in (chain, *siblings)}
    values = [scale * value for value in seeds.values() if value is not None]
    if len(values) < 2:
        return "one seed: spread unknown"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}{unit} (n = {len(values)})"
