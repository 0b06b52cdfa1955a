"""Training speed: the bare step, our loop, and the loop a user would write, same network, batch and device, in one run.

    python -m benchmarks.training [--network resnet] [--batch 128] [--steps 40] [--rounds 3] [--threads 2]

    bare      forward, backward, optimiser step on one batch that lies on the device
    ours      pipeline.training: uint8 data on the device, crop, flip, normalise, hooks, checks
    ordinary  torchvision transforms on PIL images in a DataLoader, fp32, channels first

Prints images a second (median over rounds, which are interleaved) and ratios. Images are random bytes of CIFAR-10's shape: speed
does not depend on their content.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pipeline import models
from pipeline.config import Augment, Data, Fit
from pipeline.data.batches import Batches, load
from pipeline.data.prepare import prepare
from pipeline.evaluation import pick_device
from pipeline.hooks import Hook, Run
from pipeline.precision import autocast
from pipeline.training import train

NETWORKS: dict[str, dict[str, Any]] = {
    "cifar_quick": {},
    "resnet": {"depth": 32},
    "resnet_imagenet": {"depth": 18, "stem": "cifar"},
}
FIT = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4, "schedule": "cosine"}
AUGMENT = Augment(pad=4, pad_mode="zero", flip=True, scale=None)


class Images(Dataset[tuple[torch.Tensor, int]]):
    """What a user would write: PIL images through torchvision's transforms, one by one."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        from torchvision import transforms

        self.images, self.labels = images, labels
        normalise = transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def bare(model: nn.Module, batch: int, steps: int, device: torch.device) -> float:
    """Seconds of `steps` steps on one batch that is there already."""
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    started = time.perf_counter()
    for _ in range(steps):
        with autocast(device, "auto"):
            logits = model(images)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
    _wait(device)
    return time.perf_counter() - started


def ours(model: nn.Module, folder: Path, batch: int, device: torch.device) -> float:
    """Seconds of one epoch of our loop; its validation is left out, as in the others."""
    prepared = load(folder)
    fit = Fit(epochs=1, batch_size=batch, label_smoothing=0.0, select="last", precision="auto", **FIT)
    batches = Batches(prepared, "train", batch, device, AUGMENT, shuffle=True, seed=0)
    run = Run(model, fit, batches, Batches(prepared, "validation", 256, device, None, shuffle=False, seed=0), 0, device)
    train(run, [Hook()])
    return batches.images / run.history[0]["images_per_s"]


def ordinary(model: nn.Module, folder: Path, batch: int, device: torch.device, workers: int) -> float:
    """Seconds of one epoch of an ordinary loop."""
    images, labels = (np.load(folder / f"train_{kind}.npy", allow_pickle=False) for kind in ("images", "labels"))
    loader = DataLoader(
        Images(images, labels), batch, shuffle=True, num_workers=workers, drop_last=True, pin_memory=device.type == "cuda"
    )
    model = model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    started = time.perf_counter()
    for inputs, targets in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs.to(device)), targets.to(device)).backward()
        optimizer.step()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet", choices=NETWORKS)
    for name, default in (("batch", 128), ("steps", 40), ("rounds", 3), ("threads", 2), ("workers", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    device = pick_device("auto", asked.threads)
    build = lambda: models.build(asked.network, input_shape=(3, 32, 32), classes=10, **NETWORKS[asked.network])  # noqa: E731
    with tempfile.TemporaryDirectory() as tmp:
        folder = _random_data(Path(tmp), asked.batch * asked.steps)
        bare(build(), asked.batch, 3, device)  # warm-up
        seconds: dict[str, list[float]] = {"bare": [], "ours": [], "ordinary": []}
        for _ in range(asked.rounds):
            seconds["bare"].append(bare(build(), asked.batch, asked.steps, device))
            seconds["ours"].append(ours(build(), folder, asked.batch, device))
            seconds["ordinary"].append(ordinary(build(), folder, asked.batch, device, asked.workers))
    speed = {name: asked.batch * asked.steps / statistics.median(times) for name, times in seconds.items()}
    print(f"{asked.network}, batch {asked.batch}, {device}, {asked.threads} threads, {asked.rounds} rounds of {asked.steps} steps")
    for name, images_per_s in speed.items():
        print(f"{name:>9}: {images_per_s:9,.0f} images/s   ours / {name} = {speed['ours'] / images_per_s:.2f}")


def _random_data(tmp: Path, images: int) -> Path:
    draw = np.random.default_rng(0)
    held = 640  # test images; as many again are added for the validation split
    counts = {"train": images + held, "test": held}
    arrays = {f"{name}_images": draw.integers(256, size=(n, 32, 32, 3), dtype=np.uint8) for name, n in counts.items()}
    arrays |= {f"{name}_labels": (np.arange(n) % 10).astype(np.uint8) for name, n in counts.items()}
    np.savez(tmp / "random.npz", **arrays)
    options = {"name": "cifar10", "root": str(tmp / "random.npz"), "download": False, "image_size": None, "storage": "memory"}
    share = held / (images + held)
    prepare(
        Data(**options, validation=share, test=0.1, per_class=None, crop=None, split_seed=0, mean="auto", std="auto"), tmp / "data"
    )
    return tmp / "data"


if __name__ == "__main__":
    main()
