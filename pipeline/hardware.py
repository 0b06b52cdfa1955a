"""The machine and the software that a number was measured on: `describe` what stays the same, `conditions` what may not."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "nvidia-cuda-runtime",
    "nvidia-cudnn-cu13",
    "tensorrt-cu13",
    "fvcore",
)
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve")

FREQUENCIES = ("scaling_cur_freq", "cpuinfo_max_freq", "scaling_governor")
CPUFREQ = Path("/sys/devices/system/cpu/cpufreq")
CLOCKS = {  # as nvidia-smi calls them: as a record does; MHz, watts, degrees Celsius
    "name": "name",
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "sm_max_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.mem": "memory_max_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "persistence_mode": "persistence",
    "temperature.gpu": "temperature_c",
}
REASONS = {  # bits of NVML's clocks event reasons (nvml.h): why a clock is lower than it could be
    0x1: "idle",
    0x2: "clocks set by an application",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "too hot, says the driver",
    0x40: "too hot, says the hardware",
    0x80: "power brake",
    0x100: "display clocks",
}
SLOWED = 0x4 | 0x8 | 0x20 | 0x40 | 0x80
LIBRARIES = {  # file: function that tells its version, and the weight of its first and second number in it
    "libcudart.so": ("CUDA", "cudaRuntimeGetVersion", 1000, 10),
    "libcudnn.so": ("cuDNN", "cudnnGetVersion", 10000, 100),
    "libnvinfer.so": ("TensorRT", "getInferLibVersion", 10000, 100),
}


def describe() -> dict[str, Any]:
    """CPU, cores, memory, system, Python, GPUs and the versions of the packages that decide results.

    Holds nothing that changes between two calls on one machine, and no name of the machine. A GPU's "memory_mib" is, as
    its driver tells it; "gpus" is empty where there is no driver. Imports no package that it names.
    """
    return {
        "cpu": _cpu(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])} {platform.machine()}",
        "python": platform.python_version(),
        "gpus": _gpus(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def conditions(*, gpu: bool) -> dict[str, Any]:
    """What may change between two measurements, read now: the CPU's clock and, with `gpu`, that of the first visible GPU.

    "load": processes that ran or waited in the last minute. "cpu": "mhz" [lowest, highest] of its cores, "max_mhz",
    "governor" and "boost", those that the system tells. "gpu": see `CLOCKS`, "clock_reasons", those of `REASONS` now at work, and
    whether it is "slowed" by heat or power.
    "libraries": versions of the CUDA libraries that this process has loaded. What is not told is left out.
    """
    found: dict[str, Any] = {"cpu": _cpu_clocks()}
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 2)
    return found | ({"gpu": _gpu_clocks(), "libraries": loaded_libraries()} if gpu else {})


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loaded_libraries() -> dict[str, str]:
    """Versions of the CUDA libraries that this process has loaded, as they tell them themselves."""
    paths = {line.split()[-1] for line in _lines(Path("/proc/self/maps")) if ".so" in line}
    found = {}
    for file, (title, function, first, second) in LIBRARIES.items():
        for path in (path for path in paths if Path(path).name.startswith(file)):
            number = _told_version(path, function)
            found[title] = f"{number // first}.{number % first // second}" + (f".{number % second}" if second == 100 else "")
    return found


def _told_version(path: str, function: str) -> int:
    library = ctypes.CDLL(path)
    if function == "cudaRuntimeGetVersion":
        number = ctypes.c_int()
        library.cudaRuntimeGetVersion(ctypes.byref(number))
        return number.value
    ask = getattr(library, function)
    ask.restype = ctypes.c_size_t if function == "cudnnGetVersion" else ctypes.c_int32
    return int(ask())


def _cpu_clocks() -> dict[str, Any]:
    told = {name: [line for policy in sorted(CPUFREQ.glob("policy*")) for line in _lines(policy / name)] for name in FREQUENCIES}
    now = [int(value) / 1000 for value in told["scaling_cur_freq"] if value.isdigit()]
    now = now or [float(line.partition(":")[2]) for line in _lines(Path("/proc/cpuinfo")) if line.startswith("cpu MHz")]
    most = [int(value) / 1000 for value in told["cpuinfo_max_freq"] if value.isdigit()]
    boost = _lines(CPUFREQ / "boost")
    return (
        ({"mhz": [round(min(now)), round(max(now))]} if now else {})
        | ({"max_mhz": round(max(most))} if most else {})
        | ({"governor": ", ".join(sorted(set(told["scaling_governor"])))} if told["scaling_governor"] else {})
        | ({"boost": boost[0] == "1"} if boost else {})
    )


def _gpu_clocks() -> dict[str, Any]:
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    for reasons in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # the name before driver 535
        told = _ask_gpus(CLOCKS | {reasons: "reasons"}, gpu)
        if told:
            return _read_clocks(told[0])
    return {}


def _read_clocks(told: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, text in told.items():
        number = re.fullmatch(r"\d+(\.\d+)?", text) and key.endswith(("_mhz", "_w", "_c"))
        found[key] = float(text) if number else text
    bits = found.pop("reasons", "")
    if re.fullmatch(r"0x[0-9a-fA-F]+", bits):
        found["slowed"] = bool(int(bits, 16) & SLOWED)
        found["clock_reasons"] = [name for bit, name in REASONS.items() if int(bits, 16) & bit]
    return found


def _cpu() -> dict[str, Any]:
    lines = _lines(Path("/proc/cpuinfo"))
    pairs = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]
    first = dict(reversed(pairs))
    flags = first.get("flags", first.get("Features", "")).split()
    sockets = [value for key, value in pairs if key == "physical id"]
    cores = [value for key, value in pairs if key == "core id"]
    return {
        "name": first.get("model name") or platform.processor() or platform.machine(),
        "logical_cores": os.cpu_count(),
        "physical_cores": len(set(zip(sockets, cores, strict=False))) or None,  # None: the system does not tell
        "usable_cores": usable_cores(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
    }


def _memory_gib() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemTotal:"):
            return round(int(line.split()[1]) / 2**20)
    return None


def _gpus() -> list[dict[str, str]]:
    fields = {"name": "name", "driver_version": "driver", "memory.total": "memory_mib"}
    return _ask_gpus(fields)


def _ask_gpus(fields: dict[str, str], gpu: str | None = None) -> list[dict[str, str]]:
    """What nvidia-smi answers, by the names on the right, a dict a GPU; nothing where it is absent or knows not all fields."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    words = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", *([f"--id={gpu}"] if gpu else [])]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in answer.splitlines() if line.strip()]
    return [dict(zip(fields.values(), row, strict=False)) for row in rows]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
