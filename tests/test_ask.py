"""Asking a served model: pictures' files, answers in words, and a real server of MLflow's with a registered champion."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import sample_records
import yaml
from PIL import Image

from pipeline import asking, files
from pipeline.errors import InputError
from stages import ask, champion, serve, track

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["zero", "one", "two"]
ANY = asking.Form(None, None, 1, "classify", CLASSES)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::UserWarning:mlflow"),
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the records, exports and prepared data of one variant in fp32."""
    from pipeline.config import Data
    from pipeline.data.prepare import prepare

    sample_records.write(sample_records.grid((0,), ("finetune",), ("none",)), tmp_path / "outputs")
    params = yaml.safe_load(Path("params.yaml").read_text())
    params |= {"variants": {"revive": ["finetune"], "compress": ["none"]}}
    params["champion"] = {"best": "accuracy", "at_most": {}, "at_least": {}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    prepare(Data.model_validate(params["data"]), tmp_path / "outputs" / "prepare" / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WINNOW_PORT", str(free.getsockname()[1]))
    return tmp_path


def expected(pixels: np.ndarray) -> np.ndarray:
    """What ONNX Runtime answers for uint8 (N, H, W, C)."""
    session = onnxruntime.InferenceSession(sample_records.pictures_bytes(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["probabilities"], {"pictures": pixels})[0])


def test_the_published_champion_is_served_and_answers_with_class_names(project, capsys):
    champion.main()
    track.main()
    words = [sys.executable, "-m", "stages.serve"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (project / "server.log").open("w") as log:
        server = subprocess.Popen(words, cwd=project, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait(asking.address(), server, project / "server.log")
        pixels = np.random.default_rng(0).integers(0, 256, (7, 5), dtype=np.uint8)
        Image.fromarray(pixels).convert("RGB").save("picture.png")
        capsys.readouterr()
        ask.main("picture.png")
        said, probabilities = capsys.readouterr().out, expected(pixels[None, :, :, None])[0]
        order = np.argsort(-probabilities)
        listed = [f"{CLASSES[index]} ({100 * probabilities[index]:.1f} %)" for index in order]
        assert said == f"picture.png: {listed[0]}; then {', '.join(listed[1:])}\n"
        ask.main("")
        said = capsys.readouterr().out
        labels, images = (np.load(f"outputs/prepare/data/test_{name}.npy") for name in ("labels", "images"))
        assert said.startswith(f"test image {len(labels) // 2} of digits, which is {labels[len(labels) // 2]}: ")
        printed = (project / "server.log").read_text()
        assert f"curl {asking.address()}/invocations" in printed and "version 1" in printed
        answer = asking.ask(asking.address(), Path("outputs/serve/picture.json").read_bytes())  # what the printed line sends
        assert np.allclose(answer["probabilities"], expected(images[len(images) // 2][None]), atol=1e-6) and answer.keys() == {
            "probabilities",
            "logits",
        }
        with pytest.raises(InputError, match="refuses"):
            asking.ask(asking.address(), asking.body(np.zeros((1, 4, 4, 3), np.uint8)))
        with pytest.raises(InputError, match="is taken: stop what listens there, or choose another one"):
            serve.main()
    finally:
        server.terminate()
        server.wait(20)


def wait(address: str, server: subprocess.Popen, log: Path) -> None:
    """Until the server is ready, two minutes at most."""
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/ping", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def test_without_a_publication_or_a_champion_nothing_is_served(project):
    with pytest.raises(InputError, match="published.json does not exist"):
        serve.main()
    told = {"uri": "http://away:1", "published": False, "reason": "no server"}
    files.write_json(Path("outputs/track/published.json"), told)
    with pytest.raises(InputError, match=r"nothing was published to MLflow \(no server\)"):
        serve.main()
    files.write_json(Path("outputs/track/published.json"), {"uri": "sqlite:////gone.db", "published": True, "champion": None})
    files.write_json(Path("outputs/champion/champion.json"), {"champion": None, "reason": "none of the 1 keeps macs <= 1"})
    for stage in (serve.main, lambda: ask.main("")):
        with pytest.raises(InputError, match="no variant is the champion: none of the 1 keeps"):
            stage()
    champion.main()
    with pytest.raises(InputError, match="no champion yet"):
        serve.main()
    files.write_json(Path("outputs/track/published.json"), {"uri": "sqlite:////gone.db", "published": True, "champion": "1"})
    with pytest.raises(InputError, match="is gone"):
        serve.main()


def test_mistakes_of_the_user_are_named(project, monkeypatch):
    champion.main()
    with pytest.raises(InputError, match="no server answers at http://127.0.0.1:.*make serve"):
        ask.main("")
    Path("text.png").write_text("no picture")
    with pytest.raises(InputError, match="text.png"):
        ask.main("text.png")
    with pytest.raises(FileNotFoundError, match="lost.png"):  # stages.run says it in a line
        ask.main("lost.png")
    monkeypatch.setenv("WINNOW_PORT", "five")
    with pytest.raises(InputError, match="WINNOW_PORT = 'five'"):
        ask.main("")


@contextmanager
def answering(status: int, content: bytes) -> Iterator[str]:
    """A server that answers every request alike."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (400, json.dumps({"error_code": "BAD_REQUEST", "message": "wrong\nshape"}).encode(), r"refuses \(400\): wrong shape"),
        (500, b"<html>broken</html>", r"refuses \(500\): <html>broken</html>"),
        (200, b"<html>hello</html>", "no server of models"),
        (200, b'{"answers": 1}', "no server of models"),
        (200, b'{"predictions": [1, 2]}', "serves another model"),
    ],
)
def test_an_answer_that_is_none_is_told_from_a_missing_server(status, content, said):
    with answering(status, content) as server, pytest.raises(InputError, match=said):
        asking.ask(server, b"{}")


def test_a_picture_is_converted_and_resized_only_where_the_model_needs_it(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found, done = asking.read(tmp_path / "a.png", asking.Form(None, None, 3, "classify", CLASSES))
    assert np.array_equal(found, pixels[None]) and done == ""
    grey, _ = asking.read(tmp_path / "a.png", ANY)
    assert np.array_equal(grey[0, :, :, 0], np.asarray(Image.fromarray(pixels).convert("L")))
    small, done = asking.read(tmp_path / "a.png", asking.Form(3, 4, 3, "classify", CLASSES))
    assert small.shape == (1, 3, 4, 3) and small.dtype == np.uint8 and done == "resized from 8x6 to 4x3 pixels"
    assert abs(small.mean() - pixels.mean()) < 5


def test_masks_and_depths_are_summarised():
    mask = np.array([[0.9, 0.2], [0.5, 0.4]])
    found = asking.words({"probabilities": [[mask.tolist()]]}, asking.Form(None, None, 3, "segment", ["car"]))
    assert found == "car in 50.0 % of 2x2 pixels"
    depth = {"depth": [[[[1.0, 2.0, 4.0]]]]}
    assert (
        asking.words(depth, asking.Form(None, None, 3, "depth", ["depth"])) == "depth of 3x1 pixels: 1.00 to 4.00 m, median 2.00 m"
    )
    for task in ("classify", "segment", "depth"):
        with pytest.raises(InputError, match="the server answers"):
            asking.words({"probabilities": [[0.5, 0.5]], "depth": []}, asking.Form(None, None, 3, task, CLASSES))


def test_the_form_is_read_from_the_file(tmp_path):
    (tmp_path / "pictures.onnx").write_bytes(sample_records.pictures_bytes())
    assert asking.form(tmp_path / "pictures.onnx") == ANY
    (tmp_path / "model.onnx").write_bytes(sample_records.onnx_bytes())
    with pytest.raises(InputError, match="takes no pictures"):
        asking.form(tmp_path / "model.onnx")
    with pytest.raises(InputError, match="does not exist"):
        asking.form(tmp_path / "lost.onnx")
