"""Files that appear whole or not at all: written beside their place, synced to the disk, then renamed into it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pipeline.errors import InputError


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step; a reader, or a power cut, sees the old file or the new one."""
    write_together({path: content})


def write_together(contents: dict[Path, bytes]) -> None:
    """Put each content at its path, in their order, once all are on the disk: where it is full, every old file stays."""
    partials = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in contents}
    for path in contents:
        _make_folder(path.parent)
        _sweep(path)
    try:
        for path, partial in partials.items():
            try:
                with partial.open("wb") as file:
                    file.write(contents[path])
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:  # a failed write does not know its file
                raise OSError(error.errno, error.strerror, str(path)) from None
        for path, partial in partials.items():
            partial.replace(path)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a closing newline. NaN and infinities are refused: they are not JSON."""
    write_bytes(path, as_json(value))


def as_json(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """The value in a JSON file; `InputError` names the file when it is absent or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: run the stage that writes it first (`dvc repro`)") from None
    except (ValueError, RecursionError) as error:  # no text, no JSON, numbers of thousands of digits, lists in lists in lists
        raise InputError(f"{path} is not valid JSON ({error}): delete it and run `dvc repro` again") from None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        way = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), folder)
        raise InputError(f"{way} is a file where a folder is needed: move it away") from None


def _sweep(path: Path) -> None:
    """Remove what killed processes have left of their writes to `path`."""
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        try:
            os.kill(int(partial.name.split(".")[-2]), 0)
        except (ProcessLookupError, ValueError):
            partial.unlink(missing_ok=True)
        except PermissionError:
            pass  # of another user's living process
