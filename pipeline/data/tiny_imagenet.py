"""Tiny ImageNet in its published folder layout: 200 classes of ImageNet, RGB and greyscale JPEG files of 64x64 pixels.

wnids.txt                                the classes, one WordNet id a line
words.txt                                id, tab, names separated by commas; of all of WordNet (may be absent)
train/ID/images/*.JPEG                   500 a class; the boxes beside them are not used
val/images/*.JPEG, val_annotations.txt   50 a class: file, id and four numbers of a box, separated by tabs

The labels of the published test images are not public, so papers report the accuracy on the published validation split. That is
the test split here, and our validation split is held out of the training images. Stanford CS231n, Tiny ImageNet Challenge, 2015:
http://cs231n.stanford.edu/tiny-imagenet-200.zip
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.config import Data
from pipeline.data.raw import Source, Split
from pipeline.errors import InputError

NAME = "tiny-imagenet-200"
SUFFIXES = (".jpeg", ".jpg")
LICENCE = "Tiny ImageNet, Stanford CS231n, from ImageNet: non-commercial research and education only (ImageNet's terms of access)"


def load(options: Data) -> Source:
    """What lies in `options.root` or the folder tiny-imagenet-200 in it. Classes in the order of their ids, as ImageFolder's."""
    root = Path(options.root)
    home = root / NAME if (root / NAME).is_dir() else root
    if not (home / "wnids.txt").is_file():
        raise InputError(
            f"data.root: {root} holds no {NAME} (there is no {home / 'wnids.txt'}): unpack "
            f"http://cs231n.stanford.edu/{NAME}.zip there"
        )
    try:
        ids = _ids(home / "wnids.txt")
        names, notes = _names(home / "words.txt"), []
        splits = {"train": _train(home, ids, notes), "test": _validation(home, ids, notes)}
    except OSError as error:
        raise InputError(f"data.root: {error.filename} cannot be read: {error.strerror}") from None
    classes = tuple(f"{names[label]} ({label})" if label in names else label for label in ids)
    return Source(classes, splits, LICENCE, home, notes, channels=3)


def _ids(path: Path) -> list[str]:
    ids = []
    for where, line in _lines(path):
        if not re.fullmatch(r"n\d{8}", line):
            raise InputError(f"{where}: {line!r} is no WordNet id such as n01443537")
        if line in ids:
            raise InputError(f"{where}: {line} is there twice")
        ids.append(line)
    if len(ids) < 2:
        raise InputError(f"{path} lists {len(ids)} classes: at least 2 are needed")
    return sorted(ids)


def _names(path: Path) -> dict[str, str]:
    """The first name of every id."""
    names = {}
    for where, line in _lines(path) if path.exists() else []:
        label, tab, words = line.partition("\t")
        if not tab or not words.strip():
            raise InputError(f"{where}: {line[:40]!r} is not an id, a tab and names")
        names[label] = words.split(",")[0].strip()
    return names


def _train(home: Path, ids: list[str], notes: list[str]) -> Split:
    folders = {path.name for path in (home / "train").iterdir() if path.is_dir() and not path.name.startswith(".")}
    if odd := sorted(folders ^ set(ids)):
        has, lacks = ("wnids.txt", "train") if odd[0] in ids else ("train", "wnids.txt")
        raise InputError(f"{home / has} has the class {odd[0]}, {home / lacks} has not: make them the same")
    paths, labels = [], []
    for label, name in enumerate(ids):
        found = _images(home / "train" / name / "images", notes)
        paths += [path.relative_to(home).as_posix() for path in found]
        labels += [label] * len(found)
    return Split(np.array(paths), np.array(labels, dtype=np.int64))


def _validation(home: Path, ids: list[str], notes: list[str]) -> Split:
    folder, annotations = home / "val" / "images", home / "val" / "val_annotations.txt"
    known = {label: index for index, label in enumerate(ids)}
    there = {path.name for path in _images(folder, notes)}
    labels: dict[str, int] = {}
    for where, line in _lines(annotations):
        fields = line.split("\t")
        if len(fields) != 6 or not all(re.fullmatch(r"\d+", number) for number in fields[2:]):
            raise InputError(f"{where}: {line[:60]!r} is not a file, an id and four numbers, separated by tabs")
        name, label = fields[:2]
        if label not in known:
            raise InputError(f"{where}: the id {label} is not in {home / 'wnids.txt'}")
        if name not in there:
            raise InputError(f"{where}: there is no {folder / name}")
        if name in labels:
            raise InputError(f"{where}: {name} is there twice")
        labels[name] = known[label]
    if unlisted := sorted(there - labels.keys()):
        raise InputError(f"{annotations} has no line for {folder / unlisted[0]}: add it or remove the image")
    return Split(np.array([f"val/images/{name}" for name in labels]), np.array(list(labels.values()), dtype=np.int64))


def _images(folder: Path, notes: list[str]) -> list[Path]:
    """The JPEG files of a folder by name; counts in `notes` what else is there."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not images:
        raise InputError(f"{folder} has no images: unpack {NAME}.zip again")
    if others := len(files) - len(images):
        notes.append(f"{folder}: {others} files passed over, not ending in {', '.join(SUFFIXES)}")
    return images


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line that is not empty, after "FILE, line N"."""
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise InputError(f"{path} is no text in UTF-8 ({error}): unpack {NAME}.zip again") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line := line.rstrip("\r"):
            yield f"{path}, line {number}", line
