"""Programs at once: in order, overlapping, and what happens to the others where one fails, is refused or is interrupted."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.side_by_side import Speech, run

NEEDS = {"root": [], "left": ["root"], "right": ["root"], "leaf": ["left"], "end": ["leaf", "right"]}
SPAN = """
import sys, time
for name in sys.argv[2:]:
    print("now", name, flush=True)
    began = time.monotonic()
    time.sleep(0.4)
    print(name, "was done", flush=True)
    open(sys.argv[1], "a").write(f"{name} {began} {time.monotonic()}\\n")
"""


class Log:
    """What ran when, told by programs that take 0.4 s a name."""

    def __init__(self, folder: Path) -> None:
        self.path, self.folder, self.started = folder / "times", folder, list[list[str]]()

    def command(self, names: Sequence[str]) -> list[str]:
        self.started.append(list(names))
        return [sys.executable, "-c", SPAN, str(self.path), *names]

    def spans(self) -> dict[str, tuple[float, float]]:
        rows = [line.split() for line in self.path.read_text().splitlines()]
        assert len({row[0] for row in rows}) == len(rows)
        return {name: (float(began), float(ended)) for name, began, ended in rows}


def places(count: int) -> list[dict[str, str]]:
    return [{"PLACE": str(number)} for number in range(count)]


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return max(one[0], other[0]) < min(one[1], other[1])


def test_what_needs_nothing_of_the_other_runs_beside_it_and_all_else_in_order(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log(tmp_path)
    speech = Speech(heading=re.compile("^now (.*)"))
    assert run(NEEDS, log.command, lambda: places(2), tmp_path / "logs", speech=speech) == 0
    spans = log.spans()
    assert set(spans) == set(NEEDS)
    assert all(spans[before][1] <= spans[name][0] for name, wanted in NEEDS.items() for before in wanted)
    assert overlap(spans["left"], spans["right"])
    assert log.started == [["root"], ["left", "leaf"], ["right"], ["end"]]  # the longer row first, and in one program
    assert "[leaf] leaf was done\n" in capfd.readouterr().out


def test_one_place_is_one_at_a_time(tmp_path: Path) -> None:
    log = Log(tmp_path)
    assert run(NEEDS, log.command, lambda: places(1), tmp_path / "logs") == 0
    spans = sorted(log.spans().values())
    assert all(one[1] <= other[0] for one, other in zip(spans, spans[1:], strict=False))


def test_what_is_not_stale_starts_nothing_and_asks_for_no_place(tmp_path: Path) -> None:
    assert run(NEEDS, pytest.fail, lambda: pytest.fail("asked"), tmp_path / "logs", stale=lambda name: False) == 0
    log = Log(tmp_path)
    assert run(NEEDS, log.command, lambda: places(2), tmp_path / "logs", stale=lambda name: name == "right") == 0
    assert log.started == [["right", "end"]]


def test_a_failure_lets_what_runs_finish_starts_nothing_new_and_gives_its_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def command(names: Sequence[str]) -> list[str]:
        if "bad" in names:
            return [sys.executable, "-c", "import sys; print('what is wrong', end=''); sys.exit(7)"]
        return log.command(names)

    log = Log(tmp_path)
    needs = {"bad": [], "good": [], "after bad": ["bad"], "after good": ["good", "other"], "other": []}
    assert run(needs, command, lambda: places(2), tmp_path / "logs") == 7
    said = capfd.readouterr()
    assert set(log.spans()) <= {"good", "other"} and len(log.spans()) == 1
    assert "[bad] what is wrong\n" in said.out
    assert said.err.startswith("[bad] failed (exit code 7): nothing new is started; ")


def test_what_another_program_is_in_the_way_of_is_tried_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.side_by_side.PAUSE", 0.1)
    script = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); n = len(p.read_text()) if p.exists() else 0; "
    script += "p.write_text('x' * (n + 1)); n < 2 and sys.exit('it is busy')"
    command = [sys.executable, "-c", script, str(tmp_path / "tries")]
    assert (
        run({"a": [], "b": ["a"]}, lambda names: command, lambda: places(1), tmp_path, speech=Speech(again=re.compile("busy"))) == 0
    )
    assert (tmp_path / "tries").read_text() == "xxx"
    assert capfd.readouterr().out == "[a] waits for another program: it is busy\n"


PARENT = """
import sys
from pathlib import Path
from pipeline.side_by_side import ended_by_signals, run
child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(2); open(sys.argv[1] + '.done', 'w')"
with ended_by_signals():
    folder = Path(sys.argv[1])
    run({"a": [], "b": []}, lambda names: [sys.executable, "-c", child, str(folder / names[0])], lambda: [{}, {}], folder / "logs")
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def begun(folder: Path) -> tuple["subprocess.Popen[bytes]", list[int]]:
    """A process that runs two programs, and those."""
    process = subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], stderr=subprocess.DEVNULL)
    paths = [folder / "a", folder / "b"]
    for _ in range(600):
        if all(path.exists() and path.read_text() for path in paths):
            return process, [int(path.read_text()) for path in paths]
        time.sleep(0.05)
    raise AssertionError("it did not begin")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_every_program(tmp_path: Path, number: signal.Signals) -> None:
    process, children = begun(tmp_path)
    process.send_signal(number)
    assert process.wait(30) != 0
    assert not any(alive(pid) for pid in children)
    assert not list(tmp_path.glob("*.done"))


def test_where_this_process_is_killed_the_programs_finish(tmp_path: Path) -> None:
    process, _ = begun(tmp_path)
    process.kill()
    process.wait()
    for _ in range(200):
        if len(list(tmp_path.glob("*.done"))) == 2:
            return
        time.sleep(0.05)
    raise AssertionError("they were lost")
