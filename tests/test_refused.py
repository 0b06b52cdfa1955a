"""What a user can get wrong gives one message, without a traceback, that says what and where, and exit code 2; every output
that was there stays as it was, byte for byte."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mistakes import (
    CUT,
    Change,
    alter,
    both,
    copy,
    edit,
    file_for_folder,
    folder,
    foreign_onnx,
    full_disk,
    halve,
    images,
    npz,
    put,
    remove,
    small_files,
    write,
)
from raw_data import random_npz
from small_chain import VARIANT, build, call, parameters, write_parameters

ROOT = Path(__file__).parent.parent
OUT = Path("outputs")
FIT = parameters()["train"]["fit"]
PREPARE = ("prepare",)
COVERAGE = ("coverage",)
TRAIN = ("train", "0")
REVIVE = ("revive", "finetune", "0")
COMPRESS, COLLAPSE, EXPORT, PROFILE = ((stage, *VARIANT) for stage in ("compress", "collapse", "export", "profile"))
DATA, TRAINED, REVIVED = OUT / "prepare/data", OUT / "train/0/model", OUT / "revive/finetune-0/model"
COMPRESSED, COLLAPSED = OUT / "compress/finetune-none-0/model", OUT / "collapse/finetune-none-0/model"
ONNX = OUT / "export/finetune-none-0/model.onnx"
NOTHING: Change = lambda: None  # noqa: E731
PNG = Path("raw/ant/1.png")
CARD, WEIGHTS = REVIVED / "model.json", REVIVED / "model.safetensors"

# One parameter of a params.yaml that is right otherwise -> the message.
PARAMETERS: list[tuple[str, Any, str]] = [
    ("seed", "0", "seed = '0': must be a list of whole numbers, as [0, 1, 2]"),
    ("seed", [], "seed = []: must be at least one number"),
    ("seed", [1, 1], "seed = [1, 1]: must be at least one number, each from 0 up and there once"),
    ("seed", [-1], "seed = [-1]: must be"),
    ("seed", [True], "seed = [True]: must be a list of whole numbers"),
    ("seed", CUT, "has no 'seed'; it has data, augment, "),
    ("data", CUT, "has no 'data'; it has seed, augment, "),
    ("data", "digits", "data = 'digits': must hold parameters"),
    ("data.name", "imagenet", "data.name = 'imagenet': must be 'digits', 'fashion_mnist', 'cifar10', 'cifar100' or 'folder'"),
    ("data.download", "yes", "data.download = 'yes': must be a valid boolean"),
    ("data.image_size", 0, "data.image_size = 0: must be greater than or equal to 1"),
    ("data.image_size", 16.5, "data.image_size = 16.5: must be a valid integer"),
    ("data.validation", 1.0, "data.validation = 1.0: must be less than 1"),
    ("data.test", 0, "data.test = 0: must be greater than 0"),
    ("data.mean", "measured", "data.mean = 'measured': must be 'auto' or must be a valid list"),
    ("data.std", [0.2, "x"], "data.std.1 = 'x': must be a valid number"),
    ("augment.pad", -1, "augment.pad = -1: must be greater than or equal to 0"),
    ("augment.pad_mode", "wrap", "augment.pad_mode = 'wrap': must be 'zero' or 'reflect'"),
    ("runtime.device", "tpu", "runtime.device = 'tpu': must be 'auto', 'cpu' or 'cuda'"),
    ("runtime.threads", 0, "runtime.threads = 0: must be greater than or equal to 1"),
    ("model", ["cifar_quick"], "model.name = None: must be one of cifar_quick, mininet, resnet, resnet18, vgg16_bn"),
    ("model.name", "lenet", "model.name = 'lenet': must be one of cifar_quick, "),
    ("model.depth", 20, "model.depth is not a parameter; remove it or correct its name"),
    ("model", {"name": "resnet", "depth": 33}, "model.depth = 33: must be 6n + 2"),
    ("model", {"name": "resnet"}, "model.depth is missing; every parameter must be given"),
    ("train.epochs", 3, "train.epochs is not a parameter"),
    ("train.fit.epochs", "three", "train.fit.epochs = 'three': must be a valid integer"),
    ("train.fit.epochs", True, "train.fit.epochs = True: must be a valid integer"),
    ("train.fit.lr", CUT, "train.fit.lr is missing"),
    ("train.fit.lr", float("nan"), "train.fit.lr = nan: must be a finite number"),
    ("train.fit.momentum", 1, "train.fit.momentum = 1: must be less than 1"),
    ("train.fit", FIT | {"nesterov": True, "momentum": 0.0}, "train.fit: nesterov must be false unless optimizer is sgd and"),
    ("train.fit.schedule", "cos", "train.fit.schedule = 'cos': must be 'cosine' or 'constant' or must hold parameters"),
    ("train.fit.schedule", {"every": 0, "factor": 0.1}, "train.fit.schedule.every = 0: must be greater than or equal to 1"),
    ("train.overparameterize.method", "acb", "train.overparameterize.method = 'acb': must be one of kflo, none"),
    ("train.overparameterize.depth", 1, "train.overparameterize.depth = 1: must be greater than or equal to 2"),
    ("variants.revive", [], "variants.revive = []: list should have at least 1 item"),
    ("variants.compress", ["none", "dite"], "variants.compress names 'dite', but compress has only none, diet"),
    ("variants.revive", ["finetune", "finetune"], "variants gives finetune-diet, finetune-none more than once"),
    ("revive", {}, "revive must hold named blocks, as `name: {method: ..., ...}`, not {}"),
    ("revive.a/b", {}, "revive.a/b: a block's name is letters, digits, '_' and '-'"),
    ("compress.diet/2", {}, "compress.diet/2: a block's name"),
    ("revive.finetune.method", "diet", "revive.finetune.method = 'diet': must be one of finetune, reactivation, restart"),
    ("revive.restart.criterion", "taylor", "revive.restart.criterion = 'taylor': must be 'per_example'"),
    ("revive.restart.divisor", 1, "revive.restart.divisor = 1: must be greater than 1"),
    ("compress.diet.groups", 1, "compress.diet.groups = 1: must be greater than or equal to 2"),
    ("compress.diet.groups", "two", "compress.diet.groups = 'two': must be a valid integer"),
    ("compress.diet.select", 2, "compress.diet: select must be max, min or a group from 0 to 1"),
    ("compress.diet.select", "best", "compress.diet.select = 'best': must be 'max' or 'min' or must be a valid integer"),
    ("compress.diet.distill", {"loss": "kl", "weight": 1.0}, "compress.diet.distill.temperature is missing"),
    ("export.opset", 13, "export.opset = 13: must be 18 or 20"),
    ("profile.control", "finetune-dense", "profile.control = 'finetune-dense' is not in the grid: finetune-none, finetune-diet"),
    ("profile.providers", ["tensorrt"], "profile.providers.0 = 'tensorrt': must be 'cuda' or 'cpu'"),
    ("profile.batch_sizes", [1, 0], "profile.batch_sizes.1 = 0: must be greater than or equal to 1"),
    ("profile.repeats", 3, "profile.repeats = 3: must be greater than or equal to 20"),
    ("tracking.uri", "http://localhost", "tracking.uri is not a parameter"),
    ("traning", {}, "traning is not a section; sections are data, augment, "),
]

# A params.yaml as text -> the message.
TEXTS: list[tuple[str, str]] = [
    ("", "params.yaml must hold sections (seed, data, model, ...), not NoneType"),
    ("- seed", "params.yaml must hold sections (seed, data, model, ...), not list"),
    ("seed: [0", "params.yaml is not valid YAML: "),
    ("seed: [0]\n\tdata: 1", "params.yaml is not valid YAML: "),
    ("seed: [0]\nseed: [1]", "the key 'seed' is there twice in \"params.yaml\", line 2"),
    ("seed: !!python/name:os.system", "params.yaml is not valid YAML: "),
    ("seed: 2024-13-01", "params.yaml is not valid YAML: month must be in 1..12"),
    ("seed: \x00", "params.yaml is not valid YAML: "),
]


# What is wrong in a workspace -> the stage that meets it, and its message.
FOUND: list[tuple[str, Change, tuple[str, ...], str]] = [
    ("no images", folder(NOTHING), PREPARE, "data.root: raw is not a folder"),
    ("file for the image folder", folder(write(Path("raw"), b"x")), PREPARE, "data.root: raw is not a folder"),
    ("empty image folder", folder(lambda: Path("raw").mkdir()), PREPARE, "raw has 0 class folders: at least 2 are needed"),
    ("empty class folder", folder(both(images(**{"": "ant"}), lambda: Path("raw/bee").mkdir())), PREPARE, "raw/bee has no images"),
    ("text named .png", folder(both(images(**{"": "ant bee"}), write(PNG, b"text"))), PREPARE, f"{PNG} cannot be read as an image"),
    ("truncated image", folder(both(images(**{"": "ant bee"}), halve(PNG))), PREPARE, f"{PNG} cannot be read as an image"),
    (
        "unreadable image",
        folder(both(images(**{"": "ant bee"}), remove(PNG), lambda: PNG.symlink_to("1.png"))),
        PREPARE,
        "1.png cannot be read as an image",
    ),
    (
        "unequal classes",
        folder(images(train="ant bee", test="ant wasp")),
        PREPARE,
        "raw/test and raw/train differ in the classes bee",
    ),
    ("npz without a key", npz(lambda: random_npz(Path("raw.npz"), test_labels=None)), PREPARE, "raw.npz lacks test_labels; it has"),
    (
        "pickled npz",
        npz(lambda: random_npz(Path("raw.npz"), train_labels=np.array([{}] * 60))),
        PREPARE,
        "raw.npz is no .npz file of plain arrays",
    ),
    ("npz that is text", npz(write(Path("raw.npz"), b"text")), PREPARE, "raw.npz is no .npz file of plain arrays"),
    (
        "means of three channels for one",
        put("data.mean", [0.5, 0.5, 0.5]),
        PREPARE,
        "data.mean = [0.5, 0.5, 0.5]: the images have 1",
    ),
    ("all images held out", put("data.validation", 0.999), PREPARE, "data.validation = 0.999 leaves class 0 no training image"),
    ("images larger than memory", put("data.image_size", 30_000_000), PREPARE, "there is not enough memory"),
    (
        "prepared data missing",
        remove(DATA),
        COVERAGE,
        "outputs/prepare/data/data.json does not exist: run the stage that writes it",
    ),
    ("data.json cut", halve(DATA / "data.json"), TRAIN, "outputs/prepare/data/data.json is not valid JSON"),
    ("images cut", halve(DATA / "train_images.npy"), TRAIN, "train_images.npy is damaged (it has 82624 bytes, not 165248)"),
    (
        "images too small",
        both(put("data.image_size", 8), lambda: call("prepare")),
        COVERAGE,
        "cifar_quick: images of 8x8 pixels are too",
    ),
    (
        "groups that do not divide",
        put("compress.diet.groups", 3),
        COVERAGE,
        "compress.diet: diet: the 32 channels of layer conv1 do not",
    ),
    (
        "protected layer unknown",
        put("compress.diet.protect", ["conv9"]),
        COVERAGE,
        "compress.diet: diet: protect = 'conv9' matches no",
    ),
    (
        "all protected",
        put("compress.diet.protect", ["*"]),
        COVERAGE,
        "compress.diet: diet: every channel of the network is protected",
    ),
    (
        "wrong expansion, unchecked",
        put("train.overparameterize", {"method": "kflo"}),
        COVERAGE,
        "train.overparameterize.depth is missing",
    ),
    (
        "reflection too wide",
        put("augment", {"pad": 16, "pad_mode": "reflect", "flip": False}),
        TRAIN,
        "augment.pad = 16 cannot reflect",
    ),
    ("diverging loss", put("train.fit.lr", 1e12), TRAIN, "train: the loss is nan in epoch 1 (round 1), last learning rate"),
    ("seed in words", NOTHING, ("train", "zero"), "stages.train zero: the seed 'zero' is no whole number from 0 up"),
    ("seed with a sign", NOTHING, ("collapse", "finetune", "none", "-1"), "the seed '-1' is no whole number from 0 up"),
    ("revive block unknown", NOTHING, ("revive", "restrat", "0"), "params.yaml: revive has no 'restrat'; it has finetune, restart"),
    (
        "compress block unknown",
        NOTHING,
        ("compress", "finetune", "dite", "0"),
        "params.yaml: compress has no 'dite'; it has none, diet",
    ),
    (
        "nothing trained",
        remove(TRAINED),
        REVIVE,
        "outputs/train/0/model/model.json does not exist: run the stage that writes it first",
    ),
    ("nothing trained with this seed", NOTHING, ("revive", "finetune", "1"), "outputs/train/1/model/model.json does not exist"),
    ("nothing compressed", remove(COMPRESSED), COLLAPSE, f"{COMPRESSED}/model.json does not exist: run the stage"),
    ("nothing collapsed", remove(COLLAPSED), EXPORT, f"{COLLAPSED}/model.json does not exist: run the stage"),
    ("nothing exported", remove(ONNX), PROFILE, f"{ONNX} does not exist: run the stage that writes it first"),
    ("control not exported", put("profile.control", "a-b"), PROFILE, "outputs/export/a-b-0/model.onnx does not exist"),
    ("weights missing", remove(WEIGHTS), COMPRESS, f"{WEIGHTS} does not exist: run the stage"),
    ("weights cut", halve(WEIGHTS), COMPRESS, f"{WEIGHTS} is damaged ("),
    ("weights empty", write(WEIGHTS, b""), COMPRESS, f"{WEIGHTS} is damaged ("),
    ("weights changed", alter(WEIGHTS), COMPRESS, f"{WEIGHTS} is not the file that model.json describes"),
    (
        "weights of another model",
        lambda: shutil.copy(COLLAPSED / "model.safetensors", WEIGHTS),
        COMPRESS,
        "is not the file that model",
    ),
    ("card cut", halve(CARD), COMPRESS, f"{CARD} is not valid JSON ("),
    ("card of another format", edit(CARD, "format", 2), COMPRESS, f"{CARD} is damaged (format Input should be 1)"),
    ("card without a key", edit(CARD, "classes", CUT), COMPRESS, f"{CARD} is damaged (classes Field required)"),
    ("card with one more key", edit(CARD, "extra", 1), COMPRESS, f"{CARD} is damaged (extra Extra inputs are not permitted)"),
    ("card of an unknown network", edit(CARD, "network/name", "lenet"), COMPRESS, "no network can be built from it"),
    (
        "card of an unknown layer",
        edit(CARD, "channels/norms/bn9", 3),
        COMPRESS,
        f"{CARD} is damaged (no network can be built from it",
    ),
    ("card of other widths", edit(CARD, "channels/filtering/fc2", [64, 9, 1]), COMPRESS, f"{WEIGHTS}: the tensor fc2."),
    ("card without the expansion", edit(CARD, "expansion", None), COMPRESS, f"{WEIGHTS} lacks the tensor conv1.weight, which the"),
    ("card that is a list", write(CARD, b"[]"), COMPRESS, f"{CARD} is damaged ("),
    (
        "model of other data",
        both(put("data.split_seed", 1), lambda: call("prepare")),
        REVIVE,
        f"{TRAINED}/model.json was made from other data than {DATA} holds",
    ),
    ("expanded network to export", copy(COMPRESSED, COLLAPSED), EXPORT, "still over-parameterised: collapse it before exporting"),
    (
        "tolerance out of reach",
        put("export", {"opset": 20, "atol": 1e-30, "rtol": 0.0}),
        EXPORT,
        "does not compute what the network",
    ),
    ("ONNX cut", halve(ONNX), PROFILE, f"{ONNX} is no ONNX file ("),
    ("ONNX empty", write(ONNX, b""), PROFILE, f"{ONNX} was not exported by Winnow (format 1): its metadata keys are: none"),
    ("ONNX from elsewhere", foreign_onnx(ONNX), PROFILE, f"{ONNX} was not exported by Winnow"),
    (
        "file for the folder of all models",
        file_for_folder(OUT / "collapse"),
        COLLAPSE,
        "outputs/collapse is a file where a folder is needed",
    ),
    ("file for the folder of a model", file_for_folder(TRAINED), TRAIN, f"{TRAINED} is a file where a folder is needed"),
    ("params.yaml missing", remove(Path("params.yaml")), TRAIN, "params.yaml does not exist: run from the project's root"),
    (
        "params.yaml a folder",
        both(remove(Path("params.yaml")), lambda: Path("params.yaml").mkdir()),
        TRAIN,
        "params.yaml: Is a directory",
    ),
]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("built")
    build(home)
    return home


@pytest.fixture
def workspace(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a built chain, as the working directory."""
    home = tmp_path / "workspace"
    shutil.copytree(built, home)
    monkeypatch.chdir(home)
    return home


def outputs() -> dict[Path, bytes]:
    """Every output, but for states of unfinished trainings."""
    return {path: path.read_bytes() for path in OUT.rglob("*") if path.is_file() and "resume" not in path.parts}


def refused(words: tuple[str, ...], capfd: pytest.CaptureFixture[str], lines: int = 1) -> str:
    """What the stage says when it refuses; checks that it says nothing else and leaves every output as it was."""
    before = outputs()
    capfd.readouterr()
    code = call(*words)
    said = capfd.readouterr().err
    assert code == 2, said
    assert len(said.splitlines()) == lines and said.endswith("\n"), said
    assert outputs() == before
    return said


@pytest.mark.parametrize(("key", "value", "message"), PARAMETERS, ids=[f"{key}={value!r:.30}" for key, value, _ in PARAMETERS])
def test_a_wrong_parameter_is_refused_by_its_key(
    key: str, value: Any, message: str, workspace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(key, value)()
    said = refused(("check",), capfd)
    assert said.startswith("stages.check: params.yaml") and message in said


@pytest.mark.parametrize(("text", "message"), TEXTS)
def test_a_params_yaml_that_is_none_is_refused(text: str, message: str, workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("params.yaml").write_text(text)
    assert message in refused(("check",), capfd)


def test_every_mistake_in_params_yaml_has_a_line_of_its_own(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    params = parameters()
    params["train"]["fit"] |= {"epochs": -1, "lr": "fast"}
    params["variants"] |= {"revive": ["revive"], "compress": ["compress"]}
    write_parameters(Path(), params)
    said = refused(("check",), capfd, lines=4)
    for place in ("train.fit.epochs", "train.fit.lr", "variants.revive", "variants.compress"):
        assert f"params.yaml: {place} " in said


@pytest.mark.parametrize(("change", "words", "message"), [case[1:] for case in FOUND], ids=[case[0] for case in FOUND])
def test_what_a_stage_cannot_use_is_refused_by_name(
    change: Change, words: tuple[str, ...], message: str, workspace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change()
    said = refused(words, capfd)
    assert said.startswith(f"stages.{' '.join(words)}: ") and message in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    put("runtime.device", "cuda")()
    assert "runtime.device = 'cuda', but torch finds no CUDA device here; use auto or cpu" in refused(TRAIN, capfd)


@pytest.mark.parametrize("words", [TRAIN, REVIVE, COMPRESS, COLLAPSE, EXPORT, PREPARE], ids=lambda words: words[0])
def test_a_wrong_number_of_words_gives_the_usage(
    words: tuple[str, ...], workspace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert refused((*words, "more"), capfd).startswith(f"usage: python -m stages.{words[0]}")
    if len(words) > 1:
        assert refused(words[:-1], capfd).rstrip().endswith(" SEED")


@pytest.mark.parametrize(
    ("words", "place"),
    [(PREPARE, "prepare"), (COLLAPSE, "collapse"), (EXPORT, "export"), (TRAIN, "resume")],
    ids=["prepare", "collapse", "export", "train"],
)
def test_a_full_disk_is_told_and_leaves_what_was_there(
    words: tuple[str, ...], place: str, workspace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put("data.image_size", 24)() if words == PREPARE else None  # more than there is now
    (OUT / place).mkdir(exist_ok=True)
    with full_disk(OUT / place) as reason:
        said = refused(words, capfd)
    assert f"stages.{' '.join(words)}: outputs/{place}/" in said and reason in said


def test_a_file_that_cannot_grow_is_told_and_stays(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with small_files():
        assert f"{COLLAPSED}/model.safetensors: File too large" in refused(COLLAPSE, capfd)


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (put("train.fit.lr", CUT), ("check",), "stages.check: params.yaml: train.fit.lr is missing; every parameter must be given"),
        (
            folder(NOTHING),
            PREPARE,
            "stages.prepare: data.root: raw is not a folder: give one that holds train/CLASS/*.png or CLASS/*.png",
        ),
        (halve(WEIGHTS), COMPRESS, f"stages.compress finetune none 0: {WEIGHTS} is damaged ("),
    ],
    ids=["parameter", "images", "weights"],
)
def test_the_command_itself_says_one_line_and_exits_with_2(
    change: Change, words: tuple[str, ...], message: str, workspace: Path
) -> None:
    change()
    command = [sys.executable, "-m", f"stages.{words[0]}", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith(message)
