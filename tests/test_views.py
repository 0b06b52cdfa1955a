"""What networks see of stored images is what torchvision and Pillow make of them, box by box."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from raw_data import options
from torch import Tensor
from torch.nn.functional import pad as torch_pad
from torchvision.transforms import v2
from torchvision.transforms.v2 import _geometry
from torchvision.transforms.v2 import functional as F

from pipeline.config import Augment, Crop
from pipeline.data import views
from pipeline.data.batches import Batches, Prepared, load
from pipeline.data.prepare import prepare

BOXES = Augment(pad=0, pad_mode="zero", flip=True, scale=[0.08, 1.0])
SIDE, COUNT = 6, 20  # pixels of the images on the disk, images of each class


def pictures(count: int, height: int, width: int) -> Tensor:
    """uint8 (N, H, W, 3)."""
    return torch.from_numpy(np.random.default_rng(3).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def planes(pixels: Tensor) -> Tensor:
    """uint8 (N, H, W, C) -> float64 (N, C, H, W), as torchvision takes them."""
    return pixels.permute(0, 3, 1, 2).double()


def resampled(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """float64 (N, C, h, w)."""
    return planes(views.resample(pixels, rows, columns).unflatten(2, (-1, pixels.shape[3])))


def torchvisions(images: Tensor, boxes: Tensor, seen: tuple[int, int]) -> Tensor:
    """torchvision's resized_crop of each image (N, C, H, W) at its box (4, N)."""
    return torch.stack([F.resized_crop(image, *box, list(seen)) for image, box in zip(images, boxes.T.tolist(), strict=True)])


@pytest.mark.parametrize("scale", [[0.08, 1.0], [0.9, 1.0], [1.0, 1.0], [0.001, 0.01]])
@pytest.mark.parametrize("size", [(32, 32), (64, 48), (20, 90), (90, 20), (9, 8), (1, 1)])
def test_boxes_are_those_of_torchvision_for_the_same_random_numbers(
    size: tuple[int, int], scale: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    uniform = torch.rand(2 * views.TRIES + 2, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    transform, image, found = v2.RandomResizedCrop(8, (scale[0], scale[1])), torch.zeros(3, *size), []
    for numbers in uniform.T:
        with monkeypatch.context() as patch:
            patch.setattr(_geometry, "torch", told(numbers.tolist()))
            box = transform.make_params([image])
        found.append(tuple(box[key] for key in ("top", "left", "height", "width")))
    assert [tuple(box) for box in views.boxes(uniform, size, scale).T.tolist()] == found


def told(numbers: list[float]) -> SimpleNamespace:
    """A torch whose random numbers are these: the tries' shares, their ratios, the place."""
    tries = [number for pair in zip(numbers[: views.TRIES], numbers[views.TRIES : -2], strict=True) for number in pair]
    places = numbers[-2:]
    number = SimpleNamespace(uniform_=lambda low, high: torch.tensor(float(low + (high - low) * tries.pop(0)), dtype=torch.float64))
    return SimpleNamespace(
        empty=lambda count: number,
        randint=lambda low, high, size: torch.tensor(int(low + (high - low) * places.pop(0))),
        exp=torch.exp,
    )


def test_drawn_boxes_are_distributed_as_those_of_torchvision() -> None:
    transform, image, count = v2.RandomResizedCrop(8), torch.zeros(3, 32, 32), 4000
    drawn = views.draw_boxes(count, (32, 32), [0.08, 1.0], torch.Generator().manual_seed(0)).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = [transform.make_params([image]) for _ in range(count)]
    other = torch.tensor([[box[key] for box in made] for key in ("top", "left", "height", "width")], dtype=torch.float64)
    for ours, theirs in zip(features(drawn), features(other), strict=True):
        places = torch.cat([ours, theirs]).unique()
        steps = [torch.searchsorted(values.sort()[0], places, right=True) / count for values in (ours, theirs)]
        # Kolmogorov and Smirnov: at this distance two samples of one distribution are once in 3000 times
        assert (steps[0] - steps[1]).abs().max() < 2.0 * (2 / count) ** 0.5


def features(boxes: Tensor) -> list[Tensor]:
    top, left, height, width = boxes
    return [top, left, height, width, height * width, height / width, top - left]


@pytest.mark.parametrize(
    ("stored", "seen"),
    [
        ((32, 32), (224, 224)),
        ((64, 64), (224, 224)),
        ((90, 70), (32, 32)),
        ((256, 200), (64, 48)),
        ((9, 8), (9, 8)),
        ((5, 90), (7, 7)),
    ],
)
def test_a_box_is_resampled_as_torchvision_does(stored: tuple[int, int], seen: tuple[int, int]) -> None:
    pixels = pictures(12, *stored)
    boxes = views.draw_boxes(12, stored, [0.08, 1.0], torch.Generator().manual_seed(2))
    boxes[:, 0] = torch.tensor([0, 0, *stored])
    boxes[:, 1] = torch.tensor([stored[0] - 1, stored[1] - 1, 1, 1])
    found = resampled(pixels, *views.of_boxes(boxes, stored, seen))
    torch.testing.assert_close(found, torchvisions(planes(pixels), boxes, seen), atol=2e-4, rtol=0)
    for image, box, ours in zip(pixels, boxes.T.tolist(), found, strict=True):  # Pillow rounds after each of its two passes
        top, left, height, width = box
        cut = Image.fromarray(image.numpy()).crop((left, top, left + width, top + height))
        theirs = torch.from_numpy(np.array(cut.resize(seen[::-1], Image.Resampling.BILINEAR)))
        assert (theirs.permute(2, 0, 1) - ours).abs().max() <= 1.01


@pytest.mark.parametrize(
    ("stored", "crop"),
    [((32, 32), (256, 224)), ((64, 64), (256, 224)), ((300, 211), (256, 224)), ((50, 81), (40, 33)), ((81, 50), (33, 32)),
     ((10, 97), (7, 7)), ((8, 8), (8, 8)), ((1, 2), (5, 4))],
)  # fmt: skip
def test_the_middle_is_that_of_torchvisions_resize_and_center_crop(stored: tuple[int, int], crop: tuple[int, int]) -> None:
    pixels = pictures(3, *stored)
    rows, columns = (weights.expand(3, -1, -1) for weights in views.of_middle(Crop(resize=crop[0], size=crop[1]), stored))
    assert rows.shape == (3, crop[1], stored[0]) and columns.shape == (3, crop[1], stored[1])
    found = resampled(pixels, rows, columns)
    both = v2.Compose([v2.Resize(crop[0], antialias=True), v2.CenterCrop(crop[1])])
    torch.testing.assert_close(found, both(planes(pixels)), atol=2e-4, rtol=0)
    for image, ours in zip(pixels, found, strict=True):
        theirs = np.array(both(Image.fromarray(image.numpy())))
        assert (torch.from_numpy(theirs).permute(2, 0, 1) - ours).abs().max() <= 1.01


@pytest.fixture(scope="module", params=["memory", "stream"])
def square(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Two classes of 20 random images of 6x6 pixels, of which networks see the middle 7x7 of 9x9: 24 to train on."""
    root, draw = tmp_path_factory.mktemp("raw"), np.random.default_rng(0)
    for name in ("ant", "bee"):
        (root / name).mkdir()
        for index in range(COUNT):
            Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(root / name / f"{index:02}.png")
    changes = {"image_size": SIDE, "storage": request.param, "crop": {"resize": 9, "size": 7}}
    prepare(options("folder", root, **changes), root / "out")
    return load(root / "out")


def stored(prepared: Prepared, split: str) -> Tensor:
    """The split's images (N, 3, H, W), from 0 to 255, read past the code under test."""
    if prepared.storage == "memory":
        return planes(torch.from_numpy(np.load(prepared.folder / f"{split}_images.npy")))
    assert prepared.root is not None
    paths = json.loads((prepared.folder / f"{split}_files.json").read_text())["paths"]
    return planes(torch.from_numpy(np.stack([np.array(Image.open(prepared.root / path)) for path in paths])))


def values(prepared: Prepared, images: Tensor) -> Tensor:
    """Undo the normalisation."""
    mean, std = (torch.tensor(numbers, dtype=torch.float64)[:, None, None] for numbers in (prepared.mean, prepared.std))
    return (images.double() * std + mean) * 255


def whole(batches: Batches, number: int) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches.epoch(number), strict=True)
    return torch.cat(images), torch.cat(labels)


def middle(images: Tensor) -> Tensor:
    return F.center_crop(F.resize(images, [9], antialias=True), [7])


@pytest.mark.parametrize("channels_last", [True, False])
def test_networks_see_the_middle_of_every_image(square: Prepared, channels_last: bool) -> None:
    assert square.shape == (3, 7, 7) and square.stored == (3, SIDE, SIDE)
    batches = Batches(square, "test", 7, "cpu", None, False, 0, channels_last=channels_last)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    assert all(images.is_contiguous(memory_format=memory) and images.dtype == torch.float32 for images, _ in batches.epoch(0))
    images, labels = whole(batches, 0)
    torch.testing.assert_close(values(square, images), middle(stored(square, "test")), atol=1e-3, rtol=0)
    assert torch.equal(labels, torch.from_numpy(np.load(square.folder / "test_labels.npy")))


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_a_padded_crop_is_a_window_of_what_networks_see(square: Prepared, mode: Any) -> None:
    batches = Batches(square, "train", 8, "cpu", Augment(pad=2, pad_mode=mode, flip=True, scale=None), False, 1)
    padded = torch_pad(middle(stored(square, "train")), (2, 2, 2, 2), "constant" if mode == "zero" else "reflect")
    windows = [padded[:, :, top : top + 7, left : left + 7] for top in range(5) for left in range(5)]
    assert_each_is_one_of(values(square, whole(batches, 0)[0]), torch.stack(windows))


def test_a_scaled_crop_is_a_box_of_the_image_itself(square: Prepared) -> None:
    images = stored(square, "train")
    batches = Batches(square, "train", 8, "cpu", BOXES, False, 1)
    every = [(top, left, height, width) for height in range(1, SIDE + 1) for width in range(1, SIDE + 1)
             for top in range(SIDE - height + 1) for left in range(SIDE - width + 1)]  # fmt: skip
    views_of_all = torch.stack([F.resized_crop(images, *box, [7, 7]) for box in every])
    chosen = [
        every[index]
        for number in range(4)
        for index in assert_each_is_one_of(values(square, whole(batches, number)[0]), views_of_all)
    ]
    assert len(set(chosen)) > 40 and len(set(chosen[:8])) > 4  # of 96 in all and of 8 in a batch
    for _, _, height, width in chosen:  # rounded to pixels
        assert (height + 0.5) * (width + 0.5) > 0.08 * SIDE**2
        assert (width - 0.5) / (height + 0.5) < 4 / 3 and (height - 0.5) / (width + 0.5) < 4 / 3


def assert_each_is_one_of(found: Tensor, allowed: Tensor) -> list[int]:
    """Which of `allowed` (K, N, C, h, w), straight or mirrored, each of `found` (N, C, h, w) is; about half are mirrored."""
    both = torch.stack([allowed, allowed.flip(-1)])
    distances = (both - found).abs().amax((-3, -2, -1))  # (2, K, N)
    best, places = distances.flatten(0, 1).min(0)
    assert best.max() < 1e-3
    flips = places >= len(allowed)
    assert 0.1 < flips.double().mean() < 0.9
    return (places % len(allowed)).tolist()


def test_boxes_depend_on_seed_and_epoch_alone_and_leave_order_and_flips_as_they_are(square: Prepared) -> None:
    def make(seed: int, augment: Augment | None = BOXES, batch: int = 8) -> Batches:
        return Batches(square, "train", batch, "cpu", augment, True, seed)

    first, resumed = whole(make(0), 2), make(0)
    next(resumed.epoch(1))
    assert all(map(torch.equal, first, whole(resumed, 2)))
    torch.testing.assert_close(first[0], whole(make(0, batch=24), 2)[0], atol=1e-6, rtol=1e-5)
    for other in (whole(resumed, 3), whole(make(1), 2)):
        assert not torch.equal(first[0], other[0])
    plain, all_of_it = (Augment(pad=0, pad_mode="zero", flip=True, scale=scale) for scale in (None, [1.0, 1.0]))
    images, labels = whole(make(0, plain), 2)
    assert torch.equal(first[1], labels)
    known, expected = (torch.cat([seen, seen.flip(-1)]) for seen in (middle(stored(square, "train")), stretched(square)))
    which = (known[:, None] - values(square, images)).abs().amax((-3, -2, -1)).argmin(0)
    torch.testing.assert_close(values(square, whole(make(0, all_of_it), 2)[0]), expected[which], atol=1e-3, rtol=0)


def stretched(prepared: Prepared) -> Tensor:
    """The whole training images at the size that networks see."""
    return F.resize(stored(prepared, "train"), [7, 7], antialias=True)


def test_without_a_crop_boxes_are_stretched_to_the_image_as_stored(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for index, image in enumerate(pictures(8, 10, 7)):
            Image.fromarray(image.numpy() // (1 + (name == "bee"))).save(tmp_path / name / f"{index}.png")
    prepare(options("folder", tmp_path), tmp_path / ".out")
    there = load(tmp_path / ".out")
    assert there.shape == there.stored == (3, 10, 7) and there.crop is None
    batches = Batches(there, "train", 4, "cpu", Augment(pad=0, pad_mode="zero", flip=False, scale=[0.3, 0.6]), False, 0)
    images = whole(batches, 0)[0]
    assert images.shape[1:] == (3, 10, 7) and batches.images == len(images)
    untouched = whole(Batches(there, "train", 4, "cpu", None, False, 0), 0)[0]
    assert ((images - untouched).abs().amax((1, 2, 3)) > 0.1).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("augment", [None, BOXES, Augment(pad=2, pad_mode="reflect", flip=True, scale=None)])
def test_views_on_a_gpu_equal_those_on_a_cpu(square: Prepared, augment: Augment | None) -> None:
    cpu, gpu = (whole(Batches(square, "train", 8, device, augment, True, 0), 2)[0] for device in ("cpu", "cuda"))
    torch.testing.assert_close(cpu, gpu.cpu(), atol=1e-5, rtol=1e-5)
