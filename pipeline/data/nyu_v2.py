"""NYU Depth V2, indoor photographs with the depth of every pixel, in the layout that most work on depth from one image uses: the
archive nyu_data.zip of Alhashim and Wonka's DenseDepth (https://github.com/ialhashim/DenseDepth), also on Kaggle, unpacked.

data/nyu2_train.csv, nyu2_test.csv          a line a pair: photograph, comma, depth, from the folder that holds data/
data/nyu2_train/SCENE/N.jpg, N.png          50688 of 640x480; depth in 8 bits, 255 being 10 m
data/nyu2_test/N_colors.png, N_depth.png    654, Eigen et al.'s test split; depth in 16 bits, in millimetres

Depths have their gaps filled in already; a depth of 0 would be an unknown one. Whole scenes are held out to validate on.
The published nyu_depth_v2_labeled.mat is HDF5, which takes a package that nothing else here needs: it is not read.
Silberman, Hoiem, Kohli and Fergus 2012, "Indoor Segmentation and Support Inference from RGBD Images".
"""

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import Data
from pipeline.data import stream
from pipeline.data.raw import Source, Split
from pipeline.errors import InputError

DEEPEST = 10.0  # metres, of the value 255 in 8 bits
LICENCE = "NYU Depth V2, Silberman et al. 2012, from cs.nyu.edu/~silberman: no licence stated; through DenseDepth's archive"


def load(options: Data) -> Source:
    """What lies in `options.root`, the folder that holds data/, or in the folder nyu_data in it."""
    root = Path(options.root)
    home = root / "nyu_data" if (root / "nyu_data").is_dir() else root
    splits = {split: _pairs(home, home / "data" / f"nyu2_{split}.csv") for split in ("train", "test")}
    return Source(("depth in metres",), splits, LICENCE, home, channels=3, task="depth", read_target=read_depth)


def read_depth(path: Path) -> np.ndarray:
    """The depth in a file as float32 (H, W), in metres."""
    try:
        with Image.open(path, formats=stream.FORMATS) as image:
            mode, values = image.mode, np.asarray(image)
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise InputError(f"{path} cannot be read as a depth ({error}): unpack nyu_data.zip again") from None
    if mode == "L":
        return (values * (DEEPEST / 255)).astype(np.float32)
    if mode.startswith("I"):  # older versions of Pillow read 16 bits as 32
        return (values / 1000).astype(np.float32)
    raise InputError(f"{path} has the mode {mode}: a depth is grey, of 8 bits or of 16 bits")


def _pairs(home: Path, path: Path) -> Split:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"data.root: {path} cannot be read ({why}): unpack DenseDepth's nyu_data.zip there") from None
    images, depths = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        names = [name.strip() for name in line.split(",")]
        if len(names) != 2:
            raise InputError(f"{path}, line {number}: {line[:60]!r} is not a photograph, a comma and a depth")
        if away := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
            raise InputError(f"{path}, line {number}: {away[0]} leads out of {home}: only what lies in it is read")
        if absent := [name for name in names if not (home / name).is_file()]:
            raise InputError(f"{path}, line {number}: there is no {home / absent[0]}")
        images.append(names[0])
        depths.append(names[1])
    if not images:
        raise InputError(f"{path} lists no photographs: unpack nyu_data.zip again")
    _, scenes = np.unique([Path(name).parent.as_posix() for name in images], return_inverse=True)
    return Split(np.array(images), np.zeros(len(images), np.int64), np.array(depths), groups=scenes)
