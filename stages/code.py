"""outputs/code/STAGE.txt: the source files that a stage can reach, by their sums, and the parameters that all its variants share.

So each variant has one dependency for them all: dvc.lock stays short, and `dvc repro` quick.
"""

import json
from pathlib import Path

import yaml

from pipeline.config import lookup, read_params
from pipeline.files import sha256, write_bytes
from stages import folder, run


def main(stage: str) -> None:
    """Sum up what dvc.yaml lists for the stage code-STAGE."""
    listed = yaml.safe_load(Path("dvc.yaml").read_text())["stages"][f"code-{stage}"]
    params = read_params()
    lines = [f"{sha256(Path(path))}  {path}" for path in listed["deps"]]
    lines += [f"{key}: {json.dumps(lookup(params, key), sort_keys=True)}" for key in listed["params"]]
    write_bytes(folder("code", f"{stage}.txt"), "".join(f"{line}\n" for line in lines).encode())


if __name__ == "__main__":
    run(main)
