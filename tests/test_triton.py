"""A real Triton server on the repository that the chain writes: a client gets what ONNX Runtime gives, and clean errors."""

import contextlib
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import served
import small_chain
from onnx import numpy_helper

from pipeline.export import read_metadata, write

IMAGES = 1000
SIZES = (1, 2, 3, 5, 8, 13, 32, 64)
PRECISION = {"finetune-none-0": "fp32", "finetune-none-0-tensors": "fp32"}
PRECISION |= {"finetune-none-0-int8": "int8", "finetune-none-0-int8-tensors": "int8"}
Served = tuple[Path, served.Server]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A workspace with the repository of the small grid, as the stage writes it, and Triton on it, which looks for new versions."""
    try:
        packages = served.install()
    except served.Unavailable as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("site")
    small_chain.build(folder)
    with contextlib.chdir(folder):
        assert small_chain.call("repository") == 0
    with served.served(packages, folder / "repository", folder / "triton", poll=True) as server:
        yield folder, server


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, site: Served) -> Iterator["Client"]:
    made = Client(request.param, site[1])
    yield made
    made.client.close()


class Client:
    """Triton's standard client, over HTTP or gRPC."""

    def __init__(self, protocol: str, server: served.Server) -> None:
        self.protocol, self.kind = protocol, _module(protocol)
        self.client = self.kind.InferenceServerClient(getattr(server, protocol))

    def ask(self, model: str, array: np.ndarray, version: str = "", classes: int = 0) -> dict[str, np.ndarray]:
        """The model's answer by the names of its outputs."""
        given = self.given(model, array)
        asked = [self.kind.InferRequestedOutput("probabilities", class_count=classes)] if classes else None
        found = self.client.infer(model, [given], outputs=asked, model_version=version)
        return {name: found.as_numpy(name) for name in outputs(model, bool(classes))}

    def given(self, model: str, array: np.ndarray) -> Any:
        kinds = {"uint8": "UINT8", "float32": "FP32", "float64": "FP64"}
        made = self.kind.InferInput("images" if model.endswith("-tensors") else "pictures", array.shape, kinds[str(array.dtype)])
        made.set_data_from_numpy(array)
        return made

    def error(self, call: Callable[[], Any]) -> tuple[str, str]:
        """Status and message of a request that must fail."""
        from tritonclient.utils import InferenceServerException

        with pytest.raises(InferenceServerException) as caught:
            call()
        return str(caught.value.status()).removeprefix("StatusCode."), str(caught.value.message())


def _module(protocol: str) -> ModuleType:
    import tritonclient.grpc
    import tritonclient.http

    return {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]


def outputs(model: str, classified: bool = False) -> list[str]:
    return ["logits"] if model.endswith("-tensors") else ["probabilities"] if classified else ["probabilities", "logits"]


def split(folder: Path, model: str) -> tuple[np.ndarray, np.ndarray]:
    """The test split as the model takes it, and its labels."""
    data = folder / "outputs/prepare/data"
    pictures, labels = np.load(data / "test_images.npy"), np.load(data / "test_labels.npy")
    if not model.endswith("-tensors"):
        return pictures, labels
    told = read_metadata(folder / "outputs/export/finetune-none-0/fp32/model.onnx")
    mean, std = (np.float32(told[key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    return (pictures.transpose(0, 3, 1, 2).astype(np.float32) / 255 - mean) / std, labels


def batches(images: np.ndarray) -> Iterator[np.ndarray]:
    """`IMAGES` of them, in batches of all `SIZES`."""
    images, start, number = np.resize(images, (IMAGES, *images.shape[1:])), 0, 0
    while start < IMAGES:
        yield images[start : start + SIZES[number % len(SIZES)]]
        start, number = start + SIZES[number % len(SIZES)], number + 1


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def reference(path: Path, images: np.ndarray, names: list[str]) -> list[np.ndarray]:
    opened = session(path)
    return opened.run(names, {opened.get_inputs()[0].name: images})


def test_the_server_computes_with_the_runtime_that_it_is_compared_with():
    pinned = (served.FILES / "requirements.txt").read_text()
    locked = (served.ROOT / "requirements.lock").read_text()
    version = pinned.split("onnxruntime==")[1].split()[0]
    assert f"onnxruntime-gpu=={version} " in locked, "raise onnxruntime in tests/tritonserver/requirements.txt too"


@pytest.mark.parametrize("model", [*PRECISION, "champion"])
def test_a_thousand_images_are_answered_as_by_onnx_runtime_and_as_right_as_recorded(model, client, site):
    folder, name = site[0], json.loads((site[0] / "outputs/champion/champion.json").read_text())["champion"]
    record = folder / "outputs/export/finetune-none-0" / PRECISION[name if model == "champion" else model] / "record.json"
    images, labels = split(folder, model)
    opened, answers = session(folder / "repository" / model / "1/model.onnx"), []
    for batch in batches(images):
        found = client.ask(model, batch, version="1")
        wanted = opened.run(outputs(model), {opened.get_inputs()[0].name: batch})
        for output, value in zip(outputs(model), wanted, strict=True):
            np.testing.assert_array_equal(found[output], value)
        answers.append(found["logits"].argmax(1))
    assert sum(map(len, answers)) == IMAGES >= len(labels)
    right = np.concatenate(answers)[: len(labels)] == labels
    assert right.mean() == pytest.approx(json.loads(record.read_text())["metrics"]["test_accuracy"], abs=1e-12)


def test_the_classification_extension_answers_with_class_names(client, site):
    images, _ = split(site[0], "champion")
    found = client.ask("champion", images[:7], classes=2)["probabilities"]
    likely = client.ask("champion", images[:7])["probabilities"]
    names = (site[0] / "repository/champion/labels.txt").read_text().splitlines()
    for row, told in zip(likely, found, strict=True):
        for index, text in zip(np.argsort(-row)[:2], told, strict=True):
            value, number, name = text.decode().split(":")
            assert (int(number), name) == (index, names[index]) and float(value) == pytest.approx(row[index], abs=1e-5)


def test_curl_gets_a_class_name_for_a_picture(site):
    folder, server = site
    pictures = split(folder, "champion")[0][:1]
    (wanted,) = reference(folder / "repository/champion/1/model.onnx", pictures, ["probabilities"])
    asked = {"name": "pictures", "shape": pictures.shape, "datatype": "UINT8", "data": pictures.ravel().tolist()}
    answer = {"name": "probabilities", "parameters": {"classification": 1}}
    body = json.dumps({"inputs": [asked], "outputs": [answer]}).encode()
    with urllib.request.urlopen(f"http://{server.http}/v2/models/champion/infer", body, timeout=30) as reply:
        (told,) = json.load(reply)["outputs"][0]["data"]
    assert told.split(":")[1:] == [str(wanted.argmax()), str(wanted.argmax())]  # the digits' classes are called "0" to "9"


@pytest.mark.parametrize(
    ("model", "version", "array", "http", "grpc", "said"),
    [
        ("champion", "", np.zeros((1, 16, 16, 3), np.uint8), "400", "INVALID_ARGUMENT", "unexpected shape for input 'pictures'"),
        ("champion", "", np.zeros((16, 16), np.uint8), "400", "INVALID_ARGUMENT", "unexpected shape for input 'pictures'"),
        ("champion", "", np.zeros((65, 16, 16, 1), np.uint8), "400", "INVALID_ARGUMENT", "batch-size must be <= 64"),
        ("champion", "", np.zeros((1, 16, 16, 1), np.float32), "400", "INVALID_ARGUMENT", "data-type is 'FP32'"),
        ("finetune-none-0-tensors", "", np.zeros((1, 1, 8, 8), np.float32), "400", "INVALID_ARGUMENT", "unexpected shape"),
        ("finetune-none-0-tensors", "", np.zeros((1, 1, 16, 16), np.float64), "400", "INVALID_ARGUMENT", "data-type is 'FP64'"),
        ("nobody", "", np.zeros((1, 16, 16, 1), np.uint8), "404", "NOT_FOUND", "unknown model: 'nobody'"),
        ("champion", "77", np.zeros((1, 16, 16, 1), np.uint8), "404", "NOT_FOUND", "'champion' version 77"),
    ],
    ids=lambda value: f"{value.shape}" if isinstance(value, np.ndarray) else None,
)
def test_a_mistake_gets_a_clean_error_and_the_server_goes_on(model, version, array, http, grpc, said, client, site):
    given = client.given(model, array)
    status, message = client.error(lambda: client.client.infer(model, [given], model_version=version))
    assert status == {"http": http, "grpc": grpc}[client.protocol] and said in message
    assert site[1].is_ready() and client.client.is_model_ready("champion")
    assert client.ask("champion", split(site[0], "champion")[0][:1])["logits"].shape == (1, 10)


def test_requests_at_the_same_time_are_answered_together(site):
    images, answers = split(site[0], "champion")[0][:256], {}
    (wanted,) = reference(site[0] / "repository/champion/1/model.onnx", images, ["logits"])
    with contextlib.closing((client := Client("grpc", site[1])).client) as asked:
        given = [client.given("champion", images[number : number + 1]) for number in range(len(images))]
        before = counts(asked)
        for number, picture in enumerate(given):
            asked.async_infer(
                "champion", [picture], lambda result, error, number=number: answers.update({number: error or result}), "1"
            )
        latest = time.monotonic() + 30
        while len(answers) < len(images) and time.monotonic() < latest:
            time.sleep(0.01)
        answered, runs = (after - first for after, first in zip(counts(asked), before, strict=True))
    found = np.concatenate([answers[number].as_numpy("logits") for number in range(len(images))])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)  # in batches of other sizes than the reference's
    assert answered == len(images) and runs <= 0.9 * answered, f"{answered} requests took {runs} runs"


def counts(client: Any) -> tuple[int, int]:
    """Images that the champion has answered, and the runs that took."""
    (stats,) = client.get_inference_statistics("champion", "1").model_stats
    return stats.inference_count, stats.execution_count


def test_a_model_built_again_loads_beside_the_old_one(site):
    folder, server = site
    path = folder / "outputs/export/finetune-none-0/fp32/pictures.onnx"
    images = split(folder, "champion")[0][:8]
    (old,) = reference(path, images, ["logits"])
    shift(path)
    with contextlib.chdir(folder):
        assert small_chain.call("repository") == 0
    (new,) = reference(path, images, ["logits"])
    assert np.abs(new - old).max() > 0.1
    with contextlib.closing((client := Client("http", server)).client) as asked:
        end = time.monotonic() + 60
        while time.monotonic() < end and not all(asked.is_model_ready("finetune-none-0", version) for version in "12"):
            time.sleep(0.2)
        for version, wanted in (("1", old), ("2", new), ("", new)):
            np.testing.assert_array_equal(client.ask("finetune-none-0", images, version=version)["logits"], wanted)


def shift(path: Path) -> None:
    """Another network of the same shape: every bias of the graph is one larger."""
    proto = onnx.load_model(path)
    for weight in proto.graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.shape == (10,) and values.dtype == np.float32:
            weight.CopyFrom(numpy_helper.from_array(values + np.float32(1), weight.name))
    write(path, proto)
