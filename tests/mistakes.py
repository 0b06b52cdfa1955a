"""Mistakes that tests make on purpose: each function gives a change of the workspace, which is the working directory."""

import contextlib
import json
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from raw_data import image_folder
from small_chain import parameters, write_parameters

from pipeline.files import read_json

Change = Callable[[], Any]
CUT = "(cut out)"  # in place of a value: take it out


def nothing() -> None:
    """What is wrong is elsewhere."""


def put(key: str, value: Any) -> Change:
    """Set one parameter, or cut it out."""

    def change() -> None:
        params = parameters()
        *way, last = key.split(".")
        place = params
        for part in way:
            place = place[part]
        place.pop(last, None) if value is CUT else place.update({last: value})
        write_parameters(Path(), params)

    return change


def folder(make: Change, **options: Any) -> Change:
    """Take the images of the folder `raw`, which `make` makes."""

    def change() -> None:
        make()
        params = parameters()
        params["data"] |= {"name": "folder"} | options
        write_parameters(Path(), params)

    return change


def npz(make: Change) -> Change:
    return folder(make, name="cifar10", root="raw.npz", image_size=None)


def edit(path: Path, key: str, value: Any) -> Change:
    """Set, or cut out, one value of a JSON file."""

    def change() -> None:
        whole = read_json(path)  # without the sum, which would tell
        *way, last = key.split("/")
        place = whole
        for part in way:
            place = place[part]
        place.pop(last) if value is CUT else place.update({last: value})
        path.write_text(json.dumps(whole))

    return change


def write(path: Path, content: bytes) -> Change:
    return lambda: path.write_bytes(content)


def halve(path: Path) -> Change:
    return lambda: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter(path: Path) -> Change:
    """Another last byte: one weight differs."""
    return lambda: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def remove(path: Path) -> Change:
    return lambda: shutil.rmtree(path) if path.is_dir() else path.unlink()


def copy(source: Path, target: Path) -> Change:
    return lambda: shutil.copytree(source, target, dirs_exist_ok=True)


def file_for_folder(path: Path) -> Change:
    def change() -> None:
        shutil.rmtree(path)
        path.write_text("in the way")

    return change


def folder_for_file(path: Path) -> Change:
    def change() -> None:
        path.unlink()
        path.mkdir()

    return change


def images(folders: dict[str, str]) -> Change:
    """Class folders of four images each below raw/NAME."""
    return lambda: [image_folder(Path("raw") / name, 4, tuple(classes.split())) for name, classes in folders.items()]


def both(*changes: Change) -> Change:
    return lambda: [change() for change in changes]


def foreign_onnx(path: Path) -> Change:
    """A network that another program might have written: its input fits, its origin does not."""

    def change() -> None:
        ends = [onnx.helper.make_tensor_value_info(name, 1, ["n", *size]) for name, size in (("x", (1, 16, 16)), ("y", (256,)))]
        graph = onnx.helper.make_graph([onnx.helper.make_node("Flatten", ["x"], ["y"])], "foreign", ends[:1], ends[1:])
        path.write_bytes(onnx.helper.make_model(graph).SerializeToString())

    return change


@contextlib.contextmanager
def disk(folder: Path, read_only: bool = False) -> Iterator[str]:
    """Let `folder` be on a small disk of its own with 64 KiB left, or none that can be written; gives the system's words.

    Only root can mount one; for others no file can grow beyond 64 KiB, and what needs a disk is skipped.
    """
    room = sum(file.stat().st_size + 8192 for file in folder.rglob("*")) + 65536
    kept = folder.with_name(f"{folder.name}-kept")
    folder.rename(kept)
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", folder], capture_output=True).returncode == 0
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    shutil.rmtree(kept)
    if not mounted:
        if read_only:
            pytest.skip("only root can mount a disk")
        with small_files():
            yield "File too large"
        return
    try:
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield "Read-only file system" if read_only else "No space left on device"
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def small_files(limit: int = 65536) -> Iterator[None]:
    """No file can grow beyond `limit` bytes: a write beyond fails as it does on a full disk (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
