"""Raw data as a loader hands it over, before it is divided and measured."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

TaskName = Literal["classify", "segment", "depth"]


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, H, W, C), or (N,) paths of image files below the source's root, and their labels int64 (N,).

    Where a target belongs to every pixel, `targets` are masks uint8 (N, H, W) of 0 and 1, depths float32 (N, H, W) in metres (0:
    unknown), or (N,) paths of files that the source's `read_target` reads, and labels are all 0. Images of one number in `groups`
    (N,) show the same thing: they are held out together or not at all.
    """

    images: np.ndarray
    labels: np.ndarray
    targets: np.ndarray | None = None
    groups: np.ndarray | None = None

    def take(self, indices: np.ndarray) -> "Split":
        """Some of the images, with all that belongs to them."""
        return replace(self, **{name: array[indices] for name, array in vars(self).items() if array is not None})


@dataclass(frozen=True)
class Source:
    """What a loader found: always a `train` split, `validation` and `test` where the data has its own.

    `classes` says what each output of a network stands for: the classes, or of a mask or a depth the one thing that it is of.
    """

    classes: tuple[str, ...]
    splits: dict[str, Split]
    licence: str
    root: Path | None = None  # of image files
    notes: list[str] = field(default_factory=list)
    channels: int | None = None  # of image files; None: 1 where all are greyscale, else 3
    task: TaskName = "classify"
    read_target: Callable[[Path], np.ndarray] | None = None  # a target's file -> (H, W); `InputError` names a file that is none
