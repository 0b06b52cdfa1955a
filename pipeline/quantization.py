"""An exported network in int8: integer weights and activations between QuantizeLinear and DequantizeLinear (QDQ).

A layer is a convolution, linear layer or matrix product with weights; in int8 it reads uint8 (asymmetric, one scale a tensor) and
has int8 weights (symmetric, one scale an output channel). On x86 ONNX Runtime has fast kernels for this pair alone: measured on a
CPU with AMX, one thread, ResNet-18 at 32x32 runs at 3.1x the speed of fp32, with int8 activations at 1.0x, VGG16-BN at 4x and
3.5x; symmetric ranges are slower yet and less accurate. Weights keep 7 of their 8 bits: processors without VNNI add two products
in 16 bits, which would overflow, and a file proven here would answer otherwise there. Speed is the same; the error of the outputs
doubled on two networks trained on digits, which cost no accuracy.

What lies between layers (additions, concatenations, maxima, gathers, reshapes) is done in int8 as well where a layer before it is.
Everything else stays in fp32, as transposed convolutions, batch norms that no layer could take in, involutions and interpolation:
ONNX Runtime has no integer kernels for them. Average pooling has one on the CPU that is slower than a depthwise convolution with
equal weights: where every window is whole it is replaced by one.
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

Calibration = Literal["minmax", "percentile"]

LAYERS = ("Conv", "Gemm", "MatMul")
BETWEEN = ("Add", "Concat", "GlobalAveragePool", "MaxPool")  # quantised wherever they stand, unless excluded
FOLLOWING = ("Clip", "Flatten", "Gather", "Pad", "Relu", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
POOLING = "average-pooling"  # a prefix: of the weights that average


@dataclass(frozen=True)
class Layer:
    """A layer that can be int8: its name in the network, its node's in the graph, its multiply-adds for one image."""

    name: str
    node: str
    macs: int


class Quantizer:
    """One fp32 file, its ranges measured once, from which int8 files with different layers in fp32 are made.

    `folder` holds what is made on the way. `images`: batches of float32 (B, C, H, W), normalised. `macs` counts all layers, also
    those that cannot be int8.
    """

    def __init__(self, source: Path, folder: Path, images: Sequence[np.ndarray], calibration: Calibration) -> None:
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self.folder, self.images, self.calibration = folder, images, calibration
        self.prepared, self.ranges = folder / "prepared.onnx", folder / "ranges.json"
        proto = onnx.shape_inference.infer_shapes(onnx.load(source))
        _replace_poolings(proto.graph)
        with _quiet():
            quant_pre_process(proto, self.prepared, skip_optimization=True)  # the exporter has optimised it
        graph = onnx.shape_inference.infer_shapes(onnx.load(self.prepared)).graph
        self.layers, self.macs = _count(graph)
        self._between = _between(graph, {layer.node for layer in self.layers})

    def write(self, kept: set[str], target: Path) -> None:
        """Write to `target` the file in which all layers but the nodes `kept` are int8."""
        quantised = {layer.node for layer in self.layers} - kept
        loose = {node for node, before in self._between.items() if not before & quantised}
        self._quantize(target, nodes_to_exclude=sorted(kept | loose))

    def write_alone(self, node: str, target: Path) -> None:
        """Write to `target` the file in which this layer alone is int8."""
        self._quantize(target, nodes_to_quantize=[node])

    def share(self, kept: set[str]) -> float:
        """The share of the multiply-adds that are int8 when the nodes `kept` are not."""
        return sum(layer.macs for layer in self.layers if layer.node not in kept) / max(self.macs, 1)

    def _quantize(self, target: Path, **which: Any) -> None:
        from onnxruntime import quantization

        methods = quantization.CalibrationMethod
        method = {"minmax": methods.MinMax, "percentile": methods.Percentile}[self.calibration]
        with _quiet():
            quantization.quantize_static(
                self.prepared,
                target,
                cast(Any, _Reader(self.images)),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=[*LAYERS, *BETWEEN, *FOLLOWING],
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=method,
                calibration_cache_path=self.ranges,  # the first call measures, the others read
                extra_options={"CalibStridedMinMax": 1},  # one batch at a time, or all activations of all images are kept
                **which,
            )


class _Reader:
    """Batches as ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Sequence[np.ndarray]) -> None:
        self.batches, self.left = batches, iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.left, None)
        return None if batch is None else {"images": batch}

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = iter(self.batches[start_index:end_index])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without ONNX Runtime's prints and warnings about its own work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def attributes(node: Any) -> dict[str, Any]:
    """A node's attributes by name."""
    import onnx

    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}


def _replace_poolings(graph: Any) -> None:
    """Average poolings of whole windows become depthwise convolutions whose weights are all 1 / window. Shapes must be known."""
    import onnx

    shapes = _shapes(graph)
    for number, node in enumerate(graph.node):
        if node.op_type != "AveragePool" or node.input[0] not in shapes:
            continue
        said, (_, channels, *size) = attributes(node), shapes[node.input[0]]
        kernel = said["kernel_shape"]
        strides = said.get("strides", [1] * len(kernel))
        rests = [(side - window) % stride for side, window, stride in zip(size, kernel, strides, strict=True)]
        whole = (
            not any(said.get("pads", [0]))
            and said.get("dilations", [1, 1]) == [1, 1]
            and said.get("auto_pad", b"NOTSET") == b"NOTSET"
        )
        if not whole or (said.get("ceil_mode") and any(rests)) or 0 in (channels, *size):
            continue
        name = f"{POOLING}-{number}"
        graph.initializer.append(
            onnx.numpy_helper.from_array(np.full((channels, 1, *kernel), 1 / np.prod(kernel), np.float32), name)
        )
        inputs, outputs = [node.input[0], name], list(node.output)
        node.CopyFrom(
            onnx.helper.make_node("Conv", inputs, outputs, name=node.name, kernel_shape=kernel, strides=strides, group=channels)
        )


def _shapes(graph: Any) -> dict[str, list[int]]:
    """The shape of every tensor that has one; 0 where a size is free."""
    known = {entry.name: list(entry.dims) for entry in graph.initializer}
    for entry in (*graph.value_info, *graph.input, *graph.output):
        known[entry.name] = [size.dim_value for size in entry.type.tensor_type.shape.dim]
    return known


def _count(graph: Any) -> tuple[list[Layer], int]:
    """The layers in the graph's order, and the multiply-adds of all of it for one image (products that are summed up at once, as an
    involution's, among them)."""
    shapes = _shapes(graph)
    weights = {entry.name: list(entry.dims) for entry in graph.initializer}
    summed = {node.input[0] for node in graph.node if node.op_type == "ReduceSum"}
    layers, total = [], 0
    for node in graph.node:
        kernel = weights.get(node.input[1]) if len(node.input) > 1 else None
        images, answers = (int(np.prod(shapes.get(name, [0])[1:])) for name in (node.input[0], node.output[0]))
        if node.op_type == "Mul" and node.output[0] in summed:
            total += answers
        if kernel is None or node.op_type not in (*LAYERS, "ConvTranspose") or node.input[1].startswith(POOLING):
            continue
        inputs = int(np.prod(kernel[1:]))  # that each output sums up
        if node.op_type in ("Gemm", "MatMul"):
            inputs = kernel[1 if attributes(node).get("transB") else -2]
        macs = (images if node.op_type == "ConvTranspose" else answers) * inputs
        total += macs
        if node.op_type in LAYERS:
            layers.append(Layer(node.input[1].removesuffix(".weight"), node.name, macs))
    return layers, total


def _between(graph: Any, layers: set[str]) -> dict[str, set[str]]:
    """For each node between layers the layers whose outputs reach it through no other layer."""
    before: dict[str, set[str]] = {}
    found = {}
    for node in graph.node:
        reach = set().union(*(before.get(name, set()) for name in node.input))
        if node.op_type in BETWEEN or node.op_type == "Conv" and node.name not in layers:
            found[node.name] = reach
        for name in node.output:
            before[name] = {node.name} if node.name in layers else reach
    return found
