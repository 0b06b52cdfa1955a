"""The chain on scenes, from params.yaml to the page: masks and depths through over-parameterisation, diet, collapse and ONNX."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import small_chain
from small_chain import call, parameters, record, write_parameters

from pipeline.report import usage
from pipeline.scores import NAMES

VARIANTS = {"segment": ("none", "diet"), "depth": ("diet",)}  # the export of a U-Net takes its time


def settings(task: str) -> dict[str, Any]:
    params = parameters()
    fit = params["train"]["fit"] | {"optimizer": "adam", "lr": 0.01, "batch_size": 16}
    params["data"] |= {"name": f"scenes_{task}", "image_size": None, "validation": 0.02, "per_class": 160}
    params["augment"] = {"pad": 2, "pad_mode": "reflect", "flip": True, "scale": None}
    params["model"] = {"name": "unet", "width": 2, "up": "transposed"}
    params["train"] |= {"fit": fit}
    teacher = {"loss": "kl" if task == "segment" else "logit_mse", "weight": 1.0, "temperature": 2.0}
    params["compress"]["diet"] |= {"fit": fit, "distill": teacher}
    params["variants"] |= {"compress": list(VARIANTS[task])}
    params["profile"] |= {"control": f"finetune-{VARIANTS[task][0]}"}
    return params


@pytest.fixture(scope="module", params=["segment", "depth"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The chain of one task in the working directory."""
    with contextlib.chdir(tmp_path_factory.mktemp(request.param)):
        write_parameters(Path(), settings(request.param))
        Path("data/start").mkdir(parents=True)
        words = [("check",), ("prepare",), ("coverage",), ("train", "0"), ("revive", "finetune", "0")]
        own = ("compress", "collapse", "export", "profile")
        words += [(stage, "finetune", name, "0") for name in VARIANTS[request.param] for stage in own]
        for each in [*words, ("champion",), ("repository",), ("report",)]:
            assert call(*each) == 0, each
        yield request.param


def test_every_stage_calls_the_score_by_its_name_and_proves_it(built: str) -> None:
    names = NAMES[built]
    for path in Path("outputs").rglob("record.json"):
        entry = json.loads(path.read_text())
        assert not any("accuracy" in key for row in [entry["metrics"], *entry["history"], *entry["events"]] for key in row), path
    for variant in VARIANTS[built]:
        figures = [record(stage, f"finetune-{variant}-0")["metrics"] for stage in ("compress", "collapse", "export")]
        for name in (names.headline, *names.beside):
            values = [metrics[f"test_{name}"] for metrics in figures]
            assert max(values) - min(values) < 1e-4 * max(values), name
        assert figures[2][names.agreement] > 0.999 and figures[2]["max_abs_difference"] < 1e-3
    small, whole = (record(*place)["metrics"]["parameters"] for place in (("collapse", "finetune-diet-0"), ("train", "0")))
    assert small < 0.35 * whole


def test_the_file_answers_every_pixel_as_the_page_says(built: str) -> None:
    path = "outputs/export/finetune-diet-0/fp32/model.onnx"
    targets, pixels = (np.load(f"outputs/prepare/data/test_{kind}.npy") for kind in ("targets", "images"))
    found: dict[str, Any] = {"path": path, "pixels": pixels.transpose(0, 3, 1, 2)}
    exec(usage.TENSORS + usage.ANSWERS[built], found)
    answers = found["answers"]
    assert answers.shape == targets.shape and found["facts"]["task"] == built
    metrics = record("export", "finetune-diet-0")["metrics"]
    if built == "segment":
        assert metrics["test_iou"] == pytest.approx((answers & (targets > 0)).sum() / (answers | (targets > 0)).sum())
    else:
        assert metrics["test_rmse_m"] == pytest.approx(np.sqrt(((answers - targets) ** 2).mean()), rel=1e-4)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    one = np.asarray(session.run(None, {"images": found["images"][:1]})[0])
    np.testing.assert_allclose(one[:, 0], np.asarray(session.run(None, {"images": found["images"][:3]})[0])[:1, 0], atol=1e-4)


def test_the_page_shows_pictures_and_the_record_stays_small(built: str) -> None:
    text = Path("outputs/report/index.html").read_text()
    assert text.count("data:image/png;base64,") == 6 * (
        3 + 4 * (3 if built == "segment" else 1)
    )  # the control, and each other beside it
    assert f"{NAMES[built].title}" in text and "accuracy" not in text.lower()
    assert Path("outputs/export/finetune-diet-0/fp32/record.json").stat().st_size < 110_000


def test_what_does_not_fit_the_task_is_refused_before_training(built: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = settings(built)
    mistakes: dict[str, tuple[Any, str]] = {
        "network": ({"model": {"name": "cifar_quick"}}, f"gives (N, 1) for images (N, 1, 32, 32), but the data's task '{built}'"),
        "smoothing": ({"train": before["train"] | {"fit": before["train"]["fit"] | {"label_smoothing": 0.1}}}, "label_smoothing"),
    }
    if built == "depth":
        diet = before["compress"]["diet"] | {"distill": {"loss": "kl", "weight": 1.0, "temperature": 2.0}}
        mistakes["teacher"] = {"compress": before["compress"] | {"diet": diet}}, "compress.diet.distill.loss = 'kl'"
    try:
        for changes, message in mistakes.values():
            write_parameters(Path(), before | changes)
            assert message in small_chain.refused(("coverage",), capfd)
    finally:
        write_parameters(Path(), before)
