"""Faults put into the processes of a test: Python imports this module by itself where its folder is on PYTHONPATH.

WINNOW_TEST_FAULT, or the argument of `arm`, is a JSON object:

root      the workspace; what is written below its folders outputs/ and repository/ is counted: every write, fsync and rename
count     a file for the list of these events, written at the end; no fault
at        the number of the event at which the fault comes, from 0; the length of the list: at the end of the process
act       kill: SIGKILL to the process group, inside a write after `part` of its bytes, else before the event;
          cut: the same, and of every file that is not synced to the disk only `part` is left, as a power cut may leave it;
          ENOSPC, EIO: this and all later writes and fsyncs fail; EROFS: so does everything that would change a file
clock     [seconds, after]: the wall clock jumps by so many seconds once it was asked so many times
nan, die  the number of an optimiser's step at which the process of rank `rank` gets a NaN gradient, or is killed
"""

import atexit
import builtins
import contextlib
import datetime
import errno
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

VARIABLE = "WINNOW_TEST_FAULT"
open_file = io.open
replace, rename, sync, mkdir, now, now_ns = os.replace, os.rename, os.fsync, os.mkdir, time.time, time.time_ns


class Faults:
    """Counts what the process does to the workspace's files, and acts when the time has come."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.at, self.act, self.part, self.count = spec.get("at"), spec.get("act"), spec.get("part", 0.5), spec.get("count")
        self.roots = tuple(f"{spec['root']}/{name}/" for name in ("outputs", "repository"))
        self.events: list[tuple[str, str]] = []
        self.unsynced: dict[int, int] = {}  # inode -> a handle of its own

    def watches(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(self.roots)  # noqa: PTH100

    def event(self, kind: str, path: Any, file: Any = None, data: Any = None) -> None:
        """What is about to happen; may not come back, or fail as the disk would."""
        number = len(self.events)
        self.events.append((kind, str(path)))
        if self.at is None or number < self.at:
            return
        if self.act in ("kill", "cut"):
            if number == self.at:
                if file is not None:
                    file.write(data[: int(len(data) * self.part)])
                    file.flush()
                self.end()
        elif self.act == "EROFS" or kind in ("write", "fsync"):
            if file is not None:
                file.write(data[: int(len(data) * self.part)] if number == self.at else data[:0])
                file.flush()
            named = () if kind in ("write", "fsync") else (str(path),)  # as the system tells it
            raise OSError(getattr(errno, self.act), os.strerror(getattr(errno, self.act)), *named)

    def end(self) -> None:
        """No power any more."""
        for handle in self.unsynced.values() if self.act == "cut" else ():
            os.ftruncate(handle, int(os.fstat(handle).st_size * self.part))
        os.killpg(0, signal.SIGKILL)
        time.sleep(60)

    def last(self) -> None:
        """The end of the process."""
        if self.count:
            with open_file(self.count, "w") as file:
                json.dump(self.events, file)
        if self.act in ("kill", "cut") and self.at == len(self.events):
            self.end()


class Watched:
    """A file that is written."""

    def __init__(self, file: Any, path: Any, faults: Faults) -> None:
        self.file, self.path, self.faults = file, path, faults

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError, ValueError):
            inode = os.fstat(self.file.fileno()).st_ino
            if inode not in self.faults.unsynced:
                self.faults.unsynced[inode] = os.dup(self.file.fileno())
        self.faults.event("write", self.path, self.file, data)
        return self.file.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def arm(spec: dict[str, Any]) -> None:
    """Put the fault in place, in this process."""
    if "root" in spec:
        _watch(Faults(spec))
    if "clock" in spec:
        _shift(*spec["clock"])
    if os.environ.get("RANK") == str(spec.get("rank")):
        _spoil(spec)


def _watch(faults: Faults) -> None:
    def opened(path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if not isinstance(mode, str) or not set(mode) & set("wax+") or not faults.watches(path):
            return open_file(path, mode, *more, **options)
        if faults.act == "EROFS":
            faults.event("open", path)
        return Watched(open_file(path, mode, *more, **options), path, faults)

    def synced(handle: Any) -> None:
        place = handle if isinstance(handle, int) else handle.fileno()
        faults.event("fsync", place)
        sync(place)
        held = faults.unsynced.pop(os.fstat(place).st_ino, None)
        if held is not None:
            os.close(held)

    def moving(move: Any) -> Any:
        def moved(source: Any, target: Any, **options: Any) -> None:
            if faults.watches(target):
                faults.event("rename", target)
            move(source, target, **options)

        return moved

    def made(path: Any, *more: Any, **options: Any) -> None:
        if faults.act == "EROFS" and faults.watches(path) and not os.path.exists(path):  # noqa: PTH110
            faults.event("mkdir", path)
        mkdir(path, *more, **options)

    builtins.open = io.open = opened  # type: ignore[assignment]
    os.fsync, os.replace, os.rename, os.mkdir = synced, moving(replace), moving(rename), made
    atexit.register(faults.last)
    arm.last = faults.last  # type: ignore[attr-defined]


def _shift(seconds: float, after: int) -> None:
    asked = 0

    def jump() -> float:
        nonlocal asked
        asked += 1
        return seconds if asked > after else 0

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return datetime.datetime.fromtimestamp(now() + jump(), tz)

    time.time = lambda: now() + jump()
    time.time_ns = lambda: now_ns() + int(jump() * 10**9)
    import pipeline.records

    pipeline.records.datetime = Shifted  # type: ignore[misc, attr-defined]


def _spoil(spec: dict[str, Any]) -> None:
    """In this rank's part of the gradients, before they are averaged."""
    from pipeline import distributed

    average, steps = distributed.average_gradients, 0

    def spoiled(model: Any) -> None:
        nonlocal steps
        if steps == spec.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if steps == spec.get("nan"):
            next(parameter.grad for parameter in model.parameters() if parameter.grad is not None).fill_(float("nan"))
        steps += 1
        average(model)

    distributed.average_gradients = spoiled


if VARIABLE in os.environ:
    sys.path.insert(0, str(Path.cwd()))
    arm(json.loads(os.environ[VARIABLE]))
    sys.path.pop(0)
