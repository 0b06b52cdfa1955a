"""A trained network as one ONNX file, and the proof that the file computes what the network computes.

The file takes "images", float32 (N, C, H, W), normalised as its metadata says (pixels scaled to [0, 1], then (x - mean)
/ std), and gives for any N "logits", float32 (N, classes) or, for masks, (N, 1, H, W), or "depth" (N, 1, H, W) in metres.
Equal weights and an equal card give equal bytes.
"""

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import files
from pipeline.errors import InputError
from pipeline.inference import open_session

if TYPE_CHECKING:  # torch, onnx and onnxruntime are imported where they are needed: a latency needs no torch
    import onnxruntime
    import torch

FORMAT = 1
INPUT = "images"
STRUCTURED = ("network", "classes", "mean", "std", "shape", "crop", "lineage")  # metadata kept as JSON


class ExportError(InputError):
    """The ONNX file is not what was asked for, or does not compute what the network computes."""


def export(model: "torch.nn.Module", card: dict[str, Any], path: Path, opset: int) -> None:
    """Write `model` to `path` as ONNX of exactly `opset`, with what `card` says of it as metadata.

    The network is exported as it computes in evaluation, in float32, and is not changed. An over-parameterised network
    is refused: its composition would be exported too. Raises `ExportError` when the exporter gives another opset.
    """
    import onnx
    import torch
    from torch.nn.utils import parametrize

    from pipeline.tasks import TASKS

    if any(parametrize.is_parametrized(module) for module in model.modules()):
        raise InputError(f"{path}: the network is still over-parameterised: collapse it before exporting it")
    images = torch.zeros(2, *card["input"]["shape"])  # a batch of 1 would be taken for a constant
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own code
        program = torch.onnx.export(
            copy.deepcopy(model).cpu().float().eval(),
            (images,),
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[TASKS[_task(card)].output],
            dynamic_shapes=({0: "batch"},),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    strip(proto)
    onnx.helper.set_model_props(proto, _metadata(card))
    found = {entry.domain: entry.version for entry in proto.opset_import}
    if found != {"": opset}:
        raise ExportError(f"{path}: asked for ONNX opset {opset}, the exporter gave {found}: choose an opset it supports")
    onnx.checker.check_model(proto, full_check=True)
    write(path, proto)


def write(path: Path, proto: Any) -> None:
    """Write an ONNX model with a sum of the whole file in its metadata, which `read_metadata` compares."""
    import onnx

    entries = {entry.key: entry.value for entry in proto.metadata_props}
    onnx.helper.set_model_props(proto, entries | {files.SUM: files.BLANK.decode()})
    files.write_bytes(path, files.sealed(proto.SerializeToString(deterministic=True)))


def verify(
    model: "torch.nn.Module",
    path: Path,
    batches: "Iterable[tuple[torch.Tensor, torch.Tensor]]",
    *,
    atol: float,
    rtol: float,
    task: str = "classify",
    threads: int = 1,
    batch_sizes: Sequence[int] = (1, 2, 5, 32),
    watch: Callable[[np.ndarray, np.ndarray, np.ndarray], None] | None = None,
) -> dict[str, float]:
    """Prove the ONNX file at `path` against `model` on real images, in ONNX Runtime on the CPU and in torch, both
    float32.

    `batches` gives (images (N, C, H, W) normalised, labels (N,) or targets (N, H, W)), together the whole test split. Every batch
    is compared, and the first images once more at each of `batch_sizes` (repeated where there are fewer). Returns by the names of
    `task` (pipeline/scores.py) the scores of the file and the headline score of torch, for classification `test_accuracy` and
    `torch_test_accuracy`; `max_abs_difference` of the outputs, the share of answers that agree (`top1_agreement`) and `images`.
    `watch` is shown every batch: images, targets, and what the file answered.

    Raises `ExportError` with these figures when |ONNX - torch| > atol + rtol * |torch| for any output of any batch.
    Within the tolerance the first class can differ only where two logits are nearer than twice the tolerance.
    """
    session = open_session(path, "cpu", threads)
    model = copy.deepcopy(model).cpu().float().eval()
    first: list[np.ndarray] = []
    proof = Proof(task, atol, rtol)
    for images, targets in batches:
        pixels, targets = np.ascontiguousarray(images.detach().cpu().float().numpy()), targets.detach().cpu()
        theirs, ours = _answers(model, session, path, pixels)
        proof.add(theirs, ours, targets)
        if watch:
            watch(pixels, targets.numpy(), theirs)
        if sum(map(len, first)) < max(batch_sizes):
            first.append(pixels)
    if not proof.images:
        raise InputError(f"{path}: there are no test images to prove it on")
    pool = np.concatenate(first)
    for size in batch_sizes:
        proof.add(*_answers(model, session, path, np.resize(pool, (size, *pool.shape[1:]))))
    figures = proof.figures()
    if proof.outside:
        told = ", ".join(f"{name} {value:.6g}" for name, value in figures.items())
        raise ExportError(
            f"{path} does not compute what the network computes: {proof.outside} outputs differ by more than "
            f"{atol:g} + {rtol:g} * |output| ({told}); export again, or allow more in export.atol and export.rtol"
        )
    return figures


def export_proven(
    model: "torch.nn.Module",
    card: dict[str, Any],
    path: Path,
    batches: "Iterable[tuple[torch.Tensor, torch.Tensor]]",
    *,
    opset: int,
    atol: float,
    rtol: float,
    threads: int = 1,
    watch: Callable[[np.ndarray, np.ndarray, np.ndarray], None] | None = None,
) -> dict[str, float]:
    """`export`, then `verify`: only a file that has passed comes to stand at `path`. Returns the figures of
    `verify`."""
    unproven = path.with_name(f"unproven-{path.name}")
    try:
        export(model, card, unproven, opset)
        figures = verify(model, unproven, batches, atol=atol, rtol=rtol, task=_task(card), threads=threads, watch=watch)
        unproven.replace(path)
    finally:
        unproven.unlink(missing_ok=True)
    return figures


def read_metadata(path: Path) -> dict[str, Any]:
    """What an exported file says of itself: "format", "network", "task", "precision", "classes", "mean", "std", "shape", "crop",
    "lineage", "producer", and of a file that takes pictures "form".

    Raises `InputError` for a file that is missing, damaged or was not exported by Winnow.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        content = path.read_bytes()
        proto = onnx.load_model_from_string(content)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: run the stage that writes it first (`dvc repro`)") from None
    except DecodeError as error:
        raise InputError(f"{path} is no ONNX file ({error}): delete it and export again") from None
    found: dict[str, Any] = {entry.key: entry.value for entry in proto.metadata_props}
    if files.SUM in found and not files.intact(content, found.pop(files.SUM)):  # older files have none
        raise InputError(f"{path} is damaged (it is not what was exported, says its sum): {files.AGAIN}")
    if found.get("format") != str(FORMAT) or not found.keys() >= {*STRUCTURED, "producer"}:
        has = ", ".join(sorted(found)) or "none"
        raise InputError(f"{path} was not exported by Winnow (format {FORMAT}): its metadata keys are: {has}")
    found = {"task": "classify", "precision": "fp32"} | found  # older files have none
    return found | {"format": FORMAT} | {key: json.loads(found[key]) for key in STRUCTURED}


def answer(session: "onnxruntime.InferenceSession", path: Path, pixels: np.ndarray) -> np.ndarray:
    """The first output of the file at `path`, which `session` runs."""
    try:
        return np.asarray(session.run(None, {session.get_inputs()[0].name: pixels})[0])
    except Exception as error:  # ONNX Runtime's errors share no narrower base class
        raise ExportError(f"{path} does not run on images {pixels.shape}: {' '.join(str(error).split())}") from None


class Proof:
    """Counts how far two lists of outputs agree, and how good they are: those of a file, and those of what it must equal."""

    def __init__(self, task: str, atol: float, rtol: float) -> None:
        from pipeline.tasks import TASKS, Tally

        self.task, self.atol, self.rtol = TASKS[task], atol, rtol
        self.theirs, self.ours = Tally(self.task), Tally(self.task)
        self.images = self.agree = self.answers = self.outside = 0
        self.largest = 0.0

    def add(self, theirs: np.ndarray, ours: np.ndarray, targets: "torch.Tensor | None" = None) -> None:
        """Outputs of the file and of torch; without `targets` the images are not counted a second time."""
        import torch

        gap = np.abs(theirs.astype(np.float64) - ours)
        self.outside += int((~(gap <= self.atol + self.rtol * np.abs(ours))).sum())  # a NaN is outside
        self.largest = float(np.maximum(self.largest, gap.max()))  # unlike max(), lets a NaN through
        if targets is not None:
            first, second = torch.from_numpy(theirs), torch.from_numpy(ours)
            agree, answers = self.task.agreement(first, second)
            self.images, self.agree, self.answers = self.images + len(targets), self.agree + int(agree), self.answers + answers
            self.theirs.add(first, targets)
            self.ours.add(second, targets)

    def figures(self) -> dict[str, float]:
        names = self.task.names
        return {
            **self.theirs.metrics(),
            f"torch_test_{names.headline}": self.ours.score().accuracy,
            "max_abs_difference": self.largest,
            names.agreement: self.agree / self.answers,
            "images": self.images,
        }


def _answers(
    model: "torch.nn.Module", session: "onnxruntime.InferenceSession", path: Path, pixels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The outputs of the file and of torch for the same images."""
    import torch

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        ours = model(torch.from_numpy(pixels)).numpy()
    theirs = answer(session, path, pixels)
    if theirs.shape != ours.shape:
        raise ExportError(f"{path} gives outputs {theirs.shape} for images {pixels.shape}, the network gives {ours.shape}")
    return theirs, ours


def _metadata(card: dict[str, Any]) -> dict[str, str]:
    import torch

    lineage = {key: _portable(card.get(key)) for key in ("stages", "channels", "commit", "data", "versions")}
    network, entry = card["network"], card["input"]
    values = {"network": network, "classes": card["classes"], "lineage": lineage} | {
        key: entry[key] for key in ("mean", "std", "shape", "crop")
    }
    return (
        {"format": str(FORMAT), "task": _task(card), "precision": "fp32"}
        | {key: json.dumps(values[key]) for key in STRUCTURED}
        | {"producer": f"winnow, torch {torch.__version__}"}
    )


def _task(card: dict[str, Any]) -> str:
    return card.get("task", "classify")


def _portable(value: Any) -> Any:
    """`value` with every absolute path cut to its last part."""
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def strip(message: Any) -> None:
    """Remove, at every depth, what the exporter says of its own work: stack traces and paths of this machine among
    it."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in value if hasattr(value, "add") else [value]:
                strip(part)
