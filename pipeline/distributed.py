"""One training on several processes: each has its part of every batch, the gradients are averaged, all else is the same in each.

The processes hold the same weights throughout. Gradients are summed over them after each backward pass, so that a step is that of
the whole batch; batch norms see the whole batch on CUDA (SyncBatchNorm) and their own part on a CPU, where the running statistics
are averaged before anything is evaluated. What a method does between epochs every process does alike, on whole batches; the first
process's tensors then count. It alone writes and prints.

A stage is started once and starts the processes itself (`spread`), with torch's own launcher: as many as `runtime.processes` says,
on each of `runtime.hosts` machines. Without either, every function here does nothing.
"""

import hashlib
import logging
import os
import sys
import tempfile
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
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _join(runtime)
        return False
    if runtime.processes * runtime.hosts == 1:
        return False
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it tells the same below, at length
    host, address = _place(runtime)
    with tempfile.TemporaryDirectory() as logs:
        quiet = {local: Std.ALL for local in range(1 if host == 0 else 0, runtime.processes)}
        config = LaunchConfig(
            min_nodes=runtime.hosts,
            max_nodes=runtime.hosts,
            nproc_per_node=runtime.processes,
            rdzv_backend="static" if runtime.hosts > 1 else "c10d",
            rdzv_endpoint=address,
            rdzv_configs={"rank": host} if runtime.hosts > 1 else {},
            run_id="winnow",
            max_restarts=0,
            monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=quiet),
        )
        try:
            elastic_launch(config, sys.executable)("-m", f"stages.{stage}", *words)
        except ChildFailedError as error:
            _refuse(*error.get_first_failure(), runtime, Path(logs))
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
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        _reduce([value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None])


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
    """What `make` gives in the first process, in all of them; it is called there alone."""
    if count() == 1:
        return make()
    box = [make() if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


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
    """Become one of the processes, each on its own GPU."""
    cuda = runtime.device != "cpu" and torch.cuda.is_available()
    if cuda:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(
                f"params.yaml: runtime.processes = {runtime.processes}, but there are {torch.cuda.device_count()} CUDA devices "
                "here: ask for one process a device at most"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo")


def _place(runtime: Runtime) -> tuple[int, str]:
    """The number of this host, and where the first one is reached."""
    if runtime.hosts == 1:
        return 0, "127.0.0.1:0"
    number, address = os.environ.get(HOST, ""), os.environ.get(ADDRESS, "")
    if not number.isdigit() or int(number) >= runtime.hosts or ":" not in address:
        raise InputError(
            f"params.yaml: runtime.hosts = {runtime.hosts}: on each host set {HOST} to its number, 0 to {runtime.hosts - 1}, and "
            f"{ADDRESS} to NAME:PORT of host 0, and start the same stage"
        )
    return int(number), address


def _refuse(number: int, failure: Any, runtime: Runtime, logs: Path) -> None:
    """What the first process to fail said, or how it died."""
    said = [path.read_text().strip() for path in logs.rglob(f"{failure.local_rank}/stderr.log")]
    if failure.exitcode == 2:
        print(*filter(None, said), sep="\n", end="\n" if any(said) else "", file=sys.stderr)
        sys.exit(2)
    how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    last = "".join(f": {text.splitlines()[-1]}" for text in said if text)
    raise InputError(
        f"process {number} of {runtime.processes * runtime.hosts} died ({how}){last}; the others were "
        "stopped, and `dvc repro` goes on after the last whole epoch"
    )


def _gathered(value: Value) -> list[Value]:
    everyone: list[Any] = [None] * count()
    dist.all_gather_object(everyone, value)
    return everyone


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
