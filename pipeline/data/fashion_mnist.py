"""Fashion-MNIST in the idx files of its authors: root/FashionMNIST/raw, as torchvision keeps it.

An idx file is two zero bytes, the type of its values (8: unsigned bytes), the number of dimensions, their sizes as four bytes
each, the highest first, and the values. Xiao, Rasul and Vollgraf 2017; the MD5 sums of the compressed files are the authors',
https://github.com/zalandoresearch/fashion-mnist
"""

from pathlib import Path

import numpy as np

from pipeline import files
from pipeline.data import downloads

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # no https there: the sums decide
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SPLITS = {"train": "train", "test": "t10k"}  # split -> how its files begin
KINDS = {"images-idx3-ubyte": 3, "labels-idx1-ubyte": 1}  # how they end -> dimensions
# Compressed: bytes and MD5; then the bytes inside.
PUBLISHED = {
    "train-images-idx3-ubyte": (26421880, "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d", 47040016),
    "train-labels-idx1-ubyte": (29515, "md5:25c81989df183df01b3e8a0aad5dffbe", 60008),
    "t10k-images-idx3-ubyte": (4422102, "md5:bef4ecab320f06d8554ea6380940ec79", 7840016),
    "t10k-labels-idx1-ubyte": (5148, "md5:bb300cfdad3c16e7a12a480ee83cd310", 10008),
}


def read(root: Path, download: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images uint8 (N, 28, 28) and labels (N,) of `train` and `test`; fetched first where a file is missing and `download` allows
    it. `ValueError`, `OSError` or `HTTPException` says what is wrong."""
    folder = root / "FashionMNIST" / "raw"
    if download:
        for name in PUBLISHED:
            if not (folder / name).is_file():
                files.write_bytes(folder / name, _fetched(folder, name))
    splits = {}
    for split, prefix in SPLITS.items():
        images, labels = (read_idx(folder / f"{prefix}-{kind}", dimensions) for kind, dimensions in KINDS.items())
        splits[split] = images, labels
    return splits


def _fetched(folder: Path, name: str) -> bytes:
    """The content of a file that lies compressed in `folder`, or that is fetched."""
    size, digest, inside = PUBLISHED[name]
    try:
        content = downloads.read(folder / f"{name}.gz", digest)
    except (OSError, ValueError):
        content = downloads.fetch(f"{URL}{name}.gz", size, digest)
    return downloads.inflated(content, inside)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of unsigned bytes in an idx file; `ValueError` where it has other dimensions or is cut short."""
    content = path.read_bytes()
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise ValueError(f"{path.name} is no idx file of unsigned bytes in {dimensions} dimensions")
    sizes = [int.from_bytes(content[place : place + 4]) for place in range(4, start, 4)]
    if len(content) - start != int(np.prod(sizes, dtype=object)):
        raise ValueError(f"{path.name} has not the {' x '.join(map(str, sizes))} values that it begins with")
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)
