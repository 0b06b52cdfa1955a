"""Three machines build a share each; a fourth assembles all from a folder remote and trains nothing. One MLflow server for all.

Each is a clone, and works by the lines of docs/machines.md: `make share` and `make assemble`.
"""

import argparse
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import kill
import pytest
import yaml

SHARES = {"first": "none", "second": "diet", "third": "dealloc"}
pytestmark = pytest.mark.long
TARGET = "profile@finetune-{}-0"
TRAINING = r"^> python -m stages\.(train|revive|compress) "


def run(folder: Path, *words: str, **more: str) -> str:
    """What a command says that must succeed."""
    done = subprocess.run(
        words,
        cwd=folder,
        env=kill._environment() | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def make(folder: Path, *words: str, **more: str) -> str:
    """The same of `make`, in the environment of this Python."""
    return run(folder, "make", "--silent", "--assume-old=.venv/installed", *words, **more)


def git(folder: Path, *words: str) -> None:
    person = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *person, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with a small grid and a remote, as somebody would commit it."""
    home = tmp_path_factory.mktemp("machines")
    options = argparse.Namespace(full=False, revive=["finetune"], compress=list(SHARES.values()), epochs=1)
    kill.copy_project(home / "origin", options)
    path = home / "origin" / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["compress"] = {name: params["compress"][name] for name in SHARES.values()}
    params["revive"] = {"finetune": params["revive"]["finetune"]}
    params["export"]["precisions"] = ["fp32"]
    params["profile"] |= {"batch_sizes": [1], "idle_ms": None}
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    run(home / "origin", sys.executable, "-m", "dvc", "remote", "add", "-d", "shared", str(home / "remote"))
    git(home / "origin", "commit", "--quiet", "--all", "--message", "a small grid and a remote")
    return home / "origin"


def clone(origin: Path, name: str) -> Path:
    folder = origin.parent / name
    git(origin.parent, "clone", "--quiet", str(origin), name)
    return folder


@pytest.fixture(scope="module")
def shares(origin: Path) -> dict[str, str]:
    """What each machine said while it built its share. The twin built the first one's at the same time, as it were, without its
    results, and pushed them over those."""
    said = {}
    twin = clone(origin, "twin")
    said["twin"] = run(twin, sys.executable, "-m", "dvc", "repro", TARGET.format(SHARES["first"]))
    for name, compress in SHARES.items():
        jobs = "JOBS=2" if name == "third" else "JOBS=1"
        said[name] = make(clone(origin, name), "share", jobs, f"TARGETS={TARGET.format(compress)}")
        if name == "first":
            run(twin, sys.executable, "-m", "dvc", "push", "--run-cache")
    return said


@pytest.fixture(scope="module")
def server(origin: Path) -> Iterator[str]:
    """One MLflow server for all machines."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = origin.parent / "mlflow"
    folder.mkdir()
    words = ["server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "mlflow", *words, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        process = subprocess.Popen(command, cwd=folder, env=kill._environment(), stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


def published(server: str, folder: Path) -> list[str]:
    """The names of the present grid's runs on the server."""
    asked = {"experiment_ids": [json.loads((folder / "outputs/track/published.json").read_text())["experiment_id"]]}
    asked |= {"filter": "tags.`winnow.current` = 'true'", "max_results": 1000}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server}/api/2.0/mlflow/runs/search", json.dumps(asked).encode(), headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30) as answer:
        return [run["info"]["run_name"] for run in json.load(answer)["runs"]]


def trained(said: str) -> list[tuple[str, str]]:
    return re.findall(TRAINING + r"(.*)$", said, re.MULTILINE)


def test_a_machine_trains_its_share_alone(origin: Path, shares: dict[str, str]) -> None:
    assert [stage for stage, _ in trained(shares["first"])] == ["train", "revive", "compress"]
    assert trained(shares["second"]) == [("compress", f"--revive finetune --compress {SHARES['second']} --seed 0")]
    # Side by side: the commands are not shown, but what the stages say.
    assert set(re.findall(r"^\[(\w+)@\S*\] \w+: epoch", shares["third"], re.MULTILINE)) == {"compress"}


def test_two_machines_that_built_the_same_made_the_same(origin: Path, shares: dict[str, str]) -> None:
    assert trained(shares["twin"]) == trained(shares["first"])
    models = sorted((origin.parent / "first/outputs").rglob("model.*"))
    assert len(models) >= 4 * 2 + 1  # of four stages, and the ONNX file
    for path in models:
        assert path.read_bytes() == (origin.parent / "twin" / path.relative_to(origin.parent / "first")).read_bytes(), path


def test_a_fourth_assembles_everything_and_each_variant_is_published_once(
    origin: Path, shares: dict[str, str], server: str
) -> None:
    folder = clone(origin, "fourth")
    said = make(folder, "assemble", MLFLOW_TRACKING_URI=server)
    assert not trained(said), said[-3000:]
    for name, compress in SHARES.items():
        for path in sorted((origin.parent / name / "outputs/export" / f"finetune-{compress}-0").rglob("*.onnx")):
            assert path.read_bytes() == (folder / path.relative_to(origin.parent / name)).read_bytes(), path
    built = {name: f"finetune-{compress}-0" for name, compress in SHARES.items()}
    assert sorted(published(server, folder)) == sorted(built.values())
    # Another machine that has it all, and the server's address: nothing is added.
    fifth = clone(origin, "fifth")
    said = make(fifth, "assemble", MLFLOW_TRACKING_URI=server)
    assert not trained(said) and "0 variants added, 0 replaced, 3 there already" in said
    assert sorted(published(server, fifth)) == sorted(built.values())
