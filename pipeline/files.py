"""Files that appear whole or not at all: written beside their place, synced to the disk, then renamed into it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pipeline.errors import InputError


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step; a reader, or a power cut, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a closing newline. NaN and infinities are refused: they are not JSON."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value in a JSON file; `InputError` names the file when it is absent or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: run the stage that writes it first (`dvc repro`)") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): delete it and run `dvc repro` again") from None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
