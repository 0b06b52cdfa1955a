"""Programs that depend on each other, as many at once as there are places, each the same program as it would be alone.

Each writes into a log of its own, which this process shows line by line under the program's name. So if this process is killed, the
programs go on to their ends and lose nothing; if it is interrupted, it ends them. What fails keeps new ones from starting and lets
the others finish.
"""

import contextlib
import graphlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 10  # seconds that an interrupted program has to end
LOOK = 0.05  # seconds between two looks at what runs
PAUSE = 2  # seconds before what was refused is tried again
NEVER = re.compile(r"(?!)")


@dataclass(frozen=True)
class Speech:
    """What lines of a program mean: a heading names (group 1) what it does next, noise is not shown, and where one that
    failed said `again`, another program was in its way and it is started once more."""

    heading: re.Pattern[str] = NEVER
    noise: re.Pattern[str] = NEVER
    again: re.Pattern[str] = NEVER


class Program:
    """A program that does `names` one after another in a session of its own, its output in `log`."""

    def __init__(self, names: Sequence[str], command: Sequence[str], more: Mapping[str, str], log: Path, speech: Speech) -> None:
        self.names, self.more, self.speech, self.label = list(names), more, speech, names[0]
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)  # what still writes into an earlier one goes on with that
        with log.open("wb") as said:
            self.process = subprocess.Popen(
                command,
                env=os.environ | more,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a Ctrl-C reaches it through this process alone
            )
        self.said = log.open(errors="replace", newline="\n")
        self.begun, self.refused = "", ""

    def show(self) -> None:
        """Print what it said since the last time, whole lines only until it has ended."""
        ended = self.process.poll() is not None
        while text := self.said.readline():
            self.begun += text
            if self.begun.endswith("\n"):
                self._line()
        if ended and self.begun:
            self._line()

    def ended(self) -> bool:
        """Whether it has; all that it said is shown then."""
        ended = self.process.poll() is not None
        self.show()
        if ended:
            self.said.close()
        return ended

    def signal(self, number: int) -> None:
        """To it and to all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _line(self) -> None:
        line, self.begun = self.begun.rstrip(), ""
        if self.speech.again.search(line):
            self.refused = line
        elif found := self.speech.heading.search(line):
            self.label = found[1]
        elif not self.speech.noise.search(line):
            print(f"[{self.label}] {line}", flush=True)


def run(
    needs: Mapping[str, Iterable[str]],
    command: Callable[[Sequence[str]], Sequence[str]],
    places: Callable[[], Sequence[Mapping[str, str]]],
    logs: Path,
    stale: Callable[[str], bool] = lambda name: True,
    speech: Speech = Speech(),  # noqa: B008 (it cannot change)
) -> int:
    """Do each name of `needs` after those that it needs, where it is `stale`; 0, or the exit code of the first that failed.

    `command` is the program for a few names, of which each after the first is stale because of the one before; `places` gives for
    each program at once what its environment has more than this one's, and is asked only where something is to be done.
    `ValueError` where names need each other in a circle.
    """
    sorter = graphlib.TopologicalSorter(needs)
    sorter.prepare()
    wait = _Work(needs, sorter, stale)
    free: list[Mapping[str, str]] | None = None
    running: list[Program] = []
    code = 0
    try:
        while (wait.ready and not code) or running:
            if wait.ready and free is None:
                free = list(places())
            while free and wait.ready and not code and time.monotonic() >= wait.until:
                names = wait.take()
                running.append(Program(names, command(names), free.pop(0), logs / f"{names[0]}.log", speech))
            time.sleep(LOOK)
            for program in [program for program in running if program.ended()]:
                running.remove(program)
                assert free is not None
                free.append(program.more)
                failed = program.process.returncode
                if failed and program.refused:
                    wait.again(program)
                elif failed:
                    code = code or failed
                    _tell_failure(program, running)
                else:
                    wait.done(program.names)
    finally:
        if running:
            end(running)
    return code


class _Work:
    """What is ready to be done, those first on which the longest rows of others wait."""

    def __init__(self, needs: Mapping[str, Iterable[str]], sorter: graphlib.TopologicalSorter[str], stale: Callable[[str], bool]):
        self.needs = {name: set(before) for name, before in needs.items()}
        self.after: dict[str, list[str]] = {name: [] for name in self.needs}
        for name, before in self.needs.items():
            for other in before:
                self.after[other].append(name)
        self.height: dict[str, int] = {}
        for name in reversed(list(graphlib.TopologicalSorter(self.needs).static_order())):
            self.height[name] = 1 + max((self.height[other] for other in self.after[name]), default=0)
        self.sorter, self.stale, self.finished, self.until = sorter, stale, set[str](), 0.0
        self.ready: list[str] = []
        self.told = False
        self._collect(())

    def take(self) -> list[str]:
        """The next name, and those that follow on it alone: a program's start is saved for each."""
        names = [self.ready.pop(0)]
        while len(next_ones := self.after[names[-1]]) == 1 and self.needs[next_ones[0]] <= self.finished.union(names):
            names.append(next_ones[0])
        return names

    def done(self, names: Sequence[str]) -> None:
        for name in names:
            self.sorter.done(name)
            self.finished.add(name)
            self._collect(names)

    def again(self, program: Program) -> None:
        """What another program was in the way of, later; said once."""
        if not self.told:
            print(f"[{program.label}] waits for another program: {program.refused}", flush=True)
        self.told, self.until = True, time.monotonic() + PAUSE
        self.ready.append(program.names[0])

    def _collect(self, taken: Sequence[str]) -> None:
        """Names that may be done now; what is not stale is done already."""
        while found := self.sorter.get_ready():
            for name in found:
                if name in taken:
                    continue
                if self.stale(name):
                    self.ready.append(name)
                else:
                    self.sorter.done(name)
                    self.finished.add(name)
        self.ready.sort(key=lambda name: -self.height[name])


def end(programs: Sequence[Program]) -> None:
    """Interrupt them, as a Ctrl-C would, and kill what does not end."""
    try:
        for program in programs:
            program.signal(signal.SIGINT)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and any([not program.ended() for program in programs if not program.said.closed]):
            time.sleep(LOOK)
    finally:
        for program in programs:
            program.signal(signal.SIGKILL)
            program.process.wait()


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP end this process as Ctrl-C does: `KeyboardInterrupt`."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell_failure(program: Program, running: Sequence[Program]) -> None:
    others = f"; {', '.join(other.label for other in running)} may finish" if running else ""
    print(
        f"[{program.label}] failed (exit code {program.process.returncode}): nothing new is started{others}",
        file=sys.stderr,
        flush=True,
    )
