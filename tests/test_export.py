"""The ONNX file: what is in it, and that a file which computes something else does not pass."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from pipeline import files, models
from pipeline.errors import InputError
from pipeline.export import ExportError, export, export_proven, read_metadata, verify
from pipeline.inference import AbsentProvider, open_session
from pipeline.layers import ChannelSelect
from pipeline.overparameterize import overparameterize

ROOT = Path(__file__).parent.parent
LOOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
SHAPE = (3, 64, 64)
NETWORKS: dict[str, dict[str, Any]] = {
    "cifar_quick": {},
    "mininet": {"dropout": 0.5},
    "resnet": {"depth": 8},
    "select": {},
}


class Selecting(nn.Module):
    """What surgery can leave behind: a gathered input, grouped and dilated convolution, a plain sum of branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.select = ChannelSelect(torch.tensor([0, 3, 4, 7, 8, 11]))
        self.left = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.select(self.norm(self.stem(x)).relu())
        return self.head(self.pool(x + self.left(x)).flatten(1))


def network(name: str) -> nn.Module:
    """A network whose batch norms have seen something."""
    torch.manual_seed(1)
    model = Selecting() if name == "select" else models.build(name, input_shape=SHAPE, classes=10, **NETWORKS[name])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def card(name: str) -> dict[str, Any]:
    return {
        "network": {"name": name, "arguments": NETWORKS[name]},
        "channels": None,
        "input": {"shape": list(SHAPE), "mean": [0.1, 0.2, 0.3], "std": [0.9, 0.8, 0.7], "crop": {"resize": 40, "size": 32}},
        "classes": [f"class {number}" for number in range(10)],
        "stages": [{"stage": "train", "parameters": {"epochs": 3, "root": "/home/someone/pictures/birds"}}],
        "versions": {"torch": "2"},
        "commit": "0123abc",
        "data": "fingerprint",
    }


def pictures_to_prove_on(count: int = 70) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(2)
    images, labels = torch.randn(count, *SHAPE, generator=draw), torch.randint(10, (count,), generator=draw)
    return list(zip(images.split(32), labels.split(32), strict=True))


@pytest.fixture(scope="module", params=list(NETWORKS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, nn.Module, Path]:
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    model = network(request.param)
    export(model, card(request.param), path, 20)
    return request.param, model, path


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    path = tmp_path_factory.mktemp("one") / "model.onnx"
    model = network("select")
    export(model, card("select"), path, 20)
    return model, path


def test_file_and_torch_agree_on_logits_classes_and_accuracy(exported: tuple[str, nn.Module, Path]) -> None:
    _, model, path = exported
    split = pictures_to_prove_on()
    figures = verify(model, path, split, **LOOSE)
    assert figures["top1_agreement"] == 1 and figures["images"] == 70
    assert 0 < figures["max_abs_difference"] < 1e-4
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in split)
    assert figures["test_accuracy"] == figures["torch_test_accuracy"] == right / 70


def test_any_batch_size_runs_and_an_image_does_not_depend_on_its_neighbours(
    exported: tuple[str, nn.Module, Path],
) -> None:
    session = onnxruntime.InferenceSession(exported[2], providers=["CPUExecutionProvider"])
    images = pictures_to_prove_on()[0][0].numpy()
    alone = [np.asarray(session.run(["logits"], {"images": images[i : i + 1]})[0]) for i in range(7)]
    together = np.asarray(session.run(["logits"], {"images": images[:7]})[0])
    assert together.shape == (7, 10)
    np.testing.assert_allclose(np.concatenate(alone), together, atol=1e-5)


def test_file_holds_no_path_no_stack_trace_and_no_other_metadata(exported: tuple[str, nn.Module, Path]) -> None:
    content = exported[2].read_bytes()
    for word in (str(ROOT), str(Path.home()), sys.prefix, "site-packages", "stack_trace", ".py", "/home/someone"):
        assert word.encode() not in content
    proto = onnx.load_model_from_string(content)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 20)]
    entries = [*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info, proto.graph]
    assert entries and not any(entry.metadata_props or entry.doc_string for entry in entries)


def test_metadata_comes_back_as_it_was_given_also_from_the_session(exported: tuple[str, nn.Module, Path]) -> None:
    name, _, path = exported
    given, found = card(name), read_metadata(path)
    assert found["format"] == 1 and found["network"] == given["network"] and found["classes"] == given["classes"]
    assert found["mean"] == [0.1, 0.2, 0.3] and found["std"] == [0.9, 0.8, 0.7] and found["shape"] == list(SHAPE)
    assert found["crop"] == {"resize": 40, "size": 32}
    assert found["lineage"]["commit"] == "0123abc" and found["lineage"]["data"] == "fingerprint"
    assert found["lineage"]["stages"] == [{"stage": "train", "parameters": {"epochs": 3, "root": "birds"}}]
    assert found["precision"] == "fp32" and found["producer"].startswith("winnow, torch ")
    assert open_session(path).get_modelmeta().custom_metadata_map.keys() == {*found, files.SUM}


def test_two_exports_are_equal_byte_for_byte_also_from_another_process(one: tuple[nn.Module, Path], tmp_path: Path) -> None:
    export(one[0], card("select"), tmp_path / "again.onnx", 20)
    assert (tmp_path / "again.onnx").read_bytes() == one[1].read_bytes()
    code = (
        "import sys; from pathlib import Path; from tests.test_export import card, network; from pipeline.export "
        "import export; export(network('select'), card('select'), Path(sys.argv[1]), 20)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "other.onnx")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "other.onnx").read_bytes() == one[1].read_bytes()
    assert done.stdout == done.stderr == ""  # and the exporter is quiet


def test_export_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    model = network("select").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, card("select"), tmp_path / "model.onnx", 20)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("place", ["stem", "head"])
def test_file_with_one_altered_weight_does_not_pass(one: tuple[nn.Module, Path], tmp_path: Path, place: str) -> None:
    proto = onnx.load(one[1])
    weights = next(entry for entry in proto.graph.initializer if entry.name.startswith(place))
    values = numpy_helper.to_array(weights).copy()
    values.flat[5] += 0.05
    weights.CopyFrom(numpy_helper.from_array(values, weights.name))
    onnx.save(proto, tmp_path / "altered.onnx")
    with pytest.raises(ExportError, match=r"altered.onnx does not compute .* max_abs_difference 0\.\d"):
        verify(one[0], tmp_path / "altered.onnx", pictures_to_prove_on(), **LOOSE)


def test_file_that_answers_nan_does_not_pass(one: tuple[nn.Module, Path], tmp_path: Path) -> None:
    proto = onnx.load(one[1])
    bias = next(entry for entry in proto.graph.initializer if entry.name == "head.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(10, np.nan, np.float32), bias.name))
    onnx.save(proto, tmp_path / "nan.onnx")
    with pytest.raises(ExportError, match="max_abs_difference nan"):
        verify(one[0], tmp_path / "nan.onnx", pictures_to_prove_on(), **LOOSE)


def test_file_fixed_to_one_batch_size_is_refused(one: tuple[nn.Module, Path], tmp_path: Path) -> None:
    proto = onnx.load(one[1])
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 32
    onnx.save(proto, tmp_path / "fixed.onnx")
    with pytest.raises(InputError, match=r"fixed.onnx takes .*\[32, 3, 64, 64\]"):
        verify(one[0], tmp_path / "fixed.onnx", pictures_to_prove_on(), **LOOSE)


def test_fewer_images_than_the_largest_batch_are_repeated(one: tuple[nn.Module, Path]) -> None:
    assert verify(*one, pictures_to_prove_on(3), **LOOSE)["images"] == 3
    with pytest.raises(InputError, match="no test images"):
        verify(*one, [], **LOOSE)


def test_nothing_stands_at_the_place_of_a_file_that_failed(tmp_path: Path) -> None:
    place = tmp_path / "outputs" / "model.onnx"
    with pytest.raises(ExportError):
        export_proven(network("select"), card("select"), place, pictures_to_prove_on(), opset=20, atol=1e-12, rtol=0)
    assert list(place.parent.iterdir()) == []
    export_proven(network("select"), card("select"), place, pictures_to_prove_on(), opset=18, **LOOSE)
    assert [path.name for path in place.parent.iterdir()] == ["model.onnx"]
    assert onnx.load(place).opset_import[0].version == 18


def test_another_opset_than_asked_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="asked for ONNX opset 17, the exporter gave .*18"):
        export(network("select"), card("select"), tmp_path / "model.onnx", 17)
    assert not list(tmp_path.iterdir())


def test_over_parameterised_network_is_refused(tmp_path: Path) -> None:
    model = overparameterize(network("select"), "kflo", depth=2, width=2)
    with pytest.raises(InputError, match="collapse it before"):
        export(model, card("select"), tmp_path / "model.onnx", 20)


def test_missing_truncated_and_foreign_files_are_named(one: tuple[nn.Module, Path], tmp_path: Path) -> None:
    content = one[1].read_bytes()
    proto = onnx.load(one[1])
    del proto.metadata_props[:]
    for name, damaged in {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "nearly": content[:-1],
        "text": b"import torch\n" * 50,
    }.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(damaged)
        for read in (open_session, read_metadata):
            with pytest.raises(InputError, match=f"{name}.onnx"):
                read(path)
    (tmp_path / "foreign.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="foreign.onnx was not exported by Winnow"):
        read_metadata(tmp_path / "foreign.onnx")
    for read in (open_session, read_metadata):
        with pytest.raises(InputError, match="absent.onnx does not exist"):
            read(tmp_path / "absent.onnx")


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU: the provider is not absent")


@no_gpu
def test_cuda_is_absent_here_and_the_reason_is_told(one: tuple[nn.Module, Path]) -> None:
    with pytest.raises(AbsentProvider, match="driver"):
        open_session(one[1], "cuda")


@no_gpu
def test_session_that_fell_back_to_the_cpu_is_not_taken(one: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.inference._require_cuda", lambda _: None)  # as where a driver is but no CUDA library
    with pytest.raises(AbsentProvider):
        open_session(one[1], "cuda")
