"""Latency of an ONNX file beside a control's, in ONNX Runtime: paired, with intervals, and repeated while it is noisy.

Both files are loaded in one process and timed in turn, in the balanced order variant control control variant ..., so
that whatever slows the machine slows both, and a speed-up is the median of the ratios of neighbouring timings. Before each
timed call the same network is called once untimed: right after a larger network a small one finds the caches full of
the other's numbers and takes up to twice its time, which no server of it alone would see. Only the call itself is inside the
clock: input and output lie in the memory of the device, allocated once, and the call ends when the device has finished.

`steady` times calls without a pause, `idle` calls after one, which a server sees that is asked now and then: the core
sleeps and slows down meanwhile, and others use its caches.

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

from pipeline.inference import Call, Provider, caller, open_session

MOST_PAIRS = 10_000  # in one measurement
WARMUP_LIMIT = 5  # times warmup_s: a warm-up ends then, settled or not
IDLE_PAIRS = 20  # timed after a pause each: the interval runs from the 6th to the 15th


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
    """`steady` of the file `variant` beside that of `control` at one batch size; the two may be the same file. The CPU runs
    `threads` threads. `AbsentProvider` where the provider cannot run here."""
    sessions = [open_session(path, provider, threads) for path in (variant, control)]
    calls = [caller(session, provider, batch) for session in sessions]
    return steady(calls, batch, warmup_s=warmup_s, repeats=repeats, stability=stability, attempts=attempts)


def steady(calls: Sequence[Call], batch: int, *, warmup_s: float, repeats: int, stability: float, attempts: int) -> dict[str, Any]:
    """Time the calls of a variant and of its control, each of a batch of so many images, one after another without a pause.

    A measurement times each at least `repeats` times and lasts `warmup_s` seconds or longer (fast networks get more
    calls), after a warm-up of at least `warmup_s` that lasts until the medians have settled. While its `noise` is above
    `stability` it is repeated, up to `attempts` times; the least noisy one counts.

    Returns {"variant", "control": each p50_ms, p90_ms, p99_ms, ci_low_ms, ci_high_ms of the median and
    throughput_images_per_s (of the mean call); "speedup": {"ratio", "ci_low", "ci_high"} (control / variant), "attempts",
    "stable", "noise", "pairs", "warmup_pairs", "settled"}.
    """
    warmup_pairs, settled = warm_up(calls, warmup_s, stability)
    best, least, attempt = repeat_while_noisy(lambda: _measure(calls, repeats, warmup_s), stability, attempts)
    return {
        "variant": statistics(best[0], batch),
        "control": statistics(best[1], batch),
        **_judge(best, least, stability, attempt),
        "warmup_pairs": warmup_pairs,
        "settled": settled,
    }


def idle(calls: Sequence[Call], batch: int, *, pause_ms: float, stability: float) -> dict[str, Any]:
    """Time the calls of a variant and of its control as `steady` does, which has warmed them up, but with a pause right before
    each timed call: `IDLE_PAIRS` of each, once. Returns what `steady` does but for the warm-up, the 99th percentile, for which
    they are too few, and the throughput, which the pauses decide; and "pause_ms"."""
    times = _measure(calls, IDLE_PAIRS, 0, pause_ms / 1000)
    rows = [statistics(row, batch) for row in times]
    first, second = ({k: v for k, v in row.items() if k != "p99_ms" and k.endswith("_ms")} for row in rows)
    judged = _judge(times, noise(times), stability, 1)
    return {"variant": first, "control": second, **judged, "pause_ms": pause_ms}


def _judge(times: np.ndarray, found: float, stability: float, attempts: int) -> dict[str, Any]:
    return {
        "speedup": speedup(times),
        "attempts": attempts,
        "stable": found <= stability,
        "noise": found,
        "pairs": times.shape[1],
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


def warm_up(calls: Sequence[Call], seconds: float, stability: float) -> tuple[int, bool]:
    """Call in turn for at least `seconds`, until the medians of half of that time are within `stability` of those of
    the half before, or for `WARMUP_LIMIT` times as long. Returns the number of pairs timed and whether the medians had
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


def timed_pair(calls: Sequence[Call], swapped: bool, pause_s: float = 0) -> tuple[float, float]:
    """Milliseconds of one call of each, in their order in `calls`, whichever is made first. Each is called once before
    that, untimed; a pause comes between the two."""
    times = [0.0, 0.0]
    for which in (1, 0) if swapped else (0, 1):
        call = calls[which]
        call()
        if pause_s:
            time.sleep(pause_s)
        start = time.perf_counter_ns()
        call()
        times[which] = (time.perf_counter_ns() - start) / 1e6
    return times[0], times[1]


def _measure(calls: Sequence[Call], repeats: int, seconds: float, pause_s: float = 0) -> np.ndarray:
    """(2, n) milliseconds of n >= `repeats` pairs of calls in balanced order."""
    times = []
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        while len(times) < repeats or (time.perf_counter() - start < seconds and len(times) < MOST_PAIRS):
            times.append(timed_pair(calls, len(times) % 2 == 1, pause_s))
    finally:
        gc.enable()
    return np.array(times).T
