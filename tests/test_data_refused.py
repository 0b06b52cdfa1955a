"""Malformed raw data and damaged folders are refused by name, and no failure or kill spoils what was there before."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from raw_data import fashion, image_folder, options, random_npz, write_idx

from pipeline import files
from pipeline.data import prepare as preparing
from pipeline.data.batches import load
from pipeline.data.prepare import prepare
from pipeline.errors import InputError


def test_a_full_disk_or_a_bad_source_leaves_the_earlier_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(options("cifar10", random_npz(tmp_path / "c.npz")), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        with pytest.raises(OSError) as error:
            prepare(options("cifar10", tmp_path / "c.npz", split_seed=1), out)
        assert error.value.strerror and error.value.filename
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(InputError):
        prepare(options("cifar10", tmp_path / "none.npz"), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.npz", "out"]


def _npz(**changes: Any) -> Any:
    return lambda root: ("cifar10", random_npz(root / "c.npz", **changes), {})


def _file(name: str, content: bytes) -> Any:
    def make(root: Path) -> tuple[str, Path, dict[str, Any]]:
        (root / name).write_bytes(content)
        return "cifar10", root / name, {}

    return make


def _folder(change: Any, **extra: Any) -> Any:
    def make(root: Path) -> tuple[str, Path, dict[str, Any]]:
        for split in ("train", "val", "test"):
            image_folder(root / "raw" / split)
        change(root / "raw")
        return "folder", root / "raw", extra

    return make


def _flat(change: Any, **extra: Any) -> Any:
    def make(root: Path) -> tuple[str, Path, dict[str, Any]]:
        change(image_folder(root / "raw"))
        return "folder", root / "raw", extra

    return make


def _nothing(root: Path) -> None:
    pass


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def _fashion(change: Any) -> Any:
    def make(root: Path) -> tuple[str, Path, dict[str, Any]]:
        fashion(root)
        change(root / "FashionMNIST/raw/train-images-idx3-ubyte")
        return "fashion_mnist", root, {}

    return make


U8 = np.uint8
MALFORMED: dict[str, tuple[Any, str]] = {
    "npz absent": (lambda root: ("cifar10", root / "c.npz", {}), r"c\.npz does not exist"),
    "npz not a zip": (_file("c.npz", b"hello"), r"c\.npz is no \.npz"),
    "npz empty": (_file("c.npz", b""), r"c\.npz is no \.npz"),
    "npz lacks a key": (_npz(test_labels=None), r"c\.npz lacks test_labels; it has"),
    "npz needs pickle": (_npz(train_labels=np.array([{}] * 60)), r"c\.npz is no \.npz file of plain arrays"),
    "npz float images": (_npz(train_images=np.zeros((60, 32, 32, 3))), r"train images are float64"),
    "npz channels first": (_npz(test_images=np.zeros((20, 3, 32, 32), U8)), r"test images are uint8 \(20, 3, 32, 32\)"),
    "npz no images": (_npz(test_images=np.zeros((0, 32, 32, 3), U8)), r"N > 0"),
    "npz float labels": (_npz(train_labels=np.zeros(60)), r"train labels are float64"),
    "npz too few labels": (_npz(train_labels=np.zeros(59, U8)), r"integers \(60,\)"),
    "npz label too large": (_npz(train_labels=np.full(60, 10, U8)), r"labels reach from 10 to 10: 0 to 9"),
    "npz label negative": (_npz(train_labels=np.full(60, -1)), r"labels reach from -1"),
    "npz class absent": (_npz(train_labels=(np.arange(60) % 9).astype(U8)), r"no training images of class truck"),
    "npz class of one": (_npz(train_labels=np.minimum(np.arange(60), 9).astype(U8)), r"no training image of its 1"),
    "npz mean too short": (
        lambda r: ("cifar10", random_npz(r / "c.npz"), {"mean": [0.5]}),
        r"data\.mean = .*3 channels",
    ),
    "npz std zero": (lambda r: ("cifar10", random_npz(r / "c.npz"), {"std": [0.5, 0.0, 1.0]}), r"data\.std = "),
    "npz mean of 255": (lambda r: ("cifar10", random_npz(r / "c.npz"), {"mean": [120.0] * 3}), r"data\.mean = "),
    "npz streamed": (lambda r: ("cifar10", random_npz(r / "c.npz"), {"storage": "stream"}), r"data\.storage: stream"),
    "npz constant": (_npz(train_images=np.zeros((60, 32, 32, 3), U8)), r"data\.std: channel 0 is equal"),
    "cifar10 root absent": (lambda root: ("cifar10", root / "none", {}), r"CIFAR10 .*none.*download: true"),
    "cifar100 root absent": (lambda root: ("cifar100", root / "none", {}), r"CIFAR100 .*none.*download: true"),
    "fashion absent": (lambda root: ("fashion_mnist", root, {}), r"FashionMNIST .*download: true"),
    "fashion truncated": (_fashion(_truncate), r"FashionMNIST cannot be read"),
    "fashion other size": (
        _fashion(lambda path: write_idx(path, np.zeros((40, 20, 20), U8))),
        r"train images are uint8 \(40, 20, 20, 1\)",
    ),
    "folder absent": (lambda root: ("folder", root / "none", {}), r"none is not a folder"),
    "folder empty": (lambda root: ("folder", root, {}), r"0 class folders"),
    "folder one class": (_flat(lambda raw: shutil.rmtree(raw / "bee")), r"1 class folders"),
    "folder empty class": (_flat(lambda raw: (raw / "cow").mkdir()), r"cow has no images"),
    "folder other files only": (
        _flat(lambda raw: [path.rename(path.with_suffix(".gif")) for path in (raw / "ant").iterdir()]),
        r"ant has no images",
    ),
    "folder truncated": (_flat(lambda raw: _truncate(raw / "bee/4.png")), r"bee/4\.png cannot be read as an image"),
    "folder text": (_flat(lambda raw: (raw / "bee/4.png").write_text("x")), r"bee/4\.png cannot be read as an image"),
    "folder zero bytes": (_flat(lambda raw: (raw / "ant/0.png").write_bytes(b"")), r"ant/0\.png cannot be read"),
    "folder 32 bits": (
        _flat(lambda raw: Image.fromarray(np.zeros((12, 10), np.float32)).save(raw / "ant/9.tif")),
        r"9\.tif has 32 bits",
    ),
    "folder sizes differ": (
        _flat(lambda raw: Image.new("RGB", (3, 4)).save(raw / "bee/9.png")),
        r"bee/9\.png is 3x4 pixels.*image_size",
    ),
    "folder stream sizeless": (_flat(_nothing, storage="stream"), r"data\.image_size"),
    "folder stream cropped, sizeless": (
        _flat(_nothing, storage="stream", crop={"resize": 9, "size": 8}),
        r"data\.storage: stream needs data\.image_size, the size at which files are decoded \(data\.crop is of that\)",
    ),
    "npz too few of a class": (
        lambda r: ("cifar10", random_npz(r / "c.npz", train_labels=np.maximum(np.arange(60) % 11, 1) - 1), {"per_class": 5}),
        r"data\.per_class = 5: class deer has only 4 training images that are not held out",
    ),
    "folder too few of a class": (
        _folder(lambda raw: (raw / "train/bee/0.png").unlink(), per_class=6, storage="stream", image_size=8),
        r"data\.per_class = 6: class bee has only 5 training images",
    ),
    "folder share": (_flat(_nothing, validation=0.95), r"data\.validation = 0\.95 leaves class ant"),
    "splits differ": (_folder(lambda raw: shutil.rmtree(raw / "test/bee")), r"test has 1 class folders"),
    "splits renamed": (
        _folder(lambda raw: (raw / "val/bee").rename(raw / "val/wasp")),
        r"differ in the classes bee, wasp",
    ),
    "splits no train": (_folder(lambda raw: shutil.rmtree(raw / "train")), r"no train"),
    "splits doubled": (_folder(lambda raw: image_folder(raw / "validation")), r"both val and validation"),
    "splits misnamed": (_folder(lambda raw: (raw / "test").rename(raw / "tests")), r"holds tests beside"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_input_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, message = MALFORMED[case]
    name, root, changes = make(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        prepare(options(name, root, **changes), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def _edit(key: str, value: Any) -> Any:
    def change(folder: Path) -> None:
        card = files.read_json(folder / "data.json")
        card[key] = value
        (folder / "data.json").write_text(json.dumps(card))

    return change


def _shorten(folder: Path) -> None:
    path = folder / "train_images.npy"
    path.write_bytes(path.read_bytes()[:-1])


def _relabel(folder: Path) -> None:
    labels = np.load(folder / "test_labels.npy")
    labels[0] = 2
    np.save(folder / "test_labels.npy", labels)


def _transpose(folder: Path) -> None:
    images = np.load(folder / "test_images.npy")
    np.save(folder / "test_images.npy", images.reshape(len(images), 12, 5, 2))


DAMAGE: dict[str, tuple[Any, str]] = {
    "no data.json": (lambda folder: (folder / "data.json").unlink(), r"data\.json does not exist"),
    "data.json not JSON": (lambda folder: (folder / "data.json").write_text("{"), r"data\.json is not valid JSON"),
    "data.json a list": (lambda folder: (folder / "data.json").write_text("[]"), r"data\.json is damaged"),
    "other format": (_edit("format", 99), r"data\.json is damaged .*format"),
    "no fingerprint": (_edit("fingerprint", None), r"data\.json is damaged"),
    "mean of 3": (_edit("mean", [0.1, 0.1, 0.1]), r"do not fit"),
    "std of zero": (_edit("std", [0.0]), r"do not fit"),
    "no files": (_edit("files", {}), r"data\.json is damaged"),
    "file missing": (lambda folder: (folder / "validation_images.npy").unlink(), r"validation_images\.npy is damaged"),
    "file cut": (_shorten, r"train_images\.npy is damaged \(it has"),
    "label unknown": (_relabel, r"test_labels\.npy is damaged"),
    "shape": (_transpose, r"test_images\.npy is damaged"),
    "crop of another shape": (_edit("crop", {"resize": 9, "size": 8}), r"do not fit"),
    "crop not possible": (_edit("crop", {"resize": 8, "size": 9}), r"data\.json is damaged .*size must be at most resize"),
    "stored shape absent": (_edit("stored", None), r"data\.json is damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_not_loaded(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepare(options("folder", image_folder(tmp_path / "raw", grey=True)), folder)
    load(folder)
    change, message = DAMAGE[case]
    change(folder)
    with pytest.raises(InputError, match=message):
        load(folder)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_write_killed_anywhere_leaves_no_loadable_mixture(tmp_path: Path) -> None:
    """SIGKILL before one of the calls that touch the disk: `out` is the old folder, the new one, or refused."""
    npz, out = random_npz(tmp_path / "c.npz"), tmp_path / "out"
    old, new = (prepare(options("cifar10", npz, split_seed=seed), out)["fingerprint"] for seed in (7, 1))
    outcomes = set()
    for owner, name in (
        (np, "save"),
        (preparing, "_count"),
        (files, "write_json"),
        (Path, "rename"),
        (shutil, "rmtree"),
    ):
        for survived in range(4):
            prepare(options("cifar10", npz), out)
            if (child := os.fork()) == 0:
                try:
                    _kill_at(owner, name, survived)
                    prepare(options("cifar10", npz, split_seed=1), out)
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            try:
                outcomes.add(load(out).fingerprint)
            except InputError:
                outcomes.add("refused")
            assert outcomes <= {old, new, "refused"}
            (tmp_path / ".out.partial").mkdir(exist_ok=True)
            (tmp_path / ".out.partial/stray").touch()
            prepare(options("cifar10", npz, split_seed=1), out)
            assert load(out).fingerprint == new and not (out / "stray").exists()
            assert sorted(path.name for path in tmp_path.iterdir()) == ["c.npz", "out"]
    assert outcomes == {old, new, "refused"}


def _kill_at(owner: Any, name: str, survived: int) -> None:
    """From now on the call number `survived` (from 0) of owner.name kills this process."""
    real, calls = getattr(owner, name), []

    def deadly(*words: Any, **keys: Any) -> Any:
        calls.append(name)
        if len(calls) > survived:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*words, **keys)

    setattr(owner, name, deadly)
