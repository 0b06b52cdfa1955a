"""Images in class folders: a user's own, ImageNet's and Imagenette's."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.config import Data
from pipeline.data.raw import Source, Split
from pipeline.errors import InputError

IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}  # folder -> split
IMAGENETTE = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute",
}  # fmt: skip


def load(options: Data) -> Source:
    """torchvision's ImageFolder layout: root/CLASS/**/x.png, or root/{train,val or validation,test}/CLASS/**/x.png."""
    root = Path(options.root)
    try:
        if not root.is_dir():
            raise InputError(f"data.root: {root} is not a folder: give one that holds train/CLASS/*.png or CLASS/*.png")
        homes, notes = _homes(root), []
        found = {split: _classes(home, notes) for split, home in homes.items()}
    except OSError as error:
        raise InputError(f"data.root: {error.filename} cannot be read: {error.strerror}") from None
    return _source(root, homes, found, notes, "the user's own images")


def imagenette(options: Data) -> Source:
    """Imagenette (fast.ai, version 2, Apache 2.0; images of ImageNet): root/train/ID/*.JPEG and root/val/ID/*.JPEG, or these in
    root/imagenette2, imagenette2-320 or imagenette2-160. Its validation images, on which papers report, are the test split."""
    homes = ("imagenette2", "imagenette2-320", "imagenette2-160")
    found = _published(options, homes, "Imagenette, fast.ai, Apache 2.0; ImageNet's terms of access", "imagenette2.tgz")
    return replace(found, classes=tuple(IMAGENETTE.get(label, label) for label in found.classes))


def imagenet(options: Data) -> Source:
    """ImageNet's ILSVRC 2012, as torchvision and PyTorch's example take it: root/train/ID/*.JPEG and root/val/ID/*.JPEG. The labels
    of its test images are not public: its validation images are the test split."""
    return _published(options, (), "ImageNet: non-commercial research and education only (its terms of access)", "ILSVRC2012")


def _published(options: Data, inside: tuple[str, ...], licence: str, archive: str) -> Source:
    root = Path(options.root)
    home = next((root / name for name in inside if (root / name).is_dir()), root)
    homes, notes = {"train": home / "train", "test": home / "val"}, []
    for folder in homes.values():
        if not folder.is_dir():
            raise InputError(f"data.root: {folder} does not exist: unpack {archive} so that {home} holds train/ID/ and val/ID/")
    try:
        found = {split: _classes(folder, notes) for split, folder in homes.items()}
    except OSError as error:
        raise InputError(f"data.root: {error.filename} cannot be read: {error.strerror}") from None
    return _source(home, homes, found, notes, licence)


def _source(root: Path, homes: dict[str, Path], found: dict[str, dict[str, list[Path]]], notes: list[str], licence: str) -> Source:
    """The splits, which must have the same classes."""
    classes = list(found["train"])
    for split, files in found.items():
        if list(files) != classes:
            odd = ", ".join(sorted(set(files) ^ set(classes)))
            raise InputError(f"{homes[split]} and {homes['train']} differ in the classes {odd}: make them the same")
    splits = {split: _files(root, list(files.values())) for split, files in found.items()}
    return Source(tuple(classes), splits, licence, root, notes)


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
