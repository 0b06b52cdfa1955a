"""`make JOBS=2` builds what `dvc repro` builds, several stages at once; also after a failure or a kill, and beside another one."""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kill
import pytest
import yaml

CHAIN = """
import json, pathlib, sys, time
began = time.time()
out, wanted = pathlib.Path(sys.argv[1]), sys.argv[2:]
text = "".join(pathlib.Path(path).read_text() for path in wanted)
if "bad" in text:
    sys.exit("the input is bad")
pathlib.Path(f"{out}.begun").touch()
while pathlib.Path("meet").exists() and out.name in ("one", "two") and time.time() < began + 60:
    if all(pathlib.Path(f"{name}.begun").exists() for name in ("one", "two")):
        break
    time.sleep(0.05)
for epoch in range(6):
    time.sleep(0.1)
    print("epoch", epoch, flush=True)
out.write_text(f"{out.name}({text})")
pathlib.Path(f"{out}.times").write_text(json.dumps([began, time.time()]))
"""
RUNTIME = {"device": "cpu", "threads": 1, "workers": 0, "processes": 1, "hosts": 1, "save_s": 60, "launch": "eager"}
START = re.compile(r"^\[(\w+)\] epoch 0$", re.MULTILINE)


def stage(name: str, *needs: str, **more: Any) -> dict[str, Any]:
    return {name: {"cmd": f"python chain.py {name} {' '.join(needs)}", "deps": ["chain.py", *needs], "outs": [name]} | more}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """root -> one, two -> joined; clock looks at the machine, and last follows from it."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "chain.py").write_text(CHAIN)
    (folder / "input").write_text("x")
    (folder / "params.yaml").write_text(yaml.safe_dump({"runtime": RUNTIME, "strict": {"target": {"of": "latency"}}}))
    stages = stage("root", "input") | stage("one", "root") | stage("two", "root") | stage("joined", "one", "two")
    stages |= stage("clock", always_changed=True) | stage("last", "clock", "joined") | stage("timed", "root", params=["strict"])
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    dvc(folder, "init", "--quiet", "--no-scm")
    return folder


def environment() -> dict[str, str]:
    return kill._environment() | {"PYTHONPATH": str(kill.ROOT)}


def dvc(folder: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *words], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start(folder: Path, jobs: int = 2, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "stages.build", str(jobs), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment(), **pipes)


def build(folder: Path, jobs: int = 2, *words: str, code: int = 0) -> str:
    process = start(folder, jobs, *words)
    said, _ = process.communicate(timeout=1200)
    assert process.returncode == code, said
    return said


def times(folder: Path, name: str) -> list[float]:
    return yaml.safe_load((folder / f"{name}.times").read_text())


def overlap(folder: Path, one: str, other: str) -> bool:
    return max(times(folder, one)[0], times(folder, other)[0]) < min(times(folder, one)[1], times(folder, other)[1])


def test_independent_stages_overlap_and_those_that_measure_run_alone(project: Path) -> None:
    (project / "meet").touch()  # the first of the two waits for the other, which may be slow to start
    said = build(project)
    assert (project / "last").read_text() == "last(clock()joined(one(root(x))two(root(x))))"
    assert overlap(project, "one", "two")
    for alone in ("clock", "last", "timed"):
        for other in {"root", "one", "two", "joined", "clock", "last", "timed"} - {alone}:
            assert not overlap(project, alone, other), (alone, other)
    assert "Updating lock file" not in said[: said.index("Running stage 'clock'")]
    assert set(START.findall(said)) == {"root", "one", "two", "joined"}
    assert yaml.safe_load(dvc(project, "status", "--json")) == {"clock": ["always changed"]}
    again = build(project)
    assert "[" not in again and re.findall("Running stage '(.*)'", again) == ["clock"]


def test_a_failure_ends_with_its_code_and_the_rest_is_built_the_next_time(project: Path) -> None:
    (project / "two.txt").write_text("bad")
    listed = yaml.safe_load((project / "dvc.yaml").read_text())
    listed["stages"] |= stage("two", "root", "two.txt")
    (project / "dvc.yaml").write_text(yaml.safe_dump(listed))
    said = build(project, code=255)
    assert "[two] the input is bad\n" in said and "[two] failed (exit code 255): nothing new is started" in said
    assert (project / "one").exists() and not (project / "joined").exists()
    (project / "two.txt").write_text("good")
    said = build(project)
    assert set(START.findall(said)) == {"two", "joined"}


def test_after_a_kill_what_ran_is_finished_and_the_next_one_goes_on(project: Path) -> None:
    process = start(project, 2, "joined")
    assert process.stdout
    for line in process.stdout:
        if line == "[one] epoch 0\n":
            break
    process.kill()
    process.communicate()
    began = time.time()
    said = build(project, 2, "joined")
    assert (project / "joined").read_text() == "joined(one(root(x))two(root(x)))"
    assert not {"root", "one"} & set(START.findall(said))
    assert times(project, "one")[0] < began


def test_two_at_once_build_each_stage_once(project: Path) -> None:
    both = [start(project, 2, "joined"), start(project, 2, "joined")]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(START.findall(said[0] + said[1])) == ["joined", "one", "root", "two"]
    assert "waits for another program: " in said[0] + said[1]
    assert not (project / "clock").exists()  # `joined` does not need it


def test_what_cannot_run_at_once_is_refused_before_anything_runs(project: Path) -> None:
    assert build(project, 0, code=2) == "stages.build: JOBS = '0': must be a whole number from 1 up\n"
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("hosts: 1", "hosts: 2"))
    assert "params.yaml: runtime.hosts = 2: only one stage at a time then, JOBS=1" in build(project, code=2)
    assert not (project / "root").exists()


@pytest.mark.long
def test_a_small_grid_gives_the_bytes_of_dvc_repro(tmp_path: Path) -> None:
    options = argparse.Namespace(full=False, revive=["finetune", "restart"], compress=["none", "diet"], epochs=2)
    calm, busy = tmp_path / "calm", tmp_path / "busy"
    kill.copy_project(calm, options)
    shutil.copytree(calm, busy, symlinks=True)  # with its commit, which every model card names
    dvc(calm, "repro", "export")
    build(busy, 2, "export")
    assert kill.compare(calm, busy, ["export"]) == []
