"""Raw data by name: each loader reads what is on the disk, or fetches it, and checks all of it. Nothing is unpickled."""

from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.config import Data
from pipeline.data import carvana, cifar, digits, fashion_mnist, folders, nyu_v2, scenes, tiny_imagenet
from pipeline.data.raw import Source, Split
from pipeline.errors import InputError

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LIMIT = 2**32  # bytes of an .npz file's arrays, unpacked
KRIZHEVSKY = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; no licence stated"

Found = TypeVar("Found")


def load(options: Data) -> Source:
    """The source called `options.name`; `InputError` names what is missing or malformed below `options.root`."""
    return SOURCES[options.name](options)


def _digits(options: Data) -> Source:
    """scikit-learn's 1797 handwritten digits, 8x8 greyscale; values 0..16 become 0..255."""
    images, labels = digits.load()
    pixels = np.round(images[..., None] * 255 / 16).astype(np.uint8)
    licence = "Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, CC BY 4.0; through scikit-learn"
    return Source(tuple("0123456789"), {"train": Split(pixels, labels)}, licence)


def _fashion_mnist(options: Data) -> Source:
    """Xiao et al. 2017: 60000 + 10000 greyscale 28x28, the idx files in root/FashionMNIST/raw."""
    found = _published("FashionMNIST", options, fashion_mnist.read)
    splits = {
        split: _checked(f"FashionMNIST in {options.root}: {split}", images[..., None], labels, (28, 28, 1), 10)
        for split, (images, labels) in found.items()
    }
    return Source(fashion_mnist.CLASSES, splits, "Fashion-MNIST, Zalando SE, MIT licence")


def _cifar10(options: Data) -> Source:
    """50000 + 10000 RGB 32x32: root/cifar-10-batches-py as torchvision keeps it, or `root` itself an .npz file."""
    if options.root.endswith(".npz"):
        return Source(CIFAR10, _npz(Path(options.root), (32, 32, 3), len(CIFAR10)), f"CIFAR-10: {KRIZHEVSKY}")
    return _cifar("CIFAR10", options, cifar.CIFAR10, f"CIFAR-10: {KRIZHEVSKY}")


def _cifar100(options: Data) -> Source:
    """50000 + 10000 RGB 32x32 in 100 classes: root/cifar-100-python as torchvision keeps it, or `root` itself an .npz file, whose
    classes go by their numbers."""
    if options.root.endswith(".npz"):
        classes = tuple(str(label) for label in range(100))
        return Source(classes, _npz(Path(options.root), (32, 32, 3), 100), f"CIFAR-100: {KRIZHEVSKY}")
    return _cifar("CIFAR100", options, cifar.CIFAR100, f"CIFAR-100: {KRIZHEVSKY}")


def _cifar(name: str, options: Data, which: cifar.Published, licence: str) -> Source:
    found, classes = _published(name, options, partial(cifar.read, which))
    splits = {
        split: _checked(f"{name} in {options.root}: {split}", images, labels, (32, 32, 3), len(classes))
        for split, (images, labels) in found.items()
    }
    return Source(classes, splits, licence)


def _npz(path: Path, size: tuple[int, int, int], classes: int) -> dict[str, Split]:
    """An .npz with train_images, train_labels, test_images, test_labels; images uint8 (N, H, W, C), labels integers."""
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    if not path.is_file():
        raise InputError(f"data.root: {path} does not exist: give an .npz file with {', '.join(keys)}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if missing := [key for key in keys if key not in archive]:
                raise InputError(f"{path} lacks {', '.join(missing)}; it has {', '.join(archive) or 'no arrays'}")
            if sum(member.file_size for member in archive.zip.infolist()) > LIMIT:
                raise InputError(f"{path} unpacks to more than {LIMIT} bytes: give one with {', '.join(keys)} alone")
            arrays = {key: archive[key] for key in keys}
    except InputError:
        raise
    except Exception as error:  # zip, zlib, header and pickle errors have no common class
        raise InputError(f"{path} is no .npz file of plain arrays ({error}): write it again with numpy.savez") from None
    return {
        split: _checked(f"{path}: {split}", arrays[f"{split}_images"], arrays[f"{split}_labels"], size, classes)
        for split in ("train", "test")
    }


def _published(name: str, options: Data, read: Callable[[Path, bool], Found]) -> Found:
    """What `read` finds below `options.root`, or fetches where `options.download` allows; `InputError` where it fails."""
    try:
        return read(Path(options.root), options.download)
    except InputError:
        raise
    except (OSError, ValueError, HTTPException) as error:
        hint = "check the network and the folder" if options.download else "set data.download: true"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"data.root: {name} cannot be read from {options.root} ({reason}): {hint}") from None


def _checked(where: str, images: np.ndarray, labels: np.ndarray, size: tuple[int, ...], classes: int) -> Split:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != size or not len(images):
        needed = f"uint8 (N, {', '.join(map(str, size))}) with N > 0"
        raise InputError(f"{where} images are {images.dtype} {images.shape}: {needed} is needed")
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise InputError(f"{where} labels are {labels.dtype} {labels.shape}: integers ({len(images)},) are needed")
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"{where} labels reach from {labels.min()} to {labels.max()}: 0 to {classes - 1} is allowed")
    return Split(images, labels.astype(np.int64))


SOURCES: dict[str, Callable[[Data], Source]] = {
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "tiny_imagenet": tiny_imagenet.load,
    "imagenette": folders.imagenette,
    "imagenet": folders.imagenet,
    "folder": folders.load,
    "scenes_segment": scenes.load_masks,
    "scenes_depth": scenes.load_depths,
    "carvana": carvana.load,
    "nyu_v2": nyu_v2.load,
}
