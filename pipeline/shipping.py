"""All files of one variant that are shipped: in each precision the form for tensors and the form for pictures, proven."""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import precisions
from pipeline.data.batches import Batches, Prepared, SplitName
from pipeline.deployment import Export
from pipeline.export import export_proven
from pipeline.measure import size_mb
from pipeline.pictures import Pictures
from pipeline.pictures_form import pictures_form, prove_form
from pipeline.scores import NAMES

if TYPE_CHECKING:
    import torch

BATCH_SIZE = 250  # of the proofs: decides their memory, not their result
CALIBRATION_BATCH = 16  # all activations of so many images are kept while int8's ranges are measured
TENSORS, PICTURES = "model.onnx", "pictures.onnx"


@dataclass
class Shipped:
    """What a record keeps of one precision."""

    metrics: dict[str, float]
    events: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Shipment:
    """Writes the files of the variant `called`, fp32 before the others. `threads` are ONNX Runtime's, `workers` decode streamed
    images."""

    def __init__(
        self,
        called: str,
        model: "torch.nn.Module",
        card: dict[str, Any],
        prepared: Prepared,
        options: Export,
        threads: int,
        workers: int,
    ) -> None:
        self.called, self.model, self.card, self.prepared, self.options = called, model, card, prepared, options
        self.threads, self.workers, self.names = threads, workers, NAMES[card["task"]]
        self.test, self.validation = self._batches("test"), self._batches("validation")
        self._whole: dict[str, float] = {}

    def write(self, precision: str, folder: Path) -> Shipped:
        """Write the files of `precision` to `folder`/PRECISION; `InputError` where one does not pass its proof."""
        path, fp32 = folder / precision / TENSORS, folder / "fp32" / TENSORS
        pictures = Pictures(self.card, self.test.images)
        shipped = Shipped({})
        if precision == "fp32":
            opset, atol, rtol = self.options.opset, self.options.atol, self.options.rtol
            proof: dict[str, Any] = {"opset": opset, "atol": atol, "rtol": rtol, "threads": self.threads, "watch": pictures.add}
            figures = export_proven(self.model, self.card, path, self.test.epoch(0), **proof)
            shipped.notes.append(f"proven on {figures['images']} test images and at batch sizes 1, 2, 5, 32 on the CPU")
            self._whole = figures
        else:
            shipped.events += self._lower(precision, fp32, path)
            figures = precisions.prove(fp32, path, self.test.epoch(0), self.threads, pictures.add)
            kept = [name for event in shipped.events for name in event["kept"]]
            try:
                precisions.allow_loss(self.called, self.names.task, figures, self.options.max_loss, precision, kept)
            except precisions.ExportError:
                path.unlink()
                raise
            figures[torch_name] = self._whole[torch_name := f"torch_test_{self.names.headline}"]
            shipped.notes.append(f"beside the fp32 file on {figures['images']} test images on the CPU")
        shipped.metrics = {name: value for name, value in figures.items() if name != "images"}
        score = precisions.score(path, self.validation.epoch(0), self.threads)
        shipped.metrics |= {f"validation_{self.names.headline}": score, "size_mb": size_mb(path)}
        shipped.notes.append(self._pictures_form(path))
        shipped.events.append(pictures.event())
        return shipped

    def _lower(self, precision: str, fp32: Path, path: Path) -> list[dict[str, Any]]:
        if precision == "fp16":
            precisions.half(fp32, path)
            return []
        int8 = self.options.int8
        limits: dict[str, Any] = {
            "calibration": int8.calibration,
            "max_loss": self.options.max_loss,
            "least": int8.least,
            "called": self.called,
        }
        validation = lambda: self.validation.epoch(0)  # noqa: E731
        images = self._calibration(int8.images)
        return [precisions.quantize(fp32, path, images, validation, **limits, keep=int8.keep, threads=self.threads)]

    def _pictures_form(self, path: Path) -> str:
        """Write it beside the file at `path`; what is known of it, in words."""
        stored = self.prepared.stored[1:] if self.options.resize else None
        target = path.with_name(PICTURES)
        unproven = target.with_name(f"unproven-{PICTURES}")
        try:
            pictures_form(path, unproven, stored)
            tolerance = {"atol": self.options.atol, "rtol": self.options.rtol, "threads": self.threads}
            images = prove_form(path, unproven, self.test, stored, **tolerance)
            unproven.replace(target)
        finally:
            unproven.unlink(missing_ok=True)
        return f"{PICTURES} answers as {TENSORS} on {images} test images, {size_mb(target):.3f} MB"

    def _calibration(self, count: int) -> list[np.ndarray]:
        """About `count` training images (all where there are fewer), without augmentation, the same in every run."""
        train = self._batches("train", CALIBRATION_BATCH, shuffle=True)
        return [np.ascontiguousarray(images.numpy()) for images, _ in islice(train.epoch(0), -(-count // CALIBRATION_BATCH))]

    def _batches(self, split: SplitName, size: int = BATCH_SIZE, shuffle: bool = False) -> Batches:
        return Batches(self.prepared, split, size, "cpu", None, shuffle, 0, workers=self.workers)
