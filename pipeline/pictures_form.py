"""The form of an exported file that a client wants: pictures in, probabilities out.

"pictures", uint8 (N, H, W, C), any N -> "probabilities" (N, classes), or (N, 1, H, W) of masks, and "logits"; or "depth".
What comes before the network is what the data layer does: with `stored` pictures of any H and W are first brought to that size, as
`prepare` resizes image files, and of that the middle is taken where the data is cropped; then (x - mean) / std of pixels in [0, 1].
Plain ONNX operators, in front of and behind the graph of the tensor form, whose nodes are the same.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import Crop
from pipeline.export import INPUT, ExportError, read_metadata, write
from pipeline.inference import open_session

if TYPE_CHECKING:
    import onnxruntime

    from pipeline.data.batches import Batches

PICTURES = "pictures"
PROBABILITIES = {"classify": "Softmax", "segment": "Sigmoid"}  # what makes them of logits; a depth is none
LEVEL = 1.01  # of 255: how far a resized pixel may be from Pillow's, both are rounded
ALIKE = 0.99  # share of answers that must be equal below fp32, where a pixel rounded otherwise moves an output
ERROR = 0.05  # root of the mean squared difference below fp32, as a share of the outputs'
RESIZED = 8  # test pictures on which resizing is proven

Size = tuple[int, int]


def pictures_form(source: Path, target: Path, stored: Size | None) -> None:
    """Write to `target` the form for pictures of the file `source`, of any precision.

    `stored`: height and width to which the data layer resizes pictures (before it crops them): the graph then takes any size. None:
    pictures must have the size that the network sees.
    """
    import onnx

    proto, metadata = onnx.load(source), read_metadata(source)
    front = _front(metadata, stored)
    behind = []
    if kind := PROBABILITIES.get(metadata["task"]):
        logits = proto.graph.output[0]
        options: dict[str, Any] = {"axis": 1} if kind == "Softmax" else {}
        behind = [onnx.helper.make_node(kind, [logits.name], ["probabilities"], name="probabilities", **options)]
        probabilities = onnx.ValueInfoProto()
        probabilities.CopyFrom(logits)
        probabilities.name = "probabilities"
        proto.graph.output.insert(0, probabilities)
    nodes = [*front.node, *proto.graph.node, *behind]
    del proto.graph.node[:], proto.graph.input[:]
    proto.graph.node.extend(nodes)
    proto.graph.input.extend(front.input)
    proto.graph.initializer.extend(front.initializer)
    entries = {entry.key: entry.value for entry in proto.metadata_props}
    onnx.helper.set_model_props(proto, entries | {"form": PICTURES})
    onnx.checker.check_model(proto, full_check=True)
    write(target, proto)


def prove_form(
    source: Path, target: Path, batches: "Batches", stored: Size | None, *, atol: float, rtol: float, threads: int = 1
) -> int:
    """Prove that the pictures form `target` answers to the test split's uint8 images what `source` answers to them normalised by
    the data layer; returns how many were compared.

    fp32: |difference| <= atol + rtol * |output|. Lower precisions: the same, or, where rounding differs, ALIKE of the answers equal
    and a root mean square of the differences of at most ERROR of the outputs'. With `stored`, resizing is compared too: of RESIZED
    pictures made smaller and larger, each pixel is at most LEVEL of 255 levels from what the data layer's own resizing gives.
    Raises `ExportError` with the figures.
    """
    from pipeline.tasks import TASKS

    metadata = read_metadata(source)
    tensors, pictured, task = open_session(source, "cpu", threads), _session(target, threads), TASKS[metadata["task"]]
    name, exact = tensors.get_outputs()[0].name, metadata["precision"] == "fp32"
    count, outside, agree, answers, squares, whole = 0, 0, 0, 0, 0.0, 0.0
    for pictures, images in _pairs(batches, metadata, stored is not None):
        wanted, found = (
            np.asarray(run.run([name], feed)[0]) for run, feed in ((tensors, {INPUT: images}), (pictured, {PICTURES: pictures}))
        )
        gap = np.abs(found.astype(np.float64) - wanted)
        outside += int((~(gap <= atol + rtol * np.abs(wanted))).sum())
        squares, whole = squares + float(np.square(gap).sum()), whole + float(np.square(wanted, dtype=np.float64).sum())
        import torch

        same, of = task.agreement(torch.from_numpy(found), torch.from_numpy(wanted))
        count, agree, answers = count + len(images), agree + int(same), answers + of
    error = (squares / whole) ** 0.5 if whole else 0.0
    close = not exact and agree >= ALIKE * answers and error <= ERROR
    if outside and not close:
        raise ExportError(
            f"{target} does not answer what {source} does: {outside} outputs differ by more than {atol:g} + {rtol:g} * |output|, "
            f"{agree} of {answers} answers are equal, the differences' root mean square is {error:.2g} of the outputs'"
        )
    if stored is not None:
        _prove_resizing(metadata, target, batches, stored)
    return count


def _front(metadata: dict[str, Any], stored: Size | None) -> Any:
    """The graph from pictures to images (its output has the name of the network's input)."""
    import onnx
    from onnx import helper, numpy_helper

    channels, height, width = metadata["shape"]
    free: list[int | str] = ["batch", "height", "width", channels] if stored else ["batch", height, width, channels]
    taken = helper.make_tensor_value_info(PICTURES, onnx.TensorProto.UINT8, free)
    constants = {f"{PICTURES}_{key}": value for key, value in _constants(metadata, stored).items()}
    steps: list[tuple[str, list[str], dict[str, Any]]] = []
    to_float: tuple[str, list[str], dict[str, Any]] = ("Cast", [], {"to": onnx.TensorProto.FLOAT})
    turned: tuple[str, list[str], dict[str, Any]] = ("Transpose", [], {"perm": [0, 3, 1, 2]})
    if stored:
        # antialiased and without a look beyond the edge, rounded, as Pillow. In fp32: on CUDA ONNX Runtime refuses bytes here. Not
        # behind the transposition: ONNX Runtime 1.31 would change their order, and forgets the axes
        asked = {"mode": "linear", "antialias": 1, "axes": [1, 2], "exclude_outside": 1}
        steps += [to_float, ("Resize", ["", "", f"{PICTURES}_size"], asked), ("Round", [], {}), turned]
    else:
        steps += [turned, to_float]  # bytes are moved faster
    if f"{PICTURES}_columns" in constants:
        steps += [("MatMul", [f"{PICTURES}_columns"], {}), ("MatMul", [f"{PICTURES}_rows"], {})]
    # multiplied and added one after the other in fp32, as the data layer does it, so that the results are the same bit for bit
    steps += [("Mul", [f"{PICTURES}_scale"], {}), ("Add", [f"{PICTURES}_shift"], {})]
    nodes, before = [], PICTURES
    for number, (kind, more, options) in enumerate(steps):
        after = INPUT if number + 1 == len(steps) else f"{PICTURES}_{number}"
        inputs = [*more, before] if more == [f"{PICTURES}_rows"] else [before, *more]
        nodes.append(helper.make_node(kind, inputs, [after], name=f"{PICTURES}_{number}_{kind}", **options))
        before = after
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    given = helper.make_tensor_value_info(INPUT, onnx.TensorProto.FLOAT, ["batch", channels, height, width])
    return helper.make_graph(nodes, PICTURES, [taken], [given], initializers)


def _constants(metadata: dict[str, Any], stored: Size | None) -> dict[str, np.ndarray]:
    mean, std = (np.array(metadata[key], np.float64).reshape(-1, 1, 1) for key in ("mean", "std"))
    constants: dict[str, np.ndarray] = {
        "scale": (1 / (255 * std)).astype(np.float32),
        "shift": (-mean / std).astype(np.float32),
    }  # (C, 1, 1)
    if stored:
        constants["size"] = np.array(stored, np.int64)
        if metadata["crop"]:
            from pipeline.data import views

            rows, columns = views.of_middle(Crop(**metadata["crop"]), stored)
            constants |= {"rows": rows.numpy(), "columns": np.ascontiguousarray(columns.numpy().T)}  # (h, H), (W, w)
    return constants


def _pairs(batches: "Batches", metadata: dict[str, Any], whole: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pictures uint8 (B, H, W, C) and the images float32 (B, C, h, w) that the data layer makes of them. Without `whole`, pictures
    have the size that networks see: where the data is cropped, they are what is seen, rounded."""
    rounded = bool(metadata["crop"]) and not whole
    for pixels, (images, _) in zip(_stored(batches), batches.epoch(0), strict=True):
        seen = np.ascontiguousarray(images.numpy())
        if rounded:
            mean, std = (np.reshape(metadata[key], (-1, 1, 1)) for key in ("mean", "std"))
            pixels = np.round(255 * (seen * std + mean)).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
            seen = (((pixels.transpose(0, 3, 1, 2) / 255) - mean) / std).astype(np.float32)
        yield np.ascontiguousarray(pixels), seen


def _stored(batches: "Batches") -> Iterator[np.ndarray]:
    """The split's images as they are stored, uint8 (B, H, W, C), in memory or decoded from their files."""
    for pool, picks in batches.stored():
        yield pool[picks].cpu().numpy()


def _prove_resizing(metadata: dict[str, Any], target: Path, batches: "Batches", stored: Size) -> None:
    """Compare what the graph of `target` makes of pictures of other sizes with Pillow's resizing and the data layer's crop."""
    import onnx
    import onnxruntime
    from PIL import Image

    proto = onnx.load(target)
    proto.graph.output.append(onnx.helper.make_tensor_value_info(INPUT, onnx.TensorProto.FLOAT, ["batch", *metadata["shape"]]))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    scale = np.array(_constants(metadata, None)["scale"])
    pictures = next(_stored(batches))[:RESIZED]
    for factors in ((0.6, 0.8), (1.0, 1.7), (2.3, 2.3)):
        width, height = (max(1, round(side * factor)) for side, factor in zip(stored[::-1], factors, strict=True))
        for picture in pictures:
            image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
            other = image.resize((width, height), Image.Resampling.BICUBIC)
            back = np.asarray(other.resize((stored[1], stored[0]), Image.Resampling.BILINEAR)).reshape(1, *stored, -1)
            feeds = (np.asarray(other).reshape(1, height, width, -1), back)
            found, wanted = (np.asarray(session.run([INPUT], {PICTURES: feed})[0]) for feed in feeds)
            if not (apart := float((np.abs(found - wanted) / scale).max())) <= LEVEL:
                raise ExportError(
                    f"{target} resizes a picture of {width}x{height} pixels otherwise than the data layer: a pixel is "
                    f"{apart:.1f} of 255 levels off, allowed {LEVEL:g}: take another onnxruntime, or set export.resize to false"
                )


def _session(path: Path, threads: int) -> "onnxruntime.InferenceSession":
    """A session on the CPU for the pictures form."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
