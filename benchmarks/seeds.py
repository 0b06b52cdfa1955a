"""Seeds of one training at once against the same in a row: wall time, ratio, accuracies, whether the weights are equal bit for bit.

    python -m benchmarks.seeds [--network resnet] [--epochs 10] [--seeds 4] [--launch eager graph] [--mps on off]
                               [--data data/cifar10.npz] [--images 50000] [--threads 1]

Each seed is a process that does the stage `train`'s work, start-up and all: in a row one after another, then all at once, which on
CUDA is done with NVIDIA's MPS and without. The recipe is that of recipes/reactivation_cifar10.yaml's ResNet-32 at another length.
Without --data the images are random bytes of CIFAR-10's shape, and accuracies say nothing.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from benchmarks.training import random_data
from benchmarks.training_ways import NETWORKS
from pipeline import files
from pipeline.config import Data, Runtime
from pipeline.data.prepare import prepare
from pipeline.first_training import first_training
from pipeline.gpu_sharing import SWITCH, places, visible
from pipeline.side_by_side import run

FIT = {"batch_size": 128, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4}
FIT |= {"schedule": "cosine", "label_smoothing": 0.0, "select": "last", "precision": "auto"}
PARAMS: dict[str, Any] = {"augment": {"pad": 4, "pad_mode": "zero", "flip": True, "scale": None}}
TRAIN = {"start_layers": ["*"], "overparameterize": {"method": "none"}, "revive": {"method": "finetune"}}
TRAIN |= {"compress": {"method": "finetune", "distill": None, "sensitivity": None}, "bias_lr": 1.0, "ema": None}
RUNTIME = {"device": "auto", "workers": 2, "processes": 1, "hosts": 1, "save_s": 60}
CIFAR10 = {
    "name": "cifar10",
    "download": True,
    "image_size": None,
    "crop": None,
    "storage": "memory",
    "validation": 0.02,
    "test": 0.2,
}
CIFAR10 |= {"per_class": None, "split_seed": 0, "mean": "auto", "std": "auto"}


def parameters(folder: Path, launch: str, asked: argparse.Namespace) -> dict[str, Any]:
    """A params.yaml for the stage `train`."""
    train = TRAIN | {"start": str(folder / "start"), "fit": FIT | {"epochs": asked.epochs}}
    runtime = RUNTIME | {"launch": launch, "threads": asked.threads}
    return PARAMS | {"runtime": runtime, "model": {"name": asked.network, **NETWORKS[asked.network]}, "train": train}


def train_all(folder: Path, name: str, asked: argparse.Namespace, at_once: int) -> tuple[float, list[dict[str, Any]]]:
    """Seconds, and of each seed what its model card and record say."""
    seeds = [str(seed) for seed in range(asked.seeds)]
    runtime = Runtime(**yaml.safe_load((folder / "params.yaml").read_text())["runtime"])

    def command(names: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "benchmarks.seeds", "--child", str(folder), name, *names]

    with places(at_once, runtime) as given:
        ready = given()  # what starts MPS is no part of the time
        started = time.monotonic()
        if code := run({seed: [] for seed in seeds}, command, lambda: ready, folder / "logs" / name):
            sys.exit(code)
        seconds = time.monotonic() - started
    found = []
    for seed in seeds:
        out = folder / name / seed
        record = files.read_json(out / "record.json")
        speed = sorted(row["images_per_s"] for row in record["history"])[len(record["history"]) // 2]
        sha256 = files.read_json(out / "model" / "model.json")["weights_sha256"]
        found.append({"sha256": sha256, "accuracy": record["metrics"]["test_accuracy"], "images_per_s": speed})
    return seconds, found


def compare(folder: Path, launch: str, asked: argparse.Namespace, ways: list[str]) -> None:
    """In a row, then at once in each of the ways; a line for each."""
    (folder / "params.yaml").write_text(yaml.safe_dump(parameters(folder, launch, asked)))
    row, first = train_all(folder, f"{launch}-row", asked, at_once=1)
    lines = [_line(f"{launch}, in a row", row, first)]
    for way in ways:
        os.environ[SWITCH] = way
        seconds, found = train_all(folder, f"{launch}-once-{way}", asked, at_once=asked.seeds)
        equal = sum(one["sha256"] == other["sha256"] for one, other in zip(first, found, strict=True))
        named = f"{launch}, at once{f', MPS {way}' if len(ways) > 1 or way == 'on' else ''}"
        lines.append(f"{_line(named, seconds, found)}  {row / seconds:5.2f} x  weights equal: {equal} of {asked.seeds}")
    print(*lines, sep="\n", flush=True)


def _line(named: str, seconds: float, found: list[dict[str, Any]]) -> str:
    accuracies = " ".join(f"{one['accuracy']:.2%}" for one in found)
    return (
        f"{named:26}  {seconds:7.1f} s  {sum(one['images_per_s'] for one in found) / len(found):9,.0f} images/s each  {accuracies}"
    )


def child(folder: Path, name: str, seed: str) -> None:
    """One training."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    out = folder / name / seed
    first_training(params, int(seed), prepared=folder / "data", resume=out / "resume", out=out)


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), *sys.argv[3:])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet", choices=NETWORKS)
    for name, default in (("epochs", 10), ("seeds", 4), ("images", 50_000), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--launch", nargs="+", default=["eager"], choices=["eager", "graph", "compile"])
    parser.add_argument("--mps", nargs="+", default=["on", "off"], choices=["on", "off"], help="on CUDA")
    parser.add_argument("--data", help="an .npz file of CIFAR-10, or a folder for torchvision's download")
    asked = parser.parse_args()
    devices = visible()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "start").mkdir()
        if asked.data:
            prepare(Data(root=asked.data, **CIFAR10), folder / "data")
        else:
            random_data(folder, asked.images, held=min(10_000, asked.images))
        print(f"{asked.network}, {asked.epochs} epochs of {asked.data or f'{asked.images:,} random images'}", end=", ")
        print(f"{asked.seeds} seeds, {len(devices) or 'no'} CUDA devices, {asked.threads} threads each", flush=True)
        for launch in asked.launch:
            compare(folder, launch, asked, asked.mps if devices else ["off"])


if __name__ == "__main__":
    main()
