"""What a client of Triton sees, beside the raw runtime: dense network against champion, fp32 against int8.

    python -m benchmarks.serving [--repository repository] [--provider cpu|cuda] [--batches 1 32] [--concurrency 1 2 4 8]
                                 [--ways raw http grpc shared] [--seconds 1] [--rounds 5] [--threads 1] [--http H:P --grpc H:P]

after `dvc repro`: it takes the newest versions in `repository` of the control (profile.control) and of the champion's variant, each
in fp32 and int8, in the form that takes pictures, and sends random pictures of the size that the network sees:

    raw        ONNX Runtime in this process, `concurrency` threads on one session
    http, grpc      Triton's standard client, `concurrency` of them, each sends when it has its answer
    shared     gRPC, pictures and answers in shared memory

Every setting is measured `rounds` times for `seconds`, all of them by turns, so that a slow minute of the machine is everybody's;
ratios are taken within a round, and their median and range over the rounds are told. An overhead is the median latency beside that
of raw: mostly a constant number of ms, so its share depends on the network. Without --http and --grpc a server is installed and
started here (tests/served.py); it computes on the CPU, by the same runtime behind Triton's *Python* backend, which makes it slower
than the ONNX Runtime backend of NVIDIA's images. For that one, also on a GPU, start it on the same repository (README), give its
addresses, and --provider for raw: `cuda` copies from and to the host as a server does. Clients and server share the machine, and
its cores. Prints a table a batch size, the ratios, and all figures as JSON.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import read_params, section
from pipeline.deployment import Profile
from pipeline.errors import InputError
from pipeline.export import read_metadata
from pipeline.files import read_json
from pipeline.lineage import name_of
from tests import served

WAYS = ("raw", "http", "grpc", "shared")
TAKES, GIVES = "pictures", ("probabilities", "logits")
Ask = Callable[[], object]  # one request and its answer
Key = tuple[str, str, int, int]  # model, way, batch, concurrency


class Bench:
    """The models, and how each is asked."""

    def __init__(self, asked: argparse.Namespace, http: str | None, grpc: str | None) -> None:
        self.asked, self.addresses = asked, {"http": http, "grpc": grpc, "shared": grpc}
        self.models = {label: asked.repository / name for label, name in chosen().items()}
        self.versions = {label: newest(place) for label, place in self.models.items()}
        self.sessions = {label: open_raw(self.file(label), asked.provider, asked.threads) for label in self.models}
        self.draw = np.random.default_rng(0)

    def file(self, label: str) -> Path:
        return self.models[label] / str(self.versions[label]) / "model.onnx"

    def pictures(self, label: str, batch: int) -> np.ndarray:
        channels, height, width = read_metadata(self.file(label))["shape"]
        return self.draw.integers(0, 256, (batch, height, width, channels), dtype=np.uint8)

    @contextlib.contextmanager
    def client(self, label: str, way: str, batch: int, number: int) -> Iterator[Ask]:
        """One client's way to ask; it is the only one that uses what is opened here."""
        pictures, session = self.pictures(label, batch), self.sessions[label]
        names = [output.name for output in session.get_outputs()]
        if way == "raw":
            yield lambda: session.run(names, {TAKES: pictures})
            return
        import tritonclient.grpc
        import tritonclient.http

        kind: Any = tritonclient.http if way == "http" else tritonclient.grpc
        given = kind.InferInput(TAKES, pictures.shape, "UINT8")
        wanted = [kind.InferRequestedOutput(name) for name in names]
        settings = {"model_version": str(self.versions[label]), "outputs": wanted}
        with contextlib.ExitStack() as stack:
            client = kind.InferenceServerClient(self.addresses[way])
            stack.callback(client.close)
            if way == "shared":
                sizes = {name: array.nbytes for name, array in zip(names, session.run(names, {TAKES: pictures}), strict=True)}
                _share(stack, client, f"winnow{number}", pictures, given, dict(zip(names, wanted, strict=True)), sizes)
            else:
                given.set_data_from_numpy(pictures)

            def ask() -> object:
                found = client.infer(self.models[label].name, [given], **settings)
                return None if way == "shared" else [found.as_numpy(name) for name in names]

            yield ask

    def measure(self, key: Key) -> dict[str, Any]:
        """Latencies in ms and images/s of one setting in one round."""
        label, way, batch, concurrency = key
        latencies: list[list[float]] = [[] for _ in range(concurrency)]
        ready = threading.Barrier(concurrency + 1)

        def work(number: int) -> None:
            try:
                with self.client(label, way, batch, number) as ask:  # in its own thread: HTTP connections stay in theirs
                    ask()
                    ready.wait()
                    end = time.perf_counter() + self.asked.seconds
                    while (before := time.perf_counter()) < end or not latencies[number]:
                        ask()
                        latencies[number].append(1000 * (time.perf_counter() - before))
            except BaseException:
                ready.abort()
                latencies[number].clear()
                raise

        threads = [threading.Thread(target=work, args=(number,)) for number in range(concurrency)]
        for thread in threads:
            thread.start()
        with contextlib.suppress(threading.BrokenBarrierError):
            ready.wait()
        start = time.perf_counter()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - start
        if not all(latencies):
            raise InputError(f"{label} by {way}, batch {batch}, concurrency {concurrency}: requests failed; their errors are above")
        every = [value for times in latencies for value in times]
        return {"latencies_ms": every, "images_per_s": batch * len(every) / took}


def _share(
    stack: contextlib.ExitStack,
    client: Any,
    name: str,
    pictures: np.ndarray,
    given: Any,
    wanted: dict[str, Any],
    sizes: dict[str, int],
) -> None:
    """Put a request's pictures and answers into regions of shared memory that client and server both see."""
    from tritonclient.utils import shared_memory

    for part, size in {TAKES: pictures.nbytes, **sizes}.items():
        region = f"{name}_{part}"
        with contextlib.suppress(Exception):  # what an interrupted run has left at the server
            client.unregister_system_shared_memory(region)
        handle = shared_memory.create_shared_memory_region(region, f"/{region}", size)
        stack.callback(shared_memory.destroy_shared_memory_region, handle)
        client.register_system_shared_memory(region, f"/{region}", size)
        stack.callback(client.unregister_system_shared_memory, region)
        if part == TAKES:
            shared_memory.set_shared_memory_region(handle, [pictures])
            given.set_shared_memory(region, size)
        else:
            wanted[part].set_shared_memory(region, size)


def chosen() -> dict[str, str]:
    """Label -> name in the repository: the control and the champion's variant, in fp32 and int8 where exported so."""
    champion = read_json(Path("outputs/champion/champion.json"))
    seed = read_params()["seed"][0] if champion["champion"] is None else champion["seed"]
    control = section("profile", Profile).control
    names = {f"dense {precision}": f"{control}-{seed}" for precision in ("fp32", "int8")}
    if champion["champion"] is not None and f"{champion['revive']}-{champion['compress']}" != control:
        variant = name_of(champion["revive"], champion["compress"], seed, "fp32")
        names |= {f"champion {precision}": variant for precision in ("fp32", "int8")}
    return {label: name + ("" if label.endswith("fp32") else "-int8") for label, name in names.items()}


def newest(place: Path) -> int:
    """The highest version of a model."""
    found = [int(path.name) for path in place.glob("[1-9]*") if path.name.isdigit()]
    if not found:
        raise InputError(f"{place} has no version: run `dvc repro`, with repository.models: all and pictures among its forms")
    return max(found)


def open_raw(path: Path, provider: str, threads: int) -> Any:
    """An ONNX Runtime session on the provider and no other."""
    import onnxruntime

    if provider == "cuda":
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[provider]
    session = onnxruntime.InferenceSession(path, options, providers=[wanted])
    if wanted not in session.get_providers():
        raise InputError(f"ONNX Runtime could not load {wanted}; its own message is above")
    return session


def summary(rounds: dict[Key, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each setting: percentiles over all its rounds, and the overhead over raw, round by round."""
    rows = []
    for (label, way, batch, concurrency), measured in rounds.items():
        every = np.concatenate([one["latencies_ms"] for one in measured])
        row: dict[str, Any] = {"model": label, "way": way, "batch": batch, "concurrency": concurrency, "requests": len(every)}
        row |= {"p50_ms": float(np.percentile(every, 50)), "p99_ms": float(np.percentile(every, 99))}
        row["images_per_s"] = statistics.mean(one["images_per_s"] for one in measured)
        raw = rounds.get((label, "raw", batch, concurrency))
        if raw and way != "raw":
            row["overhead_ms"] = row["p50_ms"] - float(np.percentile(np.concatenate([one["latencies_ms"] for one in raw]), 50))
            row["overhead_percent"] = spread([100 * (gain - 1) for gain in ratios(measured, raw)])
        rows.append(row)
    return rows


def ratios(measured: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[float]:
    """Median latency over the other's, for each round."""
    medians = [[statistics.median(one["latencies_ms"]) for one in side] for side in (measured, other)]
    return [mine / theirs for mine, theirs in zip(*medians, strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def gains(rounds: dict[Key, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """How much faster int8 is than fp32, and the champion than the dense network, by the median latency."""
    pairs = [("dense fp32", "dense int8"), ("champion fp32", "champion int8"), ("dense fp32", "champion fp32")]
    pairs += [("dense int8", "champion int8"), ("dense fp32", "champion int8")]
    found = []
    for label, way, batch, concurrency in rounds:
        for slow, fast in pairs:
            key = (fast, way, batch, concurrency)
            if label == slow and key in rounds:
                ratio = spread(ratios(rounds[slow, way, batch, concurrency], rounds[key]))
                found.append({"fast": fast, "slow": slow, "way": way, "batch": batch, "concurrency": concurrency, "speedup": ratio})
    return found


def table(rows: list[dict[str, Any]], batch: int) -> str:
    """The rows of one batch size, for people."""
    lines = ["| model | way | clients | p50 ms | p99 ms | images/s | overhead ms | % |", "|---|---|" + "---:|" * 6]
    for row in rows:
        if row["batch"] == batch:
            figures = [f"{row['p50_ms']:.3f}", f"{row['p99_ms']:.3f}", f"{row['images_per_s']:,.0f}"]
            figures += [f"{row['overhead_ms']:.3f}" if "overhead_ms" in row else "", told(row.get("overhead_percent"), 0)]
            lines.append("| " + " | ".join([row["model"], row["way"], str(row["concurrency"]), *figures]) + " |")
    return "\n".join(lines)


def told(value: dict[str, float] | None, digits: int) -> str:
    return "" if value is None else f"{value['median']:.{digits}f} ({value['low']:.{digits}f} … {value['high']:.{digits}f})"


def run(asked: argparse.Namespace, http: str | None, grpc: str | None) -> None:
    """Measure all settings by turns and print."""
    bench = Bench(asked, http, grpc)
    keys = [(m, w, b, c) for b in asked.batches for c in asked.concurrency for m in bench.models for w in asked.ways]
    rounds: dict[Key, list[dict[str, Any]]] = {key: [] for key in keys}
    for _ in range(asked.rounds):
        for key in keys:
            rounds[key].append(bench.measure(key))
    rows, faster = summary(rounds), gains(rounds)
    for batch in asked.batches:
        print(f"\n## batch {batch}\n\n{table(rows, batch)}")
    print("\n| faster | than | way | batch | clients | speed-up |\n|---|---|---|---:|---:|---:|")
    for row in faster:
        words = [row["fast"], row["slow"], row["way"], str(row["batch"]), str(row["concurrency"]), told(row["speedup"], 2)]
        print("| " + " | ".join(words) + " |")
    settings = {key: str(value) for key, value in vars(asked).items()}
    print(json.dumps({**settings, "own_server": asked.http is None, "rows": rows, "speedups": faster}))


def main() -> None:
    """Take the server that was named, or start one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--repository", type=Path, default=Path("repository"))
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    for name, default in (("batches", [1, 32]), ("concurrency", [1, 2, 4, 8])):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    for name, default in (("seconds", 1.0), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    for name in ("http", "grpc"):
        parser.add_argument(f"--{name}", help="host:port of a server that has the same repository")
    asked = parser.parse_args()
    if asked.http or asked.grpc or asked.ways == ["raw"]:
        run(asked, asked.http, asked.grpc)
        return
    with tempfile.TemporaryDirectory() as folder:
        with served.served(served.install(), asked.repository, Path(folder), threads=asked.threads) as server:
            run(asked, server.http, server.grpc)


if __name__ == "__main__":
    main()
