"""Small raw data of each kind, written by the tests themselves."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import Data


def options(name: str, root: Path | str, **changes: Any) -> Data:
    """A section `data` with usual values."""
    usual = {"download": False, "image_size": None, "storage": "auto", "validation": 0.2, "test": 0.25, "split_seed": 7}
    return Data.model_validate(
        usual | {"crop": None, "per_class": None, "name": name, "root": str(root), "mean": "auto", "std": "auto"} | changes
    )


def random_npz(path: Path, **changes: Any) -> Path:
    """A small .npz in CIFAR-10's form: 60 + 20 images, all classes."""
    draw = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 60), ("test", 20)):
        arrays[f"{split}_images"] = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 10).astype(np.uint8)
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return path


def image_folder(root: Path, count: int = 6, classes: tuple[str, ...] = ("ant", "bee"), grey: bool = False) -> Path:
    """`count` PNG images of 10x12 pixels in each class folder."""
    draw = np.random.default_rng(len(root.parts))
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = draw.integers(0, 256, (12, 10) if grey else (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def write_idx(path: Path, array: np.ndarray) -> None:
    """The idx format: magic number with type (8: uint8) and dimensions, sizes, values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def fashion(root: Path) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    written = {}
    for prefix, count in (("train", 40), ("t10k", 20)):
        written[prefix] = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        raw = root / "FashionMNIST" / "raw"
        write_idx(raw / f"{prefix}-images-idx3-ubyte", written[prefix])
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    return written


WNIDS = ("n02124075", "n01443537", "n07875152")  # as published: not sorted


def tiny_imagenet(root: Path, count: int = 6) -> Path:
    """Tiny ImageNet's folders with three classes of `count` images of 64x64 pixels to train on, the first of each grey."""
    draw, lines = np.random.default_rng(4), []
    (root / "val/images").mkdir(parents=True)
    (root / "test/images").mkdir(parents=True)
    for name in WNIDS:
        (root / "train" / name / "images").mkdir(parents=True)
        for index in range(count):
            path = root / "train" / name / "images" / f"{name}_{index}.JPEG"
            Image.fromarray(draw.integers(0, 256, (64, 64, 3)[: 3 if index else 2], dtype=np.uint8)).save(path)
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t10\t63\t58\n")
    for index in range(6):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / f"val/images/val_{index}.JPEG")
        lines.append(f"val_{index}.JPEG\t{WNIDS[index % 3]}\t0\t32\t44\t62\n")
    Image.new("RGB", (64, 64)).save(root / "test/images/test_0.JPEG")
    (root / "val/val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("".join(f"{name}\n" for name in WNIDS))
    words = {"n01443537": "goldfish, Carassius auratus", "n02124075": "Egyptian cat", "n00001740": "entity"}
    (root / "words.txt").write_text("".join(f"{name}\t{names}\n" for name, names in words.items()))
    return root


def carvana(root: Path, cars: int = 5, sides: int = 4) -> dict[str, np.ndarray]:
    """Kaggle's folders with so many cars; the masks by ID_NN."""
    draw, masks = np.random.default_rng(5), {}
    for folder in ("train", "train_masks"):
        (root / folder).mkdir(parents=True)
    for car in range(cars):
        for side in range(1, sides + 1):
            name = f"{car:012x}_{side:02}"
            masks[name] = (draw.random((20, 30)) < 0.4).astype(np.uint8)
            image = np.where(masks[name], 220, 30).astype(np.uint8)
            Image.fromarray(image).convert("RGB").save(root / "train" / f"{name}.jpg", quality=98)
            mask = Image.fromarray(masks[name])
            mask.putpalette([0, 0, 0, 255, 255, 255])  # the published files have two colours
            mask.save(root / "train_masks" / f"{name}_mask.gif")
    return masks


def nyu_v2(root: Path, scenes: int = 4, frames: int = 3) -> dict[str, np.ndarray]:
    """DenseDepth's folders and lists; the depths in metres by the path of their photograph."""
    draw, depths = np.random.default_rng(6), {}
    lines: dict[str, list[str]] = {"train": [], "test": []}
    pairs = [("train", f"room_{s:04}_out/{f}.jpg", f"room_{s:04}_out/{f}.png") for s in range(scenes) for f in range(1, frames + 1)]
    pairs += [("test", f"{n:05}_colors.png", f"{n:05}_depth.png") for n in (0, 1, 8)]
    for split, photograph, depth in pairs:
        paths = [f"data/nyu2_{split}/{name}" for name in (photograph, depth)]
        (root / paths[0]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(root / paths[0])
        if split == "train":
            stored = draw.integers(20, 256, (24, 32), dtype=np.uint8)
            depths[paths[0]] = stored / 25.5
        else:
            stored = draw.integers(700, 10_000, (24, 32), dtype=np.uint16)
            depths[paths[0]] = stored / 1000
        Image.fromarray(stored).save(root / paths[1])
        lines[split].append(",".join(paths))
    for split, end in (("train", "\r\n"), ("test", "\n")):
        (root / f"data/nyu2_{split}.csv").write_bytes((end.join(lines[split]) + end).encode())
    return depths
