"""A picture to a model that MLflow serves, and its answer in words."""

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import files
from pipeline.champion import decided
from pipeline.errors import InputError
from pipeline.model_card import read_onnx
from pipeline.tracking_model import PICTURES

TIMEOUT_S = 60
PORT = "5001"
NAMED = 3  # classes in an answer
MOST_PIXELS = 2**18  # of a request: in JSON each takes a dozen bytes, and the server reads them one by one


@dataclass(frozen=True)
class Form:
    """What a served model takes and answers: `height` and `width` are None where it takes any; `task` as in pipeline/scores.py."""

    height: int | None
    width: int | None
    channels: int
    task: str
    classes: list[str]


def address() -> str:
    """Where the model is served: this machine, WINNOW_PORT or 5001."""
    port = os.environ.get("WINNOW_PORT") or PORT
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"WINNOW_PORT = {port!r}: it must be a port, 1 to 65535")
    return f"http://127.0.0.1:{int(port)}"


def champion(outputs: Path) -> Path:
    """The champion's file that takes pictures, below outputs/; `InputError` where there is no champion."""
    decision = decided(outputs)
    if decision["champion"] is None:
        raise InputError(f"no variant is the champion: {decision['reason']}. Change `champion` in params.yaml, then `dvc repro`")
    variant = f"{decision['revive']}-{decision['compress']}-{decision['seed']}"
    return outputs / "export" / variant / decision["precision"] / PICTURES


def form(path: Path) -> Form:
    """That of the file at `path`, which takes pictures; `InputError` where it is missing or none of ours."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: `dvc repro`, or `dvc checkout`, puts it there")
    proto = read_onnx(path)
    told = {entry.key: entry.value for entry in proto.metadata_props}
    given = proto.graph.input[0]
    sizes = [axis.dim_value if axis.HasField("dim_value") else None for axis in given.type.tensor_type.shape.dim]
    if given.name != "pictures" or len(sizes) != 4 or sizes[3] is None or "classes" not in told:
        raise InputError(f"{path} takes no pictures: run `dvc repro`")
    return Form(sizes[1], sizes[2], sizes[3], told.get("task", "classify"), json.loads(told["classes"]))


def read(path: Path, wanted: Form) -> tuple[np.ndarray, str]:
    """A picture's file as uint8 (1, H, W, C) of the size that is wanted, and what was done to it; `InputError` where it is none."""
    from pipeline.data.stream import decode

    return fit(decode(path, path.read_bytes(), wanted.channels, None), wanted)


def example(prepared: Path) -> tuple[np.ndarray, str]:
    """The test image in the middle of prepared data, uint8 (H, W, C) as it is stored, and what it is."""
    from pipeline.data.batches import load
    from pipeline.data.stream import decode

    data = load(prepared)
    number = data.counts["test"] // 2
    told = f"test image {number} of {data.name}"
    if data.task == "classify":
        told += f", which is {data.classes[int(np.load(prepared / 'test_labels.npy', allow_pickle=False)[number])]}"
    if data.root is None:
        return np.load(prepared / "test_images.npy", mmap_mode="r", allow_pickle=False)[number].copy(), told
    path = data.root / files.read_json(prepared / "test_files.json")["paths"][number]
    return decode(path, path.read_bytes(), data.stored[0], None), told


def fit(pixels: np.ndarray, wanted: Form) -> tuple[np.ndarray, str]:
    """uint8 (H, W, C) as (1, H, W, C), stretched where the model takes one size alone, made smaller where it is larger than a
    request in JSON should be; in words what was done, or nothing."""
    from PIL import Image

    smaller = min(1.0, (MOST_PIXELS / (pixels.shape[0] * pixels.shape[1])) ** 0.5)
    height, width = wanted.height or max(1, int(pixels.shape[0] * smaller)), wanted.width or max(1, int(pixels.shape[1] * smaller))
    if pixels.shape[:2] == (height, width):
        return pixels[None], ""
    image = Image.fromarray(pixels[:, :, 0] if wanted.channels == 1 else pixels)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).reshape(1, height, width, wanted.channels)
    return resized, f"resized from {pixels.shape[1]}x{pixels.shape[0]} to {width}x{height} pixels"


def body(pictures: np.ndarray) -> bytes:
    """A request that MLflow's server understands, for uint8 (N, H, W, C)."""
    return json.dumps({"inputs": {"pictures": pictures.tolist()}}, separators=(",", ":")).encode()


def ask(server: str, content: bytes) -> dict[str, Any]:
    """The server's answer by the names of the outputs, lists of (N, ...); `InputError` says what went wrong."""
    request = urllib.request.Request(f"{server}/invocations", content, {"Content-Type": "application/json"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know this machine's ports
    try:
        with direct.open(request, timeout=TIMEOUT_S) as answer:
            found = json.load(answer)["predictions"]
    except urllib.error.HTTPError as error:
        raise InputError(f"the server at {server} refuses ({error.code}): {_message(error.read())}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"what answers at {server} is no server of models: choose another port, WINNOW_PORT=5002") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise InputError(
                f"the server at {server} did not answer within {TIMEOUT_S} s: it is busy, or the picture too large"
            ) from None
        raise InputError(f"no server answers at {server} ({reason}): start it with `make serve`, wait until it is ready") from None
    if not isinstance(found, dict):
        raise InputError(f"the server at {server} serves another model: stop it, then `make serve`")
    return found


def words(answer: dict[str, Any], wanted: Form) -> str:
    """The first picture's answer in words; `InputError` where it is not of the model that was expected."""
    output = np.asarray(answer.get("depth" if wanted.task == "depth" else "probabilities", []), dtype=np.float64)
    if wanted.task == "classify":
        if output.shape[1:] != (len(wanted.classes),):
            raise InputError(f"the server answers {output.shape}, not {len(wanted.classes)} classes: stop it, then `make serve`")
        best = np.argsort(-output[0], kind="stable")[:NAMED]
        first, *others = [f"{wanted.classes[index]} ({100 * output[0, index]:.1f} %)" for index in best]
        return f"{first}; then {', '.join(others)}" if others else first
    if output.ndim != 4 or not output.size:
        raise InputError(f"the server answers {output.shape}, not something for each pixel: stop it, then `make serve`")
    pixels, size = output[0, 0], f"{output.shape[3]}x{output.shape[2]} pixels"
    if wanted.task == "segment":
        return f"{wanted.classes[0]} in {100 * np.mean(pixels >= 0.5):.1f} % of {size}"
    return f"depth of {size}: {pixels.min():.2f} to {pixels.max():.2f} m, median {np.median(pixels):.2f} m"


def _message(content: bytes) -> str:
    """What an error's body says, in a line."""
    try:
        told = json.loads(content)
        text = str(told.get("message") or told.get("detail") or told) if isinstance(told, dict) else str(told)
    except ValueError:
        text = content.decode(errors="replace")
    text = " ".join(text.split())
    return text if len(text) <= 400 else f"{text[:120]} ... {text[-280:]}"
