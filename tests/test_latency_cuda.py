"""Latency on a GPU: every setting runs there and computes what the CPU computes. None of the times is judged."""

import ctypes
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_latency import write_network
from test_latency_settings import options

from pipeline import hardware, latency, profiling
from pipeline.inference import Provider, caller, elsewhere, open_session, provider_settings, runs_on

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CLOSE = {"rtol": 1e-2, "atol": 1e-3}  # TF32 keeps 10 bits


def has_tensorrt() -> bool:
    try:
        return find_spec("tensorrt_libs") is not None or bool(ctypes.CDLL("libnvinfer.so.10"))
    except OSError:
        return False


needs_tensorrt = pytest.mark.skipif(not has_tensorrt(), reason="needs TensorRT 10 (libnvinfer.so.10)")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of one file name and one set of node names, but of other widths, as the variants of a chain are."""
    folder = tmp_path_factory.mktemp("networks")
    for name in ("small", "large"):
        (folder / name).mkdir()
    return write_network(folder / "small/model.onnx", 4), write_network(folder / "large/model.onnx", 64)


def on_the_cpu(path: Path, batch: int) -> np.ndarray:
    images = np.random.default_rng(0).standard_normal((batch, 3, 12, 12), dtype=np.float32)
    return np.asarray(open_session(path).run(None, {"images": images})[0])


def check(path: Path, provider: Provider, batch: int, **words: Any) -> None:
    session = open_session(path, provider, **words)
    assert runs_on(session, provider)
    call: Any = caller(session, provider, batch)
    for _ in range(3):
        call()
    assert call.result.device_name() == "cuda"
    np.testing.assert_allclose(call.result.numpy(), on_the_cpu(path, batch), **CLOSE)


@pytest.mark.parametrize("batch", [1, 5])
def test_cuda_computes_on_the_gpu_what_the_cpu_computes(networks: tuple[Path, Path], batch: int) -> None:
    check(networks[0], "cuda", batch)
    assert elsewhere(open_session(networks[0], "cuda"), "cuda") == {}


def test_host_copies_give_an_array_of_the_host(networks: tuple[Path, Path]) -> None:
    (found,) = caller(open_session(networks[0], "cuda"), "cuda", 5, copies=True)()  # type: ignore[misc]
    np.testing.assert_allclose(found, on_the_cpu(networks[0], 5), **CLOSE)


@pytest.mark.parametrize("batch", [1, 5])
def test_cuda_graph_replays_the_network(networks: tuple[Path, Path], batch: int) -> None:
    check(networks[0], "cuda", batch, fixed=batch, settings=provider_settings("cuda", "fp32", graph=True))


def test_comparison_on_cuda_has_its_statistics(networks: tuple[Path, Path]) -> None:
    words: dict[str, Any] = {"threads": 1, "warmup_s": 0.05, "repeats": 20, "stability": 0.5, "attempts": 2}
    found = latency.compare(*networks, "cuda", 4, **words)
    assert 0 < found["variant"]["ci_low_ms"] <= found["variant"]["p50_ms"] <= found["variant"]["p99_ms"]


def test_profile_on_cuda_has_every_setting_and_the_gpu_s_state(networks: tuple[Path, Path], tmp_path: Path) -> None:
    found = profiling.profile(networks[0], "fp32", networks[1], options(providers=["cuda"]), tmp_path)
    made = [event["mode"] for event in found.events if event["kind"] == "latency"]
    assert made == ["", "idle", "copies", "graph", "", "copies", "graph"], found.notes
    for setting in ("cuda_b1", "cuda_b1_idle", "cuda_b1_copies", "cuda_b1_graph", "cuda_b2_graph"):
        assert found.metrics[f"latency_{setting}_p50_ms"] > 0 and found.metrics[f"speedup_{setting}"] > 0
    assert all(event["tf32"] and event["elsewhere"] == {} for event in found.events)
    machine = found.events[0]["machine"]
    assert machine["libraries"]["CUDA"].split(".")[0] == str(torch.version.cuda).split(".")[0] and "cuDNN" in machine["libraries"]
    json.dumps(found.events, allow_nan=False)


def test_clocks_are_those_of_the_gpu_that_torch_sees() -> None:
    gpu = hardware.conditions(gpu=True)["gpu"]
    if not gpu:
        pytest.skip("no nvidia-smi, or it does not answer here")
    assert gpu["name"] == torch.cuda.get_device_name(0)
    assert 0 < gpu["sm_mhz"] <= gpu["sm_max_mhz"]


@needs_tensorrt
@pytest.mark.parametrize("batch", [1, 5])
def test_tensorrt_computes_what_the_cpu_computes(networks: tuple[Path, Path], batch: int, tmp_path: Path) -> None:
    for _ in range(2):  # the second time from the engine that was kept
        settings = provider_settings("tensorrt", "fp32", engines=tmp_path)
        check(networks[0], "tensorrt", batch, fixed=batch, settings=settings)
    assert list(tmp_path.glob("*.engine"))


@needs_tensorrt
def test_networks_of_one_name_share_no_engine(networks: tuple[Path, Path], tmp_path: Path) -> None:
    found = profiling.profile(networks[0], "fp32", networks[1], options(providers=["tensorrt"]), tmp_path)
    assert found.metrics["latency_tensorrt_b1_p50_ms"] > 0, found.notes
    folders = [place for place in tmp_path.iterdir() if list(place.glob("*.engine"))]
    assert len(folders) == 4  # two files at two batch sizes
