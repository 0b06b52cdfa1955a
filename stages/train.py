"""Prepared data -> outputs/train/SEED: the over-parameterised network, trained."""

from pipeline.config import read_params
from pipeline.distributed import spread
from pipeline.first_training import first_training
from stages import PREPARED, RESUME, folder, run


def main(seed: str) -> None:
    """Build, expand and train the network of the section `model` as the section `train` says."""
    if spread("train", seed):
        return
    first_training(read_params(), int(seed), prepared=PREPARED, resume=RESUME, out=folder("train", seed))


if __name__ == "__main__":
    run(main)
