"""Image files as uint8 pixels: the one decoder, used when data is prepared and when a large folder is streamed.

H, W: height and width in pixels, C: 1 (greyscale) or 3 (RGB) channels, B: images in a batch.
Like torchvision's ImageFolder, decoding drops transparency and leaves EXIF rotation alone.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import InputError

GREY = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N")
# All that are read: Pillow hands others, such as EPS, to programs that run what is in them.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
WIDE = ("I", "F")  # 32 bits a pixel: nothing says which value is white
AHEAD = 2  # batches that lie on a GPU beside the one that it works on


def header(path: Path) -> tuple[int, tuple[int, int]]:
    """Channels (1 or 3) and (H, W) of an image file, not decoded; `InputError` names a file that is no image."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            mode, size = image.mode, (image.height, image.width)
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise _unreadable(path, error) from None
    if mode in WIDE:
        raise InputError(f"{path} has 32 bits a pixel (mode {mode}): convert it to 8 or 16 bits")
    return 1 if mode in GREY else 3, size


def decode(path: Path, content: bytes, channels: int, size: int | None) -> np.ndarray:
    """An image file's `content` as uint8 (H, W, C), resized to `size` x `size` if given; `path` is for messages.

    16-bit greyscale keeps its upper 8 bits. Raises `InputError` when the content is truncated or no image.
    """
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            image.load()
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode == "P":
                image = image.convert("RGBA")  # Pillow's way to read a palette with transparent entries
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except Exception as error:
        raise _unreadable(path, error) from None
    return resize(pixels.reshape(*pixels.shape[:2], channels), size)


def resize(pixels: np.ndarray, size: int | None) -> np.ndarray:
    """uint8 (H, W, C) stretched to (`size`, `size`, C), antialiased bilinear; None leaves it as it is.

    torchvision's v2 resize of a picture is this very call of Pillow's, and takes a second to import.
    """
    if size is None or pixels.shape[:2] == (size, size):
        return pixels
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).reshape(size, size, -1)


class Files(Dataset[Tensor | InputError]):
    """Batches of image files by their indices: a list of B indices gives uint8 (B, size, size, C).

    A file that changed its length since it was prepared, or that no longer decodes, gives an `InputError` as a value:
    raised in a worker process it would arrive wrapped in that worker's traceback.
    """

    def __init__(self, root: Path, paths: list[str], lengths: list[int], channels: int, size: int) -> None:
        # arrays, not lists: reading a list's items in a forked worker would copy its memory page by page
        self.root, self.paths, self.lengths = root, np.array(paths), np.array(lengths)
        self.channels, self.size = channels, size

    def __getitem__(self, indices: list[int]) -> Tensor | InputError:
        try:
            return torch.from_numpy(np.stack([self._read(index) for index in indices]))
        except InputError as error:
            return error

    def _read(self, index: int) -> np.ndarray:
        path = self.root / str(self.paths[index])
        try:
            content = path.read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from None
        if len(content) != self.lengths[index]:
            raise InputError(f"{path} has changed since it was prepared: run `dvc repro -f prepare`")
        return decode(path, content, self.channels, self.size)


class _Chosen:
    """The batches that a loader is to read, which change from epoch to epoch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class Reader:
    """Decodes image files in `workers` processes of one thread each, started once (0: in this process).

    Nothing here is random, so the result does not depend on `workers`. `pin` gives page-locked memory (for CUDA). `waited`: seconds
    that readings had to wait for images. Readings at the same time have workers of their own.
    """

    def __init__(self, files: Files, workers: int, pin: bool) -> None:
        self.files, self.workers, self.pin, self.waited = files, workers, pin, 0.0
        self._idle: list[tuple[DataLoader[Any], _Chosen]] = []

    def read(self, batches: list[list[int]]) -> Iterator[Tensor]:
        """For each list of indices the uint8 images (B, size, size, C), in order. `InputError` names a file that is none."""
        loader, chosen = self._idle.pop() if self._idle else self._new()
        chosen.batches = batches
        asked = time.perf_counter()
        try:
            for images in loader:
                self.waited += time.perf_counter() - asked
                if isinstance(images, InputError):
                    raise images
                yield images
                asked = time.perf_counter()
        finally:  # also of a reading that is broken off: the loader drops what is left of it
            self._idle.append((loader, chosen))

    def _new(self) -> tuple[DataLoader[Any], _Chosen]:
        chosen, stay = _Chosen(), self.workers > 0
        seedless = torch.Generator()  # its own, or DataLoader would advance torch's global generator
        how: Any = {"num_workers": self.workers, "persistent_workers": stay, "pin_memory": self.pin, "generator": seedless}
        return DataLoader(self.files, batch_size=None, sampler=chosen, **how), chosen


def upload(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The batches on `device`; on CUDA each is copied while the device works on the one before, of at most AHEAD more."""
    if device.type != "cuda":
        yield from batches
        return
    copies, used = torch.cuda.Stream(device), deque[torch.cuda.Event]()
    for batch in batches:
        with torch.cuda.stream(copies):
            there = batch.to(device, non_blocking=True)
        working = torch.cuda.current_stream(device)
        working.wait_stream(copies)
        there.record_stream(working)
        yield there
        used.append(torch.cuda.Event(blocking=True))
        used[-1].record(working)
        if len(used) > AHEAD:
            used.popleft().synchronize()


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read as an image ({error}): repair it or remove it")
