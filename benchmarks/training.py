"""Training speed and peak memory: the bare step, our loop, the loop a user would write; same network, batch and device, one run.

    python -m benchmarks.training [--network cifar_quick resnet resnet_imagenet record] [--launch graph compile] [--json FILE]

    bare          forward, backward, optimiser step on one batch that lies on the device, in ours' precision and memory order
    ours          pipeline.training: uint8 data on the device, crop, flip, normalise, hooks, checks
    ordinary      torchvision transforms on PIL images in a DataLoader, fp32, channels first
    bare graph, ours graph, bare compile, ours compile      launched as runtime.launch says; on CUDA always
    record        batches of the record holder on CIFAR-10 and ours, alone, and on CUDA in steps of its network (training_record.py)

Each way is a process of its own (training_ways.py) that waits while another one trains: they take turns, a round each, in an order
that turns round. Prints medians of images a second over the rounds and, from pairs of the same round, medians and middle halves of
ratios. Peak memory, of the warm-up round: of CUDA's allocator, or by how much the process grew (without DataLoader's workers).
Images are random bytes of CIFAR-10's shape: speed does not depend on their content. Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import training_record as record
from benchmarks.training_ways import NETWORKS, Setting, bare, ordinary, ours, serve
from pipeline.config import Data
from pipeline.data.prepare import prepare

RECORD = "record"
BATCH = {RECORD: 1024}  # as its authors train it; else 128
STEPS = {"cifar_quick": 40, "resnet": 20, "resnet_imagenet": 4, RECORD: 10}  # of a round on a CPU
CUDA_STEPS = {"cifar_quick": 390, "resnet": 390, "resnet_imagenet": 100, RECORD: 48}
WAYS = {"bare": bare, "ours": ours, "ordinary": ordinary}
WAYS |= {f"{name} {launch}": partial(way, launch=launch) for launch in ("graph", "compile") for name, way in list(WAYS.items())[:2]}
RECORD_WAYS = {
    "its loader": partial(record.loader, epochs=record.theirs),
    "our loader": partial(record.loader, epochs=record.ours),
    "its step, its loader": partial(record.step, epochs=record.theirs),
    "its step, our loader": partial(record.step, epochs=record.ours),
}
COMPARED = [("ours", "bare"), ("ours", "ordinary")]
COMPARED += [
    ("ours graph", "bare graph"),
    ("ours compile", "bare compile"),
    ("ours graph", "ordinary"),
    ("ours compile", "ordinary"),
]
COMPARED += [("our loader", "its loader"), ("its step, our loader", "its step, its loader")]


def chosen(network: str, launches: list[str]) -> list[str]:
    """The ways that can be measured here."""
    if network == RECORD:
        return [name for name in RECORD_WAYS if torch.cuda.is_available() or "step" not in name]
    return [name for name in WAYS if name.split()[-1] in ("bare", "ours", "ordinary", *launches)]


class Worker:
    """A process that trains in one way."""

    def __init__(self, way: str, network: str, folder: Path, asked: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "benchmarks.training", "--way", way, "--folder", str(folder), "--network", network]
        for name in ("batch", "workers", "threads"):
            command += [f"--{name}", str(getattr(asked, name))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.peak_mb = self._answer()["peak_mb"]  # after the warm-up

    def round(self) -> float:
        """Seconds."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()["seconds"]

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{' '.join(self.process.args)} failed")  # type: ignore[arg-type]
        return json.loads(line)

    def end(self) -> None:
        """It ends with its input."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def train_in_turns(network: str, names: list[str], steps: int, asked: argparse.Namespace) -> tuple[list[dict[str, float]], dict]:
    """Seconds of the ways `names` in each round, and their peak memory in 10^6 bytes."""
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as tmp:
        folder = random_data(Path(tmp), asked.batch * steps, asked.batch)
        try:
            for name in names:
                workers[name] = Worker(name, network, folder, asked)
            orders = [names if number % 2 else names[::-1] for number in range(asked.rounds)]
            rounds = [{name: workers[name].round() for name in order} for order in orders]
        finally:
            for worker in workers.values():
                worker.end()
    return rounds, {name: worker.peak_mb for name, worker in workers.items()}


def measure(network: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Print the table of one network, and return it."""
    cuda = torch.cuda.is_available()
    steps, names = asked.steps or (CUDA_STEPS if cuda else STEPS)[network], chosen(network, asked.launch)
    rounds, peaks = train_in_turns(network, names, steps, asked)
    device = torch.cuda.get_device_name() if cuda else "cpu"
    print(f"\n{network}, batch {asked.batch}, {device}, {asked.threads} threads, {asked.rounds} rounds of {steps} steps")
    result: dict[str, Any] = {"network": network, "device": device, "steps": steps, "rounds": asked.rounds, "ways": {}}
    result |= {name: getattr(asked, name) for name in ("batch", "threads", "workers")}
    for name in names:
        speed = asked.batch * steps / statistics.median(times[name] for times in rounds)
        result["ways"][name] = {"images_per_s": round(speed, 1), "peak_mb": round(peaks[name], 1)}
        print(f"{name:>21}: {speed:11,.0f} images/s   peak {peaks[name]:7,.0f} MB")
    result["ratios"] = {f"{a} / {b}": _ratio(rounds, a, b) for a, b in COMPARED if a in names and b in names}
    for pair, (low, middle, high) in result["ratios"].items():
        print(f"{pair:>43}: {middle:5.2f} ({low:.2f}-{high:.2f})")
    return result


def _ratio(rounds: list[dict[str, float]], ours: str, other: str) -> list[float]:
    """Lower quartile, median, upper quartile of speeds, `ours` over `other`."""
    ratios = sorted(times[other] / times[ours] for times in rounds)
    return [round(value, 3) for value in (ratios[len(ratios) // 4], statistics.median(ratios), ratios[-1 - len(ratios) // 4])]


def random_data(tmp: Path, images: int, held: int) -> Path:
    """A prepared folder of `images` training images and `held` each for validation and test."""
    draw = np.random.default_rng(0)
    counts = {"train": images + held, "test": held}
    arrays = {f"{name}_images": draw.integers(256, size=(n, 32, 32, 3), dtype=np.uint8) for name, n in counts.items()}
    arrays |= {f"{name}_labels": (np.arange(n) % 10).astype(np.uint8) for name, n in counts.items()}
    np.savez(tmp / "random.npz", **arrays)
    options = {"name": "cifar10", "root": str(tmp / "random.npz"), "download": False, "image_size": None, "storage": "memory"}
    options |= {"per_class": None, "crop": None, "split_seed": 0, "mean": "auto", "std": "auto", "test": 0.1}
    prepare(Data(validation=held / (images + held), **options), tmp / "data")
    return tmp / "data"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--network", nargs="+", default=[*NETWORKS, RECORD], choices=[*NETWORKS, RECORD])
    parser.add_argument("--launch", nargs="*", default=["graph", "compile"] if cuda else [], choices=["graph", "compile"])
    parser.add_argument("--steps", type=int, help="of a round; by default more for small networks")
    parser.add_argument("--batch", type=int, help=f"by default 128, {BATCH[RECORD]} beside the record holder")
    for name, default in (("rounds", 5), ("threads", 2), ("workers", 2 if cuda else 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="a file that a line for each network is added to")
    for name in ("way", "folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)  # a worker
    asked = parser.parse_args()
    if "graph" in asked.launch and not cuda:
        parser.error("--launch graph needs CUDA")
    if asked.way:
        setting = Setting(asked.network[0], Path(asked.folder), asked.batch, asked.workers, asked.threads)
        serve((WAYS | RECORD_WAYS)[asked.way], setting)
        return
    for network in asked.network:
        if network == RECORD and not record.installed():
            print(f"\n{record.MISSING}")
            continue
        if network == RECORD and not cuda:
            print("\nNo CUDA here: of the record holder its loader alone, on the CPU")
        batch = asked.batch or BATCH.get(network, 128)
        line = json.dumps(measure(network, argparse.Namespace(**vars(asked) | {"batch": batch})))
        print(line)
        if asked.json:
            with asked.json.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
