"""An exported network at lower precision: fp16 and int8 files made of the fp32 file, each proven against it.

Both take and give float32. A file that loses more than the limit on the test split does not come to stand at its place. Equal
files, images and options give equal bytes. How int8 computes is told in `pipeline.quantization`.
"""

import fnmatch
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import InputError
from pipeline.export import ExportError, Proof, answer, read_metadata, strip, write
from pipeline.inference import open_session
from pipeline.quantization import Calibration, Quantizer
from pipeline.scores import NAMES

if TYPE_CHECKING:
    import torch

AIM = 0.5  # share of the allowed loss that int8 may use up on the validation split: the test split's loss differs by chance
RANKED_ON = 64  # calibration images on which a layer's own error is measured

Split = Callable[[], "Iterable[tuple[torch.Tensor, torch.Tensor]]"]  # the batches of a split, images and targets, anew each time
Watch = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def half(source: Path, target: Path) -> None:
    """Write the fp32 file `source` in fp16: weights and what is computed; inputs and outputs stay float32.

    A weight beyond 65504 becomes that; one nearer to 0 than 6e-8, but not 0, becomes that.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    proto = convert_float_to_float16(onnx.load(source), keep_io_types=True)
    _sort(proto.graph)
    _finish(proto, source, target, "fp16")


def quantize(
    source: Path,
    target: Path,
    calibration_images: Sequence[np.ndarray],
    validation: Split,
    *,
    calibration: Calibration,
    max_loss: float,
    keep: Sequence[str],
    least: float,
    called: str,
    threads: int = 1,
) -> dict[str, Any]:
    """Write the fp32 file `source` in int8, with as many layers in fp32 as the headline score on `validation` needs.

    `calibration_images`: batches of float32 (B, C, H, W), normalised. Layers whose names match a pattern of `keep` stay in fp32.
    With all others in int8 the score may lose AIM * `max_loss`. Where it loses more, each layer is quantised alone, and layers
    stay in fp32 in the order of the error that this makes in the outputs, as many as it takes (by bisection); where fewer than
    `least` of the multiply-adds would be left in int8, as many as bring the loss to `max_loss`. The error of a layer alone costs
    one short run a layer and compares layers with nothing else in the way; what a layer in fp32 gains among quantised ones is
    the difference of two large errors.

    Returns the event "quantized". Raises `ExportError` with the figures of the network `called` where that is still too little.
    """
    with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
        search = _Search(Quantizer(source, Path(folder), calibration_images, calibration), source, validation, keep, threads)
        for limit in (AIM * max_loss, max_loss):
            if search.share(count := search.fewest(limit)) >= least:
                break
        loss, share = search.loss(count), search.share(count)
        facts = {
            "kind": "quantized",
            "kept": search.kept(count),
            "layers": len(search.quantizer.layers),
            "share_int8": share,
            "calibration": calibration,
            "calibration_images": sum(map(len, calibration_images)),
            "validation_loss": loss,
            "errors": search.errors,
        }
        if share < least:
            raise ExportError(_too_little(called, search, count, least, max_loss))
        import onnx

        _finish(onnx.load(search.made(count)), source, target, "int8")
    return facts


def prove(
    source: Path, path: Path, batches: "Iterable[tuple[torch.Tensor, torch.Tensor]]", threads: int = 1, watch: Watch | None = None
) -> dict[str, float]:
    """The file at `path` beside the fp32 file `source`, both run on the CPU by ONNX Runtime, on (images, targets) of a split.

    Returns the scores of the file at `path` as `test_...`, `max_abs_difference` of the outputs, the share of answers that agree,
    `images`, and `loss`: the headline score of `source` less that of `path`.
    """
    task = read_metadata(source)["task"]
    proof = Proof(task, atol=float("inf"), rtol=0)
    first, second = (open_session(file, "cpu", threads) for file in (path, source))
    for images, targets in batches:
        pixels = np.ascontiguousarray(images.numpy())
        theirs = answer(first, path, pixels)
        proof.add(theirs, answer(second, source, pixels), targets)
        if watch:
            watch(pixels, targets.numpy(), theirs)
    if not proof.images:
        raise InputError(f"{path}: there are no images to prove it on")
    figures = proof.figures()
    headline = NAMES[task].headline
    return figures | {"loss": figures.pop(f"torch_test_{headline}") - figures[f"test_{headline}"]}


def allow_loss(
    called: str, task: str, figures: dict[str, float], max_loss: float, precision: str, kept: Sequence[str] = ()
) -> None:
    """`ExportError` where `prove` found, for the network `called`, a loss above `max_loss`, or answers that are no numbers."""
    names = NAMES[task]
    after, loss = figures[f"test_{names.headline}"], figures["loss"]
    if loss <= max_loss and np.isfinite(figures["max_abs_difference"]):
        return
    more = f", with {', '.join(kept)} kept in fp32" if kept else ""
    options = "export.max_loss, export.int8.images or export.int8.keep" if precision == "int8" else "export.max_loss"
    raise ExportError(
        f"{precision} of {called} loses {_points(loss)} points of {names.title} on the test split ({_points(after + loss)} -> "
        f"{_points(after)}, allowed {_points(max_loss)}; outputs differ by up to {figures['max_abs_difference']:.4g}){more}: "
        f"raise {options}, or take {precision} out of export.precisions"
    )


def score(path: Path, batches: "Iterable[tuple[torch.Tensor, torch.Tensor]]", threads: int = 1) -> float:
    """The headline score of an exported file on (images, targets) of a split."""
    from pipeline.tasks import TASKS, Tally

    session, tally = open_session(path, "cpu", threads), Tally(TASKS[read_metadata(path)["task"]])
    import torch

    for images, targets in batches:
        tally.add(torch.from_numpy(answer(session, path, np.ascontiguousarray(images.numpy()))), targets)
    return tally.score().accuracy


class _Search:
    """How many layers stay in fp32: loss and share of int8 for each count, the most sensitive first, each found out once."""

    def __init__(self, quantizer: Quantizer, source: Path, validation: Split, keep: Sequence[str], threads: int) -> None:
        self.quantizer, self.source, self.validation, self.threads = quantizer, source, validation, threads
        always = {layer.node for layer in quantizer.layers if any(fnmatch.fnmatchcase(layer.name, one) for one in keep)}
        unmatched = [one for one in keep if not any(fnmatch.fnmatchcase(layer.name, one) for layer in quantizer.layers)]
        if unmatched:
            has = ", ".join(layer.name for layer in quantizer.layers)
            raise InputError(f"params.yaml: export.int8.keep = {unmatched}: no layer of {source} matches; it has {has}")
        self.always = always
        self.whole = score(source, validation(), threads)
        self.errors: dict[str, float] = {}
        self._losses: dict[int, float] = {}
        self._order: list[str] | None = None

    def fewest(self, limit: float) -> int:
        """The smallest count with a loss of at most `limit`, if more layers in fp32 never lose more."""
        if self.loss(0) <= limit:
            return 0
        low, high = 0, len(self.quantizer.layers) - len(self.always)  # with all in fp32 nothing is lost
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.loss(middle) <= limit else (middle, high)
        return high

    def loss(self, count: int) -> float:
        """Of the headline score on the validation split, with `count` layers in fp32 beside those that always are."""
        if count not in self._losses:
            self._losses[count] = self.whole - score(self.made(count), self.validation(), self.threads)
        return self._losses[count]

    def made(self, count: int) -> Path:
        """The file with `count` layers in fp32."""
        path = self.quantizer.folder / f"{count}.onnx"
        if not path.exists():
            self.quantizer.write(self._nodes(count), path)
            _carry(path, self.source)
        return path

    def share(self, count: int) -> float:
        return self.quantizer.share(self._nodes(count))

    def kept(self, count: int) -> list[str]:
        """The names of the layers in fp32, in the network's order."""
        nodes = self._nodes(count)
        return [layer.name for layer in self.quantizer.layers if layer.node in nodes]

    def _nodes(self, count: int) -> set[str]:
        if count and self._order is None:
            self._order = self._ranked()
        return self.always | set((self._order or [])[:count])

    def _ranked(self) -> list[str]:
        """Nodes, the most sensitive first: squared error of the outputs with this layer alone in int8, as a share."""
        images = np.concatenate(self.quantizer.images)[:RANKED_ON]
        whole = answer(open_session(self.source, "cpu", self.threads), self.source, images)
        errors = {}
        path = self.quantizer.folder / "alone.onnx"
        for layer in self.quantizer.layers:
            if layer.node not in self.always:
                self.quantizer.write_alone(layer.node, path)
                outputs = answer(open_session(path, "cpu", self.threads), path, images)
                errors[layer.node] = float(np.square(outputs - whole).mean() / max(np.square(whole).mean(), 1e-12))
                self.errors[layer.name] = errors[layer.node]
        return sorted(errors, key=lambda node: -errors[node])


def _carry(path: Path, source: Path) -> None:
    """Give the file at `path` the metadata of `source`, by which its task is known."""
    import onnx

    proto = onnx.load(path)
    _finish(proto, source, path, "int8")


def _finish(proto: Any, source: Path, target: Path, precision: str) -> None:
    """Write `proto`, made of the file `source`, with that one's metadata and nothing else that says where it comes from."""
    import onnx

    strip(proto)
    original = onnx.load(source)
    entries = {entry.key: entry.value for entry in original.metadata_props} | {"precision": precision}
    onnx.helper.set_model_props(proto, entries)
    proto.producer_name, proto.producer_version = original.producer_name, original.producer_version
    proto.graph.name = original.graph.name
    for found in list(proto.opset_import):
        if found.domain and not any(node.domain == found.domain for node in proto.graph.node):
            proto.opset_import.remove(found)
    onnx.checker.check_model(proto, full_check=True)
    write(target, proto)


def _sort(graph: Any) -> None:
    """Every node behind those whose outputs it reads, otherwise in the order there is."""
    ready = {entry.name for entry in (*graph.input, *graph.initializer)} | {""}
    left, ordered = list(graph.node), []
    while left:
        later = []
        for node in left:
            if ready.issuperset(node.input):
                ordered.append(node)
                ready.update(node.output)
            else:
                later.append(node)
        assert len(later) < len(left), "the graph has a cycle"
        left = later
    del graph.node[:]
    graph.node.extend(ordered)


def _too_little(called: str, search: _Search, count: int, least: float, max_loss: float) -> str:
    name = NAMES[read_metadata(search.source)["task"]].title
    kept, share, whole = ", ".join(search.kept(count)) or "no layer", search.share(count), search.share(0)
    return (
        f"int8 of {called}: only {share:.1%} of the multiply-adds would be int8, with {kept} kept in fp32, and "
        f"export.int8.least = {least:g} asks for more. With all in int8 that may be, {whole:.1%}, {name} on the validation split "
        f"loses {_points(search.loss(0))} points (allowed {_points(max_loss)}): raise export.max_loss or "
        "export.int8.images, shorten export.int8.keep, lower export.int8.least, or take int8 out of export.precisions"
    )


def _points(share: float) -> str:
    """A share in percent, as `98.61`."""
    return f"{100 * share:.2f}"
