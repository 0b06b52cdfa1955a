"""outputs/code/STAGE.txt: the source files that a stage can reach, by their sums, and the parameters that all its variants share;
outputs/code/FAMILY-BLOCK.txt: the file of the method that a block of params.yaml names.

So nobody lists files, an edited one re-runs the stages that it can change and no other, and dvc.lock stays short.
"""

import json

from pipeline import methods
from pipeline.config import lookup, read_params
from pipeline.files import sha256, write_together
from pipeline.sources import ROOT, reach
from stages import NAME, folder, run

# Here and not among the stage's own parameters in dvc.yaml, where DVC would write and compare them for each variant.
RUNTIME = tuple(f"runtime.{key}" for key in ("device", "threads", "processes", "hosts", "launch"))  # the rest changes no result
SHARED = {
    "train": ("augment", *RUNTIME),
    "revive": ("augment", *RUNTIME),
    "compress": ("augment", *RUNTIME),
    "collapse": ("augment", *RUNTIME),
    "export": ("export", "runtime.threads"),
    "profile": ("profile", "export.precisions"),
}


def main() -> None:
    """Sum up. A block that is wrong is left out: `check`, which comes next, says what is wrong with it."""
    params = read_params()
    told: dict[str, list[str]] = {}
    for stage in sorted(path.stem for path in (ROOT / "stages").glob("[a-z]*.py")):
        files, _ = reach(f"stages/{stage}.py")
        shared = [f"{key}: {json.dumps(lookup(params, key), sort_keys=True)}" for key in SHARED.get(stage, ())]
        told[stage] = [*map(_sum, sorted(files)), *shared]
    for family in ("revive", "compress"):
        known, blocks = methods.names(family), params.get(family)
        for block, options in blocks.items() if isinstance(blocks, dict) else ():
            method = options.get("method") if isinstance(options, dict) else None
            if method in known and NAME.fullmatch(str(block)):
                told[f"{family}-{block}"] = [_sum(f"pipeline/{family}/{method}.py")]
    write_together({folder("code", f"{name}.txt"): "".join(f"{line}\n" for line in lines).encode() for name, lines in told.items()})


def _sum(path: str) -> str:
    return f"{sha256(ROOT / path)}  {path}"


if __name__ == "__main__":
    run(main)
