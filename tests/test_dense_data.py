"""Targets of every pixel: published layouts are read, targets move as their images do, whole groups are held out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from raw_data import carvana, nyu_v2, options
from torch import Tensor

from pipeline import files
from pipeline.config import Augment, Crop
from pipeline.data import targets
from pipeline.data.batches import SPLITS, Batches, Prepared, load
from pipeline.data.prepare import prepare
from pipeline.errors import InputError


def stored(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    return np.load(folder / f"{split}_images.npy"), np.load(folder / f"{split}_targets.npy")


def pixels_of(prepared: Prepared, images: Tensor) -> Tensor:
    """Undo the normalisation: (B, C, h, w) from 0 to 255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (prepared.mean, prepared.std))
    return (images * std + mean) * 255


def test_carvana_is_read_as_kaggle_published_it_and_cars_stay_together(tmp_path: Path) -> None:
    masks = carvana(tmp_path / "raw")
    card = prepare(options("carvana", tmp_path / "raw"), tmp_path / "out")
    assert (card["task"], card["classes"], card["shape"]) == ("segment", ["car"], [3, 20, 30])
    assert card["counts"] == {"train": 12, "validation": 4, "test": 4}  # of five cars
    known, cars = {mask.tobytes(): name for name, mask in masks.items()}, []
    for split in SPLITS:
        images, found = stored(tmp_path / "out", split)
        assert found.dtype == np.uint8
        names = [known.pop(mask.tobytes()) for mask in found]
        cars.append({name.split("_")[0] for name in names})
        for image, mask in zip(images, found, strict=True):  # the photographs are white where the car is
            assert ((image.mean(2) > 125) == (mask > 0)).mean() > 0.97
    assert not known and len(set.union(*cars)) == sum(map(len, cars)) == 5
    there = load(tmp_path / "out")
    assert there.task == "segment" and not (tmp_path / "out/train_labels.npy").exists()


def test_nyu_v2_is_read_as_densedepth_published_it_and_scenes_stay_together(tmp_path: Path) -> None:
    depths = nyu_v2(tmp_path / "raw")
    card = prepare(options("nyu_v2", tmp_path / "raw"), tmp_path / "out")
    assert (card["task"], card["classes"], card["shape"]) == ("depth", ["depth in metres"], [3, 24, 32])
    assert card["counts"] == {"train": 9, "validation": 3, "test": 3}  # of four rooms one is held out
    known = {depth.astype(np.float32).tobytes(): path for path, depth in depths.items()}
    rooms = []
    for split in SPLITS:
        images, found = stored(tmp_path / "out", split)
        assert found.dtype == np.float32 and 0.7 <= found.min() and found.max() <= 10
        paths = [known.pop(depth.tobytes()) for depth in found]
        rooms.append({Path(path).parent for path in paths})
        for image, path in zip(images, paths, strict=True):
            assert np.array_equal(image, np.asarray(Image.open(tmp_path / "raw" / path)))
    assert not known and not rooms[0] & rooms[1] and rooms[2] == {Path("data/nyu2_test")}
    (tmp_path / "raw").rename(tmp_path / "nyu_data")
    again = prepare(options("nyu_v2", tmp_path), tmp_path / "out")  # the folder that the archive makes, in data.root
    assert again["fingerprint"] == card["fingerprint"]


@pytest.mark.parametrize(("name", "make"), [("carvana", carvana), ("nyu_v2", nyu_v2)])
def test_streamed_images_meet_the_targets_that_they_meet_in_memory(name: str, make: Any, tmp_path: Path) -> None:
    make(tmp_path / "raw")
    augment = Augment(pad=2, pad_mode="reflect", flip=True, scale=None)
    found = []
    for storage in ("memory", "stream"):
        prepare(options(name, tmp_path / "raw", image_size=12, storage=storage), tmp_path / storage)
        there = load(tmp_path / storage)
        batches = [Batches(there, "train", 4, "cpu", augment, True, 5), Batches(there, "test", 2, "cpu", None, False, 0)]
        found.append([tensor for each in batches for batch in each.epoch(3) for tensor in batch])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True)) and len(found[0]) > 6
    assert (tmp_path / "stream/train_targets.npy").read_bytes() == (tmp_path / "memory/train_targets.npy").read_bytes()


def test_a_resized_target_takes_whole_values_from_where_its_pixels_lie() -> None:
    target = np.arange(24 * 32, dtype=np.float32).reshape(24, 32)
    small = targets.nearest(target, 8)
    assert np.array_equal(small, target[1::3][:, 2::4])  # the pixel in which (i + 1/2) * 24 / 8 lies, and (j + 1/2) * 32 / 8
    tensor = torch.from_numpy(target)[None, None]
    for size in (5, 8, 24, 50):
        wanted = torch.nn.functional.interpolate(tensor, size=(size, size), mode="nearest-exact")[0, 0]
        assert np.array_equal(targets.nearest(target, size), wanted.numpy())


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    """Images whose pixels say what their targets are: a mask is where they are above 127, a depth is their value in centimetres.

    Smooth images, so that resampling leaves values near those of the nearest pixel.
    """
    found = {}
    draw = np.random.default_rng(0)
    for task in ("segment", "depth"):
        folder = tmp_path_factory.mktemp(task)
        prepare(options(f"scenes_{task}", "unused"), folder / "data")
        there = load(folder / "data")
        for split in SPLITS:
            corners = torch.from_numpy(draw.uniform(20, 250, (40, 1, 3, 3)))
            pixels = (
                torch.nn.functional.interpolate(corners, size=(32, 32), mode="bicubic", align_corners=True).clip(1, 255).round()
            )
            values = pixels[:, 0].numpy().astype(np.uint8)
            np.save(there.folder / f"{split}_images.npy", values[..., None])
            np.save(there.folder / f"{split}_targets.npy", values > 127 if task == "segment" else values.astype(np.float32) / 100)
        object.__setattr__(there, "counts", dict.fromkeys(SPLITS, 40))
        found[task] = there
    return found


MOVES = {
    "as stored": Augment(pad=0, pad_mode="zero", flip=False, scale=None),
    "flipped": Augment(pad=0, pad_mode="zero", flip=True, scale=None),
    "zero": Augment(pad=5, pad_mode="zero", flip=True, scale=None),
    "reflect": Augment(pad=5, pad_mode="reflect", flip=True, scale=None),
    "boxes": Augment(pad=0, pad_mode="zero", flip=True, scale=[0.3, 1.0]),
}


@pytest.mark.parametrize("crop", [None, {"resize": 40, "size": 36}], ids=["whole", "middle"])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("task", ["segment", "depth"])
def test_targets_move_with_their_images(task: str, move: str, crop: Any, marked: dict[str, Prepared]) -> None:
    there = marked[task]
    if crop:
        there = replace(there, crop=Crop(**crop), shape=(1, crop["size"], crop["size"]))
    resampled = crop is not None or move == "boxes"
    batches = Batches(there, "train", 10, "cpu", MOVES[move], True, 0)
    for images, found in batches.epoch(1):
        pixels = pixels_of(there, images)[:, 0]
        assert found.shape == pixels.shape and found.dtype == torch.float32
        if task == "depth":
            gap = (found * 100 - pixels).abs()
            assert gap.max() < (25 if resampled else 1e-2)  # of a slope's two neighbours
            assert ((found == 0) == (pixels.abs() < 1e-2)).all() or resampled  # black pixels around have no known depth
        else:
            assert set(found.unique().tolist()) <= {0.0, 1.0}
            clear = (pixels - 127.5).abs() > (25 if resampled else 0.4)
            assert clear.float().mean() > 0.5 and ((found > 0.5) == (pixels > 127.5))[clear].all()


def test_scenes_are_the_same_everywhere_and_say_what_they_show(tmp_path: Path) -> None:
    cards = {}
    for task in ("segment", "depth"):
        cards[task] = prepare(options(f"scenes_{task}", "unused", validation=0.25), tmp_path / task)
    assert cards["segment"]["counts"] == cards["depth"]["counts"] == {"train": 1200, "validation": 400, "test": 400}
    (images, masks), (same, depths) = (stored(tmp_path / task, "test") for task in ("segment", "depth"))
    assert np.array_equal(images, same) and images.shape == (400, 32, 32, 1)
    assert 0.04 < masks.mean() < 0.15 and masks.any((1, 2)).all()
    near, far = depths[masks == 1], depths[masks == 0]
    assert 0.4 <= near.min() and near.max() <= 1.1 and 1.3 <= far.min() and far.max() <= 2.3
    free = depths[~masks[:, :, :5].any((1, 2))][:, :, :5]
    assert len(free) > 20 and np.diff(free, axis=1).std((1, 2)).max() < 1e-6  # the background is a plane
    light = images[..., 0].astype(float)[masks == 1]
    assert np.corrcoef(light, 1 / near)[0, 1] > 0.8  # a digit's brightness tells its distance
    sizes = [
        (mask.any(1).sum(), depth[mask == 1].min())
        for mask, depth in zip(masks, depths, strict=True)
        if len(np.unique(depth[mask == 1])) == 2
    ]
    assert np.corrcoef([size for size, _ in sizes], [1 / distance for _, distance in sizes])[0, 1] > 0.3
    prints = [cards[task]["fingerprint"][:16] for task in ("segment", "depth")]
    assert prints == ["fbdca3b691dc75db", "597c73969ccb027e"]  # as made on x86-64 with numpy 2 and Pillow 12


def _carvana(change: Any) -> Any:
    def make(root: Path) -> str:
        carvana(root)
        change(root)
        return "carvana"

    return make


def _nyu(change: Any) -> Any:
    def make(root: Path) -> str:
        nyu_v2(root)
        change(root)
        return "nyu_v2"

    return make


def _line(text: str) -> Any:
    return lambda root: (root / "data/nyu2_train.csv").write_text(f"{text}\n")


MASK = "train_masks/000000000001_02_mask.gif"
DEPTH = "data/nyu2_train/room_0001_out/2.png"
MALFORMED: dict[str, tuple[Any, str]] = {
    "no masks": (_carvana(lambda root: shutil.rmtree(root / "train_masks")), "train_masks cannot be read: .*train_masks.zip"),
    "no photographs": (_carvana(lambda root: [path.unlink() for path in root.rglob("*_*.*")]), "train has no photographs"),
    "mask absent": (_carvana(lambda root: (root / MASK).unlink()), r"train_masks has nothing for .*000000000001_02\.jpg"),
    "photograph absent": (
        _carvana(lambda root: (root / "train/000000000001_02.jpg").unlink()),
        r"train has nothing for .*_02_mask\.gif",
    ),
    "mask damaged": (_carvana(lambda root: (root / MASK).write_bytes(b"GIF89a")), r"_02_mask\.gif cannot be read as a mask"),
    "mask of another size": (
        _carvana(lambda root: Image.new("L", (31, 20)).save(root / MASK)),
        r"_02_mask\.gif is 31x20 pixels, .*_02\.jpg is 30x20",
    ),
    "one car": (lambda root: carvana(root, cars=1) and "carvana", r"data\.test = 0\.25 leaves class car no training image"),
    "no list": (_nyu(lambda root: (root / "data/nyu2_test.csv").unlink()), r"nyu2_test\.csv cannot be read .*nyu_data\.zip"),
    "empty list": (_nyu(_line("")), r"nyu2_train\.csv lists no photographs"),
    "three names": (_nyu(_line("a.jpg,b.png,c")), r"line 1: 'a\.jpg,b\.png,c' is not a photograph, a comma and a depth"),
    "absent file": (_nyu(_line("data/a.jpg,data/a.png")), r"line 1: there is no .*data/a\.jpg"),
    "depth damaged": (_nyu(lambda root: (root / DEPTH).write_bytes(b"\x89PNG")), r"2\.png cannot be read as a depth"),
    "depth in colour": (_nyu(lambda root: Image.new("RGB", (32, 24)).save(root / DEPTH)), r"2\.png has the mode RGB"),
    "nothing known": (
        _nyu(lambda root: [Image.new("I;16", (32, 24)).save(path) for path in root.rglob("*_depth.png")]),
        "no pixel of the test images has a known depth",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_dense_data_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, message = MALFORMED[name]
    root = tmp_path / "raw"
    data = make(root)
    with pytest.raises(InputError, match=message):
        prepare(options(data, root), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["absent", "short", "type"])
def test_a_damaged_folder_of_targets_is_named(damage: str, tmp_path: Path) -> None:
    carvana(tmp_path / "raw")
    prepare(options("carvana", tmp_path / "raw"), tmp_path / "out")
    path = tmp_path / "out/validation_targets.npy"
    if damage == "absent":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        card = files.read_json(tmp_path / "out/data.json")
        np.save(path, np.load(path).astype(np.float32))
        card["files"][path.name] = path.stat().st_size
        (tmp_path / "out/data.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match=r"validation_targets\.npy is damaged"):
        load(tmp_path / "out")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("task", ["segment", "depth"])
def test_targets_on_a_gpu_equal_those_on_a_cpu(task: str, move: str, marked: dict[str, Prepared]) -> None:
    cpu, gpu = (Batches(marked[task], "train", 10, device, MOVES[move], True, 0) for device in ("cpu", "cuda"))
    for (_, here), (_, there) in zip(cpu.epoch(2), gpu.epoch(2), strict=True):
        assert there.is_cuda and torch.equal(here, there.cpu())
