"""Put faults into the chain, one after the other, and look whether anything is lost, damaged or wrong. No test of pytest's.

    python -m tests.faults --faults 200 --seed 0

copies the project (what git tracks, and new files that it does not ignore) with a small chain on the digits, builds it undisturbed,
and then, as often as asked, sets it up in front of a stage (with outputs of an earlier run of the stage, or without), lets the
stage run with a fault, looks at what is there (every file the old one or the new one, whole), runs it again without the fault, and
compares with the undisturbed outputs: models, ONNX files, data and reports byte by byte, records but for times. The seed draws
the kind of each fault, its stage and its moment. A fault that did not come to pass, as its moment lay behind the stage's end, does
not count. Prints a line for each, then a table; exit code 1 where something is wrong.
"""

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import fault_kinds as local
from tests import fault_servers as servers
from tests.fault_chain import END, STAGES, TRAINING
from tests.fault_kinds import Case
from tests.fault_workspace import Workspace

ALL = tuple(stage.name for stage in STAGES)
BIG = tuple(name for name in ALL if name not in ("coverage", "code", "champion"))  # whose files are longer than a message
READING = tuple(stage.name for stage in STAGES if stage.reads)
TRAINED = tuple(stage.name for stage in TRAINING)


@dataclass(frozen=True)
class Kind:
    """How often it is drawn, for which stages, and what makes one."""

    weight: int
    stages: tuple[str, ...]
    make: Callable[[Case], None]


KINDS = {
    "kill": Kind(8, ALL, local.kill),
    "kill in a write": Kind(5, ALL, local.at_event("kill", "write")),
    "kill before fsync": Kind(4, ALL, local.at_event("kill", "fsync")),
    "kill before rename": Kind(6, ALL, local.at_event("kill", "rename")),
    "power cut": Kind(7, ALL, local.at_event("cut")),
    "disk full": Kind(6, ALL, local.failing("ENOSPC", "No space left on device")),
    "disk full, really": Kind(3, tuple(name for name in BIG if name != "repository"), local.small_disk),
    "file too large": Kind(3, BIG, local.file_limit),
    "disk breaks": Kind(3, ALL, local.failing("EIO", "Input/output error")),
    "read-only": Kind(3, ALL, local.read_only),
    "read-only meanwhile": Kind(3, ALL, local.failing("EROFS", "Read-only file system")),
    "damaged input": Kind(10, READING, local.damaged_input),
    "damaged state": Kind(6, TRAINED, local.damaged_state),
    "twice at once": Kind(3, ALL, local.twice),
    "clock": Kind(5, ALL, local.clock),
    **{name: Kind(weight, stages, make) for name, (weight, stages, make) in servers.KINDS.items()},
}
HEAD = ("drawn", "fired", "recovered", "problems")


def main() -> None:
    """Print a line for each fault, the table and PASS or FAIL."""
    options = _options()
    with contextlib.ExitStack() as stack:
        home = options.workdir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="winnow-faults-")))
        home.mkdir(parents=True, exist_ok=True)
        cases = inject(home.resolve(), options.faults, options.seed, options.kinds, options.stages, options.numbers, options.end)
    problems = [f"{number}: {kind}, {case.stage.name}: {what}" for number, kind, case in cases for what in case.problems]
    print(table(cases), *problems, "FAIL" if problems else "PASS", sep="\n")
    sys.exit(1 if problems else 0)


def inject(
    home: Path, faults: int, seed: int, kinds: Sequence[str], stages: Sequence[str], numbers: Sequence[int] = (), end: str = END
) -> list[tuple[int, str, Case]]:
    """Faults until so many came to pass, or those of `numbers` alone, in a chain that is built up to the stage `end`."""
    possible = {kind: [stage for stage in STAGES if stage.name in KINDS[kind].stages and stage.name in stages] for kind in kinds}
    names = [kind for kind in kinds if possible[kind]]
    started, workspace, cases, number = time.monotonic(), Workspace(home), [], 0
    try:
        workspace.build(end)
        print(f"undisturbed chain: {time.monotonic() - started:.0f} s", flush=True)
        while sum(case.fired for *_, case in cases) < faults and number < 3 * faults and (not numbers or number < max(numbers)):
            number += 1
            draw = random.Random(f"{seed}/{number}")
            kind = draw.choices(names, [KINDS[name].weight for name in names])[0]
            case = Case(workspace, draw.choice(possible[kind]), draw, old=draw.random() < 0.6)
            if numbers and number not in numbers:
                continue
            begun = time.monotonic()
            try:
                KINDS[kind].make(case)
            except Exception as error:  # of one fault, which must not end the script
                case.problems.append(f"{type(error).__name__}: {error}")
            cases.append((number, kind, case))
            how = "; ".join(case.problems) or ("recovered" if case.fired else "did not fire")
            took = f"{time.monotonic() - begun:.1f} s"
            print(f"{number:4}  {kind:20} {case.stage.name:11} {took:>7}  {case.told}: {how}", flush=True)
    finally:
        workspace.close()
    print(f"{time.monotonic() - started:.0f} s in all")
    return cases


def table(cases: Sequence[tuple[int, str, Case]]) -> str:
    """A row for each kind and stage, and what the whole adds up to."""
    counted: dict[tuple[str, str], Counter[str]] = {}
    for _, kind, case in cases:
        row = counted.setdefault((kind, case.stage.name), Counter())
        row.update(drawn=1, fired=case.fired, recovered=case.fired and not case.problems, problems=bool(case.problems))
    lines = [f"\n{'kind':22}{'stage':12}" + "".join(f"{name:>10}" for name in HEAD)]
    for kind in KINDS:
        for stage in (*ALL, "track"):
            if (kind, stage) in counted:
                lines.append(f"{kind:22}{stage:12}" + "".join(f"{counted[kind, stage][name]:10}" for name in HEAD))
    whole = sum(counted.values(), Counter())
    lines.append(f"{'all':34}" + "".join(f"{whole[name]:10}" for name in HEAD))
    told = [what for *_, case in cases for what in case.problems]
    for name, marks in SUMS.items():
        lines.append(f"{name}: {sum(any(mark in what for mark in marks) for what in told)}")
    lines.append(f"epochs that were over, but not yet saved when the fault came: {sum(case.again for *_, case in cases)}")
    return "\n".join(lines)


SUMS = {
    "work lost beyond the current epoch": ("finished epochs again", "lost: "),
    "corrupt files accepted": ("accepted in silence", "neither the old", "different models"),
    "wrong results": ("wrong result", "published"),
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--faults", type=int, default=200, help="how many must come to pass (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, stages and moments (%(default)s)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--stages", nargs="+", default=list(ALL), choices=ALL, metavar="STAGE", help=", ".join(ALL))
    parser.add_argument("--numbers", nargs="+", type=int, default=[], help="only these faults of the same draw, by their numbers")
    parser.add_argument("--end", default=END, choices=ALL, metavar="STAGE", help="build the chain up to this one (%(default)s)")
    parser.add_argument("--workdir", type=Path, help="a new folder for the copy, which then stays; else a temporary one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
