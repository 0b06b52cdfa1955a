"""Kill `dvc repro` at random moments and compare what it ends with to an undisturbed run. No test of pytest's: it takes minutes.

    python -m tests.kill --kills 10 --seed 0

copies the project (what git tracks, and new files that it does not ignore) twice, with a small grid and few epochs. One copy runs
`dvc repro` undisturbed. In the other, SIGKILL ends the whole process group at moments drawn uniformly from the time that the first
one took, and `dvc repro` is started again each time. In the end every model.safetensors, model.json and model.onnx must be
byte-identical, metrics, events and curves of the records equal, and `dvc status` clean. Exit code 1 where they are not.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
MODELS = ("model.safetensors", "model.json", "model.onnx", "pictures.onnx")
UNTIMED = ("prepare", "train", "revive", "compress", "collapse", "export")  # stages whose records hold no timings but TIMED
TIMED = ("images_per_s", "loader_share")  # of an epoch
ALWAYS = "always changed"  # what `dvc status` says of a stage that looks at the machine or at raw data each time
# What a kill in the middle of a write of DVC's leaves behind, by what DVC says of it -> the file to remove before starting again.
# (DVC itself passes over locks whose process is gone.)
LEFTOVERS = {
    r"Unable to read RWLock-file|RWLock-file '.*' format error|it is being blocked by": ".dvc/tmp/rwlock",
    r"machine/dvc\.lock'? (validation failed|is invalid|is corrupted)": "machine/dvc.lock",
    r"dvc\.lock'? (validation failed|is invalid|is corrupted)": "dvc.lock",
}
PATIENCE = 5  # starts of `dvc repro` that may fail for something that a kill left behind


def main() -> None:
    """Make both runs, print a table of kills and PASS or FAIL."""
    options = _options()
    with contextlib.ExitStack() as stack:
        home = options.workdir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="winnow-kill-")))
        home.mkdir(parents=True, exist_ok=True)
        calm, killed = home / "undisturbed", home / "killed"
        copy_project(calm, options)
        shutil.copytree(calm, killed, symlinks=True)
        took = Repro(calm, options.targets).finish()
        pause = Repro(calm, options.targets).finish()
        print(f"undisturbed: {took:.0f} s; again, with nothing to do: {pause:.1f} s", flush=True)
        kill_and_finish(killed, options, took, pause)
        problems = compare(calm, killed, options.targets)
    print(*problems, "FAIL" if problems else "PASS", sep="\n")
    sys.exit(1 if problems else 0)


def copy_project(target: Path, options: argparse.Namespace) -> None:
    """The project as it stands, in a repository of its own with one commit, its parameters made small."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and Path(name).name != "dvc.lock":  # a lock file would be of other parameters
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    if not options.full:
        path = target / "params.yaml"
        path.write_text(yaml.safe_dump(smaller(yaml.safe_load(path.read_text()), options), sort_keys=False))
    person = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    for words in (["init", "--quiet"], ["add", "--all"], [*person, "commit", "--quiet", "--message", "as it stands"]):
        subprocess.run(["git", *words], cwd=target, check=True)


def smaller(params: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The same parameters with fewer variants, fewer epochs and hardly any timing."""
    params["variants"] = {"revive": options.revive, "compress": options.compress}
    params["profile"] |= {"control": f"{options.revive[0]}-{options.compress[0]}", "warmup_s": 0.01, "repeats": 20, "attempts": 1}
    params["train"]["fit"]["epochs"] = options.epochs
    for block in (*params["revive"].values(), *params["compress"].values()):
        block["fit"]["epochs"] = options.epochs
        block |= {key: least for key, least in (("restarts", 2), ("every", 1)) if key in block}
    return params


class Repro:
    """One `dvc repro` in a process group of its own, its output in a file."""

    def __init__(self, folder: Path, targets: list[str]) -> None:
        self.log = next(path for n in itertools.count(1) if not (path := folder.parent / f"{folder.name}-{n}.log").exists())
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dvc", "repro", *targets],
                cwd=folder,
                env=_environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started = time.monotonic()

    def finish(self) -> float:
        """Wait for its end; the seconds it took. Ends the script where it failed."""
        if self.process.wait():
            sys.exit(self.failure())
        return time.monotonic() - self.started

    def kill_after(self, seconds: float) -> bool:
        """SIGKILL to the whole group after so many seconds; False where it ended before."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return True
        return False

    def failure(self) -> str:
        return f"{self.said()[-4000:]}\nFAIL: `dvc repro` exits with {self.process.returncode}"

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def running(self) -> str:
        """What was running last."""
        told = re.findall(r"(Running stage|Stage) '([^']+)'|(Updating lock file)", self.said())
        if not told:
            return "start of dvc"
        kind, stage, locking = told[-1]
        return stage if kind == "Running stage" else "dvc.lock being written" if locking else f"after {stage}"

    def leftover(self) -> str | None:
        """The file in the way of this start, which failed."""
        return next((path for pattern, path in LEFTOVERS.items() if re.search(pattern, self.said())), None)


def kill_and_finish(folder: Path, options: argparse.Namespace, took: float, pause: float) -> None:
    """Start, kill, start again; a row for each kill and each thing that it left in the way."""
    draw = random.Random(options.seed)
    moments = sorted(draw.uniform(0, took) for _ in range(options.kills))
    gaps = [moment - before for moment, before in zip(moments, [0.0, *moments], strict=False)]
    kills = failures = 0
    print(f"{'kill':>4}  {'moment':>8}  {'after':>7}  what was running", flush=True)
    while True:
        repro = Repro(folder, options.targets)
        last = kills == len(gaps)
        if not last and repro.kill_after(pause + gaps[kills]):
            kills += 1
            after = pause + gaps[kills - 1]
            print(f"{kills:4}  {moments[kills - 1]:6.1f} s  {after:5.1f} s  {repro.running()}", flush=True)
        elif repro.process.wait():
            failures += 1
            path = repro.leftover()
            if path is None or failures > PATIENCE:
                sys.exit(repro.failure())
            print(f"      `dvc repro` refused to start ({repro.log.name}): {path} is removed, as DVC asks for", flush=True)
            (folder / path).unlink()
        elif last:
            print(f"finished after {kills} kills", flush=True)
            return
        else:
            print("      finished before the next kill: everything built is removed", flush=True)
            for path in ("outputs", ".dvc/cache", ".dvc/tmp"):
                shutil.rmtree(folder / path, ignore_errors=True)
            for path in ("dvc.lock", "machine/dvc.lock"):
                (folder / path).unlink(missing_ok=True)


def compare(calm: Path, killed: Path, targets: list[str]) -> list[str]:
    """A line for every difference between the outputs of both runs, and for what a kill has left behind."""
    names = sorted({p.relative_to(f) for f in (calm, killed) for p in (f / "outputs").rglob("*") if p.name in MODELS})
    problems = [f"{name} differs" for name in names if _bytes(calm / name) != _bytes(killed / name)]
    records = sorted(p.relative_to(calm) for stage in UNTIMED for p in (calm / "outputs" / stage).rglob("record.json"))
    for name in records:
        one, other = facts(calm / name), facts(killed / name)
        problems += [f"{name}: {key} differ: {one[key]} and {other.get(key)}" for key in one if one[key] != other.get(key)]
    problems += [f"{path.relative_to(killed)} was left behind" for path in (killed / "outputs").rglob("*.partial")]
    problems += [f"{path.relative_to(killed)} was left behind" for path in (killed / "outputs/resume").glob("*.safetensors")]
    for folder in (calm, killed):
        asked = [sys.executable, "-m", "dvc", "status", "--json", *(["--with-deps", *targets] if targets else [])]
        done = subprocess.run(asked, cwd=folder, env=_environment(), capture_output=True, text=True)
        changed = {} if done.returncode else {name: why for name, why in json.loads(done.stdout).items() if why != [ALWAYS]}
        if done.returncode or changed:
            problems.append(f"{folder.name}: dvc status is not clean: {changed or done.stderr}")
    print(f"compared {len(names)} model files and {len(records)} records")
    return problems if names and records else [*problems, "nothing was built"]


def facts(path: Path) -> dict[str, Any]:
    """What a record says of the computation, without times."""
    record = json.loads(path.read_text()) if path.exists() else {}
    kept = {key: record.get(key) for key in ("metrics", "events", "notes", "layers", "data")}
    return kept | {"history": [{key: row[key] for key in row if key not in TIMED} for row in record.get("history", [])]}


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _environment() -> dict[str, str]:
    """This environment's programs; no tracking server, to which a test has nothing to publish."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}", "PYTHONUNBUFFERED": "1"}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=10, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--workdir", type=Path, help="a new folder for both copies, which then stay; else a temporary one")
    parser.add_argument("--full", action="store_true", help="params.yaml as it stands, with all variants and epochs")
    parser.add_argument("--revive", nargs="+", default=["reactivate", "restart"], help="blocks of the grid (%(default)s)")
    parser.add_argument("--compress", nargs="+", default=["diet", "dealloc"], help="blocks of the grid (%(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="of every training; of each round of a restart (%(default)s)")
    parser.add_argument("--targets", nargs="*", default=[], help="stages to build; else all")
    return parser.parse_args()


if __name__ == "__main__":
    main()
