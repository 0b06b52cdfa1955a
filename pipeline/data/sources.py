"""Raw data by name: each loader reads what is on the disk (or lets torchvision fetch it) and checks all of it.

CIFAR's own files are Python pickles written by its authors; torchvision reads them only after their MD5 matched.
Nothing else here unpickles anything.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Data
from pipeline.data import carvana, nyu_v2, scenes, tiny_imagenet
from pipeline.data.raw import Source, Split
from pipeline.errors import InputError

IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}  # folder -> split
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
KRIZHEVSKY = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; no licence stated"


def load(options: Data) -> Source:
    """The source called `options.name`; `InputError` names what is missing or malformed below `options.root`."""
    return SOURCES[options.name](options)


def _digits(options: Data) -> Source:
    """scikit-learn's 1797 handwritten digits, 8x8 greyscale; values 0..16 become 0..255."""
    from sklearn.datasets import load_digits

    images, labels = map(np.asarray, load_digits(return_X_y=True))  # (1797, 64), (1797,)
    pixels = np.round(images.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    licence = "Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, CC BY 4.0; through scikit-learn"
    return Source(tuple("0123456789"), {"train": Split(pixels, labels.astype(np.int64))}, licence)


def _fashion_mnist(options: Data) -> Source:
    """Xiao et al. 2017: 60000 + 10000 greyscale 28x28, the idx files in root/FashionMNIST/raw."""
    splits, classes = _torchvision("FashionMNIST", options, (28, 28, 1))
    return Source(classes, splits, "Fashion-MNIST, Zalando SE, MIT licence")


def _cifar10(options: Data) -> Source:
    """50000 + 10000 RGB 32x32: root/cifar-10-batches-py as torchvision keeps it, or `root` itself an .npz file."""
    if options.root.endswith(".npz"):
        return Source(CIFAR10, _npz(Path(options.root), (32, 32, 3), len(CIFAR10)), f"CIFAR-10: {KRIZHEVSKY}")
    splits, classes = _torchvision("CIFAR10", options, (32, 32, 3))
    return Source(classes, splits, f"CIFAR-10: {KRIZHEVSKY}")


def _cifar100(options: Data) -> Source:
    """50000 + 10000 RGB 32x32 in 100 classes: root/cifar-100-python as torchvision keeps it, or `root` itself an .npz file, whose
    classes go by their numbers."""
    if options.root.endswith(".npz"):
        classes = tuple(str(label) for label in range(100))
        return Source(classes, _npz(Path(options.root), (32, 32, 3), 100), f"CIFAR-100: {KRIZHEVSKY}")
    splits, classes = _torchvision("CIFAR100", options, (32, 32, 3))
    return Source(classes, splits, f"CIFAR-100: {KRIZHEVSKY}")


def _folder(options: Data) -> Source:
    """torchvision's ImageFolder layout: root/CLASS/**/x.png, or root/{train,val or validation,test}/CLASS/**/x.png."""
    root = Path(options.root)
    try:
        if not root.is_dir():
            raise InputError(f"data.root: {root} is not a folder: give one that holds train/CLASS/*.png or CLASS/*.png")
        homes, notes = _homes(root), []
        found = {split: _classes(home, notes) for split, home in homes.items()}
    except OSError as error:
        raise InputError(f"data.root: {error.filename} cannot be read: {error.strerror}") from None
    classes = list(found["train"])
    for split, files in found.items():
        if list(files) != classes:
            odd = ", ".join(sorted(set(files) ^ set(classes)))
            raise InputError(f"{homes[split]} and {homes['train']} differ in the classes {odd}: make them the same")
    splits = {split: _files(root, list(files.values())) for split, files in found.items()}
    return Source(tuple(classes), splits, "the user's own images", root, notes)


def _homes(root: Path) -> dict[str, Path]:
    """The folder of each split; only `train`, the root itself, where images are not divided into splits."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    named = [path for path in folders if path.name in SPLITS and any(child.is_dir() for child in path.iterdir())]
    if not named:
        return {"train": root}
    if strangers := [path.name for path in folders if path not in named]:
        raise InputError(
            f"{root} holds {', '.join(strangers)} beside {named[0].name}: move elsewhere what is not train, val, "
            "validation or test with class folders in it"
        )
    homes = {SPLITS[path.name]: path for path in named}
    if "train" not in homes:
        raise InputError(f"{root} holds {named[0].name} but no train with class folders: add train/CLASS/*.png")
    if len(homes) < len(named):
        raise InputError(f"{root} holds both val and validation: keep one")
    return homes


def _classes(home: Path, notes: list[str]) -> dict[str, list[Path]]:
    """The image files of each class folder, in ImageFolder's order; counts in `notes` what has no image's extension."""
    folders = sorted(path for path in home.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(folders) < 2:
        raise InputError(f"{home} has {len(folders)} class folders: at least 2 are needed, each with its own images")
    found, other = {}, 0
    for folder in folders:
        files = [path for path in _walk(folder) if not path.name.startswith(".")]
        found[folder.name] = [path for path in files if path.suffix.lower() in IMAGES]
        other += len(files) - len(found[folder.name])
        if not found[folder.name]:
            raise InputError(f"{folder} has no images: add some ({', '.join(IMAGES)}) or remove the folder")
    if other:
        notes.append(f"{home.name}: {other} files passed over, not ending in {', '.join(IMAGES)}")
    return found


def _walk(folder: Path) -> list[Path]:
    def stop(error: OSError) -> None:
        raise error

    levels = sorted(os.walk(folder, onerror=stop, followlinks=True))
    return [Path(level, name) for level, _, names in levels for name in sorted(names)]


def _files(root: Path, classes: list[list[Path]]) -> Split:
    paths = [path.relative_to(root).as_posix() for files in classes for path in files]
    return Split(np.array(paths), np.repeat(np.arange(len(classes), dtype=np.int64), [len(files) for files in classes]))


def _npz(path: Path, size: tuple[int, int, int], classes: int) -> dict[str, Split]:
    """An .npz with train_images, train_labels, test_images, test_labels; images uint8 (N, H, W, C), labels integers."""
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    if not path.is_file():
        raise InputError(f"data.root: {path} does not exist: give an .npz file with {', '.join(keys)}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if missing := [key for key in keys if key not in archive]:
                raise InputError(f"{path} lacks {', '.join(missing)}; it has {', '.join(archive) or 'no arrays'}")
            arrays = {key: archive[key] for key in keys}
    except InputError:
        raise
    except Exception as error:  # zip, zlib, header and pickle errors have no common class
        raise InputError(f"{path} is no .npz file of plain arrays ({error}): write it again with numpy.savez") from None
    return {
        split: _checked(f"{path}: {split}", arrays[f"{split}_images"], arrays[f"{split}_labels"], size, classes)
        for split in ("train", "test")
    }


def _torchvision(name: str, options: Data, size: tuple[int, int, int]) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Train and test split of a torchvision dataset and its classes, fetched first where `options.download` allows."""
    from torchvision import datasets

    splits, classes = {}, ()
    for split in ("train", "test"):
        try:
            data: Any = getattr(datasets, name)(options.root, train=split == "train", download=options.download)
        except Exception as error:  # network, archive, checksum and pickle errors have no common class
            hint = "check the network and the folder" if options.download else "set data.download: true"
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"data.root: {name} cannot be read from {options.root} ({reason}): {hint}") from None
        where, images = f"{name} in {options.root}: {split}", np.asarray(data.data)
        images = images[..., None] if images.ndim == 3 else images
        splits[split] = _checked(where, images, np.asarray(data.targets), size, len(data.classes))
        classes = tuple(data.classes)
    return splits, classes


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
    "folder": _folder,
    "scenes_segment": scenes.load_masks,
    "scenes_depth": scenes.load_depths,
    "carvana": carvana.load,
    "nyu_v2": nyu_v2.load,
}
