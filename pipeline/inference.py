"""ONNX files run in ONNX Runtime: on the provider asked for and no other, with a fixed number of threads."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.errors import InputError

if TYPE_CHECKING:
    import onnxruntime

Provider = Literal["cuda", "cpu"]
PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
Call = Callable[[], object]


class AbsentProvider(InputError):
    """The execution provider asked for cannot run on this machine; the message says why."""


def open_session(path: Path, provider: Provider = "cpu", threads: int = 1) -> "onnxruntime.InferenceSession":
    """An ONNX Runtime session that runs the file at `path` on `provider`; on the CPU with `threads` threads.

    Raises `InputError` naming the file when it is missing, damaged or takes something else than one batch of images,
    and `AbsentProvider` where the provider cannot run: it is never replaced by another. The threads of the pool may
    spin within a call, as ONNX Runtime does by default, but never between calls, where they would steal time from
    another session.
    """
    import onnxruntime

    if not path.is_file():
        raise InputError(f"{path} does not exist: run the stage that writes it first (`dvc repro`)")
    if provider == "cuda":
        _require_cuda(onnxruntime)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[PROVIDERS[provider]])
    except Exception as error:  # ONNX Runtime's errors share no narrower base class
        reason = " ".join(str(error).split())
        if provider == "cuda" and type(error).__name__ in ("Fail", "RuntimeException", "EPFail", "RuntimeError"):
            raise AbsentProvider(f"CUDA did not start: {reason}") from None
        raise InputError(f"{path} is no ONNX file that can be run: {reason}; delete it and export again") from None
    if PROVIDERS[provider] not in session.get_providers():
        raise AbsentProvider(f"ONNX Runtime could not load {PROVIDERS[provider]}; its own message is above")
    inputs, outputs = session.get_inputs(), session.get_outputs()
    sizes = [isinstance(size, int) for size in inputs[0].shape]
    if len(inputs) != 1 or len(outputs) != 1 or sizes != [False, True, True, True] or inputs[0].type != "tensor(float)":
        found = [(entry.name, entry.type, entry.shape) for entry in inputs]
        raise InputError(f"{path} takes {found}, not float images (N, C, H, W) of any N: export it with Winnow")
    return session


def caller(session: "onnxruntime.InferenceSession", provider: Provider, batch: int) -> Call:
    """One call of the network on a fixed batch of random images."""
    entry = session.get_inputs()[0]
    shape = (batch, *entry.shape[1:])
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    names = [session.get_outputs()[0].name]
    if provider == "cpu":
        feeds = {entry.name: images}
        return lambda: session.run(names, feeds)

    import onnxruntime

    binding = session.io_binding()
    binding.bind_ortvalue_input(entry.name, onnxruntime.OrtValue.ortvalue_from_numpy(images, provider, 0))
    binding.bind_output(names[0], provider, 0)
    binding.synchronize_inputs()

    def call() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return call


def cpu_nodes(session: "onnxruntime.InferenceSession") -> dict[str, int]:
    """How many nodes run on the CPU, by operator: a GPU provider leaves to it what it has no kernel for."""
    nodes: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name == PROVIDERS["cpu"]:
            for node in part.get_nodes():
                nodes[node.op_type] = nodes.get(node.op_type, 0) + 1
    return nodes


def peak_memory_mb(path: Path, batch: int, threads: int) -> float | None:
    """Memory that loading and running the file on the CPU takes, in 10^6 bytes: the peak resident memory of a fresh
    process that does only that, less what the process held before it loaded the file. None where the system does not
    tell (no /proc).
    """
    if not Path("/proc/self/status").exists():
        return None
    code = "import sys; from pipeline.inference import report_memory; report_memory(*sys.argv[1:])"
    root = str(Path(__file__).resolve().parent.parent)
    search = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    words = [sys.executable, "-c", code, str(path), str(batch), str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": search})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"{path} could not be run at batch size {batch} in a process of its own: {last}")
    return json.loads(done.stdout) / 1e6


def report_memory(path: str, batch: str, threads: str) -> None:
    """Print what `peak_memory_mb` returns, in bytes; to be called in a process that has done nothing else."""
    import onnxruntime  # noqa: F401  its own memory is not the network's

    before = _status("VmRSS")
    call = caller(open_session(Path(path), "cpu", int(threads)), "cpu", int(batch))
    for _ in range(2):
        call()
    # Not getrusage: its maximum is inherited from the parent process.
    print(json.dumps(_status("VmHWM") - before))


def _require_cuda(onnxruntime: Any) -> None:
    if PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
        raise AbsentProvider("this onnxruntime was built without CUDA: install onnxruntime-gpu")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise AbsentProvider("no NVIDIA driver on this machine (libcuda.so.1)") from None
    onnxruntime.preload_dlls()  # the CUDA and cuDNN libraries that torch's wheels bring


def _status(key: str) -> int:
    """A size of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
