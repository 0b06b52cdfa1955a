"""What a file costs where it runs: latency beside the control's in every setting, and memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline import files, hardware, latency
from pipeline.deployment import Profile
from pipeline.inference import (
    AbsentProvider,
    Call,
    Provider,
    caller,
    elsewhere,
    open_session,
    peak_memory_mb,
    provider_settings,
    runs_on,
)

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CONTROL = "fp32"  # the precision of every control
Mode = Literal["", "idle", "copies", "graph"]


@dataclass(frozen=True)
class Setting:
    """One way to run a network. `mode`: "idle" pauses before each call, "copies" has the copies from and to the host within the
    clock, "graph" replays a CUDA graph; "" has none of these: input and output lie on the device."""

    provider: Provider
    batch: int
    mode: Mode

    @property
    def name(self) -> str:
        """cpu_b1, cpu_b1_idle, ..."""
        return f"{self.provider}_b{self.batch}" + (f"_{self.mode}" if self.mode else "")


@dataclass
class Found:
    """What was measured of one file, as a record holds it."""

    metrics: dict[str, float] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def settings(provider: Provider, options: Profile) -> list[Setting]:
    """The settings that a provider is measured in, in their order."""
    found = []
    for batch in options.batch_sizes:
        wanted: dict[Mode, bool] = {"": True, "idle": options.idle_ms is not None and batch == 1}
        wanted |= {"copies": options.copies and provider != "cpu", "graph": options.cuda_graph and provider == "cuda"}
        found += [Setting(provider, batch, mode) for mode, asked in wanted.items() if asked]
    return found


def profile(path: Path, precision: str, control: Path, options: Profile, engines: Path) -> Found:
    """Time the file of a precision beside the fp32 file `control`, as `options` say, and take its peak memory on the CPU.
    TensorRT keeps what it builds in the folder `engines`, for the next precision beside the same control.

    Metrics are those of `metrics` for every setting and "peak_memory_mb" at the largest batch. Events: {"kind": "latency",
    "provider", "batch", "mode", "threads" (of the CPU), "precision", "control_precision", "tf32": whether float32 may be
    multiplied in TF32, "elsewhere": what other providers run, "machine": `hardware.conditions` right afterwards, and what
    `latency.steady` or `latency.idle` returns}, and {"kind": "absent", "provider", "reason"} for a provider that cannot run
    here; for CUDA graphs alone, "provider" is "cuda_graph". Notes tell what is missing or doubtful.
    """
    pair, found, absent = _Pair([(path, precision), (control, CONTROL)], options.threads, engines), Found(), set()
    for setting in (setting for provider in options.providers for setting in settings(provider, options)):
        means = "cuda_graph" if setting.mode == "graph" else setting.provider
        if absent & {setting.provider, means}:
            continue
        try:
            _add(found, setting, _time(setting, pair, options))
        except AbsentProvider as error:
            absent.add(means)
            found.events.append({"kind": "absent", "provider": means, "reason": str(error)})
            found.notes.append(f"{means} was not measured: {error}")
    if options.threads > (cores := hardware.usable_cores()):
        found.notes.append(f"profile.threads {options.threads} take turns on {cores} cores")
    if options.idle_ms is not None and 1 not in options.batch_sizes:
        found.notes.append("no latency after a pause: profile.batch_sizes has no 1")
    memory = peak_memory_mb(path, max(options.batch_sizes), options.threads)
    if memory is None:
        found.notes.append("peak memory was not measured: this system has no /proc")
    else:
        found.metrics["peak_memory_mb"] = memory
    return found


def metrics(setting: Setting, result: Mapping[str, Any]) -> dict[str, float]:
    """The flat metrics of a comparison: latency_cpu_b1_p50_ms, ..., throughput_cpu_b1_images_per_s, speedup_cpu_b1,
    ..."""
    own, ratio, name = result["variant"], result["speedup"], setting.name
    found = {f"latency_{name}_{key}": value for key, value in own.items() if key.endswith("_ms")}
    if "throughput_images_per_s" in own:
        found[f"throughput_{name}_images_per_s"] = own["throughput_images_per_s"]
    return found | {
        f"speedup_{name}": ratio["ratio"],
        f"speedup_{name}_ci_low": ratio["ci_low"],
        f"speedup_{name}_ci_high": ratio["ci_high"],
    }


class _Pair:
    """A file and its control as sessions, each opened once."""

    def __init__(self, pair: list[tuple[Path, str]], threads: int, engines: Path) -> None:
        self.pair, self.threads, self.engines = pair, threads, engines
        self._opened: dict[tuple[Provider, int | None, bool], list[InferenceSession]] = {}

    def sessions(self, setting: Setting) -> "list[InferenceSession]":
        """Of the variant and the control. TensorRT and CUDA graphs need a fixed batch size, others are free."""
        graph = setting.mode == "graph"
        fixed = setting.batch if graph or setting.provider == "tensorrt" else None
        key = (setting.provider, fixed, graph)
        if key not in self._opened:
            self._opened[key] = [self._open(path, precision, setting.provider, fixed, graph) for path, precision in self.pair]
        return self._opened[key]

    def calls(self, setting: Setting) -> list[Call]:
        """Of the variant and the control; `AbsentProvider` where CUDA cannot record them as a graph."""
        copies = setting.mode == "copies"
        made = [caller(session, setting.provider, setting.batch, copies=copies) for session in self.sessions(setting)]
        if setting.mode == "graph":
            try:
                for call in made:
                    call()  # records
            except Exception as error:  # ONNX Runtime's errors share no narrower base class
                raise AbsentProvider(f"the network cannot be recorded: {' '.join(str(error).split())}") from None
        return made

    def _open(self, path: Path, precision: str, provider: Provider, fixed: int | None, graph: bool) -> "InferenceSession":
        place = self.engines / f"{files.sha256(path)}-{fixed}"
        if provider == "tensorrt":
            place.mkdir(exist_ok=True)
        told = provider_settings(provider, precision, graph=graph, engines=place)
        session = open_session(path, provider, self.threads, fixed=fixed, settings=told)
        if not runs_on(session, provider):
            raise AbsentProvider(f"it takes no node of {path}: {elsewhere(session, provider)}")
        return session


def _time(setting: Setting, pair: _Pair, options: Profile) -> dict[str, Any]:
    """A latency event."""
    calls, session = pair.calls(setting), pair.sessions(setting)[0]
    if setting.mode == "idle":
        assert options.idle_ms is not None
        result = latency.idle(calls, setting.batch, pause_ms=options.idle_ms, stability=options.stability)
    else:
        names = ("warmup_s", "repeats", "stability", "attempts")
        result = latency.steady(calls, setting.batch, **{name: getattr(options, name) for name in names})
    machine = hardware.conditions(gpu=setting.provider != "cpu")
    return {
        "kind": "latency",
        "provider": setting.provider,
        "batch": setting.batch,
        "mode": setting.mode,
        "precision": pair.pair[0][1],
        "control_precision": pair.pair[1][1],
        "threads": pair.threads,
        "tf32": setting.provider != "cpu",
        "elsewhere": elsewhere(session, setting.provider),
        "machine": machine,
        **result,
    }


def _add(found: Found, setting: Setting, event: dict[str, Any]) -> None:
    found.metrics |= metrics(setting, event)
    found.events.append(event)
    where = f"{setting.provider}, batch {setting.batch}" + (f", {setting.mode}" if setting.mode else "")
    if not event["stable"] and setting.mode != "idle":  # of so few calls the interval is wide by nature
        found.notes.append(f"{where}: still noisy after {event['attempts']} measurements")
    found.notes += [f"{where}: {other} runs {nodes}" for other, nodes in event["elsewhere"].items()]
    if event["machine"].get("gpu", {}).get("slowed"):
        found.notes.append(f"{where}: the GPU was slowed by {', '.join(event['machine']['gpu']['clock_reasons'])}")
