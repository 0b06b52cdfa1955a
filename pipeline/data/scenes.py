"""Scenes made from scikit-learn's handwritten digits: a small set for segmentation and depth estimation that needs no download.

A scene is S x S grey pixels: two to four digits before a slanted, textured plane. A digit at a distance of z metres is drawn
NEAR * S / (2 z) pixels high, in the light LIGHT / z that everything at that distance has, and hides what is behind it; so both its
size and its brightness tell how far it is. The mask is the digits' ink; the depth is z on the ink and the plane's elsewhere. Scenes
to test on are made of digits that no other scene shows. The random numbers are those of numpy's RandomState, which no version
changes.
"""

from functools import partial

import numpy as np
from PIL import Image

from pipeline.config import Data
from pipeline.data import digits
from pipeline.data.raw import Source, Split, TaskName

SIDE = 32  # pixels
COUNTS = {"train": 1600, "test": 400}
NEAR, FAR = 0.4, 1.1  # metres to a digit
PLANE = (1.3, 2.3)  # metres to the nearest and the farthest point that it may have
LIGHT = 100.0  # value of a white pixel at a distance of a metre, beyond white
TEXTURE = 0.25  # a patch of the plane is so much lighter or darker
NOISE = 10.0  # a pixel's value is at most so far off
LICENCE = "made from: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, CC BY 4.0; through scikit-learn"


def _load(options: Data, task: TaskName) -> Source:
    inks = digits.load()[0] / 16  # from 0 to 1
    last = len(inks) * COUNTS["train"] // sum(COUNTS.values())
    pools = {"train": inks[:last], "test": inks[last:]}
    splits = {}
    for seed, (name, pool) in enumerate(pools.items()):
        draw = np.random.RandomState(seed)
        images, masks, depths = map(np.stack, zip(*(scene(pool, draw) for _ in range(COUNTS[name])), strict=True))
        targets = masks if task == "segment" else depths
        splits[name] = Split(images[..., None], np.zeros(len(images), np.int64), targets)
    return Source(("digit" if task == "segment" else "depth in metres",), splits, LICENCE, task=task)


def scene(digits: np.ndarray, draw: np.random.RandomState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One scene of some of `digits` (N, 8, 8): pixels uint8, mask uint8 of 0 and 1, depth float32 in metres, each (S, S)."""
    depth = _plane(draw)
    patches = 1 + TEXTURE * (2 * draw.random_sample((SIDE // 4, SIDE // 4)) - 1)
    pixels = LIGHT / depth * patches.repeat(4, 0).repeat(4, 1)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    distances = NEAR + (FAR - NEAR) * draw.random_sample(draw.randint(2, 5))
    for distance in sorted(distances, reverse=True):
        size = round(NEAR * SIDE / (2 * distance))
        ink = _sized(digits[draw.randint(len(digits))], size)
        top, left = draw.randint(SIDE - size + 1, size=2)
        window = slice(top, top + size), slice(left, left + size)
        pixels[window] += ink * (LIGHT / distance - pixels[window])
        solid = ink > 0.5
        mask[window][solid], depth[window][solid] = 1, distance
    pixels += NOISE * (2 * draw.random_sample(pixels.shape) - 1)
    return np.round(pixels.clip(0, 255)).astype(np.uint8), mask, depth.astype(np.float32)


def _plane(draw: np.random.RandomState) -> np.ndarray:
    """Metres to every pixel of a plane that is slanted down and across, all of it between the two distances of PLANE."""
    slant = (PLANE[1] - PLANE[0]) / 4
    middle = PLANE[0] + slant + 2 * slant * draw.random_sample()
    down, across = 2 * slant * draw.random_sample(2) - slant
    places = np.arange(SIDE) / (SIDE - 1) - 0.5
    return middle + down * places[:, None] + across * places


def _sized(digit: np.ndarray, size: int) -> np.ndarray:
    """Ink (8, 8) stretched to (size, size)."""
    image = Image.fromarray(np.round(255 * digit).astype(np.uint8))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) / 255


load_masks, load_depths = (partial(_load, task=task) for task in ("segment", "depth"))
