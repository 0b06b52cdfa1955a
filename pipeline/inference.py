"""ONNX files run in ONNX Runtime: on the provider asked for and no other, with a fixed number of threads."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.errors import InputError

if TYPE_CHECKING:
    import onnxruntime

Provider = Literal["tensorrt", "cuda", "cpu"]
PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
TENSORRT = ("libnvinfer.so.10", "libnvonnxparser.so.10")
BATCH = "batch"  # the name of the free dimension of exported files
Call = Callable[[], object]


class AbsentProvider(InputError):
    """The execution provider asked for cannot run on this machine; the message says why."""


def open_session(
    path: Path,
    provider: Provider = "cpu",
    threads: int = 1,
    *,
    fixed: int | None = None,
    settings: Mapping[str, str] | None = None,
) -> "onnxruntime.InferenceSession":
    """An ONNX Runtime session that runs the file at `path` on `provider`; on the CPU with `threads` threads.

    TensorRT leaves to CUDA, and either to the CPU, what it has no kernel for (`elsewhere`). `fixed`: the batch size, where it
    shall not be free; `settings` of the provider, as of `provider_settings`.

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
    elif provider == "tensorrt":
        _require_tensorrt(onnxruntime)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if fixed is not None:
        options.add_free_dimension_override_by_name(BATCH, fixed)
    wanted = [(PROVIDERS[provider], dict(settings or {})), *([(PROVIDERS["cuda"], {})] if provider == "tensorrt" else [])]
    try:
        # Its own fallback would run the file on another provider after a failure.
        session = onnxruntime.InferenceSession(path, options, providers=wanted, enable_fallback=False)
    except Exception as error:  # ONNX Runtime's errors share no narrower base class
        reason = " ".join(str(error).split())
        if provider != "cpu" and type(error).__name__ in ("Fail", "RuntimeException", "EPFail", "RuntimeError"):
            raise AbsentProvider(f"{PROVIDERS[provider]} did not start: {reason}") from None
        raise InputError(f"{path} is no ONNX file that can be run: {reason}; delete it and export again") from None
    if PROVIDERS[provider] not in session.get_providers():
        raise AbsentProvider(f"ONNX Runtime could not load {PROVIDERS[provider]}; its own message is above")
    _check_form(session, path, fixed)
    return session


def provider_settings(provider: Provider, precision: str, *, graph: bool = False, engines: Path | None = None) -> dict[str, str]:
    """What a provider is told beside the file. On CUDA `graph` records the calls once and replays them. TensorRT may compute in the
    precision of the file, not below it, and keeps its engines in the folder `engines`.

    TensorRT names an engine by the file's name and the names of its nodes, not by their sizes: two networks, two precisions or two
    batch sizes must never share a folder.
    """
    if provider == "cuda":
        return {"enable_cuda_graph": "1"} if graph else {}
    if provider == "cpu":
        return {}
    lower = {"fp16": "trt_fp16_enable", "int8": "trt_int8_enable"}
    kept = {} if engines is None else {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(engines)}
    return ({lower[precision]: "1"} if precision in lower else {}) | kept


def caller(session: "onnxruntime.InferenceSession", provider: Provider, batch: int, *, copies: bool = False) -> Call:
    """One call of the network on a fixed batch of random images.

    Input and output lie in the device's memory, allocated once, and the call ends when the device has finished. With `copies`
    it goes from an array of the host to a new one, as `session.run` does.
    """
    entry = session.get_inputs()[0]
    images = np.random.default_rng(0).standard_normal((batch, *entry.shape[1:]), dtype=np.float32)
    if copies:
        names, feeds = [session.get_outputs()[0].name], {entry.name: images}
        return lambda: session.run(names, feeds)
    return _Bound(session, images, "cpu" if provider == "cpu" else "cuda")


class _Bound:
    """A session with input and output bound, to be called. ONNX Runtime's binding keeps neither the values nor the session alive,
    and must not outlive the session."""

    def __init__(self, session: "onnxruntime.InferenceSession", images: np.ndarray, device: str) -> None:
        import onnxruntime

        entry, answer = session.get_inputs()[0], session.get_outputs()[0]
        shape = (len(images), *answer.shape[1:])
        self.session, self.device = session, device
        self.given = onnxruntime.OrtValue.ortvalue_from_numpy(images, device, 0)
        self.result = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, device, 0)
        self.binding = session.io_binding()
        self.binding.bind_ortvalue_input(entry.name, self.given)
        self.binding.bind_ortvalue_output(answer.name, self.result)
        self.images = images  # on the CPU the value is this memory
        self.binding.synchronize_inputs()

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)
        if self.device != "cpu":
            self.binding.synchronize_outputs()

    def __del__(self) -> None:
        self.__dict__.pop("binding", None)


def elsewhere(session: "onnxruntime.InferenceSession", provider: Provider) -> dict[str, dict[str, int]]:
    """How many nodes run on another provider than the one asked for, by its name ("cuda", "cpu") and by operator."""
    names = {name: key for key, name in PROVIDERS.items()}
    found: dict[str, dict[str, int]] = {}
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name != PROVIDERS[provider]:
            nodes = found.setdefault(names.get(str(part.ep_name), str(part.ep_name)), {})
            for node in part.get_nodes():
                nodes[node.op_type] = nodes.get(node.op_type, 0) + 1
    return found


def runs_on(session: "onnxruntime.InferenceSession", provider: Provider) -> bool:
    """Whether the provider runs any node at all."""
    return any(part.ep_name == PROVIDERS[provider] for part in session.get_provider_graph_assignment_info())


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


def _check_form(session: "onnxruntime.InferenceSession", path: Path, fixed: int | None) -> None:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shape = inputs[0].shape
    batch_fits = shape[:1] == [fixed] if fixed is not None else not isinstance(next(iter(shape), 0), int)
    sized = len(shape) == 4 and all(isinstance(size, int) for size in (*shape[1:], *outputs[0].shape[1:]))
    if len(inputs) != 1 or len(outputs) != 1 or not batch_fits or not sized or inputs[0].type != "tensor(float)":
        found = [(entry.name, entry.type, entry.shape) for entry in inputs]
        raise InputError(f"{path} takes {found}, not float images (N, C, H, W) of any N: export it with Winnow")


def _require_cuda(onnxruntime: Any) -> None:
    if PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
        raise AbsentProvider("this onnxruntime was built without CUDA: install onnxruntime-gpu")
    if not _loads("libcuda.so.1"):
        raise AbsentProvider("no NVIDIA driver on this machine (libcuda.so.1)")
    onnxruntime.preload_dlls()  # the CUDA and cuDNN libraries that torch's wheels bring


def _require_tensorrt(onnxruntime: Any) -> None:
    if PROVIDERS["tensorrt"] not in onnxruntime.get_available_providers():
        raise AbsentProvider("this onnxruntime was built without TensorRT: install onnxruntime-gpu")
    wheel = find_spec("tensorrt_libs")  # the wheels put their libraries where no loader looks
    folder = Path((wheel.submodule_search_locations or [""])[0]) if wheel else None
    missing = [name for name in TENSORRT if not (_loads(name) or (folder and _loads(str(folder / name))))]
    if missing:
        raise AbsentProvider(f"no TensorRT 10 on this machine ({', '.join(missing)}): install tensorrt-cu13<11")
    _require_cuda(onnxruntime)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _status(key: str) -> int:
    """A size of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
