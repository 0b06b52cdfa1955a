"""A real Triton server on this machine's loopback, installed from the package index where it is not there yet.

    python -m tests.served [--install] [REPOSITORY]

installs it into .triton/ and serves REPOSITORY (repository/ by default) on ports 8000 (HTTP) and 8001 (gRPC) until it is
interrupted. It has no ONNX Runtime backend: one in Python (tests/tritonserver/backend/) takes the same repository.
"""

import argparse
import contextlib
import fcntl
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = Path(__file__).parent / "tritonserver"
PLACE = ROOT / ".triton"
LONGEST_S = 300  # an installation
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class Unavailable(Exception):
    """No server can be installed here; says why."""


def install(place: Path = PLACE) -> Path:
    """The folder with the server's packages, filled where it is not what requirements.txt says; others wait meanwhile.

    Takes some seconds and 270 MB. Raises `Unavailable` without the package index, and on machines that the server is not made for.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise Unavailable(f"Triton's server is made for Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    wanted = f"{(FILES / 'requirements.txt').read_text()}python {PYTHON}\n"
    packages, installed = place / "packages", place / "packages" / "installed.txt"
    place.mkdir(exist_ok=True)
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not installed.is_file() or installed.read_text() != wanted:
            shutil.rmtree(packages, ignore_errors=True)
            _fill(packages)
            installed.write_text(wanted)
    return packages


def _fill(packages: Path) -> None:
    words = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--python", sys.executable]
    words += ["--target", str(packages), "-r", str(FILES / "requirements.txt")]
    try:
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=LONGEST_S)
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"Triton's server could not be installed: {' '.join(error.stderr.split())[-300:]}") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"Triton's server could not be installed within {LONGEST_S} s") from None
    stub = packages / f"pytriton/tritonserver/python_backend_stubs/{PYTHON}/triton_python_backend_stub"
    if not stub.is_file():
        raise Unavailable(f"Triton's Python backend is not made for Python {PYTHON}")
    shutil.copy(stub, packages / "pytriton/tritonserver/backends/python")
    if "not found" in subprocess.run(["ldd", str(stub)], env=_environment(packages), capture_output=True, text=True).stdout:
        raise Unavailable(f"Triton's Python backend needs libpython{PYTHON}.so, which this Python lacks")


def _environment(packages: Path, threads: int = 1) -> dict[str, str]:
    """The server's libraries, and that of this Python."""
    paths = [str(packages / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {
        "LD_LIBRARY_PATH": os.pathsep.join(paths),
        "TRITON_SITE_PACKAGES": str(packages),
        "TRITON_THREADS": str(threads),
    }


class Server:
    """Triton on `repository`, ready to answer at `http` and `grpc` (host:port); `folder` takes its log. With `poll` it looks for
    new models and versions every second."""

    def __init__(
        self,
        packages: Path,
        repository: Path,
        folder: Path,
        *,
        ports: tuple[int, int] | None = None,
        threads: int = 1,
        poll: bool = False,
    ) -> None:
        self.log = folder / "triton.log"
        backends = folder / "backends"
        shutil.rmtree(backends, ignore_errors=True)
        backends.mkdir(parents=True)
        (backends / "python").symlink_to(packages / "pytriton/tritonserver/backends/python")
        (backends / "onnxruntime").symlink_to(FILES / "backend/onnxruntime")
        self.words = [str(packages / "pytriton/tritonserver/bin/tritonserver"), f"--model-repository={repository}"]
        self.words += [f"--backend-directory={backends}", "--model-config-name=cpu", "--disable-auto-complete-config"]
        self.words += ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--allow-metrics=false", "--exit-timeout-secs=10"]
        self.regions = f"winnow_{os.getpid()}_{time.monotonic_ns()}_"  # of shared memory, which a killed server would leave
        self.words += [f"--backend-config=python,shm-region-prefix-name={self.regions}"]
        self.words += ["--model-control-mode=poll", "--repository-poll-secs=1"] if poll else []
        self.environment, self.ports = _environment(packages, threads), ports
        self.process: subprocess.Popen | None = None

    def start(self, wait_s: float) -> None:
        """Start and wait until every model is ready; a `RuntimeError` has the end of the log."""
        http, grpc = self.ports or free_ports()
        self.http, self.grpc = f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        with self.log.open("w") as log:
            words = [*self.words, f"--http-port={http}", f"--grpc-port={grpc}"]
            self.process = subprocess.Popen(words, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        latest = time.monotonic() + wait_s
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > latest:
                raise RuntimeError(f"Triton does not start: {self.log.read_text()[-3000:]}")
            time.sleep(0.1)

    def is_ready(self) -> bool:
        """Whether it answers, with every model loaded."""
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def stop(self) -> None:
        """End it, the processes of its models, and their shared memory."""
        if self.process:
            end(self.process)
        for path in Path("/dev/shm").glob(f"{self.regions}*"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def served(packages: Path, repository: Path, folder: Path, *, wait_s: float = 240, **options) -> Iterator[Server]:
    """A server for as long as the block lasts."""
    server = Server(packages, repository, folder, **options)
    try:
        server.start(wait_s)
        yield server
    finally:
        server.stop()


def end(process: subprocess.Popen) -> None:
    """End a process that leads a session of its own, and what it has started."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_ports() -> tuple[int, int]:
    """Two ports of the loopback that nobody listens on."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", type=Path, nargs="?", default=ROOT / "repository")
    parser.add_argument("--install", action="store_true", help="do no more than install it")
    asked = parser.parse_args()
    try:
        packages = install()
    except Unavailable as error:
        sys.exit(str(error))
    if asked.install:
        return
    threads = len(os.sched_getaffinity(0))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, with the server
    with served(packages, asked.repository, PLACE, ports=(8000, 8001), threads=threads) as server:
        print(f"Triton answers at http://{server.http} and {server.grpc} (gRPC); Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.process.wait()


if __name__ == "__main__":
    main()
