"""Kinds of faults on one machine's processes and files: each makes one, looks at what it left, and lets the chain go on."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from pipeline import checkpoint
from pipeline.errors import InputError
from tests.fault_chain import Stage, same
from tests.fault_workspace import Calm, Ended, Workspace

EPOCH = re.compile(r"epoch (\d+)/\d+ .*validation")  # what a training says of an epoch that is over
KILLED = -9
PAGE = 4096


@dataclass
class Case:
    """One fault: in which stage, with or without its earlier outputs there, and what came of it."""

    workspace: Workspace
    stage: Stage
    draw: Random
    old: bool = False
    fired: bool = False
    told: str = ""  # what was done
    again: int = 0  # epochs that were over, though not yet on the disk, and are trained again
    problems: list[str] = field(default_factory=list)

    def begin(self) -> Calm:
        """Put the workspace in front of the stage; how the stage runs there undisturbed."""
        calm = self.workspace.calm(self.stage, self.old)
        self.workspace.restore(self.stage, self.old)
        return calm

    def expect(self, right: bool, problem: str) -> None:
        if not right:
            self.problems.append(problem)

    def whole(self, calm: Calm) -> None:
        """Every file is the old one or the new one; a model is never loaded with the card of another."""
        present = self.workspace.outputs(self.stage)
        for name, content in present.items():
            known = same(name, content, calm.before.get(name)) or same(name, content, calm.after.get(name))
            self.expect(known, f"{name} is neither the old file nor the new one")
        folder = f"{self.stage.outs[0]}/model"
        pair = [present.get(f"{folder}/model.{kind}") for kind in ("safetensors", "json")]
        ages = [[old == content, new == content] for content, old, new in zip(pair, *self._pairs(calm, folder), strict=True)]
        if None not in pair and ages[0] != ages[1]:
            try:
                checkpoint.load(self.workspace.project / folder)
                self.problems.append(f"{folder} loads with weights and card of different models")
            except InputError:
                pass

    @staticmethod
    def _pairs(calm: Calm, folder: str) -> tuple[list[bytes | None], ...]:
        return tuple(
            [state.get(f"{folder}/model.{kind}") for kind in ("safetensors", "json")] for state in (calm.before, calm.after)
        )

    def refused(self, ended: Ended, calm: Calm, *told: str) -> None:
        """With exit code 2, one line that has one of these words and names a file, and nothing lost."""
        self.expect(ended.code == 2, f"exit code {ended.code}, not 2: {ended.said[-600:]}")
        last = ended.said.strip().splitlines()[-1] if ended.said.strip() else ""
        self.expect(any(word in last for word in told), f"says nothing of {told[0]}: {last[-400:]}")
        self.expect("outputs/" in last or "repository" in last, f"names no file: {last[-400:]}")
        self.whole(calm)
        lost = calm.before.keys() - self.workspace.outputs(self.stage).keys()
        self.expect(not lost, f"lost: {', '.join(sorted(lost))}")

    def recover(self, calm: Calm, before: Ended | None = None) -> None:
        """Without the fault the stage gives what an undisturbed one gives, and trains no finished epoch again."""
        ended = self.workspace.run(self.stage.words)
        self.expect(ended.code == 0, f"afterwards: exit code {ended.code}: {ended.said[-600:]}")
        self.right(calm)
        if before:
            self.nothing_again(before, ended)

    def right(self, calm: Calm) -> None:
        """What an undisturbed stage gives, and nothing else."""
        present = self.workspace.outputs(self.stage)
        for name in sorted(present.keys() | calm.after.keys()):
            right = same(name, present.get(name), calm.after.get(name))
            self.expect(right, f"wrong result: {name}{'' if name in present else ' is missing'}")
        self.problems += self.workspace.leftovers()

    def nothing_again(self, first: Ended, second: Ended) -> None:
        """Of the epochs that were over, in a run that did not end well, only the last is trained again, if it was not saved yet."""
        done = [int(epoch) for epoch in EPOCH.findall(first.said) if first.code]
        again = [int(epoch) for epoch in EPOCH.findall(second.said) if int(epoch) <= max(done, default=0)]
        self.again += len(again)
        self.expect(len(again) <= 1, f"trains {len(again)} finished epochs again: {again} of {done}")


def kill(case: Case) -> None:
    """SIGKILL at a moment of the stage."""
    calm = case.begin()
    moment = case.draw.uniform(0, calm.seconds)
    ended = case.workspace.run(case.stage.words, after=moment)
    case.fired, case.told = ended.code == KILLED, f"after {moment:.2f} of {calm.seconds:.2f} s"
    case.whole(calm)
    case.recover(calm, ended)


def at_event(act: str, *kinds: str) -> Callable[[Case], None]:
    """SIGKILL, or a power cut, at a drawn write, fsync or rename; without kinds at any of them or at the end."""

    def fault(case: Case) -> None:
        calm = case.begin()
        places = [place for place, (kind, _) in enumerate(calm.events) if kind in kinds or not kinds]
        if not places:
            return
        at, part = case.draw.choice(places if kinds else [*places, len(calm.events)]), case.draw.random()
        ended = case.workspace.run(case.stage.words, fault={"at": at, "act": act, "part": part})
        case.fired, case.told = ended.code == KILLED, _described(calm, at)
        case.whole(calm)
        case.recover(calm, ended)

    return fault


def failing(act: str, told: str) -> Callable[[Case], None]:
    """From a drawn write or fsync on the disk is full, or broken, or can only be read."""

    def fault(case: Case) -> None:
        calm = case.begin()
        kinds = ("write", "fsync", *(("rename",) if act == "EROFS" else ()))
        at = case.draw.choice([place for place, (kind, _) in enumerate(calm.events) if kind in kinds])
        ended = case.workspace.run(case.stage.words, fault={"at": at, "act": act, "part": case.draw.random()})
        case.fired, case.told = ended.code != 0, f"{told}, {_described(calm, at)}"
        if case.fired:
            case.refused(ended, calm, told)
        case.recover(calm, ended)

    return fault


def file_limit(case: Case) -> None:
    """The system lets no file grow beyond a size (RLIMIT_FSIZE)."""
    calm = case.begin()
    limit = case.draw.randrange(1024, max(map(len, calm.after.values())))
    ended = case.workspace.run(case.stage.words, fsize=limit)
    case.fired, case.told = ended.code != 0, f"{limit} bytes a file"
    if case.fired:
        case.refused(ended, calm, "File too large")
    case.recover(calm, ended)


def small_disk(case: Case) -> None:
    """outputs/ on a real disk that has room for a part of what the stage writes."""
    calm = case.begin()
    room = case.draw.randrange(1, 1 + sum(-(-len(content) // PAGE) for content in calm.after.values()))
    place = case.workspace.project / "outputs"
    with _mounted(place, room * PAGE):
        ended = case.workspace.run(case.stage.words)
        case.fired, case.told = ended.code != 0, f"room for {room * PAGE} bytes"
        if case.fired:
            case.refused(ended, calm, "No space left on device")
        subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
        case.recover(calm, ended)


def read_only(case: Case) -> None:
    """outputs/ cannot be written from the start: really, where the user is not root or may mount; else from the first call on."""
    calm = case.begin()
    place, spec = case.workspace.project / "outputs", None
    if os.geteuid() and not os.access("/root", os.W_OK):
        folders = [path for path in [place, *place.rglob("*")] if path.is_dir()]
        for folder in folders:
            folder.chmod(0o555)
        ended = case.workspace.run(case.stage.words)
        for folder in folders:
            folder.chmod(0o755)
    elif can_mount():
        subprocess.run(["mount", "--bind", str(place), str(place)], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
            ended = case.workspace.run(case.stage.words)
        finally:
            subprocess.run(["umount", str(place)], check=True)
    else:
        spec = {"at": 0, "act": "EROFS"}
        ended = case.workspace.run(case.stage.words, fault=spec)
    case.fired, case.told = ended.code != 0, "injected" if spec else "really"
    case.refused(ended, calm, "Read-only file system", "Permission denied")
    case.recover(calm, ended)


def damaged_input(case: Case) -> None:
    """A bit flipped, or the end missing, in a file that the stage reads: refused by name, or of no consequence."""
    calm = case.begin()
    paths = sorted(path for pattern in case.stage.reads for path in case.workspace.project.glob(pattern))
    path = case.draw.choice(paths)
    name, content = str(path.relative_to(case.workspace.project)), path.read_bytes()
    case.told, case.fired = f"{damage(path, case.draw)} of {name}", True
    ended = case.workspace.run(case.stage.words)
    if ended.code == 0:
        present = case.workspace.outputs(case.stage)
        wrong = [name for name in calm.after if not same(name, present.get(name), calm.after[name])]
        case.expect(not wrong, f"accepted in silence: {case.told}")
    else:
        case.refused(ended, calm, name, str(Path(name).parent))
    path.write_bytes(content)
    case.recover(calm)


def damaged_state(case: Case) -> None:
    """The same in the state of a killed training: it is not taken up."""
    calm = case.begin()
    saves = [place for place, (kind, path) in enumerate(calm.events) if kind == "rename" and "/resume/" in path]
    ended = case.workspace.run(case.stage.words, fault={"at": case.draw.choice(saves) + 1, "act": "kill"})
    states = list((case.workspace.project / "outputs/resume").glob("*.safetensors"))
    case.fired = ended.code == KILLED and bool(states)
    if case.fired:
        case.told = f"{damage(states[0], case.draw)} of {states[0].name}"
    case.recover(calm)


def twice(case: Case) -> None:
    """Two processes of the same stage at once."""
    calm = case.begin()
    one, other = case.workspace.together([case.stage.words] * 2)
    case.fired, case.told = True, f"exit codes {one.code} and {other.code}"
    for ended in (one, other):
        case.expect(ended.code == 0, f"of two at once one ends with {ended.code}: {ended.said[-600:]}")
    case.right(calm)
    case.recover(calm)


def clock(case: Case) -> None:
    """The wall clock, or the times of the files, far in the past or in the future, or jumping on the way."""
    calm = case.begin()
    seconds = case.draw.choice([-1, 1]) * case.draw.choice([3600, 86400, 10 * 365 * 86400])
    after = case.draw.choice([0, 1, 3, 10])
    case.fired, case.told = True, f"{seconds:+} s after {after} looks"
    for path in sorted((case.workspace.project / "outputs").rglob("*")):
        if case.draw.random() < 0.5:
            moment = path.stat().st_mtime + seconds
            os.utime(path, (moment, moment))
    ended = case.workspace.run(case.stage.words, fault={"clock": [seconds, after]})
    case.expect(ended.code == 0, f"exit code {ended.code}: {ended.said[-600:]}")
    for name, content in case.workspace.outputs(case.stage).items():
        took = re.search(rb'"seconds": (-?[\d.]+)', content) if name.endswith("record.json") else None
        case.expect(took is None or 0 <= float(took[1]) < 600, f"{name} says that the stage took {took and took[1]!r} s")
    case.right(calm)
    case.recover(calm)


def damage(path: Path, draw: Random) -> str:
    """Flip a bit of the file, or cut it short; its times stay, as they do where a disk fails. Says what it did."""
    content, times = bytearray(path.read_bytes()), path.stat()
    if draw.random() < 0.3:
        kept = draw.randrange(len(content))
        content, told = content[:kept], f"{kept} of {len(content)} bytes"
    else:
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        content[place] ^= 1 << bit
        told = f"bit {bit} of byte {place}"
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(times.st_mode)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return told


def can_mount() -> bool:
    """Whether this process may mount."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


@contextmanager
def _mounted(place: Path, room: int) -> Iterator[None]:
    """What is in the folder on a disk of its own, with so many bytes more."""
    kept = place.with_name("outputs-kept")
    place.rename(kept)
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(place)], check=True)
    try:
        subprocess.run(["cp", "-a", f"{kept}/.", str(place)], check=True)
        used = os.statvfs(place)
        size = (used.f_blocks - used.f_bfree) * used.f_frsize + room
        subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)
        subprocess.run(["rm", "-rf", str(place)], check=True)
        kept.rename(place)


def _described(calm: Calm, at: int) -> str:
    if at == len(calm.events):
        return "at the end"
    kind, path = calm.events[at]
    return f"at event {at} of {len(calm.events)}, {kind} {path if not path.isdigit() else ''}".strip()
