"""CIFAR-10 and CIFAR-100 in the folders of their Python version, as torchvision keeps them.

Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009: https://www.cs.toronto.edu/~kriz/cifar.html

Their files are Python pickles. None is unpickled: that would run what a file says. `spelled` reads the opcodes as data, and
where they ask for a call it notes the name and calls nothing. Each file is checked by its sum before. The names and MD5 sums are
those of torchvision's datasets/cifar.py; the SHA-256 sums of the archives are Keras's.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import files
from pipeline.data import downloads

URL = "https://www.cs.toronto.edu/~kriz/"
LARGEST = 2**28  # bytes of a file in an archive
TUPLES = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Published:
    """The files of one of the two, by their MD5, and what they call labels and the labels' names."""

    folder: str
    archive: str
    size: int  # bytes of the archive
    digest: str
    splits: dict[str, dict[str, str]]
    meta: tuple[str, str]
    labels: str
    names: str

    @property
    def sums(self) -> dict[str, str]:
        """All files."""
        return {name: md5 for split in self.splits.values() for name, md5 in split.items()} | dict([self.meta])


CIFAR10 = Published(
    "cifar-10-batches-py",
    "cifar-10-python.tar.gz",
    170498071,
    "sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    {
        "train": {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
    },
    ("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
    "labels",
    "label_names",
)
CIFAR100 = Published(
    "cifar-100-python",
    "cifar-100-python.tar.gz",
    169001437,
    "sha256:85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    {"train": {"train": "16019d7e3df5f24257cddd939b257f8d"}, "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}},
    ("meta", "7973b15100ade9c7d40fb424638fde48"),
    "fine_labels",
    "fine_label_names",
)


def read(which: Published, root: Path, download: bool) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    """Images uint8 (N, 32, 32, 3) and labels (N,) of `train` and `test`, and the labels' names; fetched first where they are
    not all below `root` and `download` allows it. `ValueError`, `OSError` or `HTTPException` says what is wrong."""
    folder = root / which.folder
    try:
        contents = {name: downloads.read(folder / name, f"md5:{md5}") for name, md5 in which.sums.items()}
    except (OSError, ValueError):
        if not download:
            raise
        contents = _unpacked(which, root)
    splits = {}
    for split, names in which.splits.items():
        parts = [_images(spelled(contents[name]), which.labels) for name in names]
        splits[split] = np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
    return splits, tuple(spelled(contents[which.meta[0]])[which.names])


def _unpacked(which: Published, root: Path) -> dict[str, bytes]:
    """The files of the archive, which is fetched where it does not lie in `root`, put into their folder."""
    try:
        archive = downloads.read(root / which.archive, which.digest)
    except (OSError, ValueError):
        archive = downloads.fetch(URL + which.archive, which.size, which.digest)
    found = downloads.members(archive, [f"{which.folder}/{name}" for name in which.sums], LARGEST)
    contents = {name: downloads.verified(found[f"{which.folder}/{name}"], f"md5:{md5}", name) for name, md5 in which.sums.items()}
    files.write_together({root / which.folder / name: content for name, content in contents.items()})
    return contents


def _images(batch: Any, labels: str) -> tuple[np.ndarray, np.ndarray]:
    """Of a batch the images (N, 32, 32, 3) and the labels (N,); its array is noted with numpy's version, shape, type and order."""
    _, shape, _, fortran, pixels = batch["data"].state
    rows = np.frombuffer(pixels.encode("latin-1"), np.uint8).reshape(shape, order="F" if fortran else "C")
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(batch[labels])


@dataclass
class Named:
    """What unpickling would call, with which arguments, and what it would hand to the result."""

    name: Any
    arguments: Any
    state: Any = None


def _put(stack: list[Any], items: list[Any]) -> None:
    stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _hand(stack: list[Any], items: list[Any]) -> None:
    stack[-1].state = items[0]


# Opcodes that put a value on the stack, by their argument.
PUSHED: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "SHORT_BINSTRING", "BINSTRING", "BINUNICODE", "GLOBAL"), lambda value: value),
    **{"NONE": lambda _: None, "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False},
    **{"EMPTY_TUPLE": lambda _: (), "EMPTY_LIST": lambda _: [], "EMPTY_DICT": lambda _: {}},
}
# Opcodes that take so many values off the stack (None: all since the last mark), and what becomes of them.
JOINED: dict[str, tuple[int | None, Callable[[list[Any], list[Any]], None]]] = {
    **{name: (count, lambda stack, items: stack.append(tuple(items))) for name, count in TUPLES.items()},
    **{name: (count, lambda stack, items: stack[-1].extend(items)) for name, count in (("APPEND", 1), ("APPENDS", None))},
    **{"SETITEM": (2, _put), "SETITEMS": (None, _put), "BUILD": (1, _hand)},
    "REDUCE": (2, lambda stack, items: stack.append(Named(*items))),
}


def spelled(content: bytes) -> Any:
    """The value that a pickle of Python 2 spells: numbers, texts, lists, tuples, dicts, and `Named` for what would be called.

    `ValueError` for any other opcode, and where they make no sense.
    """
    stack, marks, memo = [], [], {}
    try:
        for opcode, argument, _ in pickletools.genops(content):
            name = opcode.name
            if name == "MARK":
                marks.append(len(stack))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in PUSHED:
                stack.append(PUSHED[name](argument))
            elif name in JOINED:
                count, join = JOINED[name]
                start = marks.pop() if count is None else len(stack) - count
                items = stack[start:]
                del stack[start:]
                join(stack, items)
            elif name not in ("PROTO", "STOP"):
                raise ValueError(f"{name} is no part of a batch of images")
        return stack.pop()
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no batch of images ({error!r})") from None
