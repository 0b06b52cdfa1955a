"""Latency of an ONNX file beside a control's, in ONNX Runtime: paired, with intervals, and repeated while it is noisy.

Both files are loaded in one process and called in turn, in the balanced order variant control control variant ..., so
that whatever slows the machine slows both, and a speed-up is the median of the ratios of neighbouring calls. Each call
finds the caches as the other network left them. Only the call itself is inside the clock: on the CPU `session.run` with
the input in memory, on CUDA a run with input and output bound on the device, until the device has finished.

Interval of a median (95 %): the k-th smallest and the k-th largest of n values, with the largest k for which
P(Binomial(n, 1/2) <= k - 1) <= 0.025 (Conover, Practical Nonparametric Statistics, section 3.2). It assumes no
distribution, but independent values: a machine that drifts is caught by comparing the halves of a measurement
(`noise`). It speaks for this process: one file loaded twice can differ from itself by about 1 % in where its memory
lies.
"""

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.inference import AbsentProvider, Call, Provider, caller, cpu_nodes, open_session, peak_memory_mb

MOST_PAIRS = 10_000  # in one measurement
WARMUP_LIMIT = 5  # times warmup_s: a warm-up ends then, settled or not


def profile(
    variant: Path, control: Path, providers: Sequence[Provider], batch_sizes: Sequence[int], **settings: Any
) -> tuple[dict[str, float], list[dict[str, Any]], list[str]]:
    """`compare` (see there for `settings`) at every provider and batch size, and the peak memory at the largest batch.

    Returns flat metrics (those of `metrics`, and "peak_memory_mb" on the CPU), one event {"kind": "latency", ...} a
    comparison or {"kind": "absent", ...} a provider, and notes on what is missing or doubtful.
    """
    found: dict[str, float] = {}
    events, notes = [], []
    for provider in providers:
        for batch in batch_sizes:
            result = compare(variant, control, provider, batch, **settings)
            if "absent" in result:
                events.append({"kind": "absent", "provider": provider, "reason": result["absent"]})
                notes.append(f"{provider} was not measured: {result['absent']}")
                break
            found |= metrics(result)
            events.append({"kind": "latency", **result})
            if not result["stable"]:
                notes.append(f"{provider}, batch {batch}: still noisy after {result['attempts']} measurements")
            if result["cpu_nodes"]:
                notes.append(f"{provider}, batch {batch}: the CPU runs {result['cpu_nodes']}")
    memory = peak_memory_mb(variant, max(batch_sizes), settings["threads"])
    if memory is None:
        notes.append("peak memory was not measured: this system has no /proc")
    else:
        found["peak_memory_mb"] = memory
    return found, events, notes


def compare(
    variant: Path,
    control: Path,
    provider: Provider,
    batch: int,
    *,
    threads: int,
    warmup_s: float,
    repeats: int,
    stability: float,
    attempts: int,
) -> dict[str, Any]:
    """Latency of the file `variant` beside that of `control` at one batch size; the two may be the same file.

    A measurement times each file at least `repeats` times and for at least `warmup_s` seconds together (fast networks
    get more calls), after a warm-up of at least `warmup_s` that lasts until the medians have settled. While its `noise`
    is above `stability` it is repeated, up to `attempts` times; the least noisy one counts. The CPU runs `threads`
    threads.

    Returns {"provider", "batch", "precision", "variant", "control": each p50_ms, p90_ms, p99_ms, ci_low_ms, ci_high_ms
    of the median and throughput_images_per_s (of the mean call); "speedup": {"ratio", "ci_low", "ci_high"} (control /
    variant), "attempts", "stable", "noise", "pairs", "warmup_pairs", "settled", "cpu_nodes": how many nodes of the
    variant a GPU provider leaves to the CPU, by operator}, or {"provider", "batch", "absent": why} where the provider
    cannot run here.
    """
    head = {"provider": provider, "batch": batch}
    try:
        sessions = [open_session(path, provider, threads) for path in (variant, control)]
    except AbsentProvider as error:
        return head | {"absent": str(error)}
    calls = [caller(session, provider, batch) for session in sessions]
    warmup_pairs, settled = warm_up(calls, warmup_s, stability)
    best, least, attempt = repeat_while_noisy(lambda: _measure(calls, repeats, warmup_s), stability, attempts)
    return head | {
        "precision": "float32" if provider == "cpu" else "float32, TF32 allowed",
        "variant": statistics(best[0], batch),
        "control": statistics(best[1], batch),
        "speedup": speedup(best),
        "attempts": attempt,
        "stable": least <= stability,
        "noise": least,
        "pairs": best.shape[1],
        "warmup_pairs": warmup_pairs,
        "settled": settled,
        "cpu_nodes": {} if provider == "cpu" else cpu_nodes(sessions[0]),
    }


def metrics(comparison: dict[str, Any]) -> dict[str, float]:
    """The flat metrics of a comparison: latency_cpu_b1_p50_ms, ..., throughput_cpu_b1_images_per_s, speedup_cpu_b1,
    ..."""
    name = f"{comparison['provider']}_b{comparison['batch']}"
    variant, ratio = comparison["variant"], comparison["speedup"]
    return {f"latency_{name}_{key}": value for key, value in variant.items() if key.endswith("_ms")} | {
        f"throughput_{name}_images_per_s": variant["throughput_images_per_s"],
        f"speedup_{name}": ratio["ratio"],
        f"speedup_{name}_ci_low": ratio["ci_low"],
        f"speedup_{name}_ci_high": ratio["ci_high"],
    }


def interval_rank(count: int) -> int:
    """k: the 95 % interval of the median of `count` values runs from the k-th smallest to the k-th largest.

    In whole numbers, 40 * sum_{i < k} C(count, i) <= 2^count. Six values are the fewest that have an interval.
    """
    if count < 6:
        raise ValueError(f"{count} values are too few for a 95 % interval of their median: at least 6 are needed")
    below, term, rank = 0, 1, 0
    while 40 * (below + term) <= 1 << count:
        below += term
        rank += 1
        term = term * (count - rank + 1) // rank
    return rank


def median_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Median of (n,) values and the low and high end of its 95 % interval."""
    ordered = np.sort(values)
    rank = interval_rank(len(ordered))
    return float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[-rank])


def statistics(times_ms: np.ndarray, batch: int) -> dict[str, float]:
    """Percentiles (linear between neighbours), interval of the median and images a second of (n,) calls in
    milliseconds."""
    median, low, high = median_interval(times_ms)
    p90, p99 = np.percentile(times_ms, (90, 99))
    return {
        "p50_ms": median,
        "p90_ms": float(p90),
        "p99_ms": float(p99),
        "ci_low_ms": low,
        "ci_high_ms": high,
        "throughput_images_per_s": float(batch * 1000 / np.mean(times_ms)),
    }


def speedup(times: np.ndarray) -> dict[str, float]:
    """How many times faster the variant is: median of control / variant over (2, n) paired timings, with its
    interval."""
    ratio, low, high = median_interval(times[1] / times[0])
    return {"ratio": ratio, "ci_low": low, "ci_high": high}


def repeat_while_noisy(measure: Callable[[], np.ndarray], stability: float, attempts: int) -> tuple[np.ndarray, float, int]:
    """Call `measure`, which returns (2, n) timings, until their noise is at most `stability`, `attempts` times at most.

    Returns the least noisy timings, chosen for that alone and never for being fast, their noise, and the calls made."""
    best = measure()
    least, made = noise(best), 1
    while least > stability and made < attempts:
        times, made = measure(), made + 1
        if (found := noise(times)) < least:
            best, least = times, found
    return best, least, made


def noise(times: np.ndarray) -> float:
    """How uncertain the medians of (2, n) timings are, as a share of them: the larger of the two networks'.

    The width of the median's interval, or the distance of the medians of the first and the second half where that is
    more: for independent calls it is less 19 times in 20, so more means drift.
    """
    worst = 0.0
    for calls in times:
        median, low, high = median_interval(calls)
        first, second = np.median(calls[: len(calls) // 2]), np.median(calls[len(calls) // 2 :])
        worst = max(worst, (high - low) / median, abs(first - second) / median)
    return float(worst)


def warm_up(calls: list[Call], seconds: float, stability: float) -> tuple[int, bool]:
    """Call in turn for at least `seconds`, until the medians of half of that time are within `stability` of those of
    the half before, or for `WARMUP_LIMIT` times as long. Returns the number of pairs called and whether the medians had
    settled."""
    start, before, pairs = time.perf_counter(), None, 0
    while True:
        window_start, window = time.perf_counter(), []
        while not window or time.perf_counter() - window_start < seconds / 2:
            window.append(timed_pair(calls, len(window) % 2 == 1))
        pairs += len(window)
        now = np.median(np.array(window), axis=0)
        settled = before is not None and bool((np.abs(now - before) <= stability * now).all())
        elapsed = time.perf_counter() - start
        if (settled and elapsed >= seconds) or elapsed >= WARMUP_LIMIT * seconds:
            return pairs, settled
        before = now


def timed_pair(calls: list[Call], swapped: bool) -> tuple[float, float]:
    """Milliseconds of the two calls, in their order in `calls`, whichever is made first."""
    first, second = (calls[1], calls[0]) if swapped else (calls[0], calls[1])
    start = time.perf_counter_ns()
    first()
    middle = time.perf_counter_ns()
    second()
    end = time.perf_counter_ns()
    times = (middle - start) / 1e6, (end - middle) / 1e6
    return (times[1], times[0]) if swapped else times


def _measure(calls: list[Call], repeats: int, seconds: float) -> np.ndarray:
    """(2, n) milliseconds of n >= `repeats` pairs of calls in balanced order."""
    times = []
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        while len(times) < repeats or (time.perf_counter() - start < seconds and len(times) < MOST_PAIRS):
            times.append(timed_pair(calls, len(times) % 2 == 1))
    finally:
        gc.enable()
    return np.array(times).T
