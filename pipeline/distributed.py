"""One training on several processes: each has its part of every batch, the gradients are averaged, all else is the same in each.

The processes hold the same weights throughout. Gradients are averaged over them after each backward pass, so that a step is that of
the whole batch (of depths nearly: a part's loss is the mean over its own known pixels). Batch norms see the whole batch on CUDA
(SyncBatchNorm) and their own part on a CPU, where the running statistics are averaged before anything is evaluated. What a method
does between epochs every process does alike, on whole batches; the first process's tensors then count. It alone writes and prints.

A stage is started once and starts the processes itself (`spread`): as many as `runtime.processes` says, on each of `runtime.hosts`
machines. Those of one machine meet in a file of this user's and talk over the loopback interface; several hosts talk over the
network, in the clear, as torch does: let it be a trusted one. What is sent is tensors and JSON, never a pickle. In one process
alone every function here does nothing.
"""

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.config import Runtime, section
from pipeline.errors import InputError

ADDRESS, HOST = "WINNOW_FIRST_HOST", "WINNOW_HOST"  # where the first host is reached, NAME:PORT; the number of this host, from 0
MEETING = "WINNOW_MEETING"  # where the processes of a stage meet, set for them alone
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # processes of one host talk over its loopback
DEATH_OF_PARENT = 1  # of prctl: the signal that a process gets then
Value = TypeVar("Value")


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def spread(stage: str, *words: str) -> bool:
    """Run `python -m stages.STAGE WORDS` in as many processes as params.yaml's `runtime` asks for, and wait for them.

    False where there is nothing to wait for: for one process, and in each of those that were started, which join here.
    `InputError` names the process that died first; where one was refused its input, exits with its code.
    """
    runtime = section("runtime", Runtime)
    if MEETING in os.environ:
        _join(runtime)
        return False
    if runtime.processes * runtime.hosts == 1:
        return False
    with tempfile.TemporaryDirectory() as folder:  # readable by this user alone
        host, meeting = _place(runtime, Path(folder))
        local = {} if runtime.hosts > 1 else {name: os.environ.get(name, "lo") for name in INTERFACES}
        command, environment = [sys.executable, "-m", f"stages.{stage}", *words], os.environ | local | {MEETING: meeting}
        logs = [Path(folder) / f"{number}.log" for number in range(runtime.processes)]
        started = []
        try:
            for number, log in enumerate(logs):
                rank = host * runtime.processes + number
                with log.open("wb") as said:
                    shown = None if rank == 0 else subprocess.DEVNULL
                    numbers = {"RANK": str(rank), "LOCAL_RANK": str(number)}
                    started.append(subprocess.Popen(command, env=environment | numbers, stdout=shown, stderr=said))
            dead = _first_to_fail(started)
        finally:
            for process in started:
                process.kill()
                process.wait()
        if dead is not None:
            _refuse(host * runtime.processes + dead, started[dead].returncode, logs[dead].read_text(), runtime)
    return True


def share_of(batch: int, unit: str) -> None:
    """`InputError` where the processes cannot have equal parts of a batch of so many images, which `unit` names."""
    if batch % count():
        raise InputError(f"params.yaml: {unit} = {batch}: must be a multiple of the {count()} processes of runtime")


def part(length: int) -> slice:
    """Which of so many images of a batch are this process's."""
    return slice(rank() * length // count(), (rank() + 1) * length // count())


def average_gradients(model: nn.Module) -> None:
    """Of every parameter, the mean over the processes: in place, after a backward pass."""
    if count() > 1:
        _reduce([parameter.grad for parameter in model.parameters() if parameter.grad is not None])


def average_statistics(model: nn.Module) -> None:
    """Of every batch norm, the mean of the running statistics over the processes, in place."""
    if count() > 1:
        _reduce(statistics(model))


def statistics(model: nn.Module) -> list[Tensor]:
    """The running statistics of every batch norm: within an epoch on CPUs, a process's own."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]


def total(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums by name, added up over the processes, of which one may have none."""
    if count() == 1:
        return dict(sums)
    added: dict[str, float] = {}
    for each in _gathered(dict(sums)):
        for name, value in each.items():
            added[name] = added.get(name, 0.0) + value
    return added


def of_first(make: Callable[[], Value]) -> Value:
    """What `make` gives in the first process, a JSON value, in all of them; it is called there alone."""
    if count() == 1:
        return make()
    return json.loads(bytes_of_first(lambda: json.dumps(make()).encode()))


def bytes_of_first(make: Callable[[], bytes]) -> bytes:
    """The same of bytes."""
    if count() == 1:
        return make()
    content = make() if rank() == 0 else b""
    length = torch.tensor([len(content)], device=_device())
    dist.broadcast(length, src=0)
    box = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.zeros(int(length), dtype=torch.uint8)
    box = box.to(_device())
    dist.broadcast(box, src=0)
    return box.cpu().numpy().tobytes()


def bytes_of_each(content: bytes) -> list[bytes]:
    """What each process gives, in the order of their ranks, in all of them."""
    if count() == 1:
        return [content]
    lengths = torch.zeros(count(), dtype=torch.int64, device=_device())
    lengths[rank()] = len(content)
    dist.all_reduce(lengths)
    row = torch.zeros(int(lengths.max()), dtype=torch.uint8)
    row[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    rows = [torch.empty_like(row, device=_device()) for _ in range(count())]
    dist.all_gather(rows, row.to(_device()))
    return [other.cpu().numpy().tobytes()[:length] for other, length in zip(rows, lengths.tolist(), strict=True)]


def wait() -> None:
    """Until every process is here: none ends while the first one still writes, which would look like its death."""
    if count() > 1:
        dist.barrier()


def agree(model: nn.Module) -> None:
    """After an edit that every process made: the first one's tensors in all. `InputError` where the networks differ in shape."""
    if count() == 1:
        return
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.numel()}
    shapes = hashlib.sha256(repr([(name, tuple(tensor.shape)) for name, tensor in state.items()]).encode()).hexdigest()
    if len(set(_gathered(shapes))) > 1:
        raise InputError(
            "the processes made different networks of one: train on machines of one kind, or with runtime.processes: 1"
        )
    with torch.no_grad():
        for tensor in state.values():
            dense = tensor.contiguous()
            dist.broadcast(dense, src=0)
            tensor.copy_(dense)


@contextmanager
def synchronised(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Batch norms that see the whole batch, on CUDA; torch has none for CPUs."""
    plain: dict[_BatchNorm, type[_BatchNorm]] = {}
    if count() > 1 and device.type == "cuda":
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        plain = {module: type(module) for module in model.modules() if type(module) in kinds}  # type: ignore[misc]
    for norm in plain:
        norm.__class__, norm.process_group = nn.SyncBatchNorm, None  # type: ignore[assignment, attr-defined]
    try:
        yield
    finally:
        for norm, kind in plain.items():
            norm.__class__ = kind
            del norm.process_group


def _join(runtime: Runtime) -> None:
    """Become one of the processes, each on its own GPU. None outlives the one that started it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_OF_PARENT, signal.SIGKILL)
    cuda = runtime.device != "cpu" and torch.cuda.is_available()
    if cuda:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(
                f"params.yaml: runtime.processes = {runtime.processes}, but there are {torch.cuda.device_count()} CUDA devices "
                "here: ask for one process a device at most"
            )
        torch.cuda.set_device(local)
    world = runtime.processes * runtime.hosts
    dist.init_process_group("nccl" if cuda else "gloo", os.environ[MEETING], rank=int(os.environ["RANK"]), world_size=world)


def _place(runtime: Runtime, folder: Path) -> tuple[int, str]:
    """The number of this host, and where the processes meet: in a file of one host, or at the first host's address."""
    if runtime.hosts == 1:
        return 0, f"file://{folder}/meeting"
    number, address = os.environ.get(HOST, ""), os.environ.get(ADDRESS, "")
    if not number.isdigit() or int(number) >= runtime.hosts or ":" not in address:
        raise InputError(
            f"params.yaml: runtime.hosts = {runtime.hosts}: on each host set {HOST} to its number, 0 to {runtime.hosts - 1}, and "
            f"{ADDRESS} to NAME:PORT of host 0, and start the same stage"
        )
    return int(number), f"tcp://{address}"


def _first_to_fail(processes: "list[subprocess.Popen[bytes]]") -> int | None:
    """Wait for all to end well, None, or for one that does not: its place. An error of the user's is told by the first process."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [place for place, code in enumerate(codes) if code]
        if failed:  # of several the one that was killed: without it the others fail too
            return min(failed, key=lambda place: codes[place] or 0)
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _refuse(rank: int, code: int, said: str, runtime: Runtime) -> None:
    """What the first process to fail said, or how it died."""
    if code == 2:
        print(said, end="", file=sys.stderr)
        sys.exit(2)
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    last = f": {said.splitlines()[-1]}" if said else ""
    raise InputError(
        f"process {rank} of {runtime.processes * runtime.hosts} died ({how}){last}; the others were stopped, and `dvc repro` "
        "goes on where it was saved last"
    )


def _device() -> str:
    """Where tensors must lie to be sent."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _gathered(value: Any) -> list[Any]:
    """The JSON values of all processes."""
    return [json.loads(content) for content in bytes_of_each(json.dumps(value).encode())]


def _reduce(tensors: list[Tensor]) -> None:
    """Each tensor's mean over the processes, in place; one message for each type."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        dist.all_reduce(flat)
        flat /= count()
        parts = flat.split([tensor.numel() for tensor in alike])
        with torch.no_grad():
            for tensor, mean in zip(alike, parts, strict=True):
                tensor.copy_(mean.view(tensor.shape))
