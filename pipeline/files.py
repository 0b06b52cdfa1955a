"""Files and folders that appear whole or not at all: written beside their place, synced to the disk, then renamed into it."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import InputError

BLANK = b"the SHA-256 of this file with this text in its place".ljust(64, b".")  # where `sealed` puts a sum
SUM = "sha256_of_this_file"  # with BLANK in its place
BACK = "where it comes back as it is, .dvc/cache is damaged: delete that too"
AGAIN = f"delete it and run `dvc repro` again; {BACK}"


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


@contextlib.contextmanager
def replaced(place: Path) -> Iterator[Path]:
    """A new folder, which takes the place of `place` when nothing failed; otherwise an earlier one stays as it is.

    Killed between the two renames, no `place` is left: never a mixture. Of two processes at once each has its own; the last stays.
    """
    partial, old = (place.with_name(f".{place.name}.{os.getpid()}.{kind}") for kind in ("partial", "old"))
    _make_folder(place.parent)
    _sweep(place)
    try:
        partial.mkdir()
        yield partial
        while partial.exists():
            with contextlib.suppress(FileNotFoundError):  # there is none, or another process was quicker
                place.rename(old)
            try:
                partial.rename(place)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    if old.exists():
                        old.rename(place)
                    raise
            shutil.rmtree(old, ignore_errors=True)
    finally:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


def write_json(path: Path, value: Any, *, summed: bool = False) -> None:
    """Write `value` as indented JSON with a closing newline. NaN and infinities are refused: they are not JSON.

    A dict that is `summed` ends with a sum of the whole file, which `read_json` compares and leaves out.
    """
    write_bytes(path, as_json(value, summed=summed))


def as_json(value: Any, *, summed: bool = False) -> bytes:
    """What `write_json` writes."""
    whole = {**value, SUM: BLANK.decode()} if summed else value
    content = (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode()
    return sealed(content) if summed else content


def read_json(path: Path) -> Any:
    """The value in a JSON file; `InputError` names the file when it is absent or damaged."""
    try:
        content = path.read_bytes()
        value = json.loads(content)
        whole = not isinstance(value, dict) or SUM not in value or intact(content, value.pop(SUM))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: run the stage that writes it first (`dvc repro`)") from None
    except (ValueError, RecursionError) as error:  # no text, no JSON, numbers of thousands of digits, lists in lists in lists
        raise InputError(f"{path} is not valid JSON ({error}): {AGAIN}") from None
    if not whole:
        raise InputError(f"{path} is damaged (it is not what was written there, says its sum): {AGAIN}")
    return value


def sealed(content: bytes) -> bytes:
    """`content` with the SHA-256 of the whole in the place of the one `BLANK` that it has."""
    return content.replace(BLANK, hashlib.sha256(content).hexdigest().encode(), 1)


def intact(content: bytes, told: Any) -> bool:
    """Whether `content` is as `sealed` made it: every bit of it, with the sum `told` in it."""
    return isinstance(told, str) and hashlib.sha256(content.replace(told.encode(), BLANK, 1)).hexdigest() == told


def crc32(path: Path) -> int:
    """A sum of a file's bytes that is quick for large files, and that no single damaged place leaves as it is."""
    found = 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            found = zlib.crc32(part, found)
    return found


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
    for left in (left for kind in ("partial", "old") for left in path.parent.glob(f".{path.name}.*{kind}")):
        try:
            os.kill(int(left.name.split(".")[-2]), 0)
        except (ProcessLookupError, ValueError):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        except PermissionError:
            pass  # of another user's living process
