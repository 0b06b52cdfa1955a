"""Carvana's cars with their masks, in the layout of Kaggle's archives train.zip and train_masks.zip, unpacked side by side:

train/ID_NN.jpg                 5088 photographs of 1918x1280 pixels, RGB: 318 cars, each from 16 sides
train_masks/ID_NN_mask.gif      of the same size, two values: the car is white

Masks of the published test images are not public, so the test split is held out here, and as with the validation split whole cars
are: 16 photographs of one car are no 16 independent ones. Kaggle, Carvana Image Masking Challenge, 2017:
https://www.kaggle.com/c/carvana-image-masking-challenge/data
"""

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import Data
from pipeline.data import stream
from pipeline.data.raw import Source, Split
from pipeline.errors import InputError

LICENCE = "Carvana Image Masking Challenge, Kaggle: for the competition and for non-commercial research and education"


def load(options: Data) -> Source:
    """What lies in `options.root`."""
    root = Path(options.root)
    try:
        photographs, masks = (_found(root / folder, end) for folder, end in (("train", ".jpg"), ("train_masks", "_mask.gif")))
    except OSError as error:
        raise InputError(
            f"data.root: {error.filename} cannot be read: {error.strerror}; unpack Kaggle's train.zip and train_masks.zip there"
        ) from None
    for folder, has, lacks in (("train_masks", photographs, masks), ("train", masks, photographs)):
        if odd := sorted(has.keys() - lacks.keys()):
            raise InputError(f"{root / folder} has nothing for {has[odd[0]]}: unpack both archives again")
    if not photographs:
        raise InputError(f"{root / 'train'} has no photographs ID_NN.jpg: unpack Kaggle's train.zip in {root}")
    names = sorted(photographs)
    paths, targets = (np.array([found[name].relative_to(root).as_posix() for name in names]) for found in (photographs, masks))
    _, cars = np.unique([name.rpartition("_")[0] for name in names], return_inverse=True)
    split = Split(paths, np.zeros(len(names), np.int64), targets, groups=cars)
    return Source(("car",), {"train": split}, LICENCE, root, channels=3, task="segment", read_target=read_mask)


def read_mask(path: Path) -> np.ndarray:
    """The mask in a file as uint8 (H, W) of 0 and 1."""
    try:
        with Image.open(path, formats=stream.FORMATS) as image:
            return (np.asarray(image.convert("L")) > 127).astype(np.uint8)
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise InputError(f"{path} cannot be read as a mask ({error}): unpack train_masks.zip again") from None


def _found(folder: Path, end: str) -> dict[str, Path]:
    """ID_NN -> file, of the files with that end."""
    return {path.name.removesuffix(end): path for path in folder.iterdir() if path.name.endswith(end) and path.name[0] != "."}
