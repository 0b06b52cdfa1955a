"""The model folder: what is saved is what is loaded, and nothing else is loaded in its place."""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from networks import ZOO, build, difference, draw_reads, is_expanded, plain, shape_of
from torch import Tensor, nn

from pipeline import checkpoint, files
from pipeline.data.batches import Prepared
from pipeline.errors import InputError
from pipeline.layers import ChannelSelect, filtering_layers
from pipeline.overparameterize import collapse, overparameterize
from pipeline.structure import structure
from pipeline.surgery import shrink

ROOT = Path(__file__).parent.parent
EXPANSION = {"method": "kflo", "arguments": {"depth": 2, "width": 1.5, "l2_factor": 1.0, "mixer_decay": 1e-9}}
NETWORK = "resnet"
SHAPE = shape_of(NETWORK)


@pytest.fixture(scope="module")
def data() -> Prepared:
    """Only described: checkpoints read no images."""
    counts = {"train": 1, "validation": 1, "test": 1}
    names, mean, std = tuple("abcdefghij"), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    described = ("random", names, SHAPE, mean, std, "f00d", counts)
    return Prepared(Path("nowhere"), *described, storage="memory", root=None, stored=SHAPE, crop=None)


def card_of(model: nn.Module, data: Prepared) -> dict[str, Any]:
    name, arguments, *_ = ZOO[NETWORK]
    card = checkpoint.new_card({"name": name, "arguments": arguments}, data)
    return {**card, "expansion": EXPANSION if is_expanded(model) else None}


def small(expand: bool) -> nn.Module:
    """Shrunk twice, so that there are selects of selects."""
    model = build(NETWORK, expand)
    for seed in (1, 2):
        model = shrink(model, SHAPE, draw_reads(model, SHAPE, seed))
    assert any(isinstance(module, ChannelSelect) for module in model.modules())
    return model


STATES: dict[str, Callable[[], nn.Module]] = {
    "full": lambda: build(NETWORK, expand=False),
    "expanded": lambda: build(NETWORK),
    "compressed": lambda: small(expand=False),
    "compressed and expanded": lambda: small(expand=True),
    "compressed and merged": lambda: plain(small(expand=True)),
}


@pytest.mark.parametrize("state", STATES)
def test_what_is_saved_is_loaded(state: str, data: Prepared, tmp_path: Path) -> None:
    model = STATES[state]()
    card = checkpoint.continued(card_of(model, data), stage="train", variant="0", seed=0, parameters={"lr": 0.1})
    checkpoint.save(tmp_path / "model", model.train(), card)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded, read = checkpoint.load(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
    assert {**read, "channels": None} == {**card, "weights_sha256": files.sha256(tmp_path / "model/model.safetensors")}
    assert read["input"] == {"shape": list(SHAPE), "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop": None}
    assert read["classes"] == list("abcdefghij") and read["data"] == "f00d" and read["stages"] == card["stages"]
    assert read["channels"] == structure(model) == structure(loaded)
    assert not any(module.training for module in loaded.modules())
    assert is_expanded(loaded) is is_expanded(model)
    stored, found = model.state_dict(), loaded.state_dict()
    assert stored.keys() == found.keys() and all(torch.equal(tensor, found[key]) for key, tensor in stored.items())
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == {name: True for name, _ in model.named_parameters()}
    assert difference(model, loaded, SHAPE) == 0
    # It is whole: merging, cutting and training go on as on the model that was saved.
    reads = draw_reads(loaded, SHAPE, 9)
    assert difference(shrink(plain(model), SHAPE, reads), shrink(collapse(loaded), SHAPE, reads), SHAPE) == 0


@pytest.mark.parametrize("expand", [False, True], ids=["plain", "kflo"])
def test_the_layer_table_shows_what_is_left_of_each_layer(expand: bool, data: Prepared) -> None:
    whole, model = build(NETWORK, expand), small(expand)
    rows = {row["name"]: row for row in checkpoint.layer_table(model, card_of(model, data))}
    assert list(rows) == [name for name, _ in filtering_layers(whole)]
    for name, layer in filtering_layers(model):
        row, kernel = rows[name.removesuffix(".layer")], layer.weight
        assert (row["outputs"], row["inputs"]) == kernel.shape[:2]
        assert (row["full_outputs"], row["full_inputs"]) == whole.get_submodule(row["name"]).weight.shape[:2]
        assert row["type"] == ("Conv2d" if kernel.ndim == 4 else "Linear")


@pytest.mark.parametrize("state", STATES)
def test_equal_models_make_equal_bytes(state: str, data: Prepared, tmp_path: Path) -> None:
    model = STATES[state]()
    checkpoint.save(tmp_path / "a", model, card_of(model, data))
    for _, layer in filtering_layers(model):
        for parameter in layer.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    checkpoint.save(tmp_path / "b", model, card_of(model, data))
    loaded, card = checkpoint.load(tmp_path / "a")
    checkpoint.save(tmp_path / "c", loaded, card)
    for name in ("model.safetensors", "model.json"):
        first = (tmp_path / "a" / name).read_bytes()
        assert first == (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"model.safetensors", "model.json"}


def test_an_expansion_that_was_loaded_can_still_be_assigned_to(data: Prepared, tmp_path: Path) -> None:
    model = overparameterize(build(NETWORK, expand=False), "kflo", **EXPANSION["arguments"])
    checkpoint.save(tmp_path, model, card_of(model, data))
    layer: Any = checkpoint.load(tmp_path)[0].get_submodule("fc")
    wanted = torch.randn(layer.weight.shape)
    with torch.no_grad():
        layer.weight = wanted
    torch.testing.assert_close(layer.weight, wanted, rtol=1e-4, atol=1e-5)


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Weights that were changed with their fingerprint."""
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    change(state)
    safetensors.torch.save_file(state, path)
    changed(folder, lambda card: card.update(weights_sha256=files.sha256(path)))


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.json"
    card = files.read_json(path)
    change(card)
    path.write_text(json.dumps(card))


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


WEIGHTS, CARD = "model.safetensors", "model.json"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {  # what is done, the file and the words that the message names
    "weights cut": (lambda f: cut(f / WEIGHTS, 0.5), WEIGHTS, "damaged"),
    "weights cut in their header": (lambda f: cut(f / WEIGHTS, 0.01), WEIGHTS, "damaged"),
    "weights empty": (lambda f: cut(f / WEIGHTS, 0), WEIGHTS, "damaged"),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS, "does not exist"),
    "last byte of the weights": (lambda f: flip(f / WEIGHTS, -1), WEIGHTS, "not the file that model.json describes"),
    "pickled weights": (lambda f: (f / WEIGHTS).write_bytes(b"\x80\x04\x95" + b"x" * 100), WEIGHTS, "damaged"),
    "tensor renamed": (lambda f: rewritten(f, lambda s: s.update(fd=s.pop("fc.bias"))), WEIGHTS, r"lacks the tensor fc\.bias"),
    "tensor added": (lambda f: rewritten(f, lambda s: s.update(more=torch.zeros(1))), WEIGHTS, "has a tensor more"),
    "shape": (lambda f: rewritten(f, lambda s: s.update({"fc.bias": torch.zeros(9)})), WEIGHTS, r"fc\.bias has the shape \(9,\)"),
    "card cut": (lambda f: cut(f / CARD, 0.5), CARD, "not valid JSON"),
    "card missing": (lambda f: (f / CARD).unlink(), CARD, "does not exist"),
    "folder missing": (lambda f: f.rename(f.parent / "elsewhere"), CARD, "does not exist"),
    "card of a list": (lambda f: (f / CARD).write_text("[1]"), CARD, "damaged"),
    "format": (lambda f: changed(f, lambda c: c.update(format=2)), CARD, "format"),
    "unknown key": (lambda f: changed(f, lambda c: c.update(extra=1)), CARD, "extra"),
    "unknown network": (lambda f: changed(f, lambda c: c["network"].update(name="nonet")), CARD, "nonet"),
    "network's argument": (lambda f: changed(f, lambda c: c["network"]["arguments"].update(depth=9)), CARD, "depth"),
    "another depth": (lambda f: changed(f, lambda c: c["network"]["arguments"].update(depth=14)), WEIGHTS, r"layer\d\.\d"),
    "unknown expansion": (lambda f: changed(f, lambda c: c.update(expansion={"method": "acb", "arguments": {}})), CARD, "acb"),
    "expanded after all": (lambda f: changed(f, lambda c: c.update(expansion=EXPANSION)), WEIGHTS, "parametrizations"),
    "channels of no layer": (lambda f: changed(f, lambda c: c["channels"]["norms"].update(bn9=3)), CARD, "bn9"),
    "other channels": (lambda f: changed(f, lambda c: c["channels"]["filtering"].update(fc=[64, 9, 1])), WEIGHTS, r"fc\.bias"),
    "more channels": (lambda f: changed(f, lambda c: c["channels"]["filtering"].update(fc=[64, 11, 1])), CARD, "layer fc has"),
    "shape of images": (lambda f: changed(f, lambda c: c["input"].update(shape=[1, 8, 8])), CARD, "layer conv1 has 1 inputs"),
    "classes": (lambda f: changed(f, lambda c: c["classes"].pop()), CARD, "layer fc has 64 inputs and 9 outputs, not 64 and 10"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_was_damaged_is_refused_by_file_and_key(damage: str, data: Prepared, tmp_path: Path) -> None:
    harm, file, says = DAMAGE[damage]
    folder = tmp_path / "model"
    model = build(NETWORK, expand=False)
    checkpoint.save(folder, model, card_of(model, data))
    harm(folder)
    with pytest.raises(InputError) as error:
        checkpoint.load(folder)
    message = str(error.value)
    assert str(folder / file) in message and re.search(says, message), message
    assert "\n" not in message


@pytest.mark.parametrize("key", sorted(checkpoint.Card.model_fields))
@pytest.mark.parametrize("how", ["missing", "of another type"])
def test_every_key_of_the_card_is_needed(key: str, how: str, data: Prepared, tmp_path: Path) -> None:
    model = build(NETWORK, expand=False)
    checkpoint.save(tmp_path, model, card_of(model, data))
    changed(tmp_path, lambda card: card.pop(key) if how == "missing" else card.update({key: 7}))
    if (key, how) == ("task", "missing"):  # as in cards from before there were tasks
        assert checkpoint.load(tmp_path)[1]["task"] == "classify"
        return
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path / CARD))} is damaged .*{key}"):
        checkpoint.load(tmp_path)


def test_a_model_of_other_data_is_refused(data: Prepared, tmp_path: Path) -> None:
    model = build(NETWORK, expand=False)
    checkpoint.save(tmp_path, model, {**card_of(model, data), "data": "beef"})
    with pytest.raises(InputError, match="was made from other data than nowhere holds"):
        checkpoint.load(tmp_path, data)


def test_a_disk_that_fails_leaves_the_earlier_model(data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(NETWORK, expand=False)
    checkpoint.save(tmp_path, model, card_of(model, data))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, build(NETWORK, expand=False, seed=1), card_of(model, data))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nothing_is_pickled_and_others_weight_files_give_tensors_alone() -> None:
    """torch.save and torch.load pickle, the latter but for `weights_only`; numpy does where it is allowed to."""
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {name.split(".")[0] for name in names} & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr != "save" and (node.attr != "load" or path.name == "weights.py"), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "torch.load":
                assert any(keyword.arg == "weights_only" for keyword in node.keywords), path
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
                assert isinstance(node.value, ast.Constant) and node.value.value is (node.arg == "weights_only"), path
