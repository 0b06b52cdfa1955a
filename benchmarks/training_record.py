"""The public record holder on CIFAR-10 beside our batches: KellerJordan/cifar10-airbench, from its package `airbench` (MIT).

What is timed is their `CifarLoader`, which crops, flips and normalises a whole epoch at once in fp16, and on CUDA a step of their
network `make_net94`, in fp16 as they train it, with the batches of either. Both loaders pad by 2 mirrored pixels and flip half of
the images. Left out of the step, with both: their averaging of weights every fifth step and their schedule.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.training_ways import Setting, Turn, wait
from pipeline.config import Augment
from pipeline.data.batches import Batches, load

MISSING = "the record holder is left out: `uv pip install --no-deps airbench` brings it"
Epochs = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("airbench") is not None


def theirs(setting: Setting, device: torch.device) -> Epochs:
    """Epochs of their loader."""
    from airbench import CifarLoader  # type: ignore[import-not-found]

    images, labels = setting.arrays()
    with tempfile.TemporaryDirectory() as folder:
        kept = {"images": torch.from_numpy(images), "labels": torch.from_numpy(labels), "classes": [str(i) for i in range(10)]}
        torch.save(kept, Path(folder) / "train.pt")
        loader = CifarLoader(folder, batch_size=setting.batch, aug={"flip": True, "translate": 2}, altflip=True, gpu=device)
    return lambda: loader


def ours(setting: Setting, device: torch.device) -> Epochs:
    """Epochs of our batches."""
    augment = Augment(pad=2, pad_mode="reflect", flip=True, scale=None)
    batches = Batches(load(setting.folder), "train", setting.batch, device, augment, shuffle=True, seed=0)
    numbers = iter(range(10**6))
    return lambda: batches.epoch(next(numbers))


def loader(setting: Setting, turn: Turn, epochs: Callable[[Setting, torch.device], Epochs]) -> None:
    """(d) The loader alone."""
    device = setting.user_device()
    epoch = epochs(setting, device)
    while True:
        started = time.perf_counter()
        for _ in epoch():
            pass
        wait(device)
        turn(time.perf_counter() - started)


def step(setting: Setting, turn: Turn, epochs: Callable[[Setting, torch.device], Epochs]) -> None:
    """(d) Their network, loss and optimiser."""
    from airbench import make_net94  # type: ignore[import-not-found]

    device = setting.user_device()
    epoch, network = epochs(setting, device), make_net94().train()
    learnt = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learnt, lr=1e-4, momentum=0.85, nesterov=True, weight_decay=1e-4)
    while True:
        started = time.perf_counter()
        for images, labels in epoch():
            loss = F.cross_entropy(network(images.half()), labels, label_smoothing=0.2, reduction="none").sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        wait(device)
        turn(time.perf_counter() - started)
