"""A copy of the project with a small chain that was built undisturbed, set up anew in front of a stage for every fault."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests import kill
from tests.fault_chain import END, LOCKS, OUTPUTS, RESUME, Stage, chain, small
from tests.fault_injection.sitecustomize import VARIABLE


@dataclass
class Ended:
    """How a run ended: its exit code, negative for a signal, what it said, and how long it took."""

    code: int
    said: str
    seconds: float


@dataclass
class Calm:
    """An undisturbed run of a stage: what it did to the disk, how long it took, and what was there before and after."""

    events: list[tuple[str, str]]
    seconds: float
    before: dict[str, bytes]
    after: dict[str, bytes]


class Workspace:
    """Builds the chain below `home`, and runs its stages."""

    def __init__(self, home: Path) -> None:
        self.home, self.project, self.base, self.earlier = home, home / "project", home / "base", home / "earlier"
        kill.copy_project(self.project, Namespace(full=True))
        self.environment = kill._environment() | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self.environment |= {"PYTHONPATH": f"{self.project}{os.pathsep}{self.project / 'tests/fault_injection'}"}
        self._calm: dict[tuple[Stage, bool], Calm] = {}
        self.warm = subprocess.Popen(
            [sys.executable, "tests/fault_injection/warm.py"],
            cwd=self.project,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def build(self, end: str = END) -> None:
        """The chain twice, of other data the first time, so that every stage has earlier outputs that differ."""
        for seed, kept in ((1, self.earlier), (0, self.base)):
            params = small()
            params["data"]["split_seed"] = seed
            (self.project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
            self._wipe()
            for words in chain(self.project, end):
                done = self.run(words, learn=True)
                assert done.code == 0, done.said
            self._copy(self.project, kept)

    def lock(self) -> None:
        """DVC's lock and cache of the chain that was built, once."""
        if not (self.base / "dvc.lock").exists():
            self._wipe()
            self._copy(self.base, self.project)
            self.dvc("commit", "--force", "report", "repository", "--with-deps").finish()
            for name in LOCKS:
                _copy(self.project / name, self.base / name)

    def close(self) -> None:
        assert self.warm.stdin and self.warm.stdout
        self.warm.stdin.close()
        self.warm.wait()
        self.warm.stdout.close()

    def restore(self, stage: Stage, old: bool, with_dvc: bool = False) -> None:
        """The workspace as it is in front of `stage`, with its earlier outputs if `old`, without any if not."""
        if with_dvc:
            self.lock()
        self._wipe()
        self._copy(self.base, self.project)
        for name in stage.outs:
            _remove(self.project / name)
            if old:
                _copy(self.earlier / name, self.project / name)
        if with_dvc:
            for name in LOCKS:
                _remove(self.project / name)
                _copy(self.base / name, self.project / name)

    def calm(self, stage: Stage, old: bool) -> Calm:
        """The undisturbed run from there."""
        if (stage, old) not in self._calm:
            self.restore(stage, old)
            before, count = self.outputs(stage), self.home / "count"
            self.run(stage.words)  # so that the caches are warm
            self.restore(stage, old)
            done = self.run(stage.words, fault={"count": str(count)})
            assert done.code == 0, done.said
            events = [(kind, path) for kind, path in json.loads(count.read_text())]
            self._calm[stage, old] = Calm(events, done.seconds, before, self.outputs(stage))
        return self._calm[stage, old]

    def outputs(self, stage: Stage) -> dict[str, bytes]:
        """The files of a stage by their paths, but for those that are not finished."""
        paths = [path for name in stage.outs for path in _files(self.project / name)]
        named = {str(path.relative_to(self.project)): path for path in paths}
        hidden = (".", "unproven-")
        return {name: path.read_bytes() for name, path in named.items() if not any(p.startswith(hidden) for p in name.split("/"))}

    def leftovers(self) -> list[str]:
        """What killed writers have left, and states of trainings but for one: of the last, until the next stage begins."""
        paths = [path for name in OUTPUTS for path in (self.project / name).rglob("*")]
        marks = (".partial", ".old", ".probe")
        found = [path for path in paths if path.suffix in marks or path.name.startswith("unproven-")]
        found += sorted((self.project / RESUME).glob("*.safetensors"))[1:]
        return [f"{path.relative_to(self.project)} was left behind" for path in found]

    def run(self, words: tuple[str, ...], fault: dict[str, Any] | None = None, after: float | None = None, **more: Any) -> Ended:
        """Run a stage in a fork of the warm process; SIGKILL to its group after so many seconds."""
        return self.together([words], fault, after, **more)[0]

    def together(
        self,
        runs: list[tuple[str, ...]],
        fault: dict[str, Any] | None = None,
        after: float | None = None,
        fsize: int | None = None,
        learn: bool = False,
        **environment: str,
    ) -> list[Ended]:
        """Several at the same time."""
        assert self.warm.stdin and self.warm.stdout
        logs = [self.home / f"run-{number}.log" for number in range(len(runs))]
        spec = fault and {"root": str(self.project), **fault}
        rest = {"cwd": str(self.project), "environment": environment, "fault": spec, "fsize": fsize}
        rest["learn"] = str(self.home / "modules") if learn else None
        asked = [{"words": words, "log": str(log), **rest} for words, log in zip(runs, logs, strict=True)]
        started = time.monotonic()
        print(json.dumps({"runs": asked}), file=self.warm.stdin, flush=True)
        pids = json.loads(self.warm.stdout.readline())
        if after is not None:
            time.sleep(max(0.0, after - (time.monotonic() - started)))
            for pid in pids:
                _kill(pid)
        codes = json.loads(self.warm.stdout.readline())
        seconds = time.monotonic() - started
        return [Ended(code, log.read_text(errors="replace"), seconds) for code, log in zip(codes, logs, strict=True)]

    def process(self, *words: str, fault: dict[str, Any] | None = None, **more: str) -> "Process":
        """A process of its own, `python -m WORDS`, with a fault in it and its children."""
        spec = {VARIABLE: json.dumps(fault)} if fault else {}
        return Process(self.project, [sys.executable, "-m", *words], self.environment | spec | more, self.home / "process.log")

    def dvc(self, *words: str) -> "Process":
        return self.process("dvc", *words)

    def _wipe(self) -> None:
        for name in OUTPUTS:
            _remove(self.project / name)

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        for name in OUTPUTS:
            _copy(source / name, target / name)


class Process:
    """In a process group of its own, its output in a file."""

    def __init__(self, folder: Path, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = next(path for n in range(1000) if not (path := log.with_stem(f"{log.stem}-{n}")).exists())
        self.started = time.monotonic()
        with self.log.open("w") as said:
            nothing = subprocess.DEVNULL
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=nothing, stdout=said, stderr=said, start_new_session=True
            )

    def finish(self) -> Ended:
        """Its end, which must be a good one."""
        ended = self.end()
        assert ended.code == 0, ended.said[-4000:]
        return ended

    def end(self, after: float | None = None) -> Ended:
        """Its end, by SIGKILL after so many seconds."""
        try:
            self.process.wait(after)
        except subprocess.TimeoutExpired:
            _kill(self.process.pid)
            self.process.wait()
        said = self.log.read_text(errors="replace")
        self.log.unlink()
        return Ended(self.process.returncode, said, time.monotonic() - self.started)


def _kill(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # before it has a group of its own, or after its end
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file())


def _copy(source: Path, target: Path) -> None:
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", str(source), str(target)], check=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
