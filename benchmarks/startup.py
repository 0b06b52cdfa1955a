"""How long a stage takes to start, and how long `dvc repro` takes where there is nothing to do.

    python -m benchmarks.startup [--against COMMIT] [--rounds 5] [--stages train report ...] [--grid FOLDER] [--no-dvc]

Needs the default grid built, here or in FOLDER. Copies the sources as they stand here, and those of COMMIT, into temporary folders
with repositories of their own, each with a copy of what is built, and prints both side by side; both use the installed packages.

    start     from the start of `python -m stages.X` to the call in `FIRST`: its imports are done and its parameters are read
    imports   the packages that take most of it, by `python -X importtime`, which itself slows them down
    repro     `dvc repro` with nothing to do, and the shares of its parts, by cProfile

Each round starts each stage once in each folder, in turn; medians over rounds. A round before the first one compiles everything to
bytecode and fills the system's file cache.
"""

import argparse
import collections
import json
import os
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIRST = {  # stage -> the function whose call is its first useful work
    "check": "pipeline.config:parse",
    "code": "pipeline.files:sha256",
    "method": "pipeline.files:write_bytes",
    "prepare": "pipeline.data.prepare:hold_out",
    "coverage": "pipeline.weights:chosen",
    "train": "pipeline.precision:autocast",  # around the forward pass of the first step
    "revive": "pipeline.precision:autocast",
    "compress": "pipeline.precision:autocast",
    "collapse": "pipeline.certificate:certify",
    "export": "pipeline.export:export_proven",
    "hardware": "pipeline.hardware:describe",
    "profile": "pipeline.profiling:profile",
    "champion": "pipeline.champion:choose",
    "repository": "pipeline.repository:_add",
    "report": "pipeline.report:build",
    "track": "pipeline.tracking:_Publisher",  # MLflow's store is open
}
WORDS = {"revive": "finetune", "compress": "diet", "seed": "0", "stage": "revive"}
# Runs a stage as `python -m` does, until the call. It is replaced as soon as its module is there, before others import it.
DRIVER = """
import importlib.util, inspect, os, runpy, sys, time
stage, first, words = sys.argv[1], sys.argv[2].split(":"), dict(word.split("=") for word in sys.argv[3:])
def stop(*given, **named):
    print("STARTED", time.monotonic(), flush=True)
    os._exit(0)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != first[0]:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            setattr(module, first[1], stop)
        spec.loader.exec_module = exec_module
        return spec
sys.path.insert(0, ""), sys.meta_path.insert(0, Finder())
import ast, pathlib
main = next(n for n in ast.parse(pathlib.Path("stages", stage + ".py").read_text()).body if getattr(n, "name", "") == "main")
sys.argv = [f"stages/{stage}.py", *(words[a.arg] for a in main.args.args)]
runpy.run_module(f"stages.{stage}", run_name="__main__")
"""
PARTS = {  # where `dvc repro` spends its time: functions of DVC, by file and name
    "imports": ("<frozen importlib._bootstrap>", "_find_and_load"),
    "reading YAML": ("_yaml.py", "parse_yaml"),
    "writing dvc.lock": ("dvcfile.py", "dump"),
    "the stages' own commands": ("run.py", "cmd_run"),
    "locking what is read": ("rwlock.py", "_edit_rwlock"),
    "comparing files": ("output.py", "workspace_status"),
    "the graph": ("graph.py", "build_graph"),
}


class Tree:
    """The project at a commit, or as it stands here (None), in a folder of its own with the outputs of a built one."""

    def __init__(self, name: str, commit: str | None, grid: Path, home: Path) -> None:
        self.name, self.folder = name, home / name
        self.folder.mkdir()
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MLFLOW"))}
        self.environment |= {"PYTHONPYCACHEPREFIX": str(home / "bytecode"), "PYTHONWARNINGS": "ignore"}
        self._take_sources(commit)
        shutil.copytree(grid / "outputs", self.folder / "outputs", ignore=shutil.ignore_patterns("resume"))
        if (grid / "mlflow.db").is_file():
            shutil.copy2(grid / "mlflow.db", self.folder)
        for words in (["init", "--quiet"], ["add", "--all"], [*PERSON, "commit", "--quiet", "--message", "as it stands"]):
            self.run("git", *words)

    def _take_sources(self, commit: str | None) -> None:
        if commit:
            archive = subprocess.run(["git", "archive", commit], check=True, capture_output=True).stdout
            subprocess.run(["tar", "xf", "-", "-C", str(self.folder)], input=archive, check=True)
            return
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], check=True, capture_output=True, text=True
        ).stdout
        for name in filter(None, listed.split("\0")):
            if Path(name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(name, self.folder / name)

    def run(self, *words: str) -> str:
        done = subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{self.name}: {' '.join(words[:6])}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def python(self, *words: str) -> str:
        return self.run(sys.executable, *words)

    def has(self, stage: str) -> bool:
        return (self.folder / "stages" / f"{stage}.py").is_file()

    def start(self, stage: str, *options: str) -> tuple[float, str]:
        """Seconds from the start of a process to the first useful work of a stage, and what it said."""
        words = WORDS | ({"stage": "revive-method@finetune"} if stage == "method" else {})
        began = time.monotonic()
        said = self.python(*options, "-c", DRIVER, stage, FIRST[stage], *(f"{key}={value}" for key, value in words.items()))
        ended = [line.split()[1] for line in said.splitlines() if line.startswith("STARTED")]
        if not ended:
            sys.exit(f"{self.name}: stages.{stage} never called {FIRST[stage]}: {said}")
        return float(ended[0]) - began, said

    def imports(self, stage: str) -> str:
        """The packages that a stage imports in a tenth of a second or more, the slowest first."""
        _, said = self.start(stage, "-X", "importtime")
        spent: collections.Counter[str] = collections.Counter()
        for line in said.splitlines():
            if line.startswith("import time:") and line[12:].split("|")[0].strip().isdigit():
                own, _, name = line[12:].split("|")
                spent[name.strip().split(".")[0]] += int(own) / 1e6
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent.most_common(4) if seconds >= 0.1)

    def commit(self) -> None:
        """Make DVC believe that this tree's own sources have built its outputs: nothing is left to do."""
        names = [line.split()[0] for line in self.python("-m", "dvc", "stage", "list", "--all", "--name-only").splitlines()]
        for name in names:
            if name.split(":")[-1].startswith(("code", "revive-method", "compress-method", "hardware")):
                self.python("-m", "dvc", "repro", "--quiet", "--single-item", name)
        self.python("-m", "dvc", "commit", "--force", "--quiet")
        stale = json.loads(self.python("-m", "dvc", "status", "--json"))
        if any(why != ["always changed"] for why in stale.values()):
            sys.exit(f"{self.name}: not built: {stale}")

    def repro(self) -> tuple[float, float]:
        """Seconds by the clock, and of the processor, which other work on the machine disturbs less."""
        began, used = time.monotonic(), os.times()
        self.python("-m", "dvc", "repro")
        now = os.times()
        return time.monotonic() - began, now.children_user + now.children_system - used.children_user - used.children_system

    def parts(self) -> dict[str, float]:
        """Shares of the time of a `dvc repro`, which may overlap, as where parsing imports the parser."""
        path = self.folder / ".dvc/tmp/profile"
        self.python("-m", "cProfile", "-o", str(path), "-m", "dvc", "repro", "--quiet")
        stats = pstats.Stats(str(path))
        rows = stats.stats  # type: ignore[attr-defined]
        total = stats.total_tt  # type: ignore[attr-defined]
        return {
            part: max((row[3] for (file, _, name), row in rows.items() if name == function and file.endswith(place)), default=0)
            / total
            for part, (place, function) in PARTS.items()
        }


PERSON = ("-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost", "-c", "commit.gpgsign=false")


def main() -> None:
    """Print the tables."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="winnow-startup-") as home:
        trees = [Tree("now", None, options.grid, Path(home))]
        if options.against:
            trees.insert(0, Tree(options.against, options.against, options.grid, Path(home)))
        if options.stages:
            _starts(trees, options.stages, options.rounds)
        if options.dvc:
            _repros(trees, options.rounds)


def _starts(trees: list[Tree], stages: list[str], rounds: int) -> None:
    print("| stage |", " | ".join(f"{tree.name}, s" for tree in trees), "| imports now |")
    print(f"|---|{'---:|' * len(trees)}---|")
    for stage in stages:
        having = [tree for tree in trees if tree.has(stage)]
        seconds: dict[str, list[float]] = {tree.name: [] for tree in having}
        for number in range(rounds + 1):
            for tree in having:
                found, _ = tree.start(stage)
                seconds[tree.name] += [found] * bool(number)
        told = [f"{statistics.median(seconds[tree.name]):.2f}" if tree in having else "" for tree in trees]
        print(f"| {stage} | {' | '.join(told)} | {trees[-1].imports(stage) if trees[-1] in having else ''} |", flush=True)
    _checks(trees, rounds)


def _checks(trees: list[Tree], rounds: int) -> None:
    """What `make` runs before `dvc repro`, to its end, where params.yaml passed before."""
    seconds: dict[str, list[float]] = {tree.name: [] for tree in trees}
    for number in range(rounds + 1):
        for tree in trees:
            began = time.monotonic()
            tree.python("-m", "stages.check")
            seconds[tree.name] += [time.monotonic() - began] * bool(number)
    told = [f"{statistics.median(seconds[tree.name]):.2f}" for tree in trees]
    print(f"| check again, to its end | {' | '.join(told)} | |\n")


def _repros(trees: list[Tree], rounds: int) -> None:
    seconds: dict[str, list[tuple[float, float]]] = {tree.name: [] for tree in trees}
    for tree in trees:
        tree.commit()
        tree.repro()
    for _ in range(rounds):
        for tree in trees:
            seconds[tree.name].append(tree.repro())
    parts = {tree.name: tree.parts() for tree in trees}
    print("| `dvc repro`, nothing to do |", " | ".join(tree.name for tree in trees), "|")
    print(f"|---|{'---:|' * len(trees)}")
    for number, kind in enumerate(("seconds", "seconds of the processor")):
        told = (f"{statistics.median(found[number] for found in seconds[tree.name]):.2f}" for tree in trees)
        print(f"| {kind} |", " | ".join(told), "|")
    for part in PARTS:
        print(f"| {part} |", " | ".join(f"{parts[tree.name][part]:.0%}" for tree in trees), "|")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stages", nargs="*", choices=FIRST, default=list(FIRST))
    parser.add_argument("--grid", type=Path, default=Path())
    parser.add_argument("--no-dvc", dest="dvc", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    main()
