"""Weights that others publish: torchvision's networks and ours compute the same with them; what can be read, what is taken over."""

import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from small_chain import parameters
from test_averaging import IMAGES, KFLO, zoo
from test_models import on_meta, randomise_batchnorm
from torch import Tensor, nn

from pipeline import checkpoint, files, models, weights
from pipeline.data.batches import Prepared
from pipeline.errors import InputError
from pipeline.first_training import begin, first_training, transfer
from pipeline.layers import filtering_layers

NONE = {"method": "none"}
ALEXNET = {"variant": "torchvision", "dropout": 0.5}
PUBLISHED: list[tuple[str, str, dict[str, Any]]] = [
    ("alexnet", "alexnet", ALEXNET),
    *((f"resnet{depth}", "resnet_imagenet", {"depth": depth, "stem": "imagenet"}) for depth in (18, 34, 50, 101)),
    ("vgg16_bn", "vgg16_bn", {"dropout": 0.5}),
]


def published(name: str, classes: int) -> nn.Module:
    """torchvision's network in evaluation mode; no number is a default's, and outputs stay near 1."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, num_classes=classes).eval()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    few = torch.randn(1_000_003)  # repeated: to draw a hundred million numbers takes seconds
    for tensor in (tensor for tensor in model.state_dict().values() if tensor.is_floating_point()):
        scale = (2 / tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0.1
        for part in tensor.view(-1).split(len(few)):
            part.copy_(few[: len(part)] * scale)
    for tensor in (tensor for tensor in model.state_dict().values() if not tensor.is_floating_point()):
        tensor.fill_(3)
    randomise_batchnorm(model)
    return model


def filled(name: str, classes: int, **arguments: Any) -> nn.Module:
    """Our network for 64x64 images in evaluation mode; its numbers do not matter."""
    model = on_meta(name, 64, classes=classes, **arguments).to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(1)
    return model


@pytest.mark.parametrize(("theirs", "name", "arguments"), PUBLISHED, ids=[case[0] for case in PUBLISHED])
def test_torchvision_weights_give_torchvision_outputs(theirs: str, name: str, arguments: dict[str, Any]) -> None:
    source = published(theirs, 7)
    ours = on_meta(name, 64, classes=7, **arguments)
    ours.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, actual = source(x), ours(x)
    assert (expected[0] - expected[1]).abs().min() > 1e-3  # the outputs depend on the image
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def features(model: nn.Module) -> nn.Module:
    return nn.Sequential(*list(model.children())[:-1])  # all but the classifier


def test_a_file_of_torchvision_gives_all_but_the_classifier_of_other_classes(tmp_path: Path) -> None:
    source, x = published("resnet18", 1000), torch.randn(2, 3, 64, 64)
    old = {key: tensor for key, tensor in source.state_dict().items() if "num_batches" not in key}  # before 2019 there were none
    torch.save(old, tmp_path / "resnet18-5c106cde.pth")
    safetensors.torch.save_file(source.state_dict(), tmp_path / "resnet18.safetensors")
    for path in weights.start_paths(tmp_path):
        ours = filled("resnet_imagenet", 10, depth=18, stem="imagenet")
        assert transfer(ours, weights.read(path)) == ["fc.weight", "fc.bias"]
        assert all((ours.get_parameter(f"fc.{name}") == 1).all() for name in ("weight", "bias"))
        counters = [tensor for name, tensor in ours.state_dict().items() if "num_batches" in name]
        assert len(counters) == 20 and all(tensor == (1 if path.suffix == ".pth" else 3) for tensor in counters)
        with torch.no_grad():
            expected, actual = features(source)(x).flatten(1), features(ours)(x)
        assert torch.equal(actual, expected) and expected.std() > 0.1


def test_the_pretrained_alexnet_of_the_paper_has_a_new_classifier(tmp_path: Path) -> None:
    """As in github.com/sjtu-cs222/Group_36, Fine_Tune/alexnet_cifar10_train_baseline.py."""
    source, x = published("alexnet", 1000), torch.randn(2, 3, 224, 224)
    torch.save(source.state_dict(), tmp_path / "alexnet-owt-7be5be79.pth")
    ours = filled("alexnet", 10, **ALEXNET)
    classifier = [f"classifier.{index}.{kind}" for index in (1, 4, 6) for kind in ("weight", "bias")]
    file = weights.read(tmp_path / "alexnet-owt-7be5be79.pth")
    assert begin(ours, [file], NONE, ["features.*"]) == [
        f"not taken over from the networks of train.start: {', '.join(classifier)}"
    ]
    assert all((ours.get_parameter(name) == 1).all() for name in classifier)
    with torch.no_grad():
        theirs = source.get_submodule("features")(x)
        assert torch.equal(ours.get_submodule("features")(x), theirs) and theirs.shape == (2, 256, 6, 6) and theirs.std() > 0.1
    assert transfer(ours, file) == ["classifier.6.weight", "classifier.6.bias"]


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "plain.pth": torch.save,
    "plain.safetensors": safetensors.torch.save_file,
    "legacy.pt": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "parameters.pth": lambda state, path: torch.save({name: _parameter(tensor) for name, tensor in state.items()}, path),
    "half.pth": lambda state, path: torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, path),
    "example.pth": lambda state, path: torch.save({"epoch": 90, "state_dict": state, "optimizer": {"state": {}}}, path),
    "model.pt": lambda state, path: torch.save({"model": state, "best": torch.tensor(0.9)}, path),
    "parallel.pth": lambda state, path: torch.save({"state_dict": _prefixed(state), "model": "quick"}, path),
    "parallel.safetensors": lambda state, path: safetensors.torch.save_file(_prefixed(state), path),
}


def _prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


@pytest.mark.parametrize("name", WRITERS)
def test_state_dicts_are_read_as_projects_publish_them(name: str, tmp_path: Path) -> None:
    source, model = zoo(seed=1), zoo(seed=2)
    source = source.bfloat16().float() if name == "half.pth" else source
    WRITERS[name](source.state_dict(), tmp_path / name)
    [path] = weights.start_paths(tmp_path)
    assert begin(model, [weights.read(path)], NONE) == []
    assert torch.equal(model.eval()(IMAGES), source(IMAGES))


class Runs:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def scripted() -> bytes:
    """As torch.jit.save wrote: a zip file that torch takes for TorchScript by its constants."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, text in {"data.pkl": b"\x80\x02}.", "constants.pkl": b"\x80\x02).", "version": b"3"}.items():
            file.writestr(f"net/{name}", text)
    return content.getvalue()


def pickled(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


UNREADABLE, EMPTY = "cannot be read as one", "holds no tensors by name"
WRONG: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "empty": (".pth", bytes, UNREADABLE),
    "pointer": (".pth", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", UNREADABLE),
    "module": (".pth", lambda: pickled(zoo()), UNREADABLE),
    "cut": (".pt", lambda: pickled(zoo().state_dict())[:5000], UNREADABLE),
    "script": (".pt", scripted, UNREADABLE),
    "list": (".pt", lambda: pickled([torch.ones(3)]), EMPTY),
    "tensor": (".pth", lambda: pickled(torch.ones(3)), EMPTY),
    "numbers": (".pth", lambda: pickled({"epoch": 3, 0: torch.ones(2), "model": {"depth": 18}}), EMPTY),
    "other": (".safetensors", lambda: pickled(zoo().state_dict()), UNREADABLE),
    "short": (".safetensors", lambda: safetensors.torch.save(zoo().state_dict())[:5000], UNREADABLE),
    "nothing": (".safetensors", lambda: safetensors.torch.save({}), EMPTY),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_no_state_dicts_are_refused(case: str, tmp_path: Path) -> None:
    suffix, content, why = WRONG[case]
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content())
    with pytest.raises(InputError, match=rf"net\{suffix} must be a state dict, and {why}"):
        weights.read(path)


def test_no_code_in_a_file_runs(tmp_path: Path) -> None:
    made, path = tmp_path / "made", tmp_path / "net.pth"
    torch.save({"conv1.weight": torch.ones(2), "extra": Runs(made)}, path)
    with pytest.raises(InputError, match=r"net\.pth must be a state dict.*that would run code from the file"):
        weights.read(path)
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists()  # what has just been avoided


def test_a_file_of_another_network_is_refused_with_what_each_has(tmp_path: Path) -> None:
    ours = filled("resnet", 10, depth=8)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    torch.save(published("resnet18", 7).state_dict(), tmp_path / "net.pth")
    file = weights.read(tmp_path / "net.pth")
    assert any(name in before and tensor.shape == before[name].shape for name, tensor in file.tensors.items())  # the counters
    wanted = r"net\.pth has no tensor that fits this ResNet in name and shape: it has conv1\.weight 64x3x7x7, bn1\.weight 64, "
    with pytest.raises(InputError, match=wanted + r".*; the network has conv1\.weight 16x3x3x3, .*\.\.\.$"):
        begin(ours, [file], KFLO)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    with pytest.raises(InputError, match=r"fits this ResNet.*among train\.start_layers = \['fc', 'layer2\*'\]: it has"):
        transfer(ours, file, ["fc", "layer2*"])


def changed(layers: list[str]) -> set[str]:
    """The tensors of a Cifar-quick that the patterns take over from another one."""
    source, model = zoo(seed=1), zoo(seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    left = transfer(model, source, layers)
    taken = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, source.state_dict()[name])}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in left)
    counters = {name for name in before if name.endswith("num_batches_tracked")}
    assert set(left) == before.keys() - taken - counters
    return taken - counters


def test_patterns_choose_layers_and_tensors() -> None:
    first, *_, last = [name for name, _ in filtering_layers(zoo())]
    everything = {name for name in zoo().state_dict() if not name.endswith("num_batches_tracked")}
    assert changed(["*"]) == everything
    assert changed([first]) == {f"{first}.weight"} and changed([last]) == {f"{last}.weight", f"{last}.bias"}
    assert changed([f"{first}.*", last]) == changed([first]) | changed([last])
    assert changed(["*.bias"]) == {name for name in everything if name.endswith(".bias")}
    with pytest.raises(InputError, match=rf"train\.start_layers: no layer of this CifarQuick fits 'feature': |there are {first}, "):
        changed([first, "feature"])


def test_several_networks_are_stacked_whole(tmp_path: Path) -> None:
    """Of files as of folders; part of them is not possible."""
    for seed in (1, 2):
        torch.save(zoo(seed=seed).state_dict(), tmp_path / f"{seed}.pth")
    sources, model = [weights.read(path) for path in weights.start_paths(tmp_path)], zoo(seed=3)
    assert begin(model, sources, KFLO) == []
    assert torch.equal(model.eval()(IMAGES), zoo(seed=1)(IMAGES))
    name, layer = next(filtering_layers(model))
    rows = torch.cat([source.tensors[f"{name}.weight"] for source in sources])
    assert torch.equal(layer.parametrizations.weight.original[: len(rows)], rows)  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"train\.start_layers = \['conv\*'\]: must be \['\*'\] where train\.start has several"):
        begin(zoo(seed=3), sources, KFLO, ["conv*"])


def test_everything_visible_in_the_folder_is_started_from_or_refused(tmp_path: Path) -> None:
    for folder in ("b", "d/model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.json").touch()
    for file in ("a.pth", "c.safetensors", ".gitkeep", ".DS_Store", "e.pt"):
        (tmp_path / file).touch()
    found = [str(path.relative_to(tmp_path)) for path in weights.start_paths(tmp_path)]
    assert found == ["a.pth", "b", "c.safetensors", "d/model", "e.pt"]
    wrong = {"net.pth.tar": Path.touch, "f.pth": Path.mkdir, "gone": lambda path: path.symlink_to("nowhere")}
    for name, make in wrong.items():
        make(tmp_path / name)
        with pytest.raises(InputError, match=rf"train\.start: \S+/{name} is neither a folder with a model\.json nor a weight file"):
            weights.start_paths(tmp_path)
        (tmp_path / name).rename(tmp_path / f".{name}")
    (tmp_path / "g.pth").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"g\.pth must be a state dict, and cannot be read as one \(FileNotFoundError\)"):
        weights.read(weights.start_paths(tmp_path)[-1])


def started(data: Prepared, folder: Path, epochs: int, out: Path, **train: Any) -> None:
    params = parameters()
    params["train"] |= {"start": str(folder / "start"), "overparameterize": NONE, **train}
    params["train"]["fit"]["epochs"] = epochs
    first_training(params, 0, prepared=data.folder, resume=folder / "resume", out=out)


def quick(seed: int, classes: int = 10) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return models.build("cifar_quick", input_shape=(1, 16, 16), classes=classes).state_dict()


def test_a_first_training_starts_from_a_file_and_says_what_it_did_not_take(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    torch.save(source := quick(1, classes=7), tmp_path / "start/net.pth")
    started(prepared, tmp_path, 0, tmp_path / "out", start_layers=["conv*", "fc2"])
    model, _ = checkpoint.load(tmp_path / "out/model")
    kernels = [name for name in model.state_dict() if name.endswith("weight") and not name.startswith("bn")]
    assert [name for name in kernels if torch.equal(model.state_dict()[name], source[name])] == kernels[:3]
    record = files.read_json(tmp_path / "out/record.json")
    assert record["parameters"]["train"]["start_layers"] == ["conv*", "fc2"]
    fresh = [name for name in model.state_dict() if not name.startswith("conv") and not name.endswith("num_batches_tracked")]
    assert record["notes"] == [f"not taken over from the networks of train.start: {', '.join(fresh)}"]


def test_a_training_never_resumes_with_another_file(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "full").touch()  # no folder: the training's state is kept, because its result cannot be written
    for seed in (1, 2, 1):
        torch.save(quick(seed), tmp_path / "start/net.pth")
        with pytest.raises(InputError, match="full is a file"):
            started(prepared, tmp_path, 1, tmp_path / "full")
    assert len(list((tmp_path / "resume").iterdir())) == 2


def test_the_names_of_published_densenets_are_those_of_torchvision(tmp_path: Path) -> None:
    """Its files say denselayer1.norm.1.weight where its module says denselayer1.norm1.weight."""
    state = torchvision.models.densenet121(num_classes=10).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): tensor for name, tensor in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old and len(old) == len(state)
    torch.save(old, tmp_path / "densenet121.pth")
    assert weights.read(tmp_path / "densenet121.pth").state_dict().keys() == state.keys()
