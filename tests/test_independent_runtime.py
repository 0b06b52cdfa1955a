"""Runtimes other than ONNX Runtime read the exported files and compute the same: OpenVINO, and ONNX's own reference in numpy."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import build, randomise, shape_of
from onnx.reference import ReferenceEvaluator
from test_export import Selecting, card

from pipeline import models
from pipeline.export import export
from pipeline.pictures_form import pictures_form

OPENVINO = """
import sys
import numpy as np
import openvino
compiled = openvino.Core().compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
found = compiled(dict(np.load(sys.argv[2])))
np.savez(sys.argv[3], **{output.get_any_name(): np.array(found[output]) for output in compiled.outputs})
"""
CLOSE = 2e-5  # of the largest output
UNET = {"width": 4, "up": "transposed"}
# of the zoo one of each kind; those that are left out take long to export and have no operator that these have not
NETWORKS = ("cifar_quick", "condensenet", "lenet5", "resnet", "resnet_preact", "selecting", "unet")


@pytest.fixture(scope="module", params=NETWORKS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """An exported network, images, and what torch says of them."""
    name, path = request.param, tmp_path_factory.mktemp("made") / "model.onnx"
    described: dict[str, Any] = card("select")
    if name == "selecting":
        model, shape = randomise(Selecting()).eval(), (3, 16, 16)
    elif name == "unet":
        model, shape = randomise(models.build("unet", input_shape=(3, 32, 32), classes=1, **UNET)).eval(), (3, 32, 32)
        described["task"] = "segment"
    else:
        model, shape = build(name, expand=False), shape_of(name)
    described["input"] |= {"shape": list(shape), "crop": None}
    export(model, described, path, 20)
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return path, images.numpy(), model(images).numpy()


def agree(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= CLOSE * np.abs(wanted).max()


def by_openvino(path: Path, given: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """What OpenVINO computes with the file on the CPU in float32 (its default on newer CPUs is bf16), in a process of its own: so
    many native runtimes in one do not end well."""
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed")
    np.savez(folder / "given.npz", **given)  # type: ignore[arg-type]
    words = [sys.executable, "-c", OPENVINO, str(path), str(folder / "given.npz"), str(folder / "found.npz")]
    subprocess.run(words, check=True)
    with np.load(folder / "found.npz", allow_pickle=False) as found:
        return dict(found)


def pictures_and_answers(path: Path, images: np.ndarray, folder: Path) -> tuple[Path, np.ndarray, dict[str, np.ndarray]]:
    """The form for pictures of fixed size, pictures, and what ONNX Runtime says of them."""
    pictures_form(path, folder / "pictures.onnx", None)
    size = (len(images), *images.shape[2:], images.shape[1])
    pictures = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    session = onnxruntime.InferenceSession(folder / "pictures.onnx")
    names = [entry.name for entry in session.get_outputs()]
    return folder / "pictures.onnx", pictures, dict(zip(names, session.run(names, {"pictures": pictures}), strict=True))


def test_openvino_computes_what_torch_computes(made: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    path, images, wanted = made
    for few in (len(images), 1):
        (found,) = by_openvino(path, {"images": images[:few]}, tmp_path).values()
        agree(found, wanted[:few])
    form, pictures, answers = pictures_and_answers(path, images, tmp_path)
    found = by_openvino(form, {"pictures": pictures}, tmp_path)
    for name, value in answers.items():
        agree(found[name], value)


def test_the_reference_evaluator_computes_what_torch_computes(made: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    path, images, wanted = made
    agree(np.asarray(ReferenceEvaluator(onnx.load(path)).run(None, {"images": images[:1]})[0]), wanted[:1])
    form, pictures, answers = pictures_and_answers(path, images[:1], tmp_path)
    evaluator = ReferenceEvaluator(onnx.load(form))
    for name, value in zip(evaluator.output_names, evaluator.run(None, {"pictures": pictures}), strict=True):
        agree(np.asarray(value), answers[name])
