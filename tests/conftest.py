"""Digits prepared once for all tests, and trainings on them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from raw_data import options
from torch import nn

from pipeline.config import Fit
from pipeline.data.batches import SPLITS, Batches, Prepared, load
from pipeline.data.prepare import prepare
from pipeline.hooks import Run
from pipeline.surgery import Shape

FIT: dict[str, Any] = {"epochs": 1, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False}
FIT |= {"weight_decay": 1e-4, "schedule": "cosine", "label_smoothing": 0.0, "select": "last", "precision": "fp32"}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The digits at 16x16 pixels: 1x16x16, ten classes."""
    folder = tmp_path_factory.mktemp("data")
    prepare(options("digits", folder, image_size=16), folder / "prepared")
    return load(folder / "prepared")


@pytest.fixture
def make_run(prepared: Prepared) -> Callable[..., Run]:
    """make_run(model, **changes of the fit): a training of `model` on the digits, in fp32 on the CPU."""

    def make(model: nn.Module, **changes: Any) -> Run:
        fit = Fit.model_validate(FIT | changes)
        train = Batches(prepared, "train", fit.batch_size, "cpu", None, shuffle=True, seed=0)
        validation = Batches(prepared, "validation", 256, "cpu", None, shuffle=False, seed=0)
        return Run(model, fit, train, validation, seed=0, device=torch.device("cpu"))

    return make


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Shape], Prepared]:
    """pictures((C, H, W)): random images of that shape and ten classes, 48 to train on, 16 to validate, 16 to test."""

    def make(shape: Shape) -> Prepared:
        folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
        counts = dict(zip(SPLITS, (48, 16, 16), strict=True))
        for split, count in counts.items():
            np.save(folder / f"{split}_images.npy", draw.integers(0, 256, (count, *shape[1:], shape[0]), dtype=np.uint8))
            np.save(folder / f"{split}_labels.npy", np.arange(count) % 10)
        names, half = tuple("0123456789"), (0.5,) * shape[0]
        described = ("random", names, shape, half, half, "random", counts)
        return Prepared(folder, *described, storage="memory", root=None, stored=shape, crop=None)

    return make


@pytest.fixture(scope="session")
def tiny(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The first digits: 192 to train on, 64 to validate, 64 to test."""
    folder = tmp_path_factory.mktemp("tiny")
    counts = dict(zip(SPLITS, (192, 64, 64), strict=True))
    for split, count in counts.items():
        for kind in ("images", "labels"):
            np.save(folder / f"{split}_{kind}.npy", np.load(prepared.folder / f"{split}_{kind}.npy")[:count])
    return replace(prepared, folder=folder, counts=counts)
