"""What is measured in which setting, what is told where a provider is absent, and the state of the machine beside it. GPUs are not
needed: tests/test_latency_cuda.py has what needs one."""

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from test_latency import write_network

from pipeline import hardware, profiling
from pipeline.deployment import Profile
from pipeline.errors import InputError
from pipeline.inference import PROVIDERS, AbsentProvider, elsewhere, open_session, provider_settings, runs_on

ROOT = Path(__file__).parent.parent
PARTS = ("latency_{}_p50_ms", "latency_{}_p90_ms", "latency_{}_ci_low_ms", "latency_{}_ci_high_ms")
PARTS += ("speedup_{}", "speedup_{}_ci_low", "speedup_{}_ci_high")
STEADY = ("latency_{}_p99_ms", "throughput_{}_images_per_s")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU: the provider is not absent")


def options(**changes: Any) -> Profile:
    usual: dict[str, Any] = {"control": "finetune-none", "providers": ["cpu"], "threads": 1, "batch_sizes": [1, 2]}
    usual |= {"warmup_s": 0.01, "repeats": 20, "stability": 10.0, "attempts": 1, "idle_ms": 1, "copies": True, "cuda_graph": True}
    return Profile.model_validate(usual | changes)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("networks")
    return write_network(folder / "small.onnx", 4), write_network(folder / "large.onnx", 16)


def test_settings_are_named_by_provider_batch_and_mode() -> None:
    names = {provider: [setting.name for setting in profiling.settings(provider, options())] for provider in PROVIDERS}  # type: ignore[arg-type]
    cuda = ["cuda_b1", "cuda_b1_idle", "cuda_b1_copies", "cuda_b1_graph", "cuda_b2", "cuda_b2_copies", "cuda_b2_graph"]
    assert names["cpu"] == ["cpu_b1", "cpu_b1_idle", "cpu_b2"]
    assert names["cuda"] == cuda
    assert names["tensorrt"] == ["tensorrt_b1", "tensorrt_b1_idle", "tensorrt_b1_copies", "tensorrt_b2", "tensorrt_b2_copies"]
    plain = options(idle_ms=None, copies=False, cuda_graph=False)
    assert [setting.name for setting in profiling.settings("cuda", plain)] == ["cuda_b1", "cuda_b2"]


def test_providers_are_told_the_precision_of_the_file_and_no_lower_one(tmp_path: Path) -> None:
    assert provider_settings("cpu", "int8") == provider_settings("cuda", "fp16") == provider_settings("tensorrt", "fp32") == {}
    assert provider_settings("cuda", "int8", graph=True, engines=tmp_path) == {"enable_cuda_graph": "1"}
    assert provider_settings("tensorrt", "fp16") == {"trt_fp16_enable": "1"}
    kept = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(tmp_path)}
    assert provider_settings("tensorrt", "int8", engines=tmp_path) == {"trt_int8_enable": "1"} | kept


@pytest.mark.skipif(sys.platform != "linux", reason="looks into Linux's libraries")
def test_every_word_told_to_a_provider_is_one_it_knows(tmp_path: Path) -> None:
    told = {
        "cuda": provider_settings("cuda", "fp32", graph=True),
        "tensorrt": provider_settings("tensorrt", "fp16", engines=tmp_path) | provider_settings("tensorrt", "int8"),
    }
    for provider, words in told.items():
        library = Path(onnxruntime.__file__).parent / f"capi/libonnxruntime_providers_{provider}.so"
        if not library.is_file():
            pytest.skip(f"this onnxruntime has no {library.name}")
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for word in words:
                assert content.find(b"\0" + word.encode() + b"\0") >= 0, word


def test_fixed_batch_size_is_fixed_and_a_free_one_free(networks: tuple[Path, Path]) -> None:
    session = open_session(networks[0], fixed=4)
    assert session.get_inputs()[0].shape == [4, 3, 12, 12] and session.get_outputs()[0].shape == [4, 10]
    assert open_session(networks[0]).get_inputs()[0].shape == ["batch", 3, 12, 12]


def test_network_whose_batch_size_cannot_be_fixed_is_refused(networks: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(networks[0].read_bytes().replace(b"batch", b"count"))
    open_session(path)
    with pytest.raises(InputError, match=r"other\.onnx takes"):
        open_session(path, fixed=4)


def test_nodes_of_other_providers_are_counted_by_operator(networks: tuple[Path, Path]) -> None:
    session = open_session(networks[0])
    assert elsewhere(session, "cpu") == {} and runs_on(session, "cpu") and not runs_on(session, "tensorrt")
    nodes = elsewhere(session, "cuda")["cpu"]
    assert nodes["Conv"] == nodes["Gemm"] == 1


@no_gpu
def test_absent_providers_say_what_is_missing_and_give_no_number(networks: tuple[Path, Path], tmp_path: Path) -> None:
    asked = options(providers=["tensorrt", "cuda", "cpu"])
    found = profiling.profile(networks[0], "int8", networks[1], asked, tmp_path)
    kinds = [(event["kind"], event["provider"]) for event in found.events]
    assert kinds == [("absent", "tensorrt"), ("absent", "cuda"), *[("latency", "cpu")] * 3]
    assert "libnvinfer.so.10" in found.events[0]["reason"] and "libcuda.so.1" in found.events[1]["reason"]
    assert [note.split(" was")[0] for note in found.notes[:2]] == ["tensorrt", "cuda"]
    assert not [name for name in found.metrics if "tensorrt" in name or "cuda" in name]


@no_gpu
def test_tensorrt_needs_the_driver_too(networks: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.inference.TENSORRT", ("libm.so.6",))
    with pytest.raises(AbsentProvider, match="driver"):
        open_session(networks[0], "tensorrt")


@no_gpu
def test_session_that_would_run_on_another_provider_is_not_taken(
    networks: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.inference._require_tensorrt", lambda _: None)
    with pytest.raises(AbsentProvider, match="Tensorrt"):
        open_session(networks[0], "tensorrt")


def test_profile_on_the_cpu_has_every_figure_and_tells_how_it_was_measured(networks: tuple[Path, Path], tmp_path: Path) -> None:
    found = profiling.profile(networks[0], "int8", networks[1], options(), tmp_path)
    names = {part.format(setting) for setting in ("cpu_b1", "cpu_b1_idle", "cpu_b2") for part in PARTS}
    names |= {part.format(setting) for setting in ("cpu_b1", "cpu_b2") for part in STEADY}
    assert found.metrics.keys() - {"peak_memory_mb"} == names and found.metrics["peak_memory_mb"] > 0
    assert [(event["provider"], event["batch"], event["mode"]) for event in found.events] == [
        ("cpu", 1, ""),
        ("cpu", 1, "idle"),
        ("cpu", 2, ""),
    ]
    for event in found.events:
        assert (event["precision"], event["control_precision"], event["threads"]) == ("int8", "fp32", 1)
        assert not event["tf32"] and event["elsewhere"] == {} and "cpu" in event["machine"] and "gpu" not in event["machine"]
    assert found.events[1]["pause_ms"] == 1 and found.events[1]["attempts"] == 1
    assert found.metrics["latency_cpu_b2_p50_ms"] == found.events[2]["variant"]["p50_ms"]
    assert found.notes == []
    json.dumps(found.events, allow_nan=False)


def test_what_is_doubtful_is_noted(networks: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"cpu": {}, "gpu": {"slowed": True, "clock_reasons": ["power cap"]}}
    monkeypatch.setattr(hardware, "conditions", lambda *, gpu: held)
    cores = hardware.usable_cores()
    asked = options(threads=cores + 1, batch_sizes=[2], stability=1e-9, attempts=2)
    assert profiling.profile(networks[0], "fp32", networks[1], asked, tmp_path).notes == [
        "cpu, batch 2: still noisy after 2 measurements",
        "cpu, batch 2: the GPU was slowed by power cap",
        f"profile.threads {cores + 1} take turns on {cores} cores",
        "no latency after a pause: profile.batch_sizes has no 1",
    ]


SMI = """#!/bin/sh
echo "$@" >> {log}
case "$1" in
  *clocks_event_reasons*) {event} ;;
  *) echo "Sample GPU, 570.1, 1410, 1980, 2619, 2619, 251.30, 700.00, Enabled, 41, {bits}" ;;
esac
"""


@pytest.mark.skipif(not Path("/bin/sh").exists(), reason="needs a shell")
@pytest.mark.parametrize("old", [False, True])
def test_clocks_of_the_first_visible_gpu_are_read_by_the_names_its_driver_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    bits = "0x0000000000000024"  # nvml.h: 0x4 SwPowerCap, 0x20 SwThermalSlowdown
    answer = f'echo "Sample GPU, 570.1, 1410, 1980, 2619, 2619, 251.30, 700.00, Enabled, 41, {bits}"'
    tool = tmp_path / "nvidia-smi"
    unknown = 'echo "Field is not a valid field to query."; exit 2'
    tool.write_text(SMI.format(log=tmp_path / "log", event=unknown if old else answer, bits=bits))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    gpu = hardware.conditions(gpu=True)["gpu"]
    assert (gpu["name"], gpu["driver"], gpu["persistence"]) == ("Sample GPU", "570.1", "Enabled")
    assert (gpu["sm_mhz"], gpu["sm_max_mhz"], gpu["memory_mhz"], gpu["power_limit_w"], gpu["temperature_c"]) == (
        1410,
        1980,
        2619,
        700,
        41,
    )
    assert gpu["slowed"] and gpu["clock_reasons"] == ["power cap", "too hot, says the driver"] and "reasons" not in gpu
    asked = (tmp_path / "log").read_text().splitlines()
    assert len(asked) == 1 + old and all(line.endswith("--id=3") for line in asked)


def test_clock_and_governor_of_the_cpu_come_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (now, governor) in enumerate([("1200000", "powersave"), ("3400000", "powersave")]):
        policy = tmp_path / f"policy{number}"
        policy.mkdir()
        told = {"scaling_cur_freq": now, "cpuinfo_max_freq": "3600000", "scaling_governor": governor}
        for name, value in told.items():
            (policy / name).write_text(f"{value}\n")
    (tmp_path / "boost").write_text("1\n")
    monkeypatch.setattr(hardware, "CPUFREQ", tmp_path)
    found = hardware.conditions(gpu=False)
    assert found["cpu"] == {"mhz": [1200, 3400], "max_mhz": 3600, "governor": "powersave", "boost": True}
    assert found["load"] >= 0 and found.keys() == {"cpu", "load"}
    monkeypatch.setattr(hardware, "CPUFREQ", tmp_path / "absent")
    assert "governor" not in hardware.conditions(gpu=False)["cpu"]


@pytest.mark.skipif(torch.version.cuda is None or sys.platform != "linux", reason="this torch has no CUDA libraries")
def test_loaded_libraries_are_of_the_versions_that_torch_tells() -> None:
    found = hardware.loaded_libraries()
    assert found["CUDA"] == torch.version.cuda
    if number := torch.backends.cudnn.version():
        assert hardware.loaded_libraries()["cuDNN"] == f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def test_hardware_is_the_same_every_time_and_names_no_machine() -> None:
    code = (
        "import json, sys; from pipeline import hardware; print(json.dumps(hardware.describe())); assert 'torch' not in sys.modules"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = hardware.describe()
    assert json.loads(told) == found
    assert os.uname().nodename not in told or os.uname().nodename in found["cpu"]["name"]
    assert found["cpu"]["logical_cores"] == os.cpu_count()
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
