"""Triton's description of a model, made from its ONNX graph and written with Triton's own protobuf.

Fields: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from pathlib import Path
from typing import Any

from pipeline.deployment import Repository
from pipeline.errors import InputError
from pipeline.export import read_metadata

LABELS = "labels.txt"
CLASSED = ("probabilities", "logits")  # outputs with a number for each class
HEAD = "# Written by stages.repository from the ONNX graph: what is changed here is lost when it runs again.\n"
TYPES = {"float32": "FP32", "float16": "FP16", "float64": "FP64", "uint8": "UINT8", "int8": "INT8", "int32": "INT32"}
TYPES |= {"int64": "INT64", "bool": "BOOL"}  # numpy's name -> Triton's
MODES = {"fp32": "FP32", "fp16": "FP16"}  # precision of a variant -> of TensorRT


class Graph:
    """What the ONNX file at `path` takes and gives.

    `inputs` and `outputs` are lists of (name, numpy's type, axes): the axes of one image, None where free; `labels` the class
    names of a classifier, else nothing. Raises `InputError` for a file that was not exported by Winnow or whose batch is fixed.
    """

    def __init__(self, path: Path) -> None:
        import onnx

        self.metadata = read_metadata(path)
        graph = onnx.load_model(path, load_external_data=False).graph
        weights = {weight.name for weight in graph.initializer}
        self.inputs = [_tensor(path, value) for value in graph.input if value.name not in weights]
        self.outputs = [_tensor(path, value) for value in graph.output]
        self.labels = self.metadata["classes"] if self.metadata["task"] == "classify" else []

    @property
    def interface(self) -> tuple[Any, ...]:
        """What two files must share to be versions of one model: names, types, axes, classes."""
        return (self.inputs, self.outputs, self.labels)

    def shape(self, axes: list[int | None]) -> list[int]:
        """The axes of one image, the free ones, height and then width, as the network sees them."""
        free = iter(self.metadata["shape"][1:])
        return [next(free) if axis is None else axis for axis in axes]


def config(name: str, graph: Graph, options: Repository, *, precision: str, versions: int, gpu: bool) -> Any:
    """Triton's configuration (ModelConfig) of the model `name`, with its newest `versions` loaded, on every GPU or on the CPU."""
    kinds = _protobuf().ModelInstanceGroup
    made = _protobuf().ModelConfig(name=name, backend="onnxruntime", max_batch_size=options.max_batch)
    for tensor, kind, axes in graph.inputs:
        made.input.add(name=tensor, data_type=_type(kind), dims=_dims(axes))
    for tensor, kind, axes in graph.outputs:
        label = LABELS if graph.labels and tensor in CLASSED else ""
        made.output.add(name=tensor, data_type=_type(kind), dims=_dims(axes), label_filename=label)
    made.version_policy.latest.num_versions = versions
    made.instance_group.add(count=1, kind=kinds.KIND_GPU if gpu else kinds.KIND_CPU)
    if options.max_batch > 1:
        sizes = {max(2, options.max_batch // 4), max(2, options.max_batch // 2), options.max_batch}
        made.dynamic_batching.preferred_batch_size.extend(sorted(sizes))
        made.dynamic_batching.max_queue_delay_microseconds = options.queue_delay_us
    for size in sorted({1, options.max_batch}):  # the first answers of each size are slow: memory is laid out, kernels are chosen
        warm = made.model_warmup.add(name=f"batch of {size}", batch_size=size)
        for tensor, kind, axes in graph.inputs:
            warm.inputs[tensor].data_type = _type(kind)
            warm.inputs[tensor].dims.extend(graph.shape(axes))
            warm.inputs[tensor].zero_data = True
    if gpu and options.tensorrt and precision != "int8":  # TensorRT takes no activations with zero points
        fast = made.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
        fast.parameters["precision_mode"] = MODES[precision]
    return made


def as_text(made: Any) -> bytes:
    """The content of a config.pbtxt."""
    from google.protobuf import text_format

    return (HEAD + text_format.MessageToString(made)).encode()


def parse(path: Path) -> Any:
    """The configuration (ModelConfig) in a file; `InputError` says where it is damaged."""
    from google.protobuf import text_format

    try:
        return text_format.Parse(path.read_text(), _protobuf().ModelConfig())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (UnicodeDecodeError, text_format.ParseError) as error:
        raise InputError(f"{path} is no configuration of Triton's ({error})") from None


def labels(graph: Graph) -> bytes:
    """A line for each class, in the order of the outputs."""
    return "".join(f"{' '.join(name.split())}\n" for name in graph.labels).encode()


def _tensor(path: Path, value: Any) -> tuple[str, str, list[int | None]]:
    """Name, type and axes of a graph's input or output, without that of the batch."""
    from onnx import helper

    tensor = value.type.tensor_type
    axes = [axis.dim_value if axis.HasField("dim_value") else None for axis in tensor.shape.dim]
    kind = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    if kind not in TYPES:
        raise InputError(f"{path}: {value.name} is of type {kind}: must be one of {', '.join(TYPES)}")
    if len(axes) < 2 or axes[0] is not None:
        raise InputError(f"{path}: {value.name} has the axes {axes}: the first must be a batch of any size, with others behind it")
    return value.name, kind, axes[1:]


def _type(kind: str) -> int:
    return _protobuf().DataType.Value(f"TYPE_{TYPES[kind]}")


def _protobuf() -> Any:
    """Triton's messages."""
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2


def _dims(axes: list[int | None]) -> list[int]:
    return [-1 if axis is None else axis for axis in axes]
