"""What is wrong in params.yaml is refused by its key, one line a mistake, before anything runs."""

from pathlib import Path
from typing import Any

import pytest
from mistakes import CUT, put
from small_chain import call, parameters, refused, write_parameters

FIT = parameters()["train"]["fit"]

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
    (
        "data.name",
        "cifar",
        "data.name = 'cifar': must be 'digits', 'fashion_mnist', 'cifar10', 'cifar100', 'tiny_imagenet', 'imagenette', 'imagenet', "
        "'folder', 'scenes_segment', 'carvana', 'scenes_depth' or 'nyu_v2'",
    ),
    ("data.download", "yes", "data.download = 'yes': must be a valid boolean"),
    ("data.image_size", 0, "data.image_size = 0: must be greater than or equal to 1"),
    ("data.image_size", 16.5, "data.image_size = 16.5: must be a valid integer"),
    ("data.crop", CUT, "data.crop is missing"),
    ("data.crop", 224, "data.crop = 224: must hold parameters"),
    ("data.crop", {"resize": 256}, "data.crop.size is missing"),
    ("data.crop", {"resize": 0, "size": 1}, "data.crop.resize = 0: must be greater than or equal to 1"),
    ("data.crop", {"resize": 224, "size": 256}, "data.crop: size must be at most resize"),
    ("data.validation", 1.0, "data.validation = 1.0: must be less than 1"),
    ("data.test", 0, "data.test = 0: must be greater than 0"),
    ("data.per_class", 0, "data.per_class = 0: must be greater than or equal to 1"),
    ("data.per_class", 0.4, "data.per_class = 0.4: must be a valid integer"),
    ("data.per_class", CUT, "data.per_class is missing"),
    ("data.mean", "measured", "data.mean = 'measured': must be 'auto' or must be a valid list"),
    ("data.std", [0.2, "x"], "data.std.1 = 'x': must be a valid number"),
    ("augment.pad", -1, "augment.pad = -1: must be greater than or equal to 0"),
    ("augment.pad_mode", "wrap", "augment.pad_mode = 'wrap': must be 'zero' or 'reflect'"),
    ("augment.scale", CUT, "augment.scale is missing"),
    ("augment.scale", [0.08], "augment.scale = [0.08]: list should have at least 2 items"),
    ("augment.scale", [0.0, 1.0], "augment.scale.0 = 0.0: must be greater than 0"),
    ("augment.scale", [0.5, 2.0], "augment.scale.1 = 2.0: must be less than or equal to 1"),
    ("augment", {"pad": 0, "pad_mode": "zero", "flip": False, "scale": [0.9, 0.1]}, "augment: scale must give the least share"),
    ("augment.scale", [0.08, 1.0], "augment: scale needs pad: 0, pad needs scale: null"),  # the pad is 1
    ("runtime.device", "tpu", "runtime.device = 'tpu': must be 'auto', 'cpu' or 'cuda'"),
    ("runtime.threads", 0, "runtime.threads = 0: must be greater than or equal to 1"),
    (
        "model",
        ["cifar_quick"],
        "model.name = None: must be one of alexnet, cifar_quick, condensenet, densenet, lenet5, mininet, rednet, resnet, "
        "resnet_imagenet, resnet_preact, resnext, unet, vgg16, vgg16_bn, wide_resnet",
    ),
    ("model.name", "lenet", "model.name = 'lenet': must be one of alexnet, cifar_quick, "),
    ("model.depth", 20, "model.depth is not a parameter; remove it or correct its name"),
    ("model", {"name": "resnet", "depth": 33}, "model.depth = 33: must be 6n + 2"),
    ("model", {"name": "resnet"}, "model.depth is missing; every parameter must be given"),
    ("train.epochs", 3, "train.epochs is not a parameter"),
    ("train.start_layers", [], "train.start_layers = []: list should have at least 1 item"),
    ("train.start_layers", "features.*", "train.start_layers = 'features.*': must be a valid list"),
    ("train.fit.epochs", "three", "train.fit.epochs = 'three': must be a valid integer"),
    ("train.fit.epochs", True, "train.fit.epochs = True: must be a valid integer"),
    ("train.fit.lr", CUT, "train.fit.lr is missing"),
    ("train.fit.lr", float("nan"), "train.fit.lr = nan: must be a finite number"),
    ("train.fit.momentum", 1, "train.fit.momentum = 1: must be less than 1"),
    ("train.fit", FIT | {"nesterov": True, "momentum": 0.0}, "train.fit: nesterov must be false unless optimizer is sgd and"),
    ("train.fit.schedule", "cos", "train.fit.schedule = 'cos': must be 'cosine' or 'constant' or must hold parameters"),
    ("train.fit.schedule", {"every": 0, "factor": 0.1}, "train.fit.schedule.every = 0: must be greater than or equal to 1"),
    (
        "train.overparameterize.method",
        "acb",
        "train.overparameterize.method = 'acb': must be one of acnet, dbb, do_conv, expandnet, kflo, none",
    ),
    ("train.overparameterize.depth", 1, "train.overparameterize.depth = 1: must be greater than or equal to 2"),
    ("variants.revive", [], "variants.revive = []: list should have at least 1 item"),
    ("variants.compress", ["none", "dite"], "variants.compress names 'dite', but compress has only none, diet"),
    ("variants.revive", ["finetune", "finetune"], "variants gives finetune-diet, finetune-none more than once"),
    ("revive", {}, "revive must hold named blocks, as `name: {method: ..., ...}`, not {}"),
    ("revive.a/b", {}, "revive.a/b: a block's name is letters, digits, '_' and '-'"),
    ("compress.diet/2", {}, "compress.diet/2: a block's name"),
    (
        "revive.finetune.method",
        "diet",
        "revive.finetune.method = 'diet': must be one of finetune, grafting, reactivation, restart, weight_evolution",
    ),
    ("revive.restart.criterion", "taylor", "revive.restart.criterion = 'taylor': must be 'per_example'"),
    ("revive.restart.divisor", 1, "revive.restart.divisor = 1: must be greater than 1"),
    ("compress.diet.groups", 1, "compress.diet.groups = 1: must be greater than or equal to 2"),
    ("compress.diet.groups", "two", "compress.diet.groups = 'two': must be a valid integer"),
    ("compress.diet.select", 2, "compress.diet: select must be max, min or a group from 0 to 1"),
    ("compress.diet.select", "best", "compress.diet.select = 'best': must be 'max' or 'min' or must be a valid integer"),
    ("compress.diet.distill", {"loss": "kl", "weight": 1.0}, "compress.diet.distill.temperature is missing"),
    ("export.opset", 13, "export.opset = 13: must be 18 or 20"),
    ("profile.control", "finetune-dense", "profile.control = 'finetune-dense' is not in the grid: finetune-none, finetune-diet"),
    ("export.precisions", ["int8"], "precisions must begin with fp32"),
    ("export.precisions", ["fp32", "int4"], "export.precisions.1 = 'int4': must be 'fp32', 'fp16' or 'int8'"),
    ("export.max_loss", -0.1, "export.max_loss = -0.1: must be greater than or equal to 0"),
    ("export.int8.images", 0, "export.int8.images = 0: must be greater than or equal to 1"),
    ("export.int8.calibration", "max", "export.int8.calibration = 'max': must be 'minmax' or 'percentile'"),
    ("export.int8.least", 2.0, "export.int8.least = 2.0: must be less than or equal to 1"),
    ("profile.idle_ms", 0.0, "profile.idle_ms = 0.0: must be greater than 0"),
    ("champion.at_most", {"size_mb": "small"}, "champion.at_most.size_mb = 'small': must be a valid number"),
    ("champion.best", CUT, "champion.best is missing; every parameter must be given"),
    ("repository.models", "best", "repository.models = 'best': must be 'all' or 'champion'"),
    ("repository.forms", [], "repository.forms = []: list should have at least 1 item"),
    ("repository.versions", 0, "repository.versions = 0: must be greater than or equal to 1"),
    ("profile.providers", ["rocm"], "profile.providers.0 = 'rocm': must be 'tensorrt', 'cuda' or 'cpu'"),
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


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, where a check of right parameters has passed."""
    monkeypatch.chdir(tmp_path)
    write_parameters(tmp_path, parameters())
    (tmp_path / "data/start").mkdir(parents=True)
    assert call("check") == 0
    return tmp_path


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
