"""Raw data of every kind is read, divided, measured and written as claimed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from raw_data import fashion, image_folder, options, random_npz
from torch.nn.functional import interpolate

from pipeline.data import prepare as preparing
from pipeline.data.batches import load
from pipeline.data.prepare import draw, hold_out, prepare
from pipeline.errors import InputError

SPLITS = ("train", "validation", "test")


def pixels_of(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    return np.load(folder / f"{split}_images.npy"), np.load(folder / f"{split}_labels.npy")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "data"
    prepare(options("digits", "unused"), out)
    return out


def test_a_held_out_split_is_stratified_disjoint_complete_and_repeatable() -> None:
    labels = np.random.default_rng(3).choice(4, 500, p=[0.7, 0.2, 0.09, 0.01])
    names = ("a", "b", "c", "d")
    kept, held = hold_out(labels, names, 0.1, 5, "validation")
    assert sorted([*kept, *held]) == list(range(500))
    for label in range(4):
        members = (labels == label).sum()
        assert (labels[held] == label).sum() == max(1, round(0.1 * members))
    again = hold_out(labels, names, 0.1, 5, "validation")
    assert np.array_equal(kept, again[0]) and np.array_equal(held, again[1])
    for seed, purpose in ((6, "validation"), (5, "test")):
        assert not np.array_equal(held, hold_out(labels, names, 0.1, seed, purpose)[1])


def test_so_many_images_of_each_class_are_drawn_every_one_as_likely() -> None:
    labels = np.random.default_rng(3).permutation(np.repeat(np.arange(3), (5, 8, 6)))
    times = np.zeros(len(labels))
    for seed in range(600):
        drawn = draw(labels, ("a", "b", "c"), 3, seed)
        assert np.bincount(labels[drawn]).tolist() == [3, 3, 3] and (np.diff(drawn) > 0).all()
        assert np.array_equal(drawn, draw(labels, ("a", "b", "c"), 3, seed))
        times[drawn] += 1
    share = 3 / np.array((5, 8, 6))[labels]
    assert (np.abs(times / 600 - share) < 4 * np.sqrt(share * (1 - share) / 600)).all()
    assert set(np.flatnonzero(labels == 0)) < set(draw(labels, ("a", "b", "c"), 5, 0))
    with pytest.raises(InputError, match=r"data\.per_class = 6: class a has only 5 training images"):
        draw(labels, ("a", "b", "c"), 6, 0)


def test_per_class_thins_the_training_split_alone_before_it_is_measured(tmp_path: Path) -> None:
    npz = random_npz(tmp_path / "c.npz")  # of each class 5 to train on, once 1 is held out
    whole = prepare(options("cifar10", npz), tmp_path / "whole")
    card = prepare(options("cifar10", npz, per_class=2), tmp_path / "out")
    assert card["counts"] == {"train": 20, "validation": 10, "test": 20} and card["fingerprint"] != whole["fingerprint"]
    for split in ("validation", "test"):
        for before, after in zip(pixels_of(tmp_path / "whole", split), pixels_of(tmp_path / "out", split), strict=True):
            assert np.array_equal(before, after)
    images, labels = pixels_of(tmp_path / "out", "train")
    assert np.bincount(labels).tolist() == [2] * 10
    there = {(image.tobytes(), label) for image, label in zip(*pixels_of(tmp_path / "whole", "train"), strict=True)}
    assert len({(image.tobytes(), label) for image, label in zip(images, labels, strict=True)} & there) == 20
    np.testing.assert_allclose(card["mean"], (images / 255).mean((0, 1, 2)), rtol=1e-12)
    assert prepare(options("cifar10", npz, per_class=5), tmp_path / "out") == whole


def test_per_class_of_image_files_is_drawn_with_split_seed(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        image_folder(tmp_path / "raw" / split)
    drawn = []
    for seed, storage in ((7, "stream"), (7, "memory"), (8, "stream")):
        changes: dict[str, Any] = {"per_class": 3, "storage": storage, "split_seed": seed, "image_size": 8}
        card = prepare(options("folder", tmp_path / "raw", **changes), tmp_path / "out")
        assert card["counts"] == {"train": 6, "validation": 12, "test": 12}
        drawn.append((card["fingerprint"], card["mean"], np.load(tmp_path / "out/train_labels.npy").tolist()))
        if storage == "stream":
            paths = json.loads((tmp_path / "out/train_files.json").read_text())["paths"]
            assert len(set(paths)) == 6 and [path.split("/")[1] for path in paths] == ["ant"] * 3 + ["bee"] * 3
            pixels = [Image.open(tmp_path / "raw" / path).resize((8, 8), Image.Resampling.BILINEAR) for path in paths]
            np.testing.assert_allclose(card["mean"], (np.stack(pixels) / 255).mean((0, 1, 2)), rtol=1e-12)
    (first, mean, labels), (_, same, _), (other, *_) = drawn
    assert mean == same and labels == [0, 0, 0, 1, 1, 1] and first != other


def test_digits_keep_every_image_once_in_three_stratified_splits(digits: Path) -> None:
    from sklearn.datasets import load_digits

    images, labels = map(np.asarray, load_digits(return_X_y=True))
    rounded = ([int(value * 255 / 16 + 0.5) for value in row] for row in images)
    expected = sorted((*row, int(label)) for row, label in zip(rounded, labels, strict=True))
    found = []
    for split in SPLITS:
        pixels, kinds = pixels_of(digits, split)
        assert pixels.dtype == np.uint8 and pixels.shape[1:] == (8, 8, 1) and kinds.dtype == np.int64
        found += [(*row.ravel().tolist(), int(kind)) for row, kind in zip(pixels, kinds, strict=True)]
        shares = np.bincount(kinds, minlength=10) / np.bincount(labels)
        assert np.ptp(shares) < 0.02
    assert sorted(found) == expected
    assert load(digits).counts == {split: len(pixels_of(digits, split)[0]) for split in SPLITS}


def test_statistics_are_those_of_the_training_pixels_alone(tmp_path: Path) -> None:
    card = prepare(options("cifar10", random_npz(tmp_path / "c.npz")), tmp_path / "out")
    pixels = pixels_of(tmp_path / "out", "train")[0].astype(np.float64) / 255
    np.testing.assert_allclose(card["mean"], pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(card["std"], pixels.std((0, 1, 2)), rtol=1e-12)
    assert card["counts"] == {"train": 50, "validation": 10, "test": 20}
    given = prepare(options("cifar10", tmp_path / "c.npz", mean=[0.5, 0.5, 0.5], std=[0.2, 0.3, 1.0]), tmp_path / "out")
    assert (given["mean"], given["std"]) == ([0.5, 0.5, 0.5], [0.2, 0.3, 1.0])
    assert given["fingerprint"] != card["fingerprint"]


def test_npz_arrays_come_back_exactly(tmp_path: Path) -> None:
    raw = np.load(random_npz(tmp_path / "c.npz"))
    prepare(options("cifar10", tmp_path / "c.npz"), tmp_path / "out")
    test, labels = pixels_of(tmp_path / "out", "test")
    assert np.array_equal(test, raw["test_images"]) and np.array_equal(labels, raw["test_labels"])
    both = np.concatenate([pixels_of(tmp_path / "out", split)[0] for split in ("train", "validation")])
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in raw["train_images"])


def test_fashion_mnist_is_read_from_plain_idx_files(tmp_path: Path) -> None:
    written = fashion(tmp_path)
    card = prepare(options("fashion_mnist", tmp_path), tmp_path / "out")
    assert card["shape"] == [1, 28, 28] and card["classes"][9] == "Ankle boot"
    images, labels = pixels_of(tmp_path / "out", "test")
    assert np.array_equal(images[..., 0], written["t10k"]) and labels.tolist() == [i % 10 for i in range(20)]


def test_an_image_folder_is_read_as_torchvision_reads_it(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    root = tmp_path / "raw"
    for split in ("train", "validation", "test"):
        image_folder(root / split)
    Image.open(root / "test/ant/0.png").save(root / "test/ant/0.JPG", format="JPEG")
    (root / "test/bee/deep").mkdir()
    Image.open(root / "test/bee/0.png").convert("L").save(root / "test/bee/deep/a.bmp")
    (root / "test/bee/notes.txt").write_text("not an image")
    card = prepare(options("folder", root), tmp_path / "out")
    assert card["classes"] == ["ant", "bee"] and len(card["notes"]) == 1 and "1 files" in card["notes"][0]
    for split in SPLITS:
        images, labels = pixels_of(tmp_path / "out", split)
        expected = ImageFolder(str(root / split))
        assert labels.tolist() == expected.targets
        assert all(
            np.array_equal(image, np.asarray(other))
            for image, (other, _) in zip(images, map(expected.__getitem__, range(len(images))), strict=True)
        )


def test_a_folder_without_splits_is_divided_and_greyscale_stays_one_channel(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "raw", 8, ("train", "truck", "van"), grey=True)  # "train": a class, not a split
    wide = np.arange(120, dtype=np.uint16).reshape(12, 10) * 500
    Image.fromarray(wide).save(root / "van/0.png")
    card = prepare(options("folder", root), tmp_path / "out")
    assert card["shape"] == [1, 12, 10] and card["counts"] == {"train": 15, "validation": 3, "test": 6}
    everything = np.concatenate([pixels_of(tmp_path / "out", split)[0] for split in SPLITS])[..., 0]
    assert any(np.array_equal(image, wide >> 8) for image in everything)


def test_images_are_resized_to_a_square_as_torch_antialiases(tmp_path: Path) -> None:
    root, draw, expected = tmp_path / "raw", np.random.default_rng(2), []
    for kind in ("ant", "bee"):
        (root / kind).mkdir(parents=True)
        for index, size in enumerate(((30, 20), (64, 64), (8, 12), (5, 5), (8, 8))):
            pixels = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / kind / f"{index}.png")
            image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
            expected.append(interpolate(image, size=(8, 8), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy())
    card = prepare(options("folder", root, image_size=8), tmp_path / "out")
    assert card["shape"] == [3, 8, 8]
    images = np.concatenate([pixels_of(tmp_path / "out", split)[0] for split in SPLITS])
    for wanted in expected:  # Pillow rounds after each of its two passes
        assert min(np.abs(image - wanted).max() for image in images) <= 1.01


def test_the_fingerprint_follows_content_not_time_or_place(tmp_path: Path) -> None:
    for storage in ("memory", "stream"):
        shutil.rmtree(tmp_path / "raw", ignore_errors=True)
        root = image_folder(tmp_path / "raw")
        how: dict[str, Any] = {"image_size": 8, "storage": storage, "mean": [0.5] * 3, "std": [0.5] * 3}
        first = prepare(options("folder", root, **how), tmp_path / "a")["fingerprint"]
        shutil.copytree(root, tmp_path / storage / "elsewhere")
        for path in root.rglob("*.png"):
            os.utime(path, (1, 1))
        assert prepare(options("folder", root, **how), tmp_path / "b")["fingerprint"] == first
        assert prepare(options("folder", tmp_path / storage / "elsewhere", **how), tmp_path / "b")["fingerprint"] == first
        pixels = np.asarray(Image.open(root / "bee/3.png")).copy()
        pixels[5, 5, 0] ^= 255
        Image.fromarray(pixels).save(root / "bee/3.png")
        assert prepare(options("folder", root, **how), tmp_path / "b")["fingerprint"] != first
        assert prepare(options("folder", root, **how, split_seed=8), tmp_path / "b")["fingerprint"] != first


def test_a_crop_changes_what_is_seen_and_the_fingerprint_but_not_what_is_stored(tmp_path: Path) -> None:
    npz, found = random_npz(tmp_path / "c.npz"), []
    for crop in (None, {"resize": 32, "size": 32}, {"resize": 40, "size": 32}, {"resize": 256, "size": 224}):
        card = prepare(options("cifar10", npz, crop=crop), tmp_path / "out")
        side = crop["size"] if crop else 32
        there = load(tmp_path / "out")
        assert there.shape == (3, side, side) and there.stored == (3, 32, 32)
        assert (there.crop.model_dump() if there.crop else None) == crop
        found.append((card["fingerprint"], card["mean"], pixels_of(tmp_path / "out", "train")[0].tobytes()))
    fingerprints, means, stored = zip(*found, strict=True)
    assert len(set(fingerprints)) == 4 and means.count(means[0]) == 4 and len(set(stored)) == 1
    small = prepare(options("cifar10", npz, crop={"resize": 256, "size": 224}, image_size=16), tmp_path / "out")
    assert small["shape"] == [3, 224, 224] and small["stored"] == [3, 16, 16]
    assert load(tmp_path / "out").fingerprint not in fingerprints


def test_preparing_twice_writes_the_same_bytes(tmp_path: Path, digits: Path) -> None:
    prepare(options("digits", "elsewhere"), tmp_path / "again")
    names = sorted(path.name for path in digits.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((digits / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_auto_storage_streams_what_is_too_large_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path / "raw")  # 12 images of 4x4x3 once resized
    for limit, expected in ((12 * 48, "memory"), (12 * 48 - 1, "stream")):
        monkeypatch.setattr(preparing, "LIMIT", limit)
        assert prepare(options("folder", root, image_size=4), tmp_path / "out")["storage"] == expected
        assert load(tmp_path / "out").storage == expected
    with pytest.raises(InputError, match="image_size"):
        prepare(options("folder", root), tmp_path / "out")


@pytest.mark.parametrize(("name", "inside"), [("imagenette", "imagenette2-160"), ("imagenet", "")])
def test_published_image_folders_give_their_validation_images_as_the_test(name: str, inside: str, tmp_path: Path) -> None:
    root, ids = tmp_path / "raw", ("n01440764", "n03888257")
    for split, count in (("train", 8), ("val", 3)):
        image_folder(root / inside / split, count, ids)
    card = prepare(options(name, root, image_size=8), tmp_path / "out")
    assert card["classes"] == (["tench", "parachute"] if name == "imagenette" else list(ids))
    assert card["counts"]["test"] == 6 and card["counts"]["train"] + card["counts"]["validation"] == 16
    shutil.rmtree(root / inside / "val")
    with pytest.raises(InputError, match=r"val does not exist: unpack .* holds train/ID/ and val/ID/"):
        prepare(options(name, root), tmp_path / "out")
