"""Raw data as a loader hands it over, before it is divided and measured."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, H, W, C), or (N,) paths of image files below the source's root, and their labels int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Source:
    """What a loader found: always a `train` split, `validation` and `test` where the data has its own."""

    classes: tuple[str, ...]
    splits: dict[str, Split]
    licence: str
    root: Path | None = None  # of image files
    notes: list[str] = field(default_factory=list)
    channels: int | None = None  # of image files; None: 1 where all are greyscale, else 3
