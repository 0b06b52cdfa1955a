"""Two processes train one network as one process does: with every method, after a death, on two hosts."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_chain import call, parameters, write_parameters
from together import methods
from torch import Tensor

from pipeline import distributed, files
from pipeline.data.batches import Batches, Prepared

TESTS = Path(__file__).parent
EQUAL = 1e-5  # of weights and their changes, which are about 1: fp32 sums in another order
Tensors = dict[str, Tensor]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def ends(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders with what every training ends with: of one process, and of two together."""
    alone, pair = (tmp_path_factory.mktemp(name) for name in ("alone", "pair"))
    words = [sys.executable, str(TESTS / "together.py"), str(prepared.folder)]
    subprocess.run([*words, str(alone)], env=environment(), check=True)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    both = [subprocess.Popen([*words, str(pair)], env=environment(RANK=str(rank), **meeting)) for rank in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    return alone, pair


@pytest.mark.parametrize(("family", "method"), methods())
def test_two_processes_end_alike_and_as_one(family: str, method: str, ends: tuple[Path, Path]) -> None:
    names = [(ends[0], 0), (ends[1], 0), (ends[1], 1)]
    alone, first, second = (safetensors.torch.load_file(at / f"{family}-{method}-{rank}.safetensors") for at, rank in names)
    assert alone.keys() == first.keys() == second.keys()
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=EQUAL, atol=EQUAL, msg=name)


def settings(**runtime: int) -> dict[str, Any]:
    """A chain without batch norms: their statistics would depend on how a batch is divided."""
    params = parameters()
    params["model"] = {"name": "lenet5", "variant": "classic"}
    params["data"] |= {"image_size": 28, "validation": 0.15}
    params["train"]["fit"] |= {"epochs": 4, "lr": 0.02}
    params["revive"]["restart"]["fit"] = params["train"]["fit"] | {"epochs": 1}
    params["variants"]["revive"] = ["restart"]
    params["profile"]["control"] = "restart-none"
    params["runtime"] |= runtime
    return params


def workspace(folder: Path, params: dict[str, Any]) -> Path:
    """A project whose data is prepared."""
    (folder / "data/start").mkdir(parents=True)
    write_parameters(folder, params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in ("check", "prepare", "coverage"):
            assert call(stage) == 0
    return folder


def stage(folder: Path, *words: str, **more: str) -> subprocess.Popen[bytes]:
    """One stage in the background; what it says is in `folder`/log."""
    command = [sys.executable, "-m", f"stages.{words[0]}", *words[1:]]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment(**more), stdout=log, stderr=log)


def weights(folder: Path, name: str = "train/0") -> Tensors:
    return safetensors.torch.load_file(folder / "outputs" / name / "model" / "model.safetensors")


def same(first: Tensors, second: Tensors) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=EQUAL, atol=EQUAL, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What one process makes of the stages train and revive."""
    folder = workspace(tmp_path_factory.mktemp("alone"), settings())
    assert stage(folder, "train", "0").wait(300) == 0 and stage(folder, "revive", "restart", "0").wait(300) == 0
    yield folder


def test_the_stages_train_together_as_the_parameters_say(alone: Path, tmp_path: Path) -> None:
    folder = workspace(tmp_path, settings(processes=2))
    assert stage(folder, "train", "0").wait(300) == 0, (folder / "log").read_text()
    assert (folder / "log").read_text().count("epoch 4/4") == 1  # one of them tells
    assert stage(folder, "revive", "restart", "0").wait(300) == 0, (folder / "log").read_text()
    for name in ("train/0", "revive/restart-0"):
        same(weights(alone, name), weights(folder, name))
        one, two = (files.read_json(at / "outputs" / name / "record.json") for at in (alone, folder))
        assert two["metrics"]["test_accuracy"] == pytest.approx(one["metrics"]["test_accuracy"], abs=0.003)
        for row, other in zip(one["history"], two["history"], strict=True):
            assert other["train_loss"] == pytest.approx(row["train_loss"], abs=1e-4)
            assert other["train_accuracy"] == pytest.approx(row["train_accuracy"], abs=0.003)


def children(pid: int) -> list[int]:
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


def test_a_death_is_named_and_the_work_goes_on_after_the_last_whole_epoch(alone: Path, tmp_path: Path) -> None:
    folder = workspace(tmp_path, settings(processes=2))
    process = stage(folder, "train", "0")
    while "epoch 2/4" not in (folder / "log").read_text():
        assert process.poll() is None, (folder / "log").read_text()
        time.sleep(0.02)
    trained = [pid for pid in children(process.pid) if b"stages.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(trained) == 2
    os.kill(max(trained), signal.SIGKILL)
    assert process.wait(60) == 2
    said = (folder / "log").read_text().splitlines()[-1]
    assert said.startswith("stages.train 0: process 1 of 2 died (signal 9)") and "goes on after the last whole epoch" in said
    assert not (folder / "outputs/train/0").exists()
    assert stage(folder, "train", "0").wait(300) == 0
    said = (folder / "log").read_text()
    assert "goes on after epoch" in said and "epoch 1/4" not in said
    same(weights(alone), weights(folder))


def test_two_hosts_need_no_disk_in_common(alone: Path, tmp_path: Path) -> None:
    hosts = [workspace(tmp_path / name, settings(hosts=2)) for name in ("first", "second")]
    address = f"127.0.0.1:{free_port()}"
    both = [stage(at, "train", "0", WINNOW_HOST=str(i), WINNOW_FIRST_HOST=address) for i, at in enumerate(hosts)]
    assert [process.wait(300) for process in both] == [0, 0], [(at / "log").read_text() for at in hosts]
    same(weights(alone), weights(hosts[0]))
    assert not (hosts[1] / "outputs/train").exists() and not list((hosts[1] / "outputs").glob("resume/*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"processes": 3}, "train.fit.batch_size = 64: must be a multiple of the 3 processes of runtime"),
        ({"hosts": 2}, "runtime.hosts = 2: on each host set WINNOW_HOST to its number, 0 to 1, and WINNOW_FIRST_HOST to NAME:PORT"),
    ],
)
def test_what_cannot_be_shared_is_refused_once(change: dict[str, int], said: str, tmp_path: Path) -> None:
    folder = workspace(tmp_path, settings(**change))
    assert stage(folder, "train", "0").wait(60) == 2
    lines = [line for line in (folder / "log").read_text().splitlines() if line.startswith("stages.")]
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
