"""Two processes train one network as one process does: with every method, after a death, on two hosts."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_chain import call, parameters, write_parameters
from together import methods

from pipeline import distributed, files
from pipeline.data.batches import FORMAT, Batches, Prepared

TESTS = Path(__file__).parent
EQUAL = 1e-5  # of weights and their changes, which are about 1: fp32 sums in another order


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def ends(tiny: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what every training ends with, of one process and of two together."""
    out = tmp_path_factory.mktemp("ends")
    data = {key: value for key, value in asdict(tiny).items() if key != "folder"}
    sizes = {path.name: path.stat().st_size for path in tiny.folder.glob("*.npy")}
    files.write_json(tiny.folder / "data.json", data | {"format": FORMAT, "files": sizes})
    words = [sys.executable, str(TESTS / "together.py"), str(tiny.folder), str(out)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    both = [subprocess.Popen(words, env=environment(RANK=str(rank), **meeting)) for rank in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    return out


@pytest.mark.parametrize(("family", "method"), methods())
def test_two_processes_end_alike_and_as_one(family: str, method: str, ends: Path) -> None:
    alone, first, second = (load_file(ends / f"{family}-{method}-{which}.safetensors") for which in ("alone", 0, 1))
    assert alone.keys() == first.keys() == second.keys()
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=EQUAL, atol=EQUAL, msg=name)


def test_two_processes_killed_within_epochs_end_bit_for_bit_as_undisturbed_ones(ends: Path) -> None:
    found = [load_file(ends / f"{name}-{rank}.safetensors") for name in ("undisturbed", "resumed") for rank in range(2)]
    for name, tensor in found[0].items():
        assert all(torch.equal(tensor, other[name]) for other in found), name
    kept = load_file(ends / "kept-0.safetensors")  # with what is each process's own
    parts = [{name[6:]: tensor for name, tensor in kept.items() if name.startswith(f"own.{rank}.")} for rank in range(2)]
    assert parts[0].keys() == parts[1].keys() > {"sums", "random", "statistics.0"}
    assert not any(torch.equal(tensor, parts[1][name]) for name, tensor in parts[0].items())


def settings(**runtime: float) -> dict[str, Any]:
    """A chain without batch norms: their statistics would depend on how a batch is divided."""
    params = parameters()
    params["model"] = {"name": "lenet5", "variant": "classic"}
    params["data"] |= {"image_size": 28, "validation": 0.15}
    params["train"]["fit"] |= {"epochs": 4, "lr": 0.02}
    params["revive"]["restart"]["fit"] = params["train"]["fit"] | {"epochs": 1, "lr": 0.005}
    params["variants"]["revive"] = ["restart"]
    params["profile"]["control"] = "restart-none"
    params["runtime"] |= runtime
    return params


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose data is prepared, with what one process makes of the stages train and revive."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "data/start").mkdir(parents=True)
    write_parameters(folder, settings())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in ("check",), ("prepare",), ("coverage",), ("train", "0"), ("revive", "restart", "0"):
            assert call(*words) == 0
    return folder


def workspace(folder: Path, prepared: Path, **runtime: float) -> Path:
    """The same project before its trainings, with these parameters of `runtime`."""
    (folder / "data/start").mkdir(parents=True)
    for stage in ("check", "prepare", "coverage"):
        shutil.copytree(prepared / "outputs" / stage, folder / "outputs" / stage)
    write_parameters(folder, settings(**runtime))
    return folder


def background(folder: Path, *words: str, **more: str) -> subprocess.Popen[bytes]:
    """One stage in a process of its own; what it says is in `folder`/log."""
    command = [sys.executable, "-m", f"stages.{words[0]}", *words[1:]]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment(**more), stdout=log, stderr=log)


def stage(folder: Path, *words: str, **more: str) -> int:
    """One stage, of which this process starts the others; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in environment(**more).items():
            patch.setenv(name, value)
        return call(*words)


def children(pid: int) -> list[int]:
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


def test_the_stages_train_together_and_after_a_death_go_on(alone: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = workspace(tmp_path, alone, processes=2, save_s=0.001)
    process = background(folder, "train", "0")
    while "epoch 2/4" not in (folder / "log").read_text():
        assert process.poll() is None, (folder / "log").read_text()
        time.sleep(0.02)
    trained = [pid for pid in children(process.pid) if b"stages.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(trained) == 2
    os.kill(max(trained), signal.SIGKILL)
    assert process.wait(60) == 2
    said = (folder / "log").read_text().splitlines()[-1]
    assert said.startswith("stages.train 0: process 1 of 2 died (signal 9)") and "goes on where it was saved last" in said
    assert not (folder / "outputs/train/0").exists()

    capfd.readouterr()
    assert stage(folder, "train", "0") == 0
    said = capfd.readouterr().out
    assert "goes on after epoch" in said and "epoch 1/4" not in said
    assert said.count("epoch 4/4") == 1  # one of them tells
    equal(alone, folder, "train/0")


def equal(alone: Path, together: Path, name: str) -> None:
    """Weights, and what the records say of them."""
    one, two = (load_file(at / "outputs" / name / "model/model.safetensors") for at in (alone, together))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=EQUAL, atol=EQUAL, msg=key)
    first, second = (files.read_json(at / "outputs" / name / "record.json") for at in (alone, together))
    assert second["metrics"]["test_accuracy"] == pytest.approx(first["metrics"]["test_accuracy"], abs=0.003)
    for row, other in zip(first["history"], second["history"], strict=True):
        assert other["train_loss"] == pytest.approx(row["train_loss"], abs=1e-4)
        assert other["train_accuracy"] == pytest.approx(row["train_accuracy"], abs=0.003)


def test_two_hosts_need_no_disk_in_common(alone: Path, tmp_path: Path) -> None:
    hosts = [workspace(tmp_path / name, alone, hosts=2) for name in ("first", "second")]
    for host in hosts:
        shutil.copytree(alone / "outputs/train", host / "outputs/train")
    words, address = ("revive", "restart", "0"), f"127.0.0.1:{free_port()}"
    second = background(hosts[1], *words, WINNOW_HOST="1", WINNOW_FIRST_HOST=address)
    assert stage(hosts[0], *words, WINNOW_HOST="0", WINNOW_FIRST_HOST=address) == 0
    assert second.wait(60) == 0, (hosts[1] / "log").read_text()
    equal(alone, hosts[0], "revive/restart-0")
    assert not (hosts[1] / "outputs/revive").exists() and not list((hosts[1] / "outputs").glob("resume/*"))


@pytest.mark.parametrize(
    ("runtime", "batch", "said"),
    [
        ({"processes": 2}, 63, "train.fit.batch_size = 63: must be a multiple of the 2 processes of runtime"),
        (
            {"hosts": 2},
            64,
            "runtime.hosts = 2: on each host set WINNOW_HOST to its number, 0 to 1, and WINNOW_FIRST_HOST to NAME:PORT",
        ),
    ],
    ids=["batch", "hosts"],
)
def test_what_cannot_be_shared_is_refused_once(
    runtime: dict[str, int], batch: int, said: str, alone: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, params = workspace(tmp_path, alone), settings(**runtime)
    params["train"]["fit"]["batch_size"] = batch
    write_parameters(folder, params)
    assert stage(folder, "train", "0") == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("stages.")]
    assert len(lines) == 1 and said in lines[0], lines
    assert not (folder / "outputs/train").exists()


def test_parts_of_a_batch_are_the_batch(prepared: Prepared) -> None:
    batches = Batches(prepared, "validation", 50, "cpu", None, shuffle=False, seed=0)
    parts = [lambda length, rank=rank: slice(rank * length // 3, (rank + 1) * length // 3) for rank in range(3)]
    divided = [list(batches.epoch(0, part)) for part in parts]
    for index, (images, labels) in enumerate(batches.epoch(0)):
        mine = [each[index] for each in divided]
        assert torch.equal(torch.cat([images for images, _ in mine]), images)
        assert torch.equal(torch.cat([labels for _, labels in mine]), labels)


def test_alone_nothing_is_exchanged() -> None:
    assert (distributed.count(), distributed.rank(), distributed.part(7)) == (1, 0, slice(0, 7))
    assert distributed.of_first(lambda: 3) == 3 and distributed.total({"a": 1.5}) == {"a": 1.5}
