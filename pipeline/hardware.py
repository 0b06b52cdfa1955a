"""The machine and the software that a number was measured on; the same answer every time on one machine."""

import os
import platform
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
    "nvidia-cudnn-cu13",
    "fvcore",
)
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve")


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
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
    }


def _memory_gib() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemTotal:"):
            return round(int(line.split()[1]) / 2**20)
    return None


def _gpus() -> list[dict[str, str]]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    fields = ("name", "driver_version", "memory.total")
    words = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    keys = ("name", "driver", "memory_mib")
    return [dict(zip(keys, (part.strip() for part in line.split(",")), strict=False)) for line in answer.splitlines()]


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
