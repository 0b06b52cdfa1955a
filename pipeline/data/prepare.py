"""Raw data -> a folder of plain files that `batches.load` accepts, written whole or not at all.

data.json                                 name, classes, shapes, crop, normalisation, counts, fingerprint, file sizes and sums
{train,validation,test}_labels.npy        int64 (N,)                                           (task: classify)
{train,validation,test}_targets.npy       (N, H, W), see pipeline/data/targets.py              (other tasks)
{train,validation,test}_images.npy        uint8 (N, H, W, C)                                   (storage: memory)
{train,validation,test}_files.json        paths below `root` and lengths in bytes, (N,) each   (storage: stream)
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline import files
from pipeline.config import Data
from pipeline.data import sources, stream, targets
from pipeline.data.batches import FORMAT, seen
from pipeline.data.raw import Source, Split
from pipeline.errors import InputError

LIMIT = 4 * 2**30  # bytes of pixels up to which storage "auto" keeps them in memory
CHUNK = 512  # images decoded and written at a time

Result = TypeVar("Result")


def prepare(options: Data, out: Path) -> dict[str, Any]:
    """Read the data set `options` describes, divide it, measure it, write it to the folder `out`; returns data.json.

    Raises `InputError` for what is wrong with the raw data or the options, `OSError` when the disk fails. An earlier
    `out` stays as it was until the new one is complete.
    """
    source = _divided(sources.load(options), options)
    layout = _layout(source, options)
    try:
        with files.replaced(out) as partial:
            return _write(source, layout, options, partial)
    except OSError as error:  # a failed write does not know its file
        raise OSError(error.errno, error.strerror, error.filename or str(out)) from None


def hold_out(labels: np.ndarray, classes: tuple[str, ...], share: float, seed: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held out), both ascending: of each class round(share * its images), at least 1, are held out.

    Raises `InputError` where a class would have no image left.
    """
    held = []
    for members in _shuffled(labels, seed, purpose):
        count = max(1, round(share * len(members)))
        if count >= len(members):
            raise InputError(
                f"data.{purpose} = {share} leaves class {classes[labels[members[0]]]} no training image of its "
                f"{len(members)}: lower it or add images"
            )
        held.append(members[:count])
    chosen = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def draw(labels: np.ndarray, classes: tuple[str, ...], count: int, seed: int) -> np.ndarray:
    """Indices, ascending, of `count` images of each class, every choice of them equally likely.

    Raises `InputError` where a class has fewer.
    """
    drawn = []
    for members in _shuffled(labels, seed, "per_class"):
        if len(members) < count:
            raise InputError(
                f"data.per_class = {count}: class {classes[labels[members[0]]]} has only {len(members)} training images "
                "that are not held out: lower it or add images"
            )
        drawn.append(members[:count])
    return np.sort(np.concatenate(drawn))


def _shuffled(labels: np.ndarray, seed: int, purpose: str) -> list[np.ndarray]:
    """The indices of each class in an order that `seed` and `purpose` decide.

    Images are ranked by a SHA-256 of (seed, purpose, index): no library's random numbers, so no version changes them.
    """
    ranks = np.array([hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest() for index in range(len(labels))])
    order = np.lexsort((ranks, labels))
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _divided(source: Source, options: Data) -> Source:
    """The source with all three splits: what it lacks is held out of its training images, of which `per_class` are kept."""
    splits = dict(source.splits)
    if missing := set(range(len(source.classes))) - set(splits["train"].labels.tolist()):
        names = ", ".join(source.classes[index] for index in sorted(missing))
        raise InputError(f"data.root: {options.root} has no training images of class {names}: add some")
    for purpose, share in (("test", options.test), ("validation", options.validation)):
        if purpose not in splits:
            kept, held = _hold_out(splits["train"], source.classes, share, options.split_seed, purpose)
            splits[purpose] = splits["train"].take(held)
            splits["train"] = splits["train"].take(kept)
    if options.per_class is not None:
        whole = splits["train"]
        splits["train"] = whole.take(draw(whole.labels, source.classes, options.per_class, options.split_seed))
    ordered = {name: splits[name] for name in ("train", "validation", "test")}
    return replace(source, splits=ordered)


def _hold_out(whole: Split, classes: tuple[str, ...], share: float, seed: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """As `hold_out`; of images in groups round(share * groups), at least 1, groups."""
    if whole.groups is None:
        return hold_out(whole.labels, classes, share, seed, purpose)
    _, groups = np.unique(whole.groups, return_inverse=True)
    _, held = hold_out(np.zeros(groups.max() + 1, np.int64), classes, share, seed, purpose)
    inside = np.isin(groups, held)
    return np.flatnonzero(~inside), np.flatnonzero(inside)


@dataclass(frozen=True)
class _Layout:
    """How the pixels are stored: (H, W, C), the size to resize to (None: as they are), and where."""

    shape: tuple[int, int, int]
    size: int | None
    storage: str


def _layout(source: Source, options: Data) -> _Layout:
    size = options.image_size
    native = source.splits["train"].images.shape[1:] if source.root is None else _survey(source, size is None)
    shape = (size, size, native[2]) if size else native
    storage = options.storage
    for key, values in (("mean", options.mean), ("std", options.std)):
        if isinstance(values, str):
            continue
        if len(values) != shape[2]:
            raise InputError(f"data.{key} = {values}: the images have {shape[2]} channels; give one number for each")
        if min(values) < 0 or max(values) > 1 or (key == "std" and 0 in values):
            raise InputError(f"data.{key} = {values}: pixels are scaled to [0, 1]; give numbers in that range, std > 0")
    if storage == "auto":
        images = sum(len(split.labels) for split in source.splits.values())
        storage = "memory" if source.root is None or images * int(np.prod(shape)) <= LIMIT else "stream"
    if storage == "stream" and (source.root is None or size is None):
        needed = "data.name: folder, imagenet, imagenette, tiny_imagenet, carvana or nyu_v2; use memory or auto"
        if source.root is not None:
            needed = "data.image_size, the size at which files are decoded (data.crop is of that); give one"
        raise InputError(f"data.storage: stream needs {needed}")
    return _Layout(shape, size, storage)


def _survey(source: Source, same_size: bool) -> tuple[int, int, int]:
    """(H, W, C) of image files, from their headers: C is the source's, or 1 if all are greyscale; sizes agree if `same_size`."""
    assert source.root is not None
    paths = [source.root / str(path) for split in source.splits.values() for path in split.images]
    with ThreadPoolExecutor() as pool:
        headers = [header for chunk in _mapped(pool, stream.header, paths) for header in chunk]
    (height, width), channels = headers[0][1], source.channels or max(channels for channels, _ in headers)
    for path, (_, other) in zip(paths, headers, strict=True):
        if same_size and other != (height, width):
            raise InputError(
                f"{path} is {other[1]}x{other[0]} pixels, {paths[0]} is {width}x{height}: "
                "set data.image_size to resize all to one square"
            )
    return height, width, channels


def _write(source: Source, layout: _Layout, options: Data, out: Path) -> dict[str, Any]:
    """Write every split and then data.json into `out`."""
    height, width, channels = layout.shape
    card: dict[str, Any] = {"format": FORMAT, "name": options.name, "task": source.task, "classes": list(source.classes)}
    stored = (channels, height, width)
    card |= {"shape": list(seen(stored, options.crop)), "stored": list(stored), "storage": layout.storage}
    card["crop"] = options.crop.model_dump() if options.crop else None
    card["root"] = str(source.root) if layout.storage == "stream" else None
    card["counts"] = {name: len(split.labels) for name, split in source.splits.items()}
    digest = hashlib.sha256()
    tally = np.zeros((channels, 256), np.int64)
    for name, split in source.splits.items():
        if source.task == "classify":
            content = io.BytesIO()  # numpy says nothing of a full disk, only that a file is short
            np.save(content, split.labels, allow_pickle=False)
            (out / f"{name}_labels.npy").write_bytes(content.getvalue())
            digest.update(split.labels.astype("<i8").tobytes())
        else:
            targets.write(source, layout.size, (height, width), name, out, digest)
        (_write_images if layout.storage == "memory" else _write_files)(source, layout, name, out, digest, tally)
        if name == "train":
            card |= _statistics(tally, options)
    known = ("name", "classes", "shape", "storage", "counts", "mean", "std")
    known += ("stored", "crop") if options.crop else ()  # without a crop `shape` says it all
    known += ("task",) if source.task != "classify" else ()  # folders of before there were tasks keep their fingerprint
    digest.update(json.dumps([card[key] for key in known]).encode())
    card |= {"fingerprint": digest.hexdigest(), "licence": source.licence, "notes": source.notes}
    card["files"] = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    card["sums"] = {path.name: files.crc32(path) for path in sorted(out.iterdir())}
    for path in out.iterdir():  # on the disk before data.json, which vouches for them, is
        with path.open("rb") as file:
            os.fsync(file.fileno())
    files.write_json(out / "data.json", card, summed=True)
    return card


def _write_images(source: Source, layout: _Layout, name: str, out: Path, digest: Any, tally: np.ndarray) -> None:
    split = source.splits[name]
    form = {"descr": "|u1", "fortran_order": False, "shape": (len(split.labels), *layout.shape)}
    with (out / f"{name}_images.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, form)
        for pixels, _ in _chunks(source, layout, split.images):
            content = pixels.tobytes()
            file.write(content)
            digest.update(content)
            _count(pixels, tally)


def _write_files(source: Source, layout: _Layout, name: str, out: Path, digest: Any, tally: np.ndarray) -> None:
    """As `_write_images`, but keep only where the pixels are; each file is decoded once, to check and to measure it."""
    split, lengths = source.splits[name], []
    for pixels, contents in _chunks(source, layout, split.images):
        for length, content_digest in contents:
            lengths.append(length)
            digest.update(content_digest)
        _count(pixels, tally)
    files.write_json(out / f"{name}_files.json", {"paths": split.images.tolist(), "lengths": lengths})


def _chunks(source: Source, layout: _Layout, images: np.ndarray) -> Iterator[tuple[np.ndarray, list[tuple[int, bytes]]]]:
    """Pixels uint8 (n, H, W, C), n <= CHUNK, at their final size; beside them each file's length and SHA-256."""

    def from_file(name: Any) -> tuple[np.ndarray, tuple[int, bytes]]:
        assert source.root is not None
        content = (path := source.root / str(name)).read_bytes()
        pixels = stream.decode(path, content, layout.shape[2], layout.size)
        return pixels, (len(content), hashlib.sha256(content).digest())

    with ThreadPoolExecutor() as pool:
        if source.root is not None:
            for chunk in _mapped(pool, from_file, images):
                yield np.stack([pixels for pixels, _ in chunk]), [content for _, content in chunk]
        else:
            for chunk in _mapped(pool, lambda image: stream.resize(image, layout.size), images):
                yield np.stack(chunk), []


def _mapped(pool: ThreadPoolExecutor, function: Callable[[Any], Result], items: Any) -> Iterator[list[Result]]:
    """`function` of all items, CHUNK at a time: the results of millions would not fit into memory at once."""
    for start in range(0, len(items), CHUNK):
        yield list(pool.map(function, items[start : start + CHUNK]))


def _count(pixels: np.ndarray, tally: np.ndarray) -> None:
    """Add to tally (C, 256) how often each channel has each value."""
    for channel, row in enumerate(tally):
        row += np.bincount(pixels[..., channel].ravel(), minlength=256)


def _statistics(tally: np.ndarray, options: Data) -> dict[str, list[float]]:
    """Mean and population std per channel of pixels in [0, 1]; whole numbers until the end, so the same everywhere."""
    mean, std = [], []
    for row in tally.tolist():
        count = sum(row)
        total = sum(value * times for value, times in enumerate(row))
        squares = sum(value * value * times for value, times in enumerate(row))
        mean.append(total / (255 * count))
        std.append(((count * squares - total * total) / (255 * count) ** 2) ** 0.5)
    mean = mean if options.mean == "auto" else list(options.mean)
    std = std if options.std == "auto" else list(options.std)
    if 0 in std:
        raise InputError(f"data.std: channel {std.index(0)} is equal in all training pixels: give data.std as numbers")
    return {"mean": mean, "std": std}
