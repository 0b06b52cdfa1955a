"""Kinds of faults with more than one process: under DVC, between two processes that train together, at a tracking server."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from tests import kill
from tests.fault_chain import RECORDS, STAGES, TRAINING, Stage, same, small
from tests.fault_kinds import KILLED, Case, damage
from tests.fault_workspace import Ended, Process, Workspace

TOGETHER = tuple(stage.name for stage in TRAINING)
CHAIN = tuple(stage.name for stage in STAGES if stage.name not in ("code", "repository"))  # which DVC builds and caches
CUT = 24  # requests of a publication of two variants in two precisions after which the server may die; it makes more


def dvc_killed(case: Case) -> None:
    """SIGKILL to `dvc repro` and all that it started; the next one goes on."""
    calm, moment = _before_dvc(case), case.draw.uniform(1, 12)
    first = case.workspace.dvc("repro", "--single-item", "--force", case.stage.target).end(moment)
    case.fired, case.told = first.code == KILLED, f"after {moment:.1f} s"
    case.whole(calm)
    again = _repro(case)
    case.expect(again.code == 0, f"afterwards: {again.said[-800:]}")
    case.right(calm)
    case.nothing_again(first, again)


def dvc_twice(case: Case) -> None:
    """Two `dvc repro` of the same stage at once: one may be sent away, and then nothing is wrong."""
    calm = _before_dvc(case)
    words = ("repro", "--single-item", "--force", case.stage.target)
    both = [case.workspace.dvc(*words), case.workspace.dvc(*words)]
    ended = [process.end() for process in both]
    case.fired, case.told = True, f"exit codes {', '.join(str(one.code) for one in ended)}"
    case.expect(any(one.code == 0 for one in ended), f"neither succeeds: {ended[0].said[-600:]}")
    for one in ended:
        case.expect(one.code == 0 or "ERROR" in one.said, f"ends with {one.code} and says {one.said[-600:]}")
    again = _repro(case)
    case.expect(again.code == 0, f"afterwards: {again.said[-800:]}")
    case.right(calm)


def dvc_damaged_output(case: Case) -> None:
    """A damaged output of an earlier stage: `dvc repro` sees it and puts the right one there."""
    calm = _before_dvc(case)
    path = case.draw.choice(sorted(path for pattern in case.stage.reads for path in case.workspace.project.glob(pattern)))
    content, name = path.read_bytes(), str(path.relative_to(case.workspace.project))
    case.fired, case.told = True, f"{damage(path, case.draw)} of {name}"
    _touch(path)
    ended = _repro(case)
    case.expect(ended.code == 0, f"afterwards: {ended.said[-800:]}")
    case.expect(same(name, path.read_bytes(), content), f"accepted in silence: {case.told}")
    case.right(calm)


def dvc_damaged_cache(case: Case) -> None:
    """A damaged file in DVC's cache, and the output gone that it stands for: rebuilt, or refused by name."""
    calm = _before_dvc(case)
    project = case.workspace.project
    paths = {path for pattern in case.stage.reads for path in project.glob(pattern)}
    path = case.draw.choice(sorted(paths))
    content, name = path.read_bytes(), str(path.relative_to(project))
    cached = next((file for file in (project / ".dvc/cache/files/md5").glob("*/*") if file.read_bytes() == content), None)
    if cached is None:
        return
    case.fired, case.told = True, f"{damage(cached, case.draw)} of the cached {name}"
    path.unlink()
    ended = _repro(case)
    if ended.code == 0 and path.read_bytes() != content:  # DVC trusts its cache, and no stage had to run; one that reads it
        shutil.rmtree(project / case.stage.outs[0], ignore_errors=True)
        ended = case.workspace.run(case.stage.words)
    if ended.code:
        case.expect(str(Path(name).parent) in ended.said, f"refused without a name: {ended.said[-800:]}")
        path.unlink(missing_ok=True)  # as the message advises
        shutil.rmtree(project / ".dvc/cache")
        ended = _repro(case)
        case.expect(ended.code == 0 and path.is_file(), f"afterwards: {ended.said[-800:]}")
        case.expect(same(name, path.read_bytes(), content), f"wrong result: {name}")
    if not name.endswith("record.json"):  # made anew, it has other times
        case.right(calm)


def rank_fails(what: str, told: str) -> Callable[[Case], None]:
    """One of two processes has a NaN in its gradient, or dies: a message, nothing overwritten, and it goes on."""

    def fault(case: Case) -> None:
        case.stage = next(stage for stage in TRAINING if stage.name == case.stage.name)
        workspace, stage = case.workspace, case.stage
        rank, step = case.draw.randrange(2), case.draw.randrange(40)
        reference = _two_processes(case)
        workspace.restore(stage, case.old)
        before = workspace.outputs(stage)
        words = (f"stages.{stage.name}", *stage.words[1:])
        first = workspace.process(*words, fault={what: step, "rank": rank}).end()
        case.fired, case.told = first.code != 0, f"rank {rank} at step {step}"
        if case.fired:
            case.expect(first.code == 2, f"exit code {first.code}, not 2: {first.said[-800:]}")
            case.expect(told.format(rank=rank) in first.said, f"does not say {told.format(rank=rank)}: {first.said[-600:]}")
            case.expect(workspace.outputs(stage) == before, "overwrote its earlier outputs")
        second = workspace.process(*words).end()
        case.expect(second.code == 0, f"afterwards: exit code {second.code}: {second.said[-800:]}")
        present = workspace.outputs(stage)
        for name, content in reference.items():
            case.expect(same(name, present.get(name), content), f"wrong result: {name}")
        case.problems += workspace.leftovers()
        case.nothing_again(first, second)
        _parameters(workspace, 1)

    return fault


_together: dict[tuple[Path, str], dict[str, bytes]] = {}


def _two_processes(case: Case) -> dict[str, bytes]:
    """What two undisturbed processes give; params.yaml says from here on that there are two."""
    workspace, stage = case.workspace, case.stage
    _parameters(workspace, 2)
    if (workspace.home, stage.name) not in _together:
        workspace.restore(stage, old=False)
        workspace.process(f"stages.{stage.name}", *stage.words[1:]).finish()
        _together[workspace.home, stage.name] = workspace.outputs(stage)
    return _together[workspace.home, stage.name]


def _parameters(workspace: Workspace, processes: int) -> None:
    params = small()
    params["runtime"]["processes"] = processes
    (workspace.project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def server_dies(case: Case) -> None:
    """SIGKILL to an `mlflow server` after so many requests of a publication; then it is published again, each variant once."""
    case.stage = Stage(("track",), ("outputs/track",))
    workspace, after = case.workspace, case.draw.randrange(1, CUT)
    workspace.restore(case.stage, old=False)
    shutil.rmtree(workspace.home / "mlflow", ignore_errors=True)
    with _server(workspace) as server, Proxy(server) as proxy:
        proxy.left = after
        first = workspace.process("stages.track", MLFLOW_TRACKING_URI=proxy.address).end()
        case.fired, case.told = proxy.left == 0, f"after {after} requests, exit code {first.code}"
        told = "not published" in first.said if first.code == 0 else first.code == 2 and "MLflow" in first.said
        case.expect(told or not case.fired, f"exit code {first.code}: {first.said[-800:]}")
    with _server(workspace) as server:
        second = workspace.process("stages.track", MLFLOW_TRACKING_URI=server.address).end()
        case.expect(second.code == 0, f"afterwards: exit code {second.code}: {second.said[-800:]}")
        names = Counter(run["name"] for run in server.runs() if run["top"])
        wanted = {f"restart-{name}{form}" for name in ("none-0", "diet-0") for form in ("", "-fp16")}
        case.expect(set(names) == wanted and set(names.values()) == {1}, f"published: {dict(names)}")
        case.expect(all(run["status"] == "FINISHED" for run in server.runs()), "published: a run that is not finished")
        versions = server.versions()
        case.expect(len(versions) == len(set(versions)) == len(wanted), f"published: versions of {sorted(versions)}")
    read = {path: path.read_bytes() for path in workspace.project.glob(RECORDS)}
    kept = {path: (workspace.base / path.relative_to(workspace.project)).read_bytes() for path in read}
    case.expect(read == kept, "wrong result: a record was changed")


class _Server:
    """A real `mlflow server` in the workspace's home."""

    def __init__(self, process: Process, address: str) -> None:
        self.process, self.address = process, address
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def ask(self, call: str, **values: object) -> dict:
        body = json.dumps(values).encode() if values else None
        request = urllib.request.Request(f"{self.address}/api/2.0/mlflow/{call}", body, {"Content-Type": "application/json"})
        with self.open(request, timeout=30) as answer:
            return json.load(answer)

    def runs(self) -> list[dict]:
        found = self.ask("experiments/search", max_results=100)["experiments"]
        runs = self.ask("runs/search", experiment_ids=[one["experiment_id"] for one in found], max_results=1000).get("runs", [])
        tags = [{tag["key"]: tag["value"] for tag in run["data"].get("tags", [])} for run in runs]
        return [
            {"name": tag.get("winnow.variant"), "top": "mlflow.parentRunId" not in tag, "status": run["info"]["status"]}
            for run, tag in zip(runs, tags, strict=True)
        ]

    def versions(self) -> list[str]:
        """The run of each version of the registered model."""
        found = self.ask("model-versions/search?max_results=1000").get("model_versions", [])
        return [version["run_id"] for version in found]


@contextlib.contextmanager
def _server(workspace: Workspace) -> Iterator[_Server]:
    folder = workspace.home / "mlflow"
    folder.mkdir(exist_ok=True)
    port = _free_port()
    words = ["server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    words += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    process = workspace.process("mlflow", *words, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")  # half a minute of start-up less
    server = _Server(process, f"http://127.0.0.1:{port}")
    try:
        for _ in range(480):
            assert process.process.poll() is None, process.log.read_text()
            with contextlib.suppress(OSError):
                server.open(f"{server.address}/health", timeout=2).close()
                break
            time.sleep(0.25)
        yield server
    finally:
        process.end(0)


class Proxy:
    """Hands requests on to a server, and after `left` of them kills it. It counts the client's requests, not its connections."""

    def __init__(self, server: _Server) -> None:
        self.server, self.left = server, -1
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.target = ("127.0.0.1", int(server.address.rpartition(":")[2]))

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listening.accept()
                try:
                    server = socket.create_connection(self.target)
                except OSError:
                    client.close()
                    continue
                for ends in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, asking: bool) -> None:
        with contextlib.suppress(OSError), source, target:
            while part := source.recv(65536):
                asked = len(re.findall(rb"(?:GET|POST|PATCH|PUT|DELETE) (?!/health)\S+ HTTP/1", part)) if asking else 0
                if asked and self.left > 0:
                    self.left = max(self.left - asked, 0)
                    if self.left == 0:
                        target.sendall(part[: len(part) // 2])
                        kill.os.killpg(self.server.process.process.pid, kill.signal.SIGKILL)
                        return
                target.sendall(part)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _before_dvc(case: Case):
    calm = case.workspace.calm(case.stage, case.old)
    case.workspace.restore(case.stage, case.old, with_dvc=True)
    return calm


def _repro(case: Case) -> Ended:
    """`dvc repro STAGE`, after what a killed one has left in the way was removed, as DVC asks for."""
    for _ in range(kill.PATIENCE):
        ended = case.workspace.dvc("repro", case.stage.target).end()
        path = next((path for pattern, path in kill.LEFTOVERS.items() if re.search(pattern, ended.said)), None)
        if ended.code == 0 or path is None:
            break
        (case.workspace.project / path).unlink()
    return ended


def _touch(path: Path) -> None:
    """DVC looks again at a file whose times have changed."""
    subprocess.run([sys.executable, "-c", "import os, sys; os.utime(sys.argv[1])", str(path)], check=True)


KINDS = {
    "dvc repro killed": (3, CHAIN, dvc_killed),
    "dvc repro twice": (2, CHAIN, dvc_twice),
    "damaged under dvc": (3, tuple(stage.name for stage in STAGES if stage.reads and stage.name in CHAIN), dvc_damaged_output),
    "damaged cache": (4, tuple(stage.name for stage in STAGES if stage.reads and stage.name in CHAIN), dvc_damaged_cache),
    "NaN on one rank": (2, TOGETHER, rank_fails("nan", "the loss is nan")),
    "rank killed": (1, TOGETHER, rank_fails("die", "process {rank} of 2 died (signal 9)")),
    "server dies": (2, ("report",), server_dies),
}
