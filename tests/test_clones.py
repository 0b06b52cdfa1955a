"""Three clones build a share each; a fourth assembles everything from a folder remote without a training, and publishes it once."""

import argparse
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
TRAINING = r"^> python -m stages\.(train|revive|compress) "


def run(folder: Path, *words: str, **more: str) -> str:
    """What a command says that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=kill._environment() | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


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
    run(home / "origin", "dvc", "remote", "add", "-d", "shared", str(home / "remote"))
    git(home / "origin", "commit", "--quiet", "--all", "--message", "a small grid and a remote")
    return home / "origin"


def clone(origin: Path, name: str) -> Path:
    folder = origin.parent / name
    git(origin.parent, "clone", "--quiet", str(origin), name)
    return folder


@pytest.fixture(scope="module")
def shares(origin: Path) -> dict[str, str]:
    """What each of the three machines said while it built its share."""
    said = {}
    for name, compress in SHARES.items():
        folder = clone(origin, name)
        said[name] = run(folder, "dvc", "repro", "--pull", "--allow-missing", f"profile@finetune-{compress}-0")
        run(folder, "dvc", "push", "--run-cache")
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


def test_a_machine_trains_its_share_alone(shares: dict[str, str]) -> None:
    trained = {name: re.findall(TRAINING + r"(.*)$", said, re.MULTILINE) for name, said in shares.items()}
    assert [stage for stage, _ in trained["first"]] == ["train", "revive", "compress"]
    for name in ("second", "third"):
        assert trained[name] == [("compress", f"--revive finetune --compress {SHARES[name]} --seed 0")], trained[name]


def test_a_fourth_assembles_everything_and_each_variant_is_published_once(
    origin: Path, shares: dict[str, str], server: str
) -> None:
    folder = clone(origin, "fourth")
    said = run(folder, "dvc", "repro", "--pull", MLFLOW_TRACKING_URI=server)
    assert not re.search(TRAINING, said, re.MULTILINE), said[-3000:]
    for name, compress in SHARES.items():
        for stage in ("compress", "export", "profile"):
            built = sorted((origin.parent / name / "outputs" / stage / f"finetune-{compress}-0").rglob("*.*"))
            assert built
            for path in built:
                assert path.read_bytes() == (folder / path.relative_to(origin.parent / name)).read_bytes(), path
    assert "3 variants added" in said
    again = run(folder, "dvc", "repro", "--single-item", "--force", "track", MLFLOW_TRACKING_URI=server)
    assert "0 variants added, 0 replaced, 3 there already" in again
