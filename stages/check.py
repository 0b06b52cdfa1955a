"""params.yaml, all of it, checked before anything runs; outputs/check/passed.json stays the same while it passes."""

import os
import time
from pathlib import Path

from pipeline.config import PARAMS, lookup, read_params
from pipeline.errors import InputError
from pipeline.files import write_json
from pipeline.sources import ROOT
from stages import folder, run


def main() -> None:
    """Refuse params.yaml with one line for each mistake. Where it passed and nothing was touched since, as in most calls of `make`,
    there is nothing to do; DVC removes passed.json before it runs this stage."""
    passed = folder("check") / "passed.json"
    if passed.exists() and _untouched_since(passed.stat().st_mtime_ns):
        return
    began = time.time_ns()
    from pipeline.grid import check  # imports torch, as networks and methods do: two seconds

    check()
    write_json(passed, {"passed": True})
    os.utime(passed, ns=(began, began))  # what was touched meanwhile was perhaps not seen


def _untouched_since(then: int) -> bool:
    params = read_params()
    try:
        folders = [Path(str(lookup(params, key))) for key in ("data.root", "train.start")]
    except InputError:  # the check says it better
        return False
    looked_at = [PARAMS, *folders, *(ROOT / "pipeline").rglob("*.py")]
    return all(path.exists() and max(path.stat().st_mtime_ns, path.stat().st_ctime_ns) < then for path in looked_at)


if __name__ == "__main__":
    run(main)
