"""Some test images as small PNG pictures, with what was to be answered and what a network answered, for the report.

Which images are shown depends on their number alone, so that the pictures of several networks can be compared; for classes, some of
the network's mistakes follow. Pictures are never enlarged, and made smaller until all of them together take at most MOST_BYTES.
"""

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.tasks import TASKS, share

SHOWN = {"classify": 12, "segment": 6, "depth": 6}  # images from all over the split
MISTAKES = 12  # of classes, beside them
SIDES = (128, 96, 64, 48, 32, 24, 16)  # pixels of the longer side, the first that fits
MOST_BYTES = 90_000
MASK = ((24, 26, 30), (236, 236, 236), (240, 140, 40), (70, 140, 240))  # background, foreground, found wrongly, missed
DEEP = ((253, 231, 37), (94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84))  # from near to far, as in viridis
LEVELS = 64  # of depth; the colour 0 is an unknown one


class Pictures:
    """Watches a test split of `images` images go by, batch by batch, and keeps what is to be shown."""

    def __init__(self, card: dict[str, Any], images: int) -> None:
        self.task, self.card = TASKS[card["task"]], card
        count = min(SHOWN[card["task"]], images)
        self.numbers = {(2 * place + 1) * images // (2 * count) for place in range(count)}
        self.kept: list[dict[str, Any]] = []
        self.seen = self.mistakes = 0

    def add(self, pixels: np.ndarray, targets: np.ndarray, outputs: np.ndarray) -> None:
        """One batch more: images (B, C, H, W) normalised, targets and outputs as the task has them."""
        wrong = outputs.argmax(1) != targets if self.task.names.task == "classify" else np.zeros(len(targets), bool)
        for index in range(len(targets)):
            number = self.seen + index
            mistake = bool(wrong[index]) and self.mistakes < MISTAKES
            self.mistakes += bool(wrong[index])
            if number in self.numbers or mistake:
                one = {"number": number, "pixels": pixels[index], "target": targets[index], "output": outputs[index]}
                self.kept.append(one | {"spread": number in self.numbers, "mistake": mistake})
        self.seen += len(targets)

    def event(self) -> dict[str, Any]:
        """What a record keeps: for each image its PNG in base64, and target and answer as names of classes or as PNGs."""
        facts: dict[str, Any] = {"kind": "predictions", "task": self.task.names.task, "images": self.seen}
        if facts["task"] == "classify":
            facts["mistakes"] = self.mistakes
        if facts["task"] == "depth":
            facts["range_m"] = self._range()
        for side in SIDES:
            facts["shown"] = [self._picture(one, side, facts) for one in self.kept]
            if sum(len(value) for one in facts["shown"] for value in one.values() if isinstance(value, str)) <= MOST_BYTES:
                break
        return facts

    def _picture(self, one: dict[str, Any], side: int, facts: dict[str, Any]) -> dict[str, Any]:
        target, output = one["target"], one["output"]
        shown = {"number": one["number"], "image": _png(self._image(one["pixels"]), side)}
        if facts["task"] == "classify":
            names = self.card["classes"]
            answer, true = int(output.argmax()), int(target)
            said = {"target": names[true], "answer": names[answer], "right": answer == true}
            return shown | said | {key: one[key] for key in ("spread", "mistake")}
        hits, of = self.task.hits(torch.from_numpy(output[None]), torch.from_numpy(target[None]))
        if facts["task"] == "segment":
            pair = (target > 0.5).astype(np.uint8), _judged(output[0] > 0, target > 0.5)
            pictures = [_coloured(values, MASK) for values in pair]
        else:
            pictures = [_coloured(_levels(values, *facts["range_m"]), _depth_colours()) for values in (target, output[0])]
        target, answer = (_png(picture, side) for picture in pictures)
        return shown | {"target": target, "answer": answer, "score": share(float(hits), float(of))}

    def _image(self, pixels: np.ndarray) -> Image.Image:
        """The image as it was before it was normalised."""
        mean, std = (np.reshape(self.card["input"][key], (-1, 1, 1)) for key in ("mean", "std"))
        values = np.round(255 * (pixels * std + mean)).clip(0, 255).astype(np.uint8)
        return Image.fromarray(values.transpose(1, 2, 0) if len(values) == 3 else values[0])

    def _range(self) -> list[float]:
        """The nearest and the farthest true depth of what is shown, in metres."""
        known = np.concatenate([one["target"][one["target"] > 0] for one in self.kept])
        return [round(float(known.min()), 2), round(float(known.max()), 2)] if len(known) else [0.0, 1.0]


def _judged(found: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The place in MASK of every pixel."""
    return np.where(there, np.where(found, 1, 3), np.where(found, 2, 0)).astype(np.uint8)


def _levels(depth: np.ndarray, low: float, high: float) -> np.ndarray:
    """Depths as levels from 1 to LEVELS; 0 where a depth is unknown, or is none."""
    level = 1 + np.round((LEVELS - 1) * ((depth - low) / max(high - low, 1e-6)).clip(0, 1))
    return np.where(depth > 0, level, 0).astype(np.uint8)


def _depth_colours() -> tuple[tuple[int, ...], ...]:
    places = np.linspace(0, len(DEEP) - 1, LEVELS)
    channels = [np.interp(places, range(len(DEEP)), channel) for channel in zip(*DEEP, strict=True)]
    return ((0, 0, 0), *(tuple(map(int, np.round(color))) for color in zip(*channels, strict=True)))


def _coloured(values: np.ndarray, colours: tuple[tuple[int, ...], ...]) -> Image.Image:
    image = Image.fromarray(values)
    image.putpalette([part for color in colours for part in color])
    return image


def _png(image: Image.Image, side: int) -> str:
    """The picture in base64, its longer side at most `side` pixels; colours from a palette are not mixed."""
    longer = max(image.size)
    if longer > side:
        smaller = [max(1, round(part * side / longer)) for part in image.size]
        image = image.resize(smaller, Image.Resampling.NEAREST if image.mode == "P" else Image.Resampling.BILINEAR)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()
