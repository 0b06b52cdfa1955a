"""What a stage of training leaves behind: the test split decides nothing, the control trains as much, the record tells it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import DIET, REACTIVATION, RESTART, SELECTIVE, TEACHER, fit, method, network, outcome, run_on

from pipeline import chain, checkpoint, files, methods, models
from pipeline.config import Augment, Fit, Runtime, Variants, parse, read_params
from pipeline.data.batches import SPLITS, Prepared
from pipeline.distillation import Distillation
from pipeline.hooks import Hook
from pipeline.overparameterize import overparameterize
from pipeline.records import Record
from pipeline.training import train

EXPANSION: dict[str, Any] = {"depth": 2, "width": 1.5, "l2_factor": 1.0, "mixer_decay": 1e-9}
METHODS: dict[str, Callable[[], list[Hook]]] = {
    "control": lambda: [method("revive", "finetune")],
    "reactivation": lambda: [method("revive", "reactivation", **REACTIVATION, momentum="keep")],
    "restart": lambda: [method("revive", "restart", **{**RESTART, "patience": 1, "target": 0.5, "max_drop": 0.3})],
    "diet": lambda: [Distillation(TEACHER), method("compress", "diet", **DIET)],
    "selective": lambda: [method("compress", "selective", **SELECTIVE)],
}


def with_another_test_split(data: Prepared, folder: Path) -> Prepared:
    """The same training and validation images; negatives with wrong labels to test on."""
    folder.mkdir()
    for split in SPLITS:
        images, labels = (np.load(data.folder / f"{split}_{kind}.npy") for kind in ("images", "labels"))
        if split == "test":
            images, labels = 255 - images, (labels + 1) % 10
        np.save(folder / f"{split}_images.npy", images)
        np.save(folder / f"{split}_labels.npy", labels)
    return replace(data, folder=folder)


def stage(data: Prepared, hooks: list[Hook], out: Path, chosen: Fit) -> dict[str, Any]:
    """A stage on the expanded cifar_quick; what it wrote to record.json."""
    runtime = Runtime(device="cpu", threads=1, workers=0, processes=1, hosts=1, save_s=60, launch="eager")
    augment = Augment(pad=1, pad_mode="zero", flip=False, scale=None)
    where = chain.Setting(data, augment, runtime, torch.device("cpu"), out / "resume")
    torch.manual_seed(0)
    model = overparameterize(models.build("cifar_quick", input_shape=data.shape, classes=10), "kflo", **EXPANSION)
    card = checkpoint.new_card({"name": "cifar_quick", "arguments": {}}, data)
    card["expansion"] = {"method": "kflo", "arguments": EXPANSION}
    record = Record("compress", "a-b-5", {"anything": 1}, revive="a", compress="b", seed=5)
    chain.train_stage(where, record, model, card, fit=chosen, hooks=hooks, out=out)
    assert len(list((out / "resume").iterdir())) <= 1  # its own, until the next stage has taken what it led to
    return files.read_json(out / "record.json")


@pytest.mark.parametrize("name", METHODS)
def test_the_test_split_decides_nothing(name: str, tiny: Prepared, tmp_path: Path) -> None:
    chosen = fit(select="best", epochs=2)
    other = with_another_test_split(tiny, tmp_path / "data")
    first = stage(tiny, METHODS[name](), tmp_path / "first", chosen)
    second = stage(other, METHODS[name](), tmp_path / "second", chosen)
    for file in ("model.safetensors", "model.json"):
        assert (tmp_path / "first/model" / file).read_bytes() == (tmp_path / "second/model" / file).read_bytes()
    assert first["events"] == second["events"] and first["metrics"]["test_loss"] != second["metrics"]["test_loss"]
    for metric in ("validation_accuracy", "parameters", "epochs"):
        assert first["metrics"][metric] == second["metrics"][metric]
    for file in other.folder.glob("test_*"):
        file.unlink()
    train(run_on(other, network(), chosen), METHODS[name]())  # nothing misses it


@pytest.mark.parametrize("name", METHODS)
def test_a_stage_whose_end_nobody_noted_does_not_train_again(
    name: str, tiny: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = stage(tiny, METHODS[name](), tmp_path / "out", fit(epochs=2))
    written = {path: path.read_bytes() for path in (tmp_path / "out/model").iterdir()}
    shutil.rmtree(tmp_path / "out/model")
    capsys.readouterr()
    again = stage(tiny, METHODS[name](), tmp_path / "out", fit(epochs=2))
    epochs = once["metrics"]["epochs"]
    assert capsys.readouterr().out == f"compress: goes on after epoch {epochs} of {epochs}\n"
    assert {path: path.read_bytes() for path in (tmp_path / "out/model").iterdir()} == written
    for key in ("metrics", "history", "events", "notes"):
        assert once[key] == again[key], key


def test_a_record_tells_what_the_written_model_does(tiny: Prepared, tmp_path: Path) -> None:
    record = stage(tiny, METHODS["selective"](), tmp_path, fit(epochs=2))
    model, card = checkpoint.load(tmp_path / "model")
    mean, std = tiny.mean[0], tiny.std[0]
    pixels = np.load(tiny.folder / "test_images.npy").astype(np.float64) / 255
    images = torch.from_numpy((pixels.transpose(0, 3, 1, 2) - mean) / std).float()
    labels = torch.from_numpy(np.load(tiny.folder / "test_labels.npy"))
    with torch.no_grad():
        right = int((model(images).argmax(1) == labels).sum())
    assert record["metrics"]["test_accuracy"] == right / 64
    assert record["metrics"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert record["metrics"]["epochs"] == len(record["history"]) == 2
    assert [event["kind"] for event in record["events"]] == ["dealloc", "surgery", "batchnorm"]
    assert any("selective leaves the inputs of conv1, fc1, fc2 whole" in note for note in record["notes"])
    convolutions = {row["name"]: row for row in record["layers"]}
    removed = record["events"][1]["removed"]
    for name in ("conv2", "conv3"):
        row = convolutions[name]
        assert row["type"] == "Conv2d" and row["full_inputs"] - row["inputs"] == removed[name] > 0
    widths = {"inputs": 64, "outputs": 10, "full_inputs": 64, "full_outputs": 10, "groups": 1}
    assert convolutions["fc2"] == {"name": "fc2", "type": "Linear", **widths}
    lineage = {"stage": "compress", "variant": "a-b-5", "seed": 5, "parameters": {"anything": 1}}
    assert card["stages"] == [lineage] and card["data"] == tiny.fingerprint == record["data"]


def test_the_best_epoch_is_kept_where_the_fit_asks_for_it(tiny: Prepared) -> None:
    scores = {}
    for select in ("best", "last"):
        run = run_on(tiny, network(), fit(select=select, lr=1.5, schedule="constant", momentum=0.0, epochs=6))
        train(run, [])
        accuracies = [row["validation_accuracy"] for row in run.history]
        images, labels = next(iter(run.validation.epoch(0)))
        with torch.no_grad():
            scores[select] = float((run.model(images).argmax(1) == labels).float().mean())
        assert scores[select] == pytest.approx(max(accuracies) if select == "best" else accuracies[-1])
    assert scores["best"] > scores["last"]  # else this says nothing


@pytest.mark.parametrize("expand", [False, True], ids=["plain", "kflo"])
def test_a_method_without_edits_is_its_control_bit_for_bit(expand: bool, tiny: Prepared) -> None:
    runs = []
    nothing = {**REACTIVATION, "rounding": "floor", "alpha": 0.0, "momentum": "keep"}
    for hook in (method("revive", "finetune"), method("revive", "reactivation", **nothing), method("compress", "finetune")):
        runs.append(run_on(tiny, network(expand)))
        train(runs[-1], [hook])
        runs[-1].events, runs[-1].notes = [], []
    assert outcome(runs[0]) == outcome(runs[1]) == outcome(runs[2])


def test_every_variant_of_the_default_grid_trains_as_many_epochs_as_its_control() -> None:
    params = read_params(Path(__file__).parent.parent / "params.yaml")
    grid = parse("variants", params["variants"], Variants)
    for family, names in (("revive", grid.revive), ("compress", grid.compress)):
        planned = set()
        for name in names:
            options = methods.options(family, f"{family}.{name}", params[family][name])
            planned.add(sum(methods.load(family, options.method).create(options).rounds(options.fit.epochs)))
        assert len(planned) == 1, (family, planned)


def test_no_epochs_leave_the_weights_as_they_are(tiny: Prepared) -> None:
    run = run_on(tiny, network(), fit(epochs=0))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    assert train(run, [method("revive", "finetune")]) is run.model and not run.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items()) and run.history == []
