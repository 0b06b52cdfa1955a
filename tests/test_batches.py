"""Batches: every image once, true crops and flips, the same epoch whenever and however it is asked for."""

import copy
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad as torch_pad
from torchvision.transforms import v2

from pipeline.config import Augment, Data
from pipeline.data import stream
from pipeline.data.batches import Batches, Prepared, load
from pipeline.data.prepare import prepare
from pipeline.errors import InputError

H, W = 10, 8
CROP = Augment(pad=2, pad_mode="zero", flip=True, scale=None)


def options(root: Path, **changes: Any) -> Data:
    usual = {"download": False, "image_size": None, "storage": "auto", "validation": 0.2, "test": 0.25, "split_seed": 7}
    return Data.model_validate(
        usual | {"crop": None, "per_class": None, "name": "folder", "root": str(root), "mean": "auto", "std": "auto"} | changes
    )


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 50 random images of 10 x 8 pixels (H x W): training gets 60, validation 16, test 24."""
    root, draw = tmp_path_factory.mktemp("raw"), np.random.default_rng(0)
    for name in ("ant", "bee"):
        (root / name).mkdir()
        for index in range(50):
            Image.fromarray(draw.integers(0, 256, (H, W, 3), dtype=np.uint8)).save(root / name / f"{index:02}.png")
    return root


@pytest.fixture(scope="module")
def prepared(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    out = tmp_path_factory.mktemp("memory") / "data"
    prepare(options(raw), out)
    return load(out)


@pytest.fixture(scope="module", params=["memory", "stream"])
def square(request: pytest.FixtureRequest, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The same images at 9 x 9 pixels, in each kind of storage."""
    out = tmp_path_factory.mktemp("square") / request.param
    prepare(options(raw, image_size=9, storage=request.param), out)
    return load(out)


def stored(prepared: Prepared, split: str) -> tuple[Tensor, Tensor]:
    """The split as uint8 (N, C, H, W) and labels, read past the code under test."""
    images = torch.from_numpy(np.load(prepared.folder / f"{split}_images.npy")).permute(0, 3, 1, 2)
    return images, torch.from_numpy(np.load(prepared.folder / f"{split}_labels.npy"))


def raw_pixels(prepared: Prepared, images: Tensor) -> Tensor:
    """Undo the normalisation: uint8 values, asserting that they are whole."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (prepared.mean, prepared.std))
    values = (images * std + mean) * 255
    assert (values - values.round()).abs().max() < 1e-3
    return values.round().to(torch.uint8)


def whole(batches: Batches, number: int) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches.epoch(number), strict=True)
    return torch.cat(images), torch.cat(labels)


def same(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(left[0], right[0]) and torch.equal(left[1], right[1])


@pytest.mark.parametrize("channels_last", [True, False])
def test_without_shuffling_all_images_come_in_order_normalised(prepared: Prepared, channels_last: bool) -> None:
    batches = Batches(prepared, "test", 7, "cpu", None, False, 0, channels_last=channels_last)
    images, labels = stored(prepared, "test")
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (prepared.mean, prepared.std))
    found = list(batches.epoch(3))
    assert [len(batch) for batch, _ in found] == [7, 7, 7, 3] and len(batches) == 4 and batches.images == 24
    memory = torch.channels_last if channels_last else torch.contiguous_format
    assert all(batch.is_contiguous(memory_format=memory) and batch.dtype == torch.float32 for batch, _ in found)
    torch.testing.assert_close(torch.cat([batch for batch, _ in found]).double(), (images / 255 - mean) / std, atol=1e-6, rtol=1e-6)
    assert torch.equal(torch.cat([kinds for _, kinds in found]), labels)


def test_training_sees_each_image_once_with_its_label_and_drops_the_rest(prepared: Prepared) -> None:
    images, labels = stored(prepared, "train")
    for size, count in ((10, 60), (16, 48), (60, 60), (64, 60)):
        batches = Batches(prepared, "train", size, "cpu", None, True, 0)
        sizes = [len(kinds) for _, kinds in batches.epoch(0)]
        assert sum(sizes) == count == batches.images and len(sizes) == len(batches)
        assert set(sizes) == {min(size, 60)}
        found, kinds = whole(batches, 0)
        matches = (raw_pixels(prepared, found)[:, None] == images[None]).flatten(2).all(2)
        assert (matches.sum(1) == 1).all() and matches.sum(0).max() == 1
        assert torch.equal(kinds, labels[matches.int().argmax(1)])


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_every_crop_is_a_window_of_the_padded_image_and_half_are_flipped(prepared: Prepared, mode: Any) -> None:
    batches = Batches(prepared, "train", 60, "cpu", Augment(pad=3, pad_mode=mode, flip=True, scale=None), True, 1)
    images, labels = stored(prepared, "train")
    padded = torch_pad(images.float(), (3, 3, 3, 3), "constant" if mode == "zero" else "reflect").to(torch.uint8)
    places = [(top, left, flip) for top in range(7) for left in range(7) for flip in (False, True)]
    known = {}  # the bytes of each possible result: which image, and where from
    for place in places:
        top, left, flip = place
        windows = padded[:, :, top : top + H, left : left + W]
        for index, window in enumerate(windows.flip(-1) if flip else windows):
            known[window.numpy().tobytes()] = index, place
    assert len(known) == 60 * 98
    seen = []
    for number in range(20):
        found, kinds = whole(batches, number)
        for image, kind in zip(raw_pixels(prepared, found), kinds, strict=True):
            index, place = known[image.numpy().tobytes()]
            assert labels[index] == kind
            seen.append(place)
    tops, lefts, flips = (np.array(values) for values in zip(*seen, strict=True))
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / np.sqrt(1200)
    for values in (tops, lefts):  # 1200 draws from 7 places: chi-squared with 6 degrees of freedom, 99.99 % at 27.9
        counts = np.bincount(values, minlength=7)
        assert ((counts - 1200 / 7) ** 2 / (1200 / 7)).sum() < 27.9
    for left, right in ((tops, lefts), (tops, flips), (lefts, flips)):
        assert abs(np.corrcoef(left, right)[0, 1]) < 4 / np.sqrt(1200)


def test_without_flip_or_crop_only_the_other_happens(prepared: Prepared) -> None:
    images, _ = stored(prepared, "train")
    flipped = Batches(prepared, "train", 60, "cpu", Augment(pad=0, pad_mode="zero", flip=True, scale=None), False, 0)
    found = raw_pixels(prepared, whole(flipped, 0)[0])
    straight, mirrored = ((found == other).flatten(1).all(1) for other in (images, images.flip(3)))
    assert (straight ^ mirrored).all() and straight.any() and mirrored.any()
    cropped = Batches(prepared, "train", 60, "cpu", Augment(pad=1, pad_mode="zero", flip=False, scale=None), False, 0)
    found = raw_pixels(prepared, whole(cropped, 0)[0])
    padded = torch_pad(images, (1, 1, 1, 1))
    windows = [padded[:, :, top : top + H, left : left + W] for top in range(3) for left in range(3)]
    assert torch.stack([(found == window).flatten(1).all(1) for window in windows]).any(0).all()


def test_an_epoch_depends_on_seed_and_number_alone(square: Prepared) -> None:
    def make(seed: int) -> Batches:
        return Batches(square, "train", 16, "cpu", CROP, True, seed)

    whole_run, resumed = make(0), make(0)
    epoch = [whole(whole_run, number) for number in range(3)][2]
    torch.rand(5)  # other random numbers in between change nothing
    next(resumed.epoch(1))  # nor does an epoch that was broken off
    state = torch.get_rng_state()
    assert same(epoch, whole(resumed, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert not same(epoch, whole(resumed, 3)) and not same(epoch, whole(make(1), 2))
    assert not torch.equal(epoch[1], whole(resumed, 3)[1])


def test_streamed_images_equal_those_in_memory(raw: Path, tmp_path: Path) -> None:
    found = []
    for storage in ("memory", "stream"):
        prepare(options(raw, image_size=9, storage=storage), tmp_path / storage)
        there = load(tmp_path / storage)
        train = Batches(there, "train", 16, "cpu", CROP, True, 5)
        test = Batches(there, "test", 16, "cpu", None, False, 5)
        found.append((there.mean, there.std, whole(train, 4), whole(test, 0)))
    assert not (tmp_path / "stream/train_images.npy").exists()
    assert found[0][:2] == found[1][:2]
    assert same(found[0][2], found[1][2]) and same(found[0][3], found[1][3])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_the_number_of_workers_changes_nothing(raw: Path, tmp_path: Path) -> None:
    prepare(options(raw, image_size=9, storage="stream"), tmp_path / "out")
    here, workers = (Batches(load(tmp_path / "out"), "train", 16, "cpu", CROP, True, 5, count) for count in (0, 2))
    assert same(whole(here, 1), whole(workers, 1))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_stay_from_epoch_to_epoch_and_each_reading_at_a_time_has_its_own(raw: Path, tmp_path: Path) -> None:
    prepare(options(raw, image_size=9, storage="stream"), tmp_path / "out")
    there = load(tmp_path / "out")
    here, streamed = (Batches(there, "train", 16, "cpu", CROP, True, 5, count) for count in (0, 2))

    def pids() -> set[int]:
        return {child.pid for child in multiprocessing.active_children() if child.pid not in before}

    before = {child.pid for child in multiprocessing.active_children()}
    assert here.waited == streamed.waited == 0.0
    assert same(whole(here, 0), whole(streamed, 0))
    first = pids()
    assert len(first) == 2
    broken_off = streamed.epoch(1)
    next(broken_off)
    broken_off.close()
    assert same(whole(here, 2), whole(streamed, 2)) and pids() == first
    one, other = streamed.epoch(3), copy.copy(streamed).epoch(3)  # as grafting reads
    for (images, labels), (same_images, same_labels) in zip(one, other, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    assert len(pids()) == 4 and pids() > first
    assert streamed.waited > 0 and Batches(there, "train", 16, "cpu", CROP, True, 5).waited == 0.0


def test_resizing_is_that_of_torchvision_v2() -> None:
    draw = np.random.default_rng(0)
    for height, width, channels in ((37, 53, 3), (9, 200, 3), (64, 48, 1)):
        pixels = draw.integers(0, 256, (height, width, channels), dtype=np.uint8)
        picture = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
        for size in (8, 32, 60):
            theirs = np.asarray(v2.functional.resize(picture, [size, size]))  # bilinear
            assert np.array_equal(stream.resize(pixels, size), theirs.reshape(size, size, channels))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_broken_after_preparing_is_named(workers: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    for name in ("ant", "bee"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(draw.integers(0, 256, (6, 6), dtype=np.uint8)).save(tmp_path / "raw" / name / f"{index}.png")
    prepare(options(tmp_path / "raw", image_size=6, storage="stream"), tmp_path / "out")
    there = load(tmp_path / "out")
    batches = Batches(there, "train", 2, "cpu", None, False, 0, workers)
    victim = next(path for path in sorted((tmp_path / "raw").rglob("*.png")) if path.name in str(batches._reader.files.paths[0]))
    content = victim.read_bytes()
    for damage, message in (
        (b"\0" * len(content), "cannot be read"),
        (content[:-9], "has changed"),
        (None, "cannot be read"),
    ):
        victim.unlink() if damage is None else victim.write_bytes(damage)
        with pytest.raises(InputError, match=rf"{victim.name} {message}") as error:
            list(batches.epoch(0))
        assert "Traceback" not in str(error.value)
    (tmp_path / "raw").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="raw, which holds the images, is not there"):
        load(tmp_path / "out")


def test_results_do_not_depend_on_the_number_of_threads(prepared: Prepared) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(whole(Batches(prepared, "train", 59, "cpu", CROP, True, 0), 0))
    finally:
        torch.set_num_threads(before)
    assert same(*found)


@pytest.mark.parametrize(("part", "start"), [(slice, 0), (lambda length: slice(length // 2, length), 1), (slice, 9)])
def test_batches_made_several_at_once_are_the_same(
    prepared: Prepared, part: Any, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: 7 batches of 8 images (the last of 60 are dropped), 3 at once, of each the part, from one of them on."""
    batches = Batches(prepared, "train", 8, "cpu", CROP, True, 0)
    one_by_one = list(batches.epoch(1, part, start))
    monkeypatch.setattr(Batches, "_at_once", lambda self: 3)
    at_once = list(batches.epoch(1, part, start))
    assert len(one_by_one) == len(at_once) == max(0, 7 - start)
    for before, after in zip(one_by_one, at_once, strict=True):
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(before, after, strict=True))


def test_a_reflection_wider_than_the_image_is_refused(prepared: Prepared) -> None:
    with pytest.raises(InputError, match=r"augment\.pad = 8 cannot reflect images of 10x8"):
        Batches(prepared, "train", 16, "cpu", Augment(pad=8, pad_mode="reflect", flip=False, scale=None), True, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_equal_those_on_a_cpu(square: Prepared) -> None:
    cpu, gpu = (Batches(square, "train", 16, device, CROP, True, 0) for device in ("cpu", "cuda"))
    for (images, labels), (there, kinds) in zip(cpu.epoch(2), gpu.epoch(2), strict=True):
        assert there.is_cuda and torch.equal(labels, kinds.cpu())
        torch.testing.assert_close(images, there.cpu(), atol=1e-6, rtol=1e-6)
