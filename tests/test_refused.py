"""What a stage cannot use gives one message, without a traceback, that says what and where, and exit code 2; every output that
was there stays as it was, byte for byte. (Of params.yaml: test_refused_parameters.py; more raw data: test_data_refused.py.)"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mistakes as do
import numpy as np
import pytest
import torch
from raw_data import random_npz
from small_chain import VARIANT, build, call, parameters, refused

from pipeline import files

ROOT = Path(__file__).parent.parent
OUT = Path("outputs")
DATA, TRAINED, REVIVED = OUT / "prepare/data", OUT / "train/0/model", OUT / "revive/finetune-0/model"
COMPRESSED, COLLAPSED = OUT / "compress/finetune-none-0/model", OUT / "collapse/finetune-none-0/model"
ONNX = OUT / "export/finetune-none-0/fp32/model.onnx"
CARD, WEIGHTS = REVIVED / "model.json", REVIVED / "model.safetensors"
PNG, NPZ = Path("raw/ant/1.png"), Path("raw.npz")

PREPARE, COVERAGE, REPORT = ("prepare",), ("coverage",), ("report",)
TRAIN, REVIVE = ("train", "0"), ("revive", "finetune", "0")
COMPRESS, COLLAPSE, EXPORT, PROFILE = ((stage, *VARIANT) for stage in ("compress", "collapse", "export", "profile"))
LAST = parameters()["train"]["fit"] | {"batch_size": 2048, "lr": 1e30, "weight_decay": 1e30, "schedule": "constant"}
KFLO = {"method": "kflo", "layers": ["*"], "depth": 2, "width": 4, "narrow": False, "mixer_decay": 0.0}


def two_classes(*changes: do.Change) -> do.Change:
    """A folder of the user's own images, right but for `changes`."""
    return do.folder(do.both(do.images({"": "ant bee"}), *changes))


def prepared_with(key: str, value: Any) -> do.Change:
    """Data prepared with another parameter than the models were made with."""
    return do.both(do.put(key, value), lambda: call("prepare"))


# Stage -> what is wrong, and the message.
FOUND: dict[tuple[str, ...], list[tuple[str, do.Change, str]]] = {
    PREPARE: [
        ("no image folder", do.folder(do.nothing), "data.root: raw is not a folder"),
        ("file for the image folder", do.folder(do.write(Path("raw"), b"x")), "data.root: raw is not a folder"),
        ("empty image folder", do.folder(lambda: Path("raw").mkdir()), "raw has 0 class folders: at least 2 are needed"),
        ("empty class folder", two_classes(lambda: Path("raw/cow").mkdir()), "raw/cow has no images"),
        ("text named .png", two_classes(do.write(PNG, b"text")), f"{PNG} cannot be read as an image"),
        ("truncated image", two_classes(do.halve(PNG)), f"{PNG} cannot be read as an image"),
        ("unreadable image", two_classes(do.remove(PNG), lambda: PNG.symlink_to("1.png")), f"{PNG} cannot be read as an image"),
        (
            "unequal classes",
            do.folder(do.images({"train": "ant bee", "test": "ant cow"})),
            "differ in the classes bee, cow",
        ),
        ("npz without a key", do.npz(lambda: random_npz(NPZ, test_labels=None)), "raw.npz lacks test_labels; it has"),
        ("npz with a pickle", do.npz(lambda: random_npz(NPZ, train_labels=np.array([{}]))), "raw.npz is no .npz file of plain"),
        ("npz of text", do.npz(do.write(NPZ, b"text")), "raw.npz is no .npz file of plain arrays"),
        ("published data absent", do.folder(do.nothing, name="cifar100"), "CIFAR100 cannot be read from raw"),
        (
            "means for RGB, images grey",
            do.put("data.mean", [0.5, 0.5, 0.5]),
            "data.mean = [0.5, 0.5, 0.5]: the images have 1",
        ),
        ("all images held out", do.put("data.validation", 0.999), "data.validation = 0.999 leaves class 0 no training image"),
        ("params.yaml missing", do.remove(Path("params.yaml")), "params.yaml does not exist: run from the project's root"),
        ("params.yaml a folder", do.folder_for_file(Path("params.yaml")), "params.yaml: Is a directory"),
        ("file for all outputs", do.file_for_folder(OUT / "prepare"), "outputs/prepare is a file where a folder"),
    ],
    COVERAGE: [
        ("nothing prepared", do.remove(DATA), f"{DATA}/data.json does not exist: run the stage that writes it first"),
        (
            "images too small",
            prepared_with("data.image_size", 8),
            "cifar_quick: images of 8x8 pixels are too small; the smallest are",
        ),
        (
            "groups do not divide",
            do.put("compress.diet.groups", 3),
            "compress.diet: diet: the 32 channels of layer conv1 do",
        ),
        (
            "protected unknown",
            do.put("compress.diet.protect", ["conv9"]),
            "compress.diet: protect = 'conv9' matches no",
        ),
        ("all protected", do.put("compress.diet.protect", ["*"]), "compress.diet: diet: every channel of the network is protected"),
        (
            "layers to start from",
            do.put("train.start_layers", ["conv1", "convolution*"]),
            "train.start_layers: no layer of this CifarQuick fits 'convolution*'; there are conv1, bn1,",
        ),
        ("expansion", do.put("train.overparameterize", KFLO), "train.overparameterize.l2_factor is missing"),
    ],
    TRAIN: [
        ("data.json cut", do.halve(DATA / "data.json"), f"{DATA}/data.json is not valid JSON"),
        ("images cut", do.halve(DATA / "train_images.npy"), f"{DATA}/train_images.npy is damaged (it has 82624 bytes, not 165248)"),
        (
            "reflection",
            do.put("augment", {"pad": 16, "pad_mode": "reflect", "flip": False, "scale": None}),
            "augment.pad = 16 cannot reflect",
        ),
        (
            "divergence in the last step",
            do.both(do.put("train.overparameterize", {"method": "none"}), do.put("train.fit", LAST)),
            "train: after epoch 1 ",
        ),
        ("divergence", do.put("train.fit.lr", 1e12), "train: the loss is nan in epoch 1 (round 1), last learning rate"),
        ("file for the model's folder", do.file_for_folder(TRAINED), f"{TRAINED} is a file where a folder is needed: move it away"),
    ],
    ("train", "zero"): [("seed in words", do.nothing, "the seed 'zero' is no whole number from 0 up")],
    ("collapse", "finetune", "none", "-1"): [("seed below 0", do.nothing, "the seed '-1' is no whole number from 0 up")],
    ("revive", "restrat", "0"): [("unknown block", do.nothing, "params.yaml: revive has no 'restrat'; it has finetune, restart")],
    ("compress", "finetune", "dite", "0"): [("unknown block", do.nothing, "compress has no 'dite'; it has none, diet")],
    ("revive", "finetune", "1"): [("seed not trained", do.nothing, "outputs/train/1/model/model.json does not exist")],
    REVIVE: [
        ("nothing trained", do.remove(TRAINED), f"{TRAINED}/model.json does not exist: run the stage that writes it first"),
        (
            "model of other data",
            prepared_with("data.split_seed", 1),
            f"{TRAINED}/model.json was made from other data than {DATA} holds",
        ),
    ],
    COMPRESS: [
        ("weights missing", do.remove(WEIGHTS), f"{WEIGHTS} does not exist: run the stage"),
        ("weights cut", do.halve(WEIGHTS), f"{WEIGHTS} is damaged ("),
        ("weights empty", do.write(WEIGHTS, b""), f"{WEIGHTS} is damaged ("),
        ("weights changed", do.alter(WEIGHTS), f"{WEIGHTS} is not the file that model.json describes"),
        ("other weights", lambda: shutil.copy(COLLAPSED / WEIGHTS.name, WEIGHTS), f"{WEIGHTS} is not the file that model.json"),
        ("card cut", do.halve(CARD), f"{CARD} is not valid JSON ("),
        ("card no card", do.write(CARD, b"[]"), f"{CARD} is damaged ("),
        ("card of another format", do.edit(CARD, "format", 2), f"{CARD} is damaged (format Input should be 1)"),
        ("card without a key", do.edit(CARD, "classes", do.CUT), f"{CARD} is damaged (classes Field required)"),
        ("card with one more key", do.edit(CARD, "extra", 1), f"{CARD} is damaged (extra Extra inputs are not permitted)"),
        (
            "card without sizes",
            do.edit(CARD, "input/shape", [1, 16]),
            f"{CARD} is damaged (input.shape List should have at",
        ),
        ("card of no network", do.edit(CARD, "network/name", "lenet"), f"{CARD} is damaged (no network can be built from it"),
        ("card of no layer", do.edit(CARD, "channels/norms/bn9", 3), f"{CARD} is damaged (no network can be built from it"),
        ("card of other widths", do.edit(CARD, "channels/filtering/fc2", [64, 9, 1]), f"{WEIGHTS}: the tensor fc2."),
        ("card without expansion", do.edit(CARD, "expansion", None), f"{WEIGHTS} has a tensor conv1.parametrizations.weight."),
    ],
    COLLAPSE: [
        ("nothing compressed", do.remove(COMPRESSED), f"{COMPRESSED}/model.json does not exist: run the stage"),
        ("file for all models", do.file_for_folder(OUT / "collapse"), "outputs/collapse is a file where a folder is needed"),
    ],
    EXPORT: [
        ("nothing collapsed", do.remove(COLLAPSED), f"{COLLAPSED}/model.json does not exist: run the stage"),
        ("not collapsed", do.copy(COMPRESSED, COLLAPSED), "the network is still over-parameterised: collapse it before"),
        ("no tolerance", do.put("export.atol", 1e-30), "does not compute what the network computes"),
    ],
    PROFILE: [
        ("nothing exported", do.remove(ONNX), f"{ONNX} does not exist: run the stage that writes it first"),
        ("no control", do.put("profile.control", "a-b"), "outputs/export/a-b-0/fp32/model.onnx does not exist: run the stage"),
        ("ONNX cut", do.halve(ONNX), f"{ONNX} is no ONNX file ("),
        ("ONNX empty", do.write(ONNX, b""), f"{ONNX} was not exported by Winnow (format 1): its metadata keys are: none"),
        (
            "ONNX from elsewhere",
            do.foreign_onnx(ONNX),
            f"{ONNX} was not exported by Winnow (format 1): its metadata keys are: none",
        ),
        (
            "batch larger than memory",
            do.put("profile.batch_sizes", [10**13]),
            "there is not enough memory for it (",
        ),
    ],
    REPORT: [("record cut", do.halve(ONNX.with_name("record.json")), f"{ONNX.parent}/record.json is not valid JSON (")],
}
CASES = [(words, *case) for words, cases in FOUND.items() for case in cases]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("built")
    build(home)
    return home


@pytest.fixture
def workspace(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a built chain, as the working directory."""
    shutil.copytree(built, tmp_path / "workspace")
    monkeypatch.chdir(tmp_path / "workspace")
    return tmp_path / "workspace"


Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("words", "change", "message"), [(case[0], *case[2:]) for case in CASES], ids=[f"{case[0][0]}: {case[1]}" for case in CASES]
)
def test_what_a_stage_cannot_use_is_refused_by_name(
    words: tuple[str, ...], change: do.Change, message: str, workspace: Path, capfd: Capture
) -> None:
    change()
    said = refused(words, capfd)
    assert said.startswith(f"stages.{' '.join(words)}: ") and message in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(workspace: Path, capfd: Capture) -> None:
    do.put("runtime.device", "cuda")()
    assert "runtime.device = 'cuda', but torch finds no CUDA device here; use auto or cpu" in refused(TRAIN, capfd)


@pytest.mark.parametrize("words", [TRAIN, REVIVE, COMPRESS, COLLAPSE, EXPORT, PREPARE], ids=lambda words: words[0])
def test_a_wrong_number_of_words_gives_the_usage(words: tuple[str, ...], workspace: Path, capfd: Capture) -> None:
    assert refused((*words, "more"), capfd).startswith(f"usage: python -m stages.{words[0]}")
    if len(words) > 1:
        assert refused(words[:-1], capfd).rstrip().endswith(" SEED")


@pytest.mark.parametrize("state", ["full", "read-only"])
@pytest.mark.parametrize(
    ("words", "place"),
    [(PREPARE, "prepare"), (TRAIN, "resume"), (COLLAPSE, "collapse"), (EXPORT, "export")],
    ids=["prepare", "train", "collapse", "export"],
)
def test_a_disk_that_takes_nothing_is_told_and_keeps_what_was_there(
    words: tuple[str, ...], place: str, state: str, workspace: Path, capfd: Capture
) -> None:
    (OUT / place).mkdir(exist_ok=True)
    if words == PREPARE:
        do.put("data.image_size", 24)()  # more than there is now
    with do.disk(OUT / place, read_only=state == "read-only") as reason:
        said = refused(words, capfd)
    assert f"stages.{' '.join(words)}: outputs/{place}/" in said and reason in said


def test_a_file_that_cannot_grow_is_told_and_stays(workspace: Path, capfd: Capture) -> None:
    with do.small_files():
        assert f"{COLLAPSED}/model.safetensors: File too large" in refused(COLLAPSE, capfd)


@pytest.mark.parametrize(
    ("words", "change", "message"),
    [
        (("check",), do.put("model.name", "lenet"), "params.yaml: model.name = 'lenet': must be one of"),
        (PREPARE, do.folder(do.nothing), "data.root: raw is not a folder"),
        (COMPRESS, do.halve(WEIGHTS), f"{WEIGHTS} is damaged ("),
    ],
    ids=lambda words: words[0] if isinstance(words, tuple) else "",
)
def test_the_command_itself_says_one_line_and_exits_with_2(
    words: tuple[str, ...], change: do.Change, message: str, workspace: Path
) -> None:
    change()
    command = [sys.executable, "-m", f"stages.{words[0]}", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"stages.{' '.join(words)}: {message}")


def test_what_a_killed_write_left_is_swept_and_a_living_one_is_not(tmp_path: Path) -> None:
    dead, alive = (tmp_path / f".a.json.{process}.partial" for process in (2**22 + 1, os.getppid()))  # pids end at 2^22
    for partial in (dead, alive):
        partial.write_text("{")
    files.write_json(tmp_path / "a.json", 1)
    assert sorted(tmp_path.iterdir()) == [alive, tmp_path / "a.json"]
