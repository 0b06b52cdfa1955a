"""The DVC stages: each reads its part of params.yaml and the folders before it, calls the library, writes one folder."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import InputError

OUTPUTS = Path("outputs")
PREPARED = OUTPUTS / "prepare" / "data"
RESUME = OUTPUTS / "resume"  # states of unfinished trainings


def folder(stage: str, *variant: str | int) -> Path:
    """Where a stage keeps a variant: folder("compress", "restart", "diet", 0) is outputs/compress/restart-diet-0."""
    return OUTPUTS / stage / "-".join(map(str, variant))


def run(main: Callable[..., None]) -> None:
    """Call `main` with the command line's words; a mistake of the user's is one message and exit code 2."""
    words, names = sys.argv[1:], list(inspect.signature(main).parameters)
    stage = Path(sys.argv[0]).stem
    if len(words) != len(names):
        print(f"usage: python -m stages.{stage} {' '.join(name.upper() for name in names)}", file=sys.stderr)
        sys.exit(2)
    try:
        main(*words)
    except InputError as error:
        print(f"stages.{stage} {' '.join(words)}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"stages.{stage} {' '.join(words)}: {error.strerror}: {error.filename}", file=sys.stderr)
        sys.exit(2)
