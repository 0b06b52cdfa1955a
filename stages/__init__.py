"""The DVC stages: each reads its part of params.yaml and the folders before it, calls the library, writes one folder."""

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pipeline.errors import InputError

OUTPUTS = Path("outputs")
PREPARED = OUTPUTS / "prepare" / "data"
RESUME = OUTPUTS / "resume"  # states of unfinished trainings
SEED = re.compile("0|[1-9][0-9]*")
NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_-]*")  # of a block; others would lead to other folders


def folder(stage: str, *variant: str | int) -> Path:
    """Where a stage keeps a variant: folder("compress", "restart", "diet", 0) is outputs/compress/restart-diet-0."""
    return OUTPUTS / stage / "-".join(map(str, variant))


def run(main: Callable[..., None]) -> None:
    """Call `main` with the command line's words, or --NAME WORD for each; a user's mistake is one message and exit code 2."""
    words, names = sys.argv[1:], list(inspect.signature(main).parameters)
    if words[::2] == [f"--{name}" for name in names]:  # as DVC writes them, which quotes each for the shell
        words = words[1::2]
    stage = f"stages.{Path(sys.argv[0]).stem}"
    if len(words) != len(names):
        _refuse(f"usage: python -m {' '.join([stage, *(name.upper() for name in names)])}")
    call = " ".join([stage, *words])
    if "seed" in names and not SEED.fullmatch(seed := words[names.index("seed")]):
        _refuse(f"{call}: the seed {seed!r} is no whole number from 0 up")
    for name, word in zip(names, words, strict=True):
        if name in ("revive", "compress") and not NAME.fullmatch(word):
            _refuse(f"{call!r}: the block's name {word!r} is not made of letters, digits, '_' and '-'")
    guard(call, lambda: main(*words))


def guard(call: str, act: Callable[[], None]) -> None:
    """Do it; a mistake of the user's is one message, which begins with `call`, and exit code 2."""
    try:
        act()
    except InputError as error:
        _refuse(f"{call}: {error}")
    except OSError as error:
        _refuse(f"{call}: {f'{error.filename}: {error.strerror}' if error.filename else error}")
    except KeyboardInterrupt:
        print(f"{call}: interrupted", file=sys.stderr)
        sys.exit(130)
    except MemoryError as error:
        _refuse(f"{call}: there is not enough memory for it ({error})")


def _refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)
