"""The handwritten digits that scikit-learn's package holds, without an import of it: that takes longer than preparing them."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np


def load() -> tuple[np.ndarray, np.ndarray]:
    """Ink from 0 to 16 as float64 (1797, 8, 8), and labels as int64 (1797,): as `sklearn.datasets.load_digits` gives them."""
    package = find_spec("sklearn")
    assert package and package.origin, "scikit-learn is among this project's requirements"
    with gzip.open(Path(package.origin).parent / "datasets/data/digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
