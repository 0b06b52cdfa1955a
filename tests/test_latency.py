"""The statistics of a latency on timings made up for the purpose, and real runs of real files, of which nothing is
timed."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline import latency
from pipeline.errors import InputError
from pipeline.inference import caller, open_session, peak_memory_mb

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, Any] = {"threads": 1, "warmup_s": 0.01, "repeats": 20, "stability": 0.5, "attempts": 2}


def write_network(path: Path, filters: int) -> Path:
    """A convolution, a ReLU, a mean over all pixels and a linear layer, written without torch."""
    draw = np.random.default_rng(filters)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(draw.standard_normal(shape).astype(np.float32) / math.prod(shape[1:]), name)

    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["features"], ["active"]),
        helper.make_node("GlobalAveragePool", ["active"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "matrix"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 12, 12])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [weight("kernel", filters, 3, 3, 3), weight("matrix", 10, filters)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("networks")
    return write_network(folder / "small.onnx", 4), write_network(folder / "large.onnx", 64)


@pytest.mark.parametrize(
    ("count", "rank"),
    # The table of 95 % intervals of a median: 1st and 6th of 6, 2nd and 9th of 10, 6th and 15th of 20, ...
    [(6, 1), (8, 1), (9, 2), (10, 2), (15, 4), (20, 6), (25, 8), (30, 10), (50, 18), (100, 40)],
)
def test_interval_of_a_median_has_the_ranks_of_the_published_table(count: int, rank: int) -> None:
    assert latency.interval_rank(count) == rank


@pytest.mark.parametrize("count", [6, 7, 20, 101, 500, 3001])
def test_interval_covers_95_percent_and_the_next_narrower_one_does_not(count: int) -> None:
    def outside(rank: int) -> float:
        return 2 * sum(math.comb(count, below) for below in range(rank)) / 2**count

    rank = latency.interval_rank(count)
    assert outside(rank) <= 0.05 < outside(rank + 1)


def test_interval_of_few_values_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 6"):
        latency.interval_rank(5)


def test_interval_holds_the_true_median_in_95_of_100_samples() -> None:
    draw = np.random.default_rng(0)
    holds = 0
    for sample in draw.exponential(size=(4000, 50)):  # skewed, as latencies are
        _, low, high = latency.median_interval(sample)
        holds += low <= math.log(2) <= high
    # of 50 values the interval is that of rank 18, which covers 96.7 %
    assert holds / 4000 == pytest.approx(0.967, abs=0.01)


def test_percentiles_interval_and_throughput_of_known_timings() -> None:
    times = np.random.default_rng(1).permutation(np.arange(1, 101, dtype=float))
    found = latency.statistics(times, 8)
    assert found["p50_ms"] == 50.5 and found["p90_ms"] == pytest.approx(90.1) and found["p99_ms"] == pytest.approx(99.01)
    assert (found["ci_low_ms"], found["ci_high_ms"]) == (40, 61)
    assert found["throughput_images_per_s"] == pytest.approx(8 * 1000 / 50.5)


def test_speedup_is_the_median_of_ratios_of_neighbours_not_the_ratio_of_medians() -> None:
    machine = np.array([1.0, 1, 1, 1, 1, 8, 8, 8, 8])  # slows down at the fifth pair, between its two calls
    times = np.stack([machine, 3 * np.array([1.0, 1, 1, 1, 8, 8, 8, 8, 8])])
    assert latency.speedup(times) == {"ratio": 3.0, "ci_low": 3.0, "ci_high": 3.0}
    assert np.median(times[1]) / np.median(times[0]) == 24
    assert latency.speedup(times[::-1])["ratio"] == pytest.approx(1 / 3)


def test_common_disturbance_leaves_the_paired_ratio_alone() -> None:
    draw = np.random.default_rng(2)
    machine = draw.lognormal(0, 0.8, 400)  # both calls of a pair meet the same machine
    times = np.stack([machine, 2 * machine]) * draw.normal(1, 0.01, (2, 400))
    found = latency.speedup(times)
    assert found["ci_low"] < 2 < found["ci_high"] and found["ci_high"] - found["ci_low"] < 0.01
    assert latency.noise(times) > 0.1  # while the medians by themselves are uncertain


def test_noise_is_the_width_of_the_interval_or_the_drift_of_the_worse_network() -> None:
    quiet = np.tile([1.0, 1.01], 50)
    wide = np.random.default_rng(3).permutation(np.arange(1, 101, dtype=float))
    drifting = np.concatenate([np.linspace(1, 2, 5000), np.linspace(1.2, 2.2, 5000)])  # its interval alone is 2 % wide
    assert latency.noise(np.stack([quiet, quiet])) == pytest.approx(0.01 / 1.005)
    expected = max(21, abs(np.median(wide[:50]) - np.median(wide[50:]))) / 50.5
    assert latency.noise(np.stack([quiet, wide])) == latency.noise(np.stack([wide, quiet])) == pytest.approx(expected)
    assert latency.noise(np.stack([drifting, drifting[::-1]])) == pytest.approx(0.2 / 1.6)


def measurements(*noises: float) -> Any:
    """A measurement of so much noise each time, the first the fastest."""
    rows = [speed + width * np.tile([0.0, 1.0], 50) for speed, width in enumerate(noises, start=1)]
    answers = iter([np.stack([row, row]) for row in rows])
    return lambda: next(answers)


def test_noisy_measurement_is_repeated_until_one_is_quiet() -> None:
    times, noise, made = latency.repeat_while_noisy(measurements(1.0, 1.0, 0.01, 0.001), 0.05, 9)
    assert made == 3 and noise <= 0.05 and times.min() == 3


def test_quiet_measurement_is_not_repeated() -> None:
    assert latency.repeat_while_noisy(measurements(0.01), 0.05, 9)[2] == 1


def test_least_noisy_measurement_counts_when_none_is_quiet_though_another_is_faster() -> None:
    times, noise, made = latency.repeat_while_noisy(measurements(0.9, 0.4, 0.8), 0.05, 3)
    assert made == 3 and noise > 0.05 and times.min() == 2


class Clock:
    """A clock that only the calls and pauses of a test move; it keeps what was done, in its order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.done = 0, list[str]()
        monkeypatch.setattr("time.perf_counter_ns", lambda: self.now)
        monkeypatch.setattr("time.perf_counter", lambda: self.now / 1e9)
        monkeypatch.setattr("time.sleep", lambda seconds: self.spend("pause", 1000 * seconds))

    def spend(self, name: str, milliseconds: float) -> None:
        self.done.append(name)
        self.now += round(milliseconds * 1e6)

    def call(self, name: str, warm: float, cold: float) -> latency.Call:
        """A call that takes longer where another network was called last."""

        def called() -> None:
            before = [other for other in self.done if other != "pause"][-1:]
            self.spend(name, warm if before == [name] else cold)

        return called


def test_pair_calls_both_in_the_order_asked_for_and_answers_in_the_order_given(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = [clock.call("variant", 2, 2), clock.call("control", 7, 7)]
    assert latency.timed_pair(calls, False) == latency.timed_pair(calls, True) == (2.0, 7.0)
    assert clock.done == [name for name in ("variant", "control", "control", "variant") for _ in range(2)]


def test_timed_call_finds_the_caches_as_its_own_network_left_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = [clock.call("variant", 1, 1.8), clock.call("control", 7, 7.5)]
    found = latency.steady(calls, 4, warmup_s=0.1, repeats=20, stability=0.05, attempts=3)
    assert found["variant"]["p50_ms"] == found["variant"]["p99_ms"] == 1 and found["control"]["p99_ms"] == 7
    assert found["speedup"] == {"ratio": 7, "ci_low": 7, "ci_high": 7}
    assert found["variant"]["throughput_images_per_s"] == pytest.approx(4000)
    assert found["pairs"] == 20 and found["attempts"] == 1 and found["settled"] and found["stable"]
    # 20 pairs of 17.3 ms last long enough; the warm-up takes windows of half its time
    names = clock.done[2 * found["warmup_pairs"] * 2 :]
    firsts = ["".join(name[0] for name in names[start : start + 4]) for start in range(0, len(names), 4)]
    assert firsts == ["vvcc", "ccvv"] * 10


def test_pause_comes_right_before_each_timed_call_and_outside_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = [clock.call("v", 1, 3), clock.call("c", 4, 6)]
    found = latency.idle(calls, 1, pause_ms=20, stability=0.05)
    assert clock.done == [*"v", "pause", *"vc", "pause", *"cc", "pause", *"cv", "pause", *"v"] * (latency.IDLE_PAIRS // 2)
    assert found["variant"] == {"p50_ms": 1, "p90_ms": 1, "ci_low_ms": 1, "ci_high_ms": 1}
    assert found["speedup"]["ratio"] == 4 and found["pause_ms"] == 20 and found["pairs"] == latency.IDLE_PAIRS == 20


def test_pauses_take_the_time_they_say() -> None:
    begun: list[float] = []
    ended: list[float] = []

    def call() -> None:
        begun.append(time.perf_counter())
        ended.append(time.perf_counter())

    latency.idle([call, call], 1, pause_ms=2, stability=0.05)
    gaps = np.array(begun[1:]) - np.array(ended[:-1])
    assert (gaps[::2] >= 0.002).all() and np.median(gaps[1::2]) < 0.001
    assert len(begun) == 4 * latency.IDLE_PAIRS


def test_warm_up_lasts_until_the_medians_settle_or_five_times_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    ramp: latency.Call = lambda: clock.spend("ramp", max(2.0, 10 - clock.now / 1e8))  # noqa: E731  a core that speeds up for 0.8 s
    steady: latency.Call = lambda: clock.spend("steady", 5)  # noqa: E731
    _, settled = latency.warm_up([ramp, steady], 0.3, 0.02)
    assert settled and 0.8 < clock.now / 1e9 < 1.5
    start = clock.now
    slower: latency.Call = lambda: clock.spend("slower", 1 + (clock.now - start) / 1e7)  # noqa: E731
    _, settled = latency.warm_up([slower, steady], 0.3, 0.02)
    assert not settled and 5 * 0.3 <= (clock.now - start) / 1e9 < 9 * 0.3


def test_warm_up_calls_both_networks_equally_often() -> None:
    made = [0, 0]

    def call(which: int) -> latency.Call:
        def called() -> None:
            made[which] += 1

        return called

    pairs, _ = latency.warm_up([call(0), call(1)], 0.01, 0.1)
    assert made == [2 * pairs, 2 * pairs] and pairs > 1


def test_comparison_of_two_files_tells_all_that_a_latency_needs(networks: tuple[Path, Path]) -> None:
    found = latency.compare(*networks, "cpu", 2, **SETTINGS)
    assert found["pairs"] >= 20 and 1 <= found["attempts"] <= 2
    assert found["stable"] == (found["noise"] <= 0.5)
    for network in (found["variant"], found["control"]):
        assert 0 < network["ci_low_ms"] <= network["p50_ms"] <= network["ci_high_ms"]
        assert network["p50_ms"] <= network["p90_ms"] <= network["p99_ms"]
    assert found["speedup"]["ci_low"] <= found["speedup"]["ratio"] <= found["speedup"]["ci_high"]
    json.dumps(found, allow_nan=False)


def test_call_computes_the_network_into_memory_allocated_once(networks: tuple[Path, Path]) -> None:
    session = open_session(networks[0])
    call: Any = caller(session, "cpu", 3)
    places = set()
    for _ in range(3):
        call()
        places.add(call.result.data_ptr())
    (copied,) = caller(session, "cpu", 3, copies=True)()  # type: ignore[misc]
    images = np.random.default_rng(0).standard_normal((3, 3, 12, 12), dtype=np.float32)
    (expected,) = session.run(None, {"images": images})
    assert len(places) == 1
    np.testing.assert_array_equal(call.result.numpy(), expected)
    np.testing.assert_array_equal(copied, expected)


def test_missing_control_is_named(networks: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone.onnx does not exist"):
        latency.compare(networks[0], tmp_path / "gone.onnx", "cpu", 1, **SETTINGS)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_that_of_the_network_not_of_this_process(networks: tuple[Path, Path], tmp_path: Path) -> None:
    ballast = np.ones(40_000_000)  # 320 MB here, none of it there
    small = peak_memory_mb(networks[1], 1, 1)
    large = peak_memory_mb(networks[1], 512, 1)
    assert small is not None and large is not None and ballast[0] == 1
    assert small < 100
    activations = 512 * 64 * 12 * 12 * 4 / 1e6  # of the convolution: 18.9 MB, at least once
    assert large - small > activations
    (tmp_path / "bad.onnx").write_bytes(b"no network")
    with pytest.raises(InputError, match="bad.onnx"):
        peak_memory_mb(tmp_path / "bad.onnx", 1, 1)


def test_latency_needs_no_torch() -> None:
    code = "import sys; from pipeline import profiling; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
