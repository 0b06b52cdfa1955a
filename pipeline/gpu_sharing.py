"""The GPUs of this machine dealt out to programs that run at once, under NVIDIA's MPS where it can be had.

Without MPS the programs on one GPU take turns; with it their kernels run at the same time. Neither changes what a kernel computes.
Devices are named by UUID: numbers mean other devices under an MPS daemon that itself sees a part of them.
"""

import fcntl
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from pipeline.config import Runtime
from pipeline.errors import InputError
from pipeline.hardware import usable_cores

CONTROL = "nvidia-cuda-mps-control"
VISIBLE = "CUDA_VISIBLE_DEVICES"
SWITCH = "WINNOW_MPS"  # "off": no MPS
PATIENCE = 30  # seconds for the daemon to answer

# The devices that CUDA shows, one UUID a line. With an argument also a context on the first, which fails where MPS does not work.
PROBE = """
import ctypes, sys, uuid
cuda = ctypes.CDLL("libcuda.so.1")
number, device, raw, context = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)(), ctypes.c_void_p()
def ask(name, *words):
    if getattr(cuda, name)(*words):
        sys.exit(1)
ask("cuInit", 0)
ask("cuDeviceGetCount", ctypes.byref(number))
for place in range(number.value):
    ask("cuDeviceGet", ctypes.byref(device), place)
    ask("cuDeviceGetUuid", raw, device)
    whole = uuid.UUID(bytes=bytes(raw))
    ask("cuDeviceGetUuid_v2", raw, device)
    part = uuid.UUID(bytes=bytes(raw))
    print(f"GPU-{whole}" if part == whole else f"MIG-{part}")
    if sys.argv[1:] and place == 0:
        ask("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
"""


@contextmanager
def places(programs: int, runtime: Runtime) -> Iterator[Callable[[], list[dict[str, str]]]]:
    """What gives, when it is called, each of so many programs at once what its environment needs to have beside this one's.

    `InputError` where several hosts train together: a second training would meet the first one's processes.
    """
    if runtime.hosts > 1 and programs > 1:
        raise InputError(f"params.yaml: runtime.hosts = {runtime.hosts}: only one stage at a time then, JOBS=1")
    with ExitStack() as stack:

        def give() -> list[dict[str, str]]:
            devices = [] if runtime.device == "cpu" else visible()
            if not devices:
                busy = programs * runtime.processes * runtime.threads
                if busy > usable_cores():
                    print(f"{programs} stages at once use {busy} threads of {usable_cores()} cores: fewer are as fast", flush=True)
                return [{} for _ in range(programs)]
            more = stack.enter_context(shared(devices)) if programs > 1 else {}
            return [more | own for own in dealt(devices, programs, runtime.processes)]

        yield give


def visible() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES takes them. Asked in another process: this one takes
    no memory of theirs. Empty where there is no driver or no device."""
    done = subprocess.run([sys.executable, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else []


def dealt(devices: list[str], programs: int, each: int = 1) -> list[dict[str, str]]:
    """What each of so many programs, of `each` devices, gets into its environment: the devices in turn."""
    if len(devices) < each or not devices:
        return [{} for _ in range(programs)]
    groups = [devices[place * each : (place + 1) * each] for place in range(len(devices) // each)]
    return [{VISIBLE: ",".join(groups[number % len(groups)])} for number in range(programs)]


@contextmanager
def shared(devices: list[str]) -> Iterator[dict[str, str]]:
    """Inside, programs with this environment share GPUs by MPS where that works; one line says how they share.

    A daemon that answers already is used and left alone. One that this user's programs started ends with the last of them.
    """
    if os.environ.get(SWITCH) == "off":
        print(f"MPS: {SWITCH}=off: programs on one GPU take turns", flush=True)
        yield {}
    elif shutil.which(CONTROL) is None:
        print(f"MPS: there is no {CONTROL} here: programs on one GPU take turns", flush=True)
        yield {}
    elif _ask("get_server_list", os.environ):
        print("MPS: by the daemon that runs already", flush=True)
        yield {}
    else:
        with _own(devices) as more:
            how = (
                f"by a daemon in {more['CUDA_MPS_PIPE_DIRECTORY']}" if more else "it does not start: programs on one GPU take turns"
            )
            print(f"MPS: {how}", flush=True)
            yield more


@contextmanager
def _own(devices: list[str]) -> Iterator[dict[str, str]]:
    """The daemon of this user's programs, which is started where it does not run; {} where it cannot work.

    Its folder's name is always the same: what was killed leaves a daemon behind, which the next program uses and ends.
    """
    home = Path(tempfile.gettempdir()) / f"winnow-mps-{os.getuid()}"
    if not _made(home):
        yield {}
        return
    more = {"CUDA_MPS_PIPE_DIRECTORY": str(home / "pipe"), "CUDA_MPS_LOG_DIRECTORY": str(home / "log")}
    whole = os.environ | more | {VISIBLE: ",".join(devices)}
    with (home / "users").open("w") as users, (home / "door").open("w") as door:
        with _locked(door):
            works = _start(home, whole)
            fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield more if works else {}
        finally:
            with _locked(door):
                try:
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused where another program uses the daemon
                except BlockingIOError:
                    pass
                else:
                    _end(whole)


@contextmanager
def _locked(door: IO[str]) -> Iterator[None]:
    """Only one program at a time starts or ends the daemon. The system opens the lock when a program ends, however that happens."""
    fcntl.flock(door, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(door, fcntl.LOCK_UN)


def _made(home: Path) -> bool:
    """The folder, this user's alone; False where somebody else's is in its place."""
    home.mkdir(mode=0o700, exist_ok=True)
    found = home.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def _start(home: Path, environment: Mapping[str, str]) -> bool:
    """Whether a program with this environment can use its first GPU under MPS."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": False, "timeout": PATIENCE}
    try:
        if not _ask("get_server_list", environment):
            for name in ("pipe", "log"):
                shutil.rmtree(home / name, ignore_errors=True)
                (home / name).mkdir()
            if subprocess.run([CONTROL, "-d"], env=environment, stdin=subprocess.DEVNULL, **quiet).returncode:
                return False
        if subprocess.run([sys.executable, "-c", PROBE, "use"], env=environment, **quiet).returncode == 0:
            return True
    except (subprocess.TimeoutExpired, OSError):
        pass
    _ask("quit -t 1", environment)
    return False


def _end(environment: Mapping[str, str]) -> None:
    """End a daemon that runs: when its programs have ended, or without waiting for one that does not."""
    if _ask("get_server_list", environment) and not _ask("quit", environment):
        _ask("quit -t 1", environment)


def _ask(command: str, environment: Mapping[str, str]) -> bool:
    """Whether a daemon takes the command."""
    try:
        done = subprocess.run(
            [CONTROL],
            env=environment,
            input=f"{command}\n",
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError):
        return False
    return done.returncode == 0
