"""Tiny ImageNet in its published folders is read whole, and what is missing or malformed there is refused by file and line."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from raw_data import WNIDS, options, tiny_imagenet

from pipeline.data.batches import SPLITS, Batches, load
from pipeline.data.prepare import prepare
from pipeline.errors import InputError

VAL = "val/val_annotations.txt"


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_tiny_imagenet_is_read_as_published(storage: str, tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    home = tiny_imagenet(tmp_path / "raw/tiny-imagenet-200")
    card = prepare(options("tiny_imagenet", tmp_path / "raw", image_size=64, storage=storage), tmp_path / "out")
    again = prepare(options("tiny_imagenet", home, image_size=64, storage=storage), tmp_path / "out")
    assert again["fingerprint"] == card["fingerprint"] and card["shape"] == [3, 64, 64] and not card["notes"]
    assert card["classes"] == ["goldfish (n01443537)", "Egyptian cat (n02124075)", "n07875152"]
    assert card["counts"] == {"train": 15, "validation": 3, "test": 6} and "non-commercial" in card["licence"]
    there, found = load(tmp_path / "out"), {}
    for split in SPLITS:
        images, labels = zip(*Batches(there, split, 4, "cpu", None, False, 0).epoch(0), strict=True)
        mean, std = (torch.tensor(values)[:, None, None] for values in (there.mean, there.std))
        pixels = ((torch.cat(images) * std + mean) * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
        found[split] = [(image.tobytes(), int(label)) for image, label in zip(pixels, torch.cat(labels), strict=True)]
    expected = [(np.asarray(image).tobytes(), label) for image, label in ImageFolder(str(home / "train"))]
    assert sorted(found["train"] + found["validation"]) == sorted(expected)
    assert [item for item in expected if item in found["train"]] == found["train"]
    published = [(np.asarray(Image.open(home / f"val/images/val_{index}.JPEG")), WNIDS[index % 3]) for index in range(6)]
    assert found["test"] == [(image.tobytes(), sorted(WNIDS).index(label)) for image, label in published]


def test_tiny_imagenet_is_in_colour_and_its_names_may_be_absent(tmp_path: Path) -> None:
    home = tiny_imagenet(tmp_path / "raw")
    (home / "words.txt").unlink()
    for path in home.rglob("*.JPEG"):
        Image.open(path).convert("L").save(path)
    (home / "val/images/notes.txt").write_text("not an image")
    card = prepare(options("tiny_imagenet", home), tmp_path / "out")
    assert card["classes"] == sorted(WNIDS) and card["shape"] == [3, 64, 64] and card["storage"] == "memory"
    images = np.load(tmp_path / "out/train_images.npy")
    assert (images == images[..., :1]).all() and "1 files passed over" in card["notes"][0]


Make = Callable[[Path], Path]


def harm(change: Callable[[Path], object]) -> Make:
    """A set to which `change` has been done."""

    def make(root: Path) -> Path:
        change(tiny_imagenet(root / "raw"))
        return root / "raw"

    return make


def text(name: str, old: str, new: str) -> Make:
    """A set with another text in one of its files."""

    def change(raw: Path) -> None:
        assert old in (there := (raw / name).read_text())
        (raw / name).write_text(there.replace(old, new))

    return harm(change)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


MALFORMED: dict[str, tuple[Make, str]] = {
    "absent": (
        lambda root: root,
        r"no tiny-imagenet-200 .*wnids\.txt.*cs231n.*/tiny-imagenet-200\.zip",
    ),
    "id": (text("wnids.txt", "n01443537", "goldfish"), r"wnids\.txt, line 2: 'goldfish' is no WordNet id"),
    "id twice": (text("wnids.txt", "n01443537", "n02124075"), r"wnids\.txt, line 2: n02124075 is there twice"),
    "ids binary": (harm(lambda raw: (raw / "wnids.txt").write_bytes(b"\xff")), r"wnids\.txt is no text in UTF-8"),
    "ids empty": (harm(lambda raw: (raw / "wnids.txt").write_text("")), r"wnids\.txt lists 0 classes"),
    "class unlisted": (text("wnids.txt", "n01443537\n", ""), r"raw/train has the class n01443537, .*wnids\.txt has not"),
    "class absent": (
        harm(lambda raw: shutil.rmtree(raw / "train/n01443537")),
        r"wnids\.txt has the class n01443537, .*train has not",
    ),
    "class empty": (
        harm(lambda raw: [path.unlink() for path in raw.glob("train/n01443537/images/*")]),
        r"n01443537/images has no images",
    ),
    "no train": (harm(lambda raw: shutil.rmtree(raw / "train")), r"raw/train cannot be read: No such file"),
    "no images": (harm(lambda raw: shutil.rmtree(raw / "val/images")), r"val/images cannot be read: No such file"),
    "no annotations": (harm(lambda raw: (raw / VAL).unlink()), r"val_annotations\.txt cannot be read: No such file"),
    "words": (
        text("words.txt", "n00001740\t", "n00001740 "),
        r"words\.txt, line 3: 'n00001740 entity' is not an id, a tab and",
    ),
    "annotation": (
        text(VAL, "val_1.JPEG\t", "val_1.JPEG "),
        r"val_annotations\.txt, line 2: .* is not a file, an id and four",
    ),
    "unknown class": (
        text(VAL, "n07875152", "n00000001"),
        r"val_annotations\.txt, line 3: the id n00000001 is not in .*wnids",
    ),
    "image absent": (
        harm(lambda raw: (raw / "val/images/val_4.JPEG").unlink()),
        r"line 5: there is no .*val/images/val_4\.JPEG",
    ),
    "image twice": (text(VAL, "val_1.JPEG", "val_0.JPEG"), r"val_annotations\.txt, line 2: val_0\.JPEG is there twice"),
    "image unlisted": (
        harm(lambda raw: Image.new("L", (64, 64)).save(raw / "val/images/val_9.JPEG")),
        r"val_annotations\.txt has no line for .*val/images/val_9\.JPEG",
    ),
    "image truncated": (
        harm(lambda raw: truncate(raw / "val/images/val_0.JPEG")),
        r"val_0\.JPEG cannot be read as an image",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_set_is_refused_by_file_and_line(case: str, tmp_path: Path) -> None:
    make, message = MALFORMED[case]
    root = make(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        prepare(options("tiny_imagenet", root), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
