"""fp16 and int8: what is in the files, what they compute, which layers stay in fp32, and that no file loses too much."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import randomise
from onnx import TensorProto, numpy_helper
from test_export import card
from torch import Tensor, nn

from pipeline import precisions
from pipeline.checkpoint import new_card
from pipeline.data.batches import Prepared
from pipeline.deployment import Export, Int8
from pipeline.errors import InputError
from pipeline.export import ExportError, export, read_metadata
from pipeline.files import replaced
from pipeline.involution import Involution
from pipeline.layers import ChannelSelect
from pipeline.models import build
from pipeline.precisions import half, prove, quantize
from pipeline.quantization import Quantizer
from pipeline.shipping import Shipment

SHAPE = (3, 12, 12)
OPTIONS: dict[str, Any] = {"calibration": "minmax", "max_loss": 0.1, "keep": [], "least": 0.0, "called": "it"}


class Mixed(nn.Module):
    """Every kind of layer that int8 must compute or let pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.select = ChannelSelect(torch.tensor([0, 1, 3, 3, 5, 7, 7, 2] * 2))
        self.involution = Involution(16, 3, 1)
        self.enlarge = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.average = nn.AvgPool2d(2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.depthwise(x)).relu()
        y = self.enlarge(self.involution(self.select(self.grouped(x))))
        return self.head(torch.cat([x, self.average(y)], 1).relu().mean((2, 3)))


class Wild(nn.Module):
    """One layer gives a channel a thousand times as large as the others, which the next layer hardly reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wild, self.reader = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)
        self.last, self.head = nn.Conv2d(8, 16, 3), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reader(self.wild(self.first(x).relu()).relu()).relu()
        return self.head(self.last(x).mean((2, 3)))


def wild() -> nn.Module:
    model = randomise(Wild())
    with torch.no_grad():
        model.get_parameter("wild.weight")[0] *= 3000
        model.get_parameter("reader.weight")[:, 0] /= 3000
    return model


def images(count: int = 64) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(5))


def split(model: nn.Module) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    """Images with the classes that the network itself says: fp32 is always right."""
    with torch.no_grad():
        x = images(200)
        batches = list(zip(x.split(50), model.eval()(x).argmax(1).split(50), strict=True))
    return lambda: batches


def calibration() -> list[np.ndarray]:
    return [part.numpy() for part in images().split(16)]


@pytest.fixture(scope="module", params=["mixed", "wild"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, nn.Module, Path]:
    path = tmp_path_factory.mktemp("made") / "model.onnx"
    model = (randomise(Mixed()) if request.param == "mixed" else wild()).eval()
    described = card("select")
    described["input"]["shape"] = list(SHAPE)
    export(model, described, path, 20)
    return request.param, model, path


def test_int8_weights_are_what_the_formula_says_and_the_rest_is_float(made: tuple[str, nn.Module, Path], tmp_path: Path) -> None:
    name, model, path = made
    facts = quantize(path, tmp_path / "int8.onnx", calibration(), split(model), **OPTIONS | {"max_loss": 9.0})
    graph = onnx.load(tmp_path / "int8.onnx").graph
    constants = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    before = {entry.name: numpy_helper.to_array(entry) for entry in onnx.load(path).graph.initializer}
    seen = set()
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        reads = maker[node.input[0]]
        assert reads.op_type == "DequantizeLinear" and constants[reads.input[2]].dtype == np.uint8
        weights, scales, zeros = (constants[key] for key in maker[node.input[1]].input)
        assert weights.dtype == np.int8 and abs(weights.astype(int)).max() <= 64 and not zeros.any()
        layer = maker[node.input[1]].input[0].removesuffix("_quantized")
        if layer not in before:
            continue  # an average
        seen.add(layer.removesuffix(".weight"))
        rows = before[layer].reshape(len(weights), -1)
        np.testing.assert_allclose(scales, abs(rows).max(1) / 64, rtol=0.02)  # one an output channel, of 7 bits
        back = weights.reshape(len(rows), -1) * scales[:, None]
        assert (abs(back - rows) <= 0.501 * scales[:, None]).all()
    assert facts["kept"] == [] and {"head"} | ({"grouped"} if name == "mixed" else {"wild"}) <= seen
    assert [entry.type.tensor_type.elem_type for entry in (*graph.input, *graph.output)] == [TensorProto.FLOAT] * 2
    if name == "mixed":
        transposed = next(node for node in graph.node if node.op_type == "ConvTranspose")
        assert constants[transposed.input[1]].dtype == np.float32 and "AveragePool" not in {node.op_type for node in graph.node}
        everything = 3 * 9 * 8 + 9 * 8 + 4 * 9 * 8  # stem, depthwise, grouped: multiply-adds a pixel
        everything += 16 * 4 + 4 * 9 + 16 * 9 + 16 * 8 * 4  # involution's two layers and its products, the transposed one
        everything = 144 * everything + 160
        float_macs = 144 * (16 * 9 + 16 * 8 * 4)
        assert facts["share_int8"] == pytest.approx(1 - float_macs / everything)


def test_int8_of_a_network_of_every_kind_answers_alike_and_has_equal_bytes(
    made: tuple[str, nn.Module, Path], tmp_path: Path
) -> None:
    name, model, path = made
    if name != "mixed":
        return
    before = set(Path(tempfile.gettempdir()).iterdir())
    for file in ("first.onnx", "second.onnx"):
        quantize(path, tmp_path / file, calibration(), split(model), **OPTIONS | {"max_loss": 9.0})
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()
    assert not [
        found for found in set(Path(tempfile.gettempdir()).iterdir()) - before if found.name.startswith(("winnow-", "ort."))
    ]
    with torch.no_grad():
        wanted = model(images()).numpy()
    found = np.asarray(onnxruntime.InferenceSession(tmp_path / "first.onnx").run(None, {"images": images().numpy()})[0])
    assert np.abs(found - wanted).std() < 0.1 * wanted.std()
    old, new = read_metadata(path), read_metadata(tmp_path / "first.onnx")
    assert (old["precision"], new["precision"]) == ("fp32", "int8") and old | {"precision": "int8"} == new
    content = (tmp_path / "first.onnx").read_bytes()
    assert str(Path(tempfile.gettempdir())).encode() not in content and b"onnx.quantize" not in content


def test_layers_that_int8_cannot_bear_stay_in_fp32(made: tuple[str, nn.Module, Path], tmp_path: Path) -> None:
    name, model, path = made
    if name != "wild":
        return
    facts = quantize(path, tmp_path / "int8.onnx", calibration(), split(model), **OPTIONS)
    assert facts["kept"] == ["wild", "reader"] and facts["validation_loss"] <= 0.05
    assert sorted(facts["errors"], key=lambda layer: -facts["errors"][layer])[:2] in (["wild", "reader"], ["reader", "wild"])
    figures = prove(path, tmp_path / "int8.onnx", split(model)())
    assert figures["loss"] == pytest.approx(1 - figures["test_accuracy"]) and figures["loss"] <= 0.1
    whole = quantize(path, tmp_path / "whole.onnx", calibration(), split(model), **OPTIONS | {"max_loss": 9.0})
    assert whole["kept"] == [] and whole["validation_loss"] > 0.2


def test_too_little_int8_and_too_much_loss_are_told_with_the_figures(made: tuple[str, nn.Module, Path], tmp_path: Path) -> None:
    name, model, path = made
    if name != "wild":
        return
    told = (
        r"int8 of it: only \d+\.\d% of .* with .*wild, reader.* kept in fp32, and export.int8.least = 0.9 .* loses \d+\.\d\d points"
    )
    with pytest.raises(ExportError, match=told):
        quantize(path, tmp_path / "int8.onnx", calibration(), split(model), **OPTIONS | {"least": 0.9})
    with pytest.raises(InputError, match=r"export.int8.keep = \['conv9'\].* it has first, wild, reader, last, head"):
        quantize(path, tmp_path / "int8.onnx", calibration(), split(model), **OPTIONS | {"keep": ["f*", "conv9"]})
    assert not list(tmp_path.iterdir())
    figures = {"test_accuracy": 0.9721, "loss": 0.014, "max_abs_difference": 1.0}
    told = r"loses 1.40 points of accuracy on the test split \(98.61 -> 97.21, allowed 1.00; .*, with a, b kept in fp32: "
    with pytest.raises(ExportError, match=told):
        precisions.allow_loss("x-0", "classify", figures, 0.01, "int8", ["a", "b"])
    precisions.allow_loss("x-0", "classify", figures, 0.014, "int8")
    with pytest.raises(ExportError, match="fp16 of x-0"):
        precisions.allow_loss("x-0", "classify", figures | {"max_abs_difference": float("nan")}, 0.5, "fp16")


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_ranges_are_those_of_the_calibration_images(made: tuple[str, nn.Module, Path], tmp_path: Path, method: Any) -> None:
    _, _, path = made
    Quantizer(path, tmp_path, calibration(), method).write(set(), tmp_path / "int8.onnx")
    constants = {entry.name: numpy_helper.to_array(entry) for entry in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    scale, zero = float(constants["images_scale"]), int(constants["images_zero_point"])
    pixels = np.concatenate(calibration())
    low, high = scale * (0 - zero), scale * (255 - zero)
    if method == "minmax":
        assert low == pytest.approx(pixels.min(), abs=scale) and high == pytest.approx(pixels.max(), abs=scale)
    assert pixels.min() - scale <= low < -2 and 2 < high <= pixels.max() + scale


def test_fp16_computes_in_fp16_and_takes_and_gives_float(made: tuple[str, nn.Module, Path], tmp_path: Path) -> None:
    name, model, path = made
    half(path, tmp_path / "fp16.onnx")
    graph = onnx.load(tmp_path / "fp16.onnx").graph
    before = {entry.name: numpy_helper.to_array(entry) for entry in onnx.load(path).graph.initializer}
    for entry in graph.initializer:
        if before[entry.name].dtype == np.float32:
            assert entry.data_type == TensorProto.FLOAT16, entry.name
            np.testing.assert_array_equal(numpy_helper.to_array(entry), before[entry.name].astype(np.float16))
    assert [entry.type.tensor_type.elem_type for entry in (*graph.input, *graph.output)] == [TensorProto.FLOAT] * 2
    known = {entry.name for entry in (*graph.input, *graph.initializer)} | {""}
    for node in graph.node:  # in an order that can be run
        assert known.issuperset(node.input)
        known.update(node.output)
    figures = prove(path, tmp_path / "fp16.onnx", split(model)())
    assert figures["loss"] <= 0.02 and figures["max_abs_difference"] < (0.1 if name == "mixed" else 1)
    assert read_metadata(tmp_path / "fp16.onnx")["precision"] == "fp16"
    assert (tmp_path / "fp16.onnx").stat().st_size < path.stat().st_size


def test_a_variant_is_shipped_whole_or_not_at_all(prepared: Prepared, tmp_path: Path) -> None:
    model = build("cifar_quick", input_shape=prepared.shape, classes=10)
    described = new_card({"name": "cifar_quick", "arguments": {}}, prepared)
    int8 = Int8(images=32, calibration="minmax", keep=["fc1"], least=0.1)
    options = Export(opset=20, atol=1e-4, rtol=1e-3, precisions=["fp32", "fp16", "int8"], max_loss=1.0, resize=False, int8=int8)
    place = tmp_path / "export" / "x-0"

    def ship(options: Export) -> dict[str, Any]:
        shipment = Shipment("x-0", model, described, prepared, options, 1, 0)
        with replaced(place) as partial:
            return {precision: shipment.write(precision, partial) for precision in options.precisions}

    shipped = ship(options)
    there = {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*.onnx")}
    assert sorted(there) == [f"{precision}/{form}.onnx" for precision in ("fp16", "fp32", "int8") for form in ("model", "pictures")]
    (event,) = [event for event in shipped["int8"].events if event["kind"] == "quantized"]
    assert event["kept"] == ["fc1"] and event["calibration_images"] == 32
    for one in shipped.values():
        assert one.metrics.keys() >= {"test_accuracy", "torch_test_accuracy", "validation_accuracy", "top1_agreement", "size_mb"}
    assert shipped["int8"].metrics["size_mb"] < 0.5 * shipped["fp32"].metrics["size_mb"]
    losing = options.model_copy(update={"precisions": ["fp32", "int8"], "int8": int8.model_copy(update={"least": 1.0})})
    with pytest.raises(ExportError, match="int8 of x-0: only"):
        ship(losing)
    assert {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*.onnx")} == there
    assert [path.name for path in place.parent.iterdir()] == ["x-0"]
