"""An ONNX file as an MLflow model, ready to be served: `mlflow models serve -m models:/ID`."""

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.model_card import read_onnx

if TYPE_CHECKING:
    from mlflow.models import ModelSignature


PICTURES = "pictures.onnx"  # the form of an exported network that takes a client's images, among a record's artifacts


def log_model(client: Any, experiment_id: str, run_id: str, parameters: dict[str, str], path: Path) -> None:
    """Log the file at `path` as the model "model" of a run, with its signature and the names of its classes; `InputError` where it
    is no ONNX file."""
    import mlflow.onnx as flavor
    from mlflow.models import Model

    proto = read_onnx(path)  # MLflow changes the one it is given: a fresh one each time
    told = {entry.key: entry.value for entry in proto.metadata_props}
    settings: dict[str, Any] = {"signature": _signature(proto), "pip_requirements": _pip_requirements()}
    settings["metadata"] = {key: told[key] for key in ("task", "classes") if key in told}
    # Made here, because `Model.log` by itself would take the default experiment.
    made = client.create_logged_model(experiment_id, "model", run_id, params=parameters)
    Model.log(None, flavor, run_id=run_id, model_id=made.model_id, onnx_model=proto, save_as_external_data=False, **settings)


def _pip_requirements() -> list[str]:
    """What a server needs to answer with the ONNX file."""
    packages = [f"{name}=={version}" for name in ("onnx", "numpy") if (version := _version(name))]
    runtime = _version("onnxruntime") or _version("onnxruntime-gpu")
    return [*packages, f"onnxruntime=={runtime}" if runtime else "onnxruntime"]


def _signature(proto: Any) -> "ModelSignature":
    """Names and shapes of the graph's inputs and outputs; -1 stands for an axis of any length."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec
    from onnx import helper

    def specs(values: Any) -> Schema:
        rows = []
        for value in values:
            tensor = value.type.tensor_type
            shape = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in tensor.shape.dim]
            rows.append(TensorSpec(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape, value.name))
        return Schema(rows)

    return ModelSignature(inputs=specs(proto.graph.input), outputs=specs(proto.graph.output))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
