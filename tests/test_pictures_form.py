"""The form for pictures: bytes in, probabilities out, and in between what Pillow, numpy and the tensor form say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import randomise
from PIL import Image
from raw_data import carvana, image_folder, nyu_v2, options
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from pipeline.checkpoint import new_card
from pipeline.config import Crop
from pipeline.data.batches import Batches, Prepared, load
from pipeline.data.prepare import prepare
from pipeline.export import ExportError, export, read_metadata
from pipeline.pictures_form import pictures_form, prove_form
from pipeline.precisions import half, quantize

EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
CROP = Crop(resize=12, size=9)


class Small(nn.Module):
    """A class of each image, or with `dense` a number of each pixel."""

    def __init__(self, channels: int, dense: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, 1 if dense else 5, 3, padding=1)
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x).relu())
        return x if self.dense else x.mean((2, 3))


def exported(prepared: Prepared, path: Path) -> Path:
    """A network for the data, as the tensor form at `path`."""
    model = randomise(Small(prepared.shape[0], dense=prepared.task != "classify"))
    export(model, new_card({"name": "small", "arguments": {}}, prepared), path, 20)
    return path


def answers(path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path)
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(names, {session.get_inputs()[0].name: images})), strict=True))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of pictures of 10x12 pixels (H x W)."""
    root = tmp_path_factory.mktemp("raw")
    image_folder(root, count=8, classes=("ant", "bee", "ça"))
    return root


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "streamed": {"image_size": 11, "storage": "stream"},
    "cropped": {"crop": CROP},
    "cropped-streamed": {"image_size": 14, "crop": CROP, "storage": "stream"},
}


@pytest.fixture(scope="module", params=list(KINDS))
def made(request: pytest.FixtureRequest, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Path]:
    place = tmp_path_factory.mktemp("made")
    prepare(options("folder", raw, **KINDS[request.param]), place / "data")
    prepared = load(place / "data")
    return prepared, exported(prepared, place / "model.onnx")


def test_any_picture_is_resized_cropped_and_normalised_as_pillow_and_numpy_do_it(
    made: tuple[Prepared, Path], tmp_path: Path
) -> None:
    prepared, path = made
    pictures_form(path, tmp_path / "pictures.onnx", prepared.stored[1:])
    draw = np.random.default_rng(0)
    for height, width in (prepared.stored[1:], (33, 20), (7, 6)):
        pictures = draw.integers(0, 256, (3, height, width, 3), dtype=np.uint8)
        size = prepared.stored[2], prepared.stored[1]
        resized = np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BILINEAR)) for one in pictures])
        images = torch.from_numpy(resized).permute(0, 3, 1, 2).float()
        if prepared.crop:  # on floats, as the data layer: nothing is rounded a second time
            images = transforms.resize(images, [prepared.crop.resize], antialias=True)
            images = transforms.center_crop(images, [prepared.crop.size])
        mean, std = (np.reshape(values, (-1, 1, 1)) for values in (prepared.mean, prepared.std))
        wanted = answers(path, ((images.numpy() / 255 - mean) / std).astype(np.float32))["logits"]
        found = answers(tmp_path / "pictures.onnx", pictures)
        close = 1e-4 if (height, width) == prepared.stored[1:] else 0.05  # a level of 255 where two roundings differ
        np.testing.assert_allclose(found["logits"], wanted, atol=close)
        shifted = np.exp(found["logits"] - found["logits"].max(1, keepdims=True))
        np.testing.assert_allclose(found["probabilities"], shifted / shifted.sum(1, keepdims=True), atol=1e-5)


def test_form_without_resizing_takes_the_size_that_the_network_sees(made: tuple[Prepared, Path], tmp_path: Path) -> None:
    prepared, path = made
    pictures_form(path, tmp_path / "pictures.onnx", None)
    session = onnxruntime.InferenceSession(tmp_path / "pictures.onnx")
    channels, height, width = prepared.shape
    (entry,) = session.get_inputs()
    assert (entry.name, entry.type, entry.shape) == ("pictures", "tensor(uint8)", ["batch", height, width, channels])
    assert [output.name for output in session.get_outputs()] == ["probabilities", "logits"]
    pictures = np.random.default_rng(1).integers(0, 256, (2, height, width, channels), dtype=np.uint8)
    images = (pictures / 255 - prepared.mean) / prepared.std
    wanted = answers(path, images.transpose(0, 3, 1, 2).astype(np.float32))["logits"]
    np.testing.assert_allclose(answers(tmp_path / "pictures.onnx", pictures)["logits"], wanted, atol=1e-5)
    proto = onnx.load(tmp_path / "pictures.onnx")
    assert "Resize" not in {node.op_type for node in proto.graph.node} and {entry.domain for entry in proto.opset_import} == {""}


def test_every_precision_passes_its_proof_in_every_storage(made: tuple[Prepared, Path], tmp_path: Path) -> None:
    prepared, path = made
    batches = lambda split: Batches(prepared, split, 4, "cpu", None, False, 0)  # noqa: E731
    half(path, tmp_path / "fp16.onnx")
    calibration = [images.numpy() for images, _ in batches("train").epoch(0)]
    limits: dict[str, Any] = {"calibration": "minmax", "max_loss": 9.0, "keep": [], "least": 0.0, "called": "it"}
    quantize(path, tmp_path / "int8.onnx", calibration, lambda: batches("validation").epoch(0), **limits)
    for source in (path, tmp_path / "fp16.onnx", tmp_path / "int8.onnx"):
        for stored in (None, prepared.stored[1:]):
            pictures_form(source, tmp_path / "pictures.onnx", stored)
            count = prove_form(source, tmp_path / "pictures.onnx", batches("test"), stored, **EXACT)
            assert count == prepared.counts["test"]
            old, new = read_metadata(source), read_metadata(tmp_path / "pictures.onnx")
            assert new == old | {"form": "pictures"}


def test_a_form_that_normalises_or_resizes_otherwise_does_not_pass(made: tuple[Prepared, Path], tmp_path: Path) -> None:
    prepared, path = made
    test = Batches(prepared, "test", 4, "cpu", None, False, 0)
    pictures_form(path, tmp_path / "pictures.onnx", prepared.stored[1:])
    proto = onnx.load(tmp_path / "pictures.onnx")
    scale = next(entry for entry in proto.graph.initializer if entry.name == "pictures_scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1.01), scale.name))
    onnx.save(proto, tmp_path / "other.onnx")
    with pytest.raises(ExportError, match="other.onnx does not answer what .*model.onnx does: .* outputs differ"):
        prove_form(path, tmp_path / "other.onnx", test, prepared.stored[1:], **EXACT)
    for resize in proto.graph.node:
        if resize.op_type == "Resize":
            for entry in resize.attribute:
                if entry.name in ("antialias", "exclude_outside"):
                    entry.i = 0
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) / np.float32(1.01), scale.name))
    onnx.save(proto, tmp_path / "coarse.onnx")
    with pytest.raises(ExportError, match="coarse.onnx resizes a picture of .* otherwise than the data layer"):
        prove_form(path, tmp_path / "coarse.onnx", test, prepared.stored[1:], **EXACT)


@pytest.mark.parametrize("task", ["segment", "depth"])
def test_masks_get_a_probability_for_every_pixel_and_depths_stay_depths(tmp_path: Path, task: str) -> None:
    (carvana if task == "segment" else nyu_v2)(tmp_path / "raw")
    prepare(options("carvana" if task == "segment" else "nyu_v2", tmp_path / "raw"), tmp_path / "data")
    prepared = load(tmp_path / "data")
    path = exported(prepared, tmp_path / "model.onnx")
    pictures_form(path, tmp_path / "pictures.onnx", None)
    prove_form(path, tmp_path / "pictures.onnx", Batches(prepared, "test", 4, "cpu", None, False, 0), None, **EXACT)
    pictures = np.load(tmp_path / "data/test_images.npy")[:2]
    found = answers(tmp_path / "pictures.onnx", pictures)
    assert found.keys() == ({"probabilities", "logits"} if task == "segment" else {"depth"})
    assert all(value.shape == (2, 1, *prepared.shape[1:]) for value in found.values())
    if task == "segment":
        np.testing.assert_allclose(found["probabilities"], 1 / (1 + np.exp(-found["logits"])), atol=1e-6)


def test_names_of_classes_come_back_and_equal_input_gives_equal_bytes(made: tuple[Prepared, Path], tmp_path: Path) -> None:
    prepared, path = made
    for name in ("first", "second"):
        pictures_form(path, tmp_path / name, prepared.stored[1:])
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    for file in (path, tmp_path / "first"):
        found = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
        assert json.loads(found["classes"]) == ["ant", "bee", "ça"] and found["precision"] == "fp32"
