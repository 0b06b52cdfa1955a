"""An exported network as `mlflow models serve` serves it: the logits of ONNX Runtime, and clean errors."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import sample_records
import served

from pipeline.deployment import Tracking
from pipeline.tracking_model import log_model
from pipeline.tracking_server import session

WAIT_S = 90
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::UserWarning:mlflow"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network on pictures of any size."""
    path = tmp_path_factory.mktemp("model") / "pictures.onnx"
    path.write_bytes(sample_records.pictures_bytes())
    return path


@pytest.fixture(scope="module")
def address(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server with the network, logged as the chain's publication does it."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    with session(uri, Tracking(experiment="winnow", timeout_s=10), folder) as (client, experiment_id):
        run = client.create_run(experiment_id)
        log_model(client, experiment_id, run.info.run_id, {}, model)
        (logged,) = client.search_logged_models([experiment_id])
    port, _ = served.free_ports()
    words = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", f"models:/{logged.model_id}"]
    words += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONWARNINGS": "ignore"}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}/ping", process, folder / "log.txt")
        yield f"http://127.0.0.1:{port}"
    finally:
        served.end(process)


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + WAIT_S
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"mlflow models serve does not start: {log.read_text()[-3000:]}")


def ask(address: str, value: Any) -> tuple[int, Any]:
    """Status and answer of a request."""
    body = json.dumps({"inputs": {"pictures": value}}).encode()
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("shape", [(1, 4, 4, 1), (5, 4, 4, 1), (3, 9, 7, 1)])
def test_the_server_answers_as_onnx_runtime_does(shape, address, model):
    pictures = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    opened = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in opened.get_outputs()]
    status, answer = ask(address, pictures.tolist())
    assert status == 200 and set(answer["predictions"]) == set(names) == {"probabilities", "logits"}
    for name, wanted in zip(names, opened.run(names, {"pictures": pictures}), strict=True):
        np.testing.assert_array_equal(np.float32(answer["predictions"][name]), wanted)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (np.zeros((1, 4, 4, 3), int).tolist(), "Shape of input (1, 4, 4, 3) does not match expected shape (-1, -1, -1, 1)"),
        (np.zeros((4, 4), int).tolist(), "Shape of input (4, 4) does not match expected shape (-1, -1, -1, 1)"),
        ([[[["red"]]]], "invalid literal for int() with base 10: 'red'"),
    ],
    ids=["channels", "axes", "type"],
)
def test_a_mistake_gets_a_clean_error_and_the_server_goes_on(wrong, said, address):
    status, told = ask(address, wrong)
    assert status == 400 and said in json.loads(told)["message"]
    assert ask(address, np.zeros((1, 4, 4, 1), int).tolist())[0] == 200
