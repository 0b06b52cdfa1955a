"""outputs/methods/FAMILY-BLOCK.py: a copy of the file of the method that a block of params.yaml names.

A shell could copy it as well, but would take parts of the block's and the method's name for commands.
"""

import re
from pathlib import Path

from pipeline import methods
from pipeline.config import lookup, read_params
from pipeline.errors import InputError
from pipeline.files import write_bytes
from stages import NAME, folder, run

STAGE = re.compile(f"(?:.*:)?(revive|compress)-method@({NAME.pattern})", re.DOTALL)


def main(stage: str) -> None:
    """Copy the file for `stage`, FAMILY-method@BLOCK, as DVC calls it in DVC_STAGE."""
    found = STAGE.fullmatch(stage)
    if not found:
        raise InputError(f"{stage!r} must be revive-method@BLOCK or compress-method@BLOCK")
    family, block = found.groups()
    method = lookup(read_params(), f"{family}.{block}.method")
    if method not in methods.names(family):
        raise InputError(f"params.yaml: {family}.{block}.method = {method!r}: must be one of {', '.join(methods.names(family))}")
    source = Path(methods.__file__).parent / family / f"{method}.py"
    write_bytes(folder("methods", family, f"{block}.py"), source.read_bytes())


if __name__ == "__main__":
    run(main)
