"""The ways to train that benchmarks/training.py compares, each in a process of its own, which trains a round whenever it is told.

A way is a function of its `Setting` and of `turn`. It calls `turn` with the seconds of a round; that prints them with the peak
memory so far and waits for the next line of standard input. The first round is the warm-up. Without another line it ends.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pipeline import models
from pipeline.config import Augment, Fit, Launch
from pipeline.data.batches import Batches, load
from pipeline.evaluation import pick_device
from pipeline.hooks import Hook, Run
from pipeline.precision import autocast
from pipeline.step import WARM_UP, beside, capture
from pipeline.training import train

NETWORKS: dict[str, dict[str, Any]] = {
    "cifar_quick": {},
    "resnet": {"depth": 32},
    "resnet_imagenet": {"depth": 18, "stem": "cifar"},
}
AUGMENT = Augment(pad=4, pad_mode="zero", flip=True, scale=None)
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
EPOCHS = 10**6  # more than there are rounds
Turn = Callable[[float], None]


@dataclass(frozen=True)
class Setting:
    """What all ways share. `folder` holds prepared images, as many as a round has."""

    network: str
    folder: Path
    batch: int
    workers: int
    threads: int

    def model(self) -> nn.Module:
        """A fresh network."""
        return models.build(self.network, input_shape=(3, 32, 32), classes=10, **NETWORKS[self.network])

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images (N, 32, 32, 3) and int64 labels (N,) of a round."""
        images, labels = (np.load(self.folder / f"train_{kind}.npy", allow_pickle=False) for kind in ("images", "labels"))
        return images, labels

    def user_device(self) -> torch.device:
        """The device as an ordinary script has it: nothing is made deterministic and memory is freed as ever."""
        torch.set_num_threads(self.threads)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bare(setting: Setting, turn: Turn, launch: Launch = "eager") -> None:
    """(a) Forward, backward and optimiser on one batch that lies on the device."""
    device = pick_device("auto", setting.threads)
    images = torch.randn(setting.batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (setting.batch,), device=device)
    model = setting.model().to(device, memory_format=torch.channels_last).train()
    forward = torch.compile(model, dynamic=False) if launch == "compile" else model
    optimizer = torch.optim.SGD(model.parameters(), fused=True, **SGD)

    def step() -> None:
        with autocast(device, "auto"):
            logits = forward(images)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    launched = step
    if launch == "graph":
        for _ in range(WARM_UP):
            beside(step)
        launched = capture(step)
    steps = len(setting.arrays()[0]) // setting.batch
    while True:
        started = time.perf_counter()
        for _ in range(steps):
            launched()
        wait(device)
        turn(time.perf_counter() - started)


class Clock(Hook):
    """Counts an epoch from the end of the one before to its last step; its validation is left out, as in the other ways."""

    def __init__(self, turn: Turn) -> None:
        self.turn, self.steps, self.started = turn, 0, time.perf_counter()

    def after_step(self, run: Run) -> None:
        self.steps += 1
        if self.steps % len(run.train) == 0:
            wait(run.device)
            self.seconds = time.perf_counter() - self.started

    def after_epoch(self, run: Run) -> bool:
        self.turn(self.seconds)
        self.started = time.perf_counter()
        return False


def ours(setting: Setting, turn: Turn, launch: Launch = "eager") -> None:
    """(b) pipeline.training: uint8 data on the device, crop, flip, normalise, hooks, checks."""
    device, prepared = pick_device("auto", setting.threads), load(setting.folder)
    rest: dict[str, Any] = {"nesterov": False, "label_smoothing": 0.0, "select": "last", "precision": "auto"}
    fit = Fit(epochs=EPOCHS, batch_size=setting.batch, optimizer="sgd", schedule="constant", **SGD, **rest)
    batches = Batches(prepared, "train", setting.batch, device, AUGMENT, shuffle=True, seed=0)
    validation = Batches(prepared, "validation", setting.batch, device, None, shuffle=False, seed=0)
    train(Run(setting.model(), fit, batches, validation, 0, device), [Clock(turn)], launch=launch)


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


def ordinary(setting: Setting, turn: Turn) -> None:
    """(c) torchvision's transforms on PIL images in a DataLoader; fp32, channels first."""
    device, cuda, workers = setting.user_device(), torch.cuda.is_available(), setting.workers
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": cuda}
    loader = DataLoader(Images(*setting.arrays()), setting.batch, shuffle=True, drop_last=True, **options)
    model = setting.model().to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    while True:
        started = time.perf_counter()
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
        wait(device)
        turn(time.perf_counter() - started)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_rss() -> float:
    """Bytes; Linux tells it by process, unlike getrusage, which counts what the process was before it was this program."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * float(line.split()[1])


def serve(way: Callable[[Setting, Turn], None], setting: Setting) -> None:
    """Train by `way`: a line of JSON on standard output after each round, another round for each line on standard input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stdout = Path(os.devnull).open("w")  # progress
    before = peak_rss()

    def turn(seconds: float) -> None:
        cuda = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if cuda else peak_rss() - before
        print(json.dumps({"seconds": seconds, "peak_mb": peak / 1e6}), file=answers)
        if not sys.stdin.readline():
            os._exit(0)  # nothing is left to save, and a compiled network or a CUDA graph takes long to tidy up

    way(setting, turn)
