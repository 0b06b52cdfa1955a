"""GPUs dealt out to programs; NVIDIA's MPS daemon started, used and ended. A script stands in for NVIDIA's program but on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import gpu_sharing
from pipeline.config import Runtime
from pipeline.errors import InputError
from pipeline.gpu_sharing import dealt, places, shared, visible

CONTROL = """#!/bin/sh
# As NVIDIA's: -d starts a daemon for $CUDA_MPS_PIPE_DIRECTORY; commands on standard input fail where none answers there.
pipe=${CUDA_MPS_PIPE_DIRECTORY:-$DEFAULT_PIPE}
echo "$* $CUDA_VISIBLE_DEVICES" >>"$CALLS"
if [ "$1" = -d ]; then test -d "$pipe" && test ! -e "$pipe/control" && touch "$pipe/control"; exit; fi
read -r command
test -e "$pipe/control" || exit 1
case $command in quit*) rm "$pipe/control" ;; esac
"""
RUNTIME = Runtime(device="auto", threads=1, workers=0, processes=1, hosts=1, save_s=60, launch="eager")


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the daemon's folder will be; its default folder is tmp_path/default."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / gpu_sharing.CONTROL
    program.write_text(CONTROL)
    program.chmod(0o755)
    (tmp_path / "default").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("DEFAULT_PIPE", str(tmp_path / "default"))
    for name in ("CUDA_MPS_PIPE_DIRECTORY", gpu_sharing.SWITCH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(gpu_sharing, "PROBE", "")  # a program that finds the GPU
    return tmp_path / f"winnow-mps-{os.getuid()}"


def test_devices_are_dealt_in_turn_and_stay_whole() -> None:
    assert [more["CUDA_VISIBLE_DEVICES"] for more in dealt(["a", "b"], 3)] == ["a", "b", "a"]
    assert [more["CUDA_VISIBLE_DEVICES"] for more in dealt(["a", "b", "c", "d", "e"], 3, each=2)] == ["a,b", "c,d", "a,b"]
    assert dealt(["a"], 2, each=2) == dealt([], 2) == [{}, {}]


def test_a_daemon_of_our_own_is_started_told_its_devices_and_ended(daemon: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with shared(["GPU-1", "GPU-2"]) as more:
        assert more["CUDA_MPS_PIPE_DIRECTORY"] == str(daemon / "pipe") and Path(more["CUDA_MPS_LOG_DIRECTORY"]).is_dir()
        assert (daemon / "pipe" / "control").exists()
    assert not (daemon / "pipe" / "control").exists()
    assert "-d GPU-1,GPU-2\n" in (daemon.parent / "calls").read_text()
    assert capfd.readouterr().out == f"MPS: by a daemon in {daemon / 'pipe'}\n"
    assert daemon.stat().st_mode & 0o077 == 0


def test_the_last_program_ends_the_daemon_also_one_that_a_kill_left(daemon: Path) -> None:
    script = "import time; from pipeline import gpu_sharing; gpu_sharing.PROBE = ''; import tempfile; "
    script += f"tempfile.gettempdir = lambda: {str(daemon.parent)!r}\n"
    script += "with gpu_sharing.shared(['GPU-1']): print('in', flush=True); time.sleep(600)"
    root = str(Path(gpu_sharing.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline().startswith("MPS: by") and other.stdout.readline() == "in\n"
        with shared(["GPU-1"]) as more:
            assert more
        assert (daemon / "pipe" / "control").exists()  # the other one's
        other.kill()
    with shared(["GPU-1"]) as more:
        assert more
    assert not (daemon / "pipe" / "control").exists()
    assert (daemon.parent / "calls").read_text().count("-d ") == 1


def test_a_daemon_that_answers_already_is_used_and_left_alone(daemon: Path, capfd: pytest.CaptureFixture[str]) -> None:
    running = daemon.parent / "default" / "control"
    running.touch()
    with shared(["GPU-1"]) as more:
        assert more == {}
    assert running.exists() and not daemon.exists()
    assert capfd.readouterr().out == "MPS: by the daemon that runs already\n"


def test_where_it_does_not_work_programs_take_turns(
    daemon: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_sharing, "PROBE", "raise SystemExit(1)")
    with shared(["GPU-1"]) as more:
        assert more == {}
    assert not (daemon / "pipe" / "control").exists()
    daemon.chmod(0o755)  # as if somebody else could write there
    with shared(["GPU-1"]) as more:
        assert more == {}
    monkeypatch.setenv(gpu_sharing.SWITCH, "off")
    with shared(["GPU-1"]) as more:
        assert more == {}
    monkeypatch.delenv(gpu_sharing.SWITCH)
    monkeypatch.setenv("PATH", str(daemon.parent))
    with shared(["GPU-1"]) as more:
        assert more == {}
    assert [line.rpartition(": ")[2] for line in capfd.readouterr().out.splitlines()] == ["programs on one GPU take turns"] * 4


def test_without_gpus_too_many_threads_are_told(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sharing, "usable_cores", lambda: 4)
    for programs, told in ((4, ""), (5, "5 stages at once use 5 threads of 4 cores: fewer are as fast\n")):
        with places(programs, RUNTIME.model_copy(update={"device": "cpu"})) as given:
            assert given() == [{}] * programs
        assert capfd.readouterr().out == told
    with pytest.raises(InputError, match="runtime.hosts = 2"), places(2, RUNTIME.model_copy(update={"hosts": 2})):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_programs_beside_each_other_compute_what_one_computes() -> None:
    script = "import torch; torch.manual_seed(0); x = torch.randn(512, 512, device='cuda'); "
    script += "[x := torch.tanh(x @ x) for _ in range(200)]; print(x.double().sum().item().hex(), torch.cuda.device_count())"

    def begin(more: dict[str, str]) -> "subprocess.Popen[str]":
        return subprocess.Popen([sys.executable, "-c", script], env=os.environ | more, stdout=subprocess.PIPE, text=True)

    with places(4, RUNTIME) as given:
        said = [process.communicate()[0] for process in [begin(more) for more in given()]]
    assert visible() and said[0].endswith(" 1\n")
    assert said == [begin(dealt(visible(), 1)[0]).communicate()[0]] * 4
