"""What a grid costs as it grows, beside its training: DVC, the report, the champion, MLflow. No network is trained.

    python -m benchmarks.scale [--grids 5x2x1 10x10x1 20x10x5] [--parts dvc report mlflow] [--json FILE]
    python -m benchmarks.scale --built outputs      disk and seconds by stage of a grid that is built

A grid NxMxS has N revive blocks, M compress blocks and S seeds: N * M * S variants.

    dvc       a copy of the project with such a grid; small files stand for the outputs. `commit` hashes them and writes dvc.lock:
              the grid is built, as far as DVC can tell. Then, each in a process of its own: `index`, reading dvc.yaml and dvc.lock
              and checking the graph; `status`; `repro`, which finds nothing to do (without the stage that looks at the machine each
              time); `lock`, reading and writing dvc.lock, which `dvc repro` does once more after every stage that has run
    report    the champion and the report of hand-made records of such a grid in fp32 and int8
    mlflow    the same records published to a SQLite file, and once more with nothing to add

Prints seconds, those of the CPU over the whole process (imports included), its peak memory, and sizes.
"""

import argparse
import json
import math
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
FILES = {  # what stands for an output folder
    "model": ("model.json", "model.safetensors"),
    "data": ("data.json",),
    "export": (
        "fp32/model.onnx",
        "fp32/pictures.onnx",
        "fp32/record.json",
        "int8/model.onnx",
        "int8/pictures.onnx",
        "int8/record.json",
    ),
    "profile": ("fp32/record.json", "int8/record.json"),
}
STEPS = ("commit", "index", "status", "repro", "lock")
TABLES = ("runs", "params", "metrics", "latest_metrics", "tags")  # MLflow's, that grow with a grid


def copy_project(target: Path, size: tuple[int, ...]) -> None:
    """The project as it stands with a grid of `size` blocks and seeds, in a repository of its own."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listed, cwd=ROOT, text=True)
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file() and Path(name).name != "dvc.lock":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / "data/raw").mkdir(parents=True, exist_ok=True)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    names = {"revive": [f"r{i}" for i in range(size[0])], "compress": [f"c{i}" for i in range(size[1])]}
    params["revive"] = dict.fromkeys(names["revive"], params["revive"]["finetune"])
    params["compress"] = dict.fromkeys(names["compress"], params["compress"]["none"])
    params |= {"variants": names, "seed": list(range(size[2]))}
    params["profile"]["control"] = "r0-c0"
    (target / "params.yaml").write_text(yaml.dump(params, sort_keys=False))
    for path in target.rglob("dvc.yaml"):
        path.write_text(path.read_text().replace("    always_changed: true\n", ""))
    subprocess.run(["git", "init", "--quiet"], cwd=target, check=True)


@contextmanager
def _repo() -> Iterator[Any]:
    from dvc.repo import Repo

    with closing(Repo()) as repo:
        yield repo


def commit() -> dict[str, float]:
    """Make the outputs and commit them."""
    with _repo() as repo:
        stages = list(repo.index.stages)
        outs = [out.fs_path for stage in stages for out in stage.outs]
        deps = [dep.fs_path for stage in stages for dep in stage.deps]  # of a folder, those that a stage asks for
        for path in (path for path in map(Path, dict.fromkeys(outs + deps)) if not path.exists()):
            inside = FILES.get(path.name, FILES.get(path.parent.name, ("file",)))
            for file in [path] if path.suffix else [path / name for name in inside]:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(str(path))
    with _repo() as repo:
        started = time.perf_counter()
        repo.commit(force=True)
        return {"seconds": time.perf_counter() - started, "files": sum(1 for path in Path("outputs").rglob("*") if path.is_file())}


def index() -> dict[str, float]:
    """Read the pipeline, then check its graph."""
    with _repo() as repo:
        started = time.perf_counter()
        stages = len(list(repo.index.stages))
        read = time.perf_counter()
        repo.index.check_graph()
        return {"seconds": time.perf_counter() - started, "read_s": read - started, "stages": stages}


def status() -> dict[str, float]:
    """Of all stages."""
    with _repo() as repo:
        started = time.perf_counter()
        changed = len(repo.status())
        return {"seconds": time.perf_counter() - started, "changed": changed}


def repro() -> dict[str, float]:
    """Nothing is to be done."""
    with _repo() as repo:
        started = time.perf_counter()
        done = len(repo.reproduce())
        return {"seconds": time.perf_counter() - started, "changed": done}


def lock() -> dict[str, float]:
    """As after a stage."""
    from dvc.utils.serialize import modify_yaml

    started = time.perf_counter()
    with modify_yaml("dvc.lock"):
        pass
    return {"seconds": time.perf_counter() - started, "mb": Path("dvc.lock").stat().st_size / 1e6}


def report(size: tuple[int, ...]) -> dict[str, float]:
    """Champion and report of hand-made records."""
    from pipeline.champion import choose
    from pipeline.config import section
    from pipeline.deployment import Champion
    from pipeline.records import read_records
    from pipeline.report import write

    records, folder = _written(size)
    started = time.perf_counter()
    records = read_records(folder)
    found = {"records": len(records), "read_s": time.perf_counter() - started}
    started = time.perf_counter()
    decision = choose(records, section("champion", Champion))
    found["champion_s"] = time.perf_counter() - started
    started = time.perf_counter()
    write(records, folder / "report", decision)
    found["report_s"] = time.perf_counter() - started
    found["page_mb"] = (folder / "report/index.html").stat().st_size / 1e6
    return found | {"report_mb": _bytes(folder / "report") / 1e6}


def mlflow(size: tuple[int, ...]) -> dict[str, float]:
    """Publish hand-made records, twice."""
    from pipeline.champion import choose
    from pipeline.config import section
    from pipeline.deployment import Champion, Tracking
    from pipeline.tracking import publish

    records, folder = _written(size)
    decision, options = choose(records, section("champion", Champion)), section("tracking", Tracking)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        publish(records, folder, options, "sqlite:///mlflow.db", decision)
        seconds.append(time.perf_counter() - started)
    with closing(sqlite3.connect("mlflow.db")) as base:
        rows = {f"{table}_rows": base.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in TABLES}  # noqa: S608
    sizes = {"db_mb": Path("mlflow.db").stat().st_size / 1e6, "artifacts_mb": _bytes(Path("mlartifacts")) / 1e6}
    return {"seconds": seconds[0], "again_s": seconds[1], **sizes, **rows}


def _written(size: tuple[int, ...]) -> tuple[list[dict[str, Any]], Path]:
    """Records of a grid of `size`, and the folder that they are written to."""
    from tests import sample_records

    control = ("finetune", "none")
    revive, compress = ((first, *(f"block{i}" for i in range(1, n))) for first, n in zip(control, size, strict=False))
    records, folder = sample_records.grid(tuple(range(size[2])), revive, compress, ("fp32", "int8")), Path("outputs")
    sample_records.write(records, folder)
    return records, folder


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def built(outputs: Path) -> None:
    """Print what each stage's folders hold and what its records say it took."""
    print(f"{'stage':<10}{'records':>9}{'KB each':>10}{'seconds each':>14}")
    for stage in ("prepare", "train", "revive", "compress", "collapse", "export", "profile"):
        paths = sorted((outputs / stage).rglob("record.json"))
        seconds = [json.loads(path.read_text())["seconds"] for path in paths]
        if paths:
            mean = sum(seconds) / len(seconds)
            print(f"{stage:<10}{len(paths):>9}{_bytes(outputs / stage) / len(paths) / 1e3:>10,.0f}{mean:>14.2f}")
    cache = outputs.parent / ".dvc/cache"
    print(f"outputs {_bytes(outputs) / 1e6:,.1f} MB, cache {_bytes(cache) / 1e6:,.1f} MB")


def child(what: str, size: tuple[int, ...], folder: Path) -> dict[str, float]:
    """What one measurement, in a process of its own, tells."""
    command = [sys.executable, "-m", "benchmarks.scale", "--child", what, "--grids", "x".join(map(str, size))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(part: str, size: tuple[int, ...]) -> dict[str, Any]:
    """Print and return what `part` costs for a grid of `size`."""
    found: dict[str, Any] = {"part": part, "grid": "x".join(map(str, size)), "variants": math.prod(size)}
    with tempfile.TemporaryDirectory() as tmp:
        copy_project(Path(tmp), size)
        steps = {step: child(step, size, Path(tmp)) for step in (STEPS if part == "dvc" else (part,))}
    for step, values in steps.items():
        print(f"{found['grid']:>10} {step:>7}: " + ", ".join(f"{name} {value:,.4g}" for name, value in values.items()), flush=True)
    return found | steps


def _size(text: str) -> tuple[int, ...]:
    size = tuple(map(int, text.split("x")))
    if len(size) != 3 or min(size) < 1:
        raise ValueError(text)
    return size


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--grids", nargs="+", type=_size, default=[(5, 2, 1), (10, 10, 1), (20, 10, 5)], metavar="NxMxS")
    parser.add_argument("--parts", nargs="+", default=["dvc", "report", "mlflow"], choices=["dvc", "report", "mlflow"])
    parser.add_argument("--built", type=Path, help="the outputs folder of a grid that is built")
    parser.add_argument("--json", type=Path, help="a file that a line for each measurement is added to")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        ways: dict[str, Callable[[], dict]] = {step: globals()[step] for step in STEPS}
        ways |= {part: lambda part=part: globals()[part](asked.grids[0]) for part in ("report", "mlflow")}
        values, used = ways[asked.child](), resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps(values | {"cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1e3}))
        return
    if asked.built:
        built(asked.built)
        return
    for size in asked.grids:
        for part in asked.parts:
            line = json.dumps(measure(part, size))
            if asked.json:
                with asked.json.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
