"""Targets that belong to every pixel: masks and depths, beside images when data is prepared and batch by batch.

{train,validation,test}_targets.npy     (N, H, W) as the images are stored: masks uint8 of 0 and 1, depths float32 in metres

Whatever moves, resizes or turns an image moves its target alike. A target is never averaged: each pixel takes the nearest one,
because between an edge's two sides lies no object, and a mean with an unknown depth (0) is no depth.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Augment
from pipeline.data import stream, views
from pipeline.data.raw import Source
from pipeline.errors import InputError

CHUNK = 512  # targets decoded and written at a time
TYPES = {"segment": "uint8", "depth": "float32"}  # by task


def write(source: Source, size: int | None, shape: tuple[int, int], name: str, out: Path, digest: Any) -> None:
    """Write the targets of the split `name`, resized to `size` x `size` if given, and add them to `digest`."""
    split, dtype = source.splits[name], np.dtype(TYPES[source.task])
    form = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (len(split.labels), *shape)}
    any_known = source.task != "depth"
    with (out / f"{name}_targets.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, form)
        for targets in _chunks(source, name, size):
            content = targets.astype(dtype.newbyteorder("<"), copy=False).tobytes()
            file.write(content)
            digest.update(content)
            any_known = any_known or bool((targets > 0).any())
    if not any_known:
        raise InputError(f"data.root: no pixel of the {name} images has a known depth (above 0)")


def _chunks(source: Source, name: str, size: int | None) -> Iterator[np.ndarray]:
    split, root = source.splits[name], source.root
    assert split.targets is not None
    if source.read_target is None or root is None:
        yield np.stack([nearest(target, size) for target in split.targets])
        return
    read = source.read_target

    def decoded(pair: tuple[Any, Any]) -> np.ndarray:
        image, path = (root / str(part) for part in pair)
        _, expected = stream.header(image)
        if (target := read(path)).shape != expected:
            raise InputError(f"{path} is {_size(target.shape)} pixels, {image} is {_size(expected)}: a target lies on its image")
        return nearest(target, size)

    pairs = list(zip(split.images, split.targets, strict=True))
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(pairs), CHUNK):
            yield np.stack(list(pool.map(decoded, pairs[start : start + CHUNK])))


def nearest(target: np.ndarray, size: int | None) -> np.ndarray:
    """(H, W) -> (`size`, `size`), each pixel the one in which its centre lies; None leaves it as it is."""
    if size is None:
        return target
    rows, columns = (((2 * np.arange(size) + 1) * side) // (2 * size) for side in target.shape)
    return target[rows[:, None], columns]


class Targets:
    """The targets of a split, on the device where the images are in memory, else read from the disk batch by batch."""

    def __init__(self, path: Path, memory: bool, device: torch.device, augment: Augment | None, resampled: bool) -> None:
        self.device, self.augment, self.resampled = device, augment, resampled
        self.stored = np.load(path, mmap_mode=None if memory else "r", allow_pickle=False)  # (N, H, W)
        self.pool: Tensor | None = self._padded(torch.from_numpy(self.stored).to(device)) if memory else None

    def _padded(self, targets: Tensor) -> Tensor:
        """(N, H, W) -> (N, H + 2p, W + 2p, 1), as images that are not resampled are; else (N, H, W, 1)."""
        return targets[..., None] if self.resampled else views.pad(targets[..., None], self.augment)

    def cut(self, order: Tensor, corners: Tensor, flips: Tensor | None, size: views.Size) -> Tensor:
        """float32 (B, h, w): windows of the targets `order` (B,), as `views.cut` cuts them out of images."""
        pool, picks = self._of(order)
        return views.cut(pool, picks, corners, flips, size).float()

    def resample(self, order: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """float32 (B, h, w): of each target the pixels that count most in an image resampled by weights (B, h, H), (B, w, W)."""
        pool, picks = self._of(order)
        return views.nearest(pool[picks].squeeze(3), rows, columns).float()

    def _of(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Targets (N, ., ., 1), and which of these N are meant."""
        if self.pool is not None:
            return self.pool, order.to(self.device)
        targets = torch.from_numpy(self.stored[order.numpy()]).to(self.device)
        return self._padded(targets), torch.arange(len(targets), device=self.device)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
