"""outputs/code/STAGE.txt: the sums of the source files that a stage can reach, so that its variants have one dependency for all."""

from pathlib import Path

import yaml

from pipeline.files import sha256, write_bytes
from stages import folder, run


def main(stage: str) -> None:
    """Sum up the dependencies that dvc.yaml lists for the stage code-STAGE."""
    listed = yaml.safe_load(Path("dvc.yaml").read_text())["stages"][f"code-{stage}"]["deps"]
    write_bytes(folder("code", f"{stage}.txt"), "".join(f"{sha256(Path(path))}  {path}\n" for path in listed).encode())


if __name__ == "__main__":
    run(main)
