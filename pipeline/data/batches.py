"""Prepared data as batches on the device: shuffled, cropped, flipped and normalised, the same in every run.

B: images in a batch, C: channels, H, W: height and width as stored, h, w: as the network sees them, the same two unless the
images are resampled; p: pixels of padding. An epoch's order, crops, boxes and flips depend on (seed, epoch number) alone, so a
run that continues at epoch n, or within it, sees what an undisturbed run sees.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from pipeline import files
from pipeline.config import Augment, Crop
from pipeline.data import stream, views
from pipeline.data.raw import TaskName
from pipeline.data.targets import TYPES, Targets
from pipeline.errors import InputError

FORMAT = 2
AT_ONCE = 2**24  # values in the batches that are made at once, 64 MiB
SPLITS = ("train", "validation", "test")
SplitName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Prepared:
    """A folder written by `prepare`: what is in it. Pixels scaled to [0, 1] are normalised as (x - mean) / std."""

    folder: Path
    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # C, h, w: what networks see
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    counts: dict[str, int]  # images in each split
    storage: Literal["memory", "stream"]
    root: Path | None  # of the image files, where storage is stream
    stored: tuple[int, int, int]  # C, H, W
    crop: Crop | None  # from what is stored to what networks see
    task: TaskName = "classify"  # what networks are to answer; older folders do not say


def load(folder: Path) -> Prepared:
    """What `prepare` wrote to `folder`. `InputError` names the file when one is missing, cut short or does not fit."""
    card = files.read_json(folder / "data.json")
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise _damaged(folder / "data.json", f"its format is not {FORMAT}")
    try:
        known = {key: card[key] for key in Prepared.__dataclass_fields__ if key not in ("folder", "task")}
        known["task"] = card.get("task", "classify")
        prepared = TypeAdapter(Prepared).validate_python({"folder": folder, **known})
        sizes = {name: int(card["files"][name]) for split in SPLITS for name in _names(prepared, split)}
        sums = dict(card.get("sums", {}))  # older folders have none
        fits = len(prepared.mean) == len(prepared.std) == prepared.shape[0] and set(prepared.counts) == set(SPLITS)
        fits = fits and all(value > 0 for value in prepared.std) and prepared.shape == seen(prepared.stored, prepared.crop)
    except (KeyError, TypeError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        raise _damaged(folder / "data.json", " ".join(str(error).split())) from None
    if not fits:
        raise _damaged(folder / "data.json", "mean, std, shape and counts do not fit")
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(path, "it is missing")
        if path.stat().st_size != size:
            raise _damaged(path, f"it has {path.stat().st_size} bytes, not {size}")
        if name in sums and files.crc32(path) != sums[name]:
            raise _damaged(path, "it is not what was prepared, says its sum")
    for split in SPLITS:
        _check(prepared, split)
    return prepared


def seen(stored: tuple[int, int, int], crop: Crop | None) -> tuple[int, int, int]:
    """The shape of images after `crop`."""
    return (stored[0], crop.size, crop.size) if crop else stored


class Batches:
    """The images of one split and their labels, or targets for every pixel, in batches.

    With `shuffle` (training) images come in a new order each epoch and an incomplete last batch is dropped unless it is
    the only one; without, all come in the order of the split. `augment` (None: no change) pads by p pixels and crops back
    at a random place, or takes a random box instead of the prepared crop, and flips half of the images, each image on its
    own. Pixels in memory live on the device as uint8 and as they are stored; streamed ones are decoded by `workers`
    processes (0: in this one), which stay from epoch to epoch. `images`: how many images an epoch yields.
    """

    def __init__(
        self,
        prepared: Prepared,
        split: SplitName,
        batch_size: int,
        device: torch.device | str,
        augment: Augment | None,
        shuffle: bool,
        seed: int,
        workers: int = 0,
        channels_last: bool = True,
    ) -> None:
        self.prepared, self.split, self.batch_size, self.device = prepared, split, batch_size, torch.device(device)
        self.augment, self.shuffle, self.seed, self.workers = augment, shuffle, seed, workers
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.count = prepared.counts[split]
        self.images = len(self) * batch_size if shuffle and self.count >= batch_size else self.count
        _, height, width = prepared.shape
        if augment and augment.pad_mode == "reflect" and augment.pad >= min(height, width):
            raise InputError(f"augment.pad = {augment.pad} cannot reflect images of {height}x{width} pixels: lower it")
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (prepared.mean, prepared.std))
        self._scale = (1 / (255 * std)).float().repeat(width).to(self.device)  # (W * C,)
        self._shift = (-mean / std).float().repeat(width).to(self.device)
        self._boxes = augment.scale if augment else None
        self._resampled = prepared.crop is not None or self._boxes is not None
        if prepared.crop and self._boxes is None:
            middle = views.of_middle(prepared.crop, prepared.stored[1:])
            self._middle = [views.padded(weights, augment).to(self.device) for weights in middle]  # (h + 2p, H), (w + 2p, W)
        self._pixels: Tensor | None = None
        if prepared.storage == "memory":
            pixels = torch.from_numpy(np.load(prepared.folder / f"{split}_images.npy", allow_pickle=False)).to(self.device)
            self._pixels = pixels if self._resampled else views.pad(pixels, augment)
        else:
            self._reader = stream.Reader(_listed(prepared, split), workers, pin=self.device.type == "cuda")
        self._targets: Targets | None = None
        if prepared.task == "classify":
            self._labels = torch.from_numpy(np.load(prepared.folder / f"{split}_labels.npy", allow_pickle=False)).to(self.device)
        else:
            path, memory = prepared.folder / f"{split}_targets.npy", prepared.storage == "memory"
            self._targets = Targets(path, memory, self.device, augment, self._resampled)

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(self.count, self.batch_size)
        return whole + (rest > 0 and not (self.shuffle and whole > 0))

    @property
    def waited(self) -> float | None:
        """Seconds that whoever took batches had to wait for images to be decoded; None where they are in memory."""
        return self._reader.waited if self._pixels is None else None

    def epoch(self, number: int, part: Callable[[int], slice] = slice, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Epoch `number`: float32 images (B, C, h, w), normalised, and int64 labels (B,), or float32 masks of 0 and 1 or depths in
        metres (B, h, w), as `prepared.task` says; all on the device. Of each batch only the `part` of its length; a batch of which
        that is nothing is left out. The first `start` of these batches are passed over, and none of their images is read."""
        draw = torch.Generator()
        draw.manual_seed(int.from_bytes(hashlib.sha256(f"{self.seed}/{number}".encode()).digest()[:8], "big"))
        order = torch.randperm(self.count, generator=draw) if self.shuffle else torch.arange(self.count)
        order = order[: self.images]
        pad = self.augment.pad if self.augment else 0
        places = torch.randint(2 * pad + 1, (2, self.images), generator=draw)  # corners, or boxes
        flips = torch.rand(self.images, generator=draw) < 0.5
        if self._boxes is not None:
            places = views.draw_boxes(self.images, self.prepared.stored[1:], self._boxes, draw)
        positions = [numbers[part(len(numbers))] for numbers in torch.arange(self.images).split(self.batch_size)]
        positions = [own for own in positions if len(own)][start:]
        left = torch.cat([torch.arange(0), *positions])
        streamed = self._pixels is None and (self._targets is None or self._targets.pool is None)
        order, places, flips = order[left].to("cpu" if streamed else self.device), places[:, left], flips[left]
        lengths, many = [len(own) for own in positions], 1 if streamed else self._at_once()
        groups = [lengths[at : at + many] for at in range(0, len(lengths), many)]
        sizes = [sum(group) for group in groups]
        picks, flips, places = order.split(sizes), flips.to(self.device).split(sizes), places.to(self.device).split(sizes, 1)
        flipped = flips if self.augment and self.augment.flip else [None] * len(groups)
        chosen = picks if self._targets else order.to(self.device).split(sizes)  # labels lie there; nobody waits for the device
        for group, numbers, place, flip, pool in zip(groups, chosen, places, flipped, self._pools(picks), strict=True):
            images, targets = self._view(*pool, numbers, place, flip)
            yield from zip(images.split(group), targets.split(group), strict=True)

    def _at_once(self) -> int:
        """How many batches are made at once: on a GPU several, as launching one's kernels takes longer than they run; on a CPU one,
        which stays in its cache."""
        values = self.batch_size * max(math.prod(self.prepared.shape), math.prod(self.prepared.stored))
        return max(1, AT_ONCE // values) if self.device.type == "cuda" else 1

    def stored(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each batch in the order of the split uint8 pixels as they are stored, padded where they are augmented, (N, H, W, C),
        and which B of these N are meant."""
        return self._pools(list(torch.arange(self.count).split(self.batch_size)))

    def _pools(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each of `batches`, numbers of images, padded uint8 pixels (N, H + 2p, W + 2p, C), and which B of these N are meant.

        Images that are resampled come as (N, H, W, C): they are padded afterwards.
        """
        if self._pixels is not None:
            yield from ((self._pixels, picks) for picks in batches)
            return
        numbers = [picks.tolist() for picks in batches]
        for pixels in stream.upload(self._reader.read(numbers), self.device):
            pixels = pixels if self._resampled else views.pad(pixels, self.augment)
            yield pixels, torch.arange(len(pixels), device=self.device)

    def _view(self, pixels: Tensor, picks: Tensor, numbers: Tensor, places: Tensor, flips: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the pool `pixels` the images `picks` as the network sees them: cropped at `places`, flipped where `flips`, normalised;
        and what belongs to them, which are the images `numbers` of the split."""
        channels, height, width = self.prepared.shape
        targets: Tensor | None = None
        if self._resampled:
            weights = self._weights(places, flips)
            rows = views.resample(pixels[picks], *weights)
            targets = self._targets.resample(numbers, *weights) if self._targets else None
        else:
            rows = views.cut(pixels, picks, places, flips, (height, width))
            targets = self._targets.cut(numbers, places, flips, (height, width)) if self._targets else None
        # whole rows of w * C numbers: a last dimension of C = 3 would be ten times slower on a CPU
        images = rows.float().mul_(self._scale).add_(self._shift)
        images = images.unflatten(2, (width, channels)).permute(0, 3, 1, 2).contiguous(memory_format=self.layout)
        return images, self._labels[numbers.to(self.device)] if targets is None else targets

    def _weights(self, places: Tensor, flips: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of a box of each image, or a window of the prepared crop: weights of rows (B, h, H) and columns (B, w, W)."""
        if self._boxes is not None:
            rows, columns = views.of_boxes(places, self.prepared.stored[1:], self.prepared.shape[1:])
        else:
            both = zip(self._middle, places, self.prepared.shape[1:], strict=True)
            rows, columns = (views.windows(weights, starts, size) for weights, starts, size in both)
        return rows, columns if flips is None else views.mirrored(columns, flips)


def _names(prepared: Prepared, split: str) -> list[str]:
    targets = f"{split}_labels.npy" if prepared.task == "classify" else f"{split}_targets.npy"
    return [targets, f"{split}_images.npy" if prepared.storage == "memory" else f"{split}_files.json"]


def _check(prepared: Prepared, split: str) -> None:
    """The arrays of a split have the type and shape that data.json says, and labels name its classes."""
    channels, height, width = prepared.stored
    count = prepared.counts[split]
    expected: dict[str, tuple[str, tuple[int, ...]]] = {f"{split}_labels.npy": ("int64", (count,))}
    if prepared.task != "classify":
        expected = {f"{split}_targets.npy": (TYPES[prepared.task], (count, height, width))}
    if prepared.storage == "memory":
        expected[f"{split}_images.npy"] = ("uint8", (count, height, width, channels))
    elif prepared.root is None or not prepared.root.is_dir():
        raise InputError(f"{prepared.root}, which holds the images, is not there: bring it back or prepare again")
    for name, (dtype, shape) in expected.items():
        path = prepared.folder / name
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise _damaged(path, str(error)) from None
        if array.dtype != dtype or array.shape != shape:
            raise _damaged(path, f"it holds {array.dtype} {array.shape}, not {dtype} {shape}")
    if prepared.task != "classify":
        return
    labels = np.load(prepared.folder / f"{split}_labels.npy", allow_pickle=False)
    if not count or labels.min() < 0 or labels.max() >= len(prepared.classes):
        raise _damaged(prepared.folder / f"{split}_labels.npy", f"labels must be 0 to {len(prepared.classes) - 1}")


def _listed(prepared: Prepared, split: str) -> stream.Files:
    path = prepared.folder / f"{split}_files.json"
    listed = files.read_json(path)
    try:
        paths, lengths = listed["paths"], listed["lengths"]
        assert prepared.root is not None
        whole = len(paths) == len(lengths) == prepared.counts[split]
    except (KeyError, TypeError) as error:
        raise _damaged(path, repr(error)) from None
    if not all(isinstance(name, str) and name[:1] != "/" and ".." not in name.split("/") for name in paths):
        raise _damaged(path, f"it lists files outside {prepared.root}")
    if not whole:
        raise _damaged(path, f"it does not list {prepared.counts[split]} files")
    return stream.Files(prepared.root, paths, lengths, prepared.stored[0], prepared.stored[1])


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is damaged ({why}): delete {path.parent} and run `dvc repro` again; {files.BACK}")
