"""A model on disk: a folder with `model.safetensors` (the state dict) and `model.json` (the card: how to build the module).

The card names the network and its arguments, how it is over-parameterised, the channels of every layer, the input's shape and
normalisation, the class names, the parameters of every stage so far, versions, commit and data fingerprint. `load(folder)` gives
back the same module, compressed or expanded or neither. No pickle anywhere.
"""

import copy
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from pipeline import files, models, overparameterize, records
from pipeline.data.batches import Prepared
from pipeline.errors import InputError
from pipeline.surgery import restructure, structure

FORMAT = 1
KEYS = frozenset(
    (
        "format",
        "network",
        "expansion",
        "channels",
        "input",
        "classes",
        "stages",
        "versions",
        "commit",
        "data",
        "weights_sha256",
    )
)


def new_card(network: dict[str, Any], data: Prepared) -> dict[str, Any]:
    """The card of a network that no stage has worked on. `network`: {"name": ..., "arguments": {...}}."""
    return {
        "format": FORMAT,
        "network": network,
        "expansion": None,
        "channels": None,
        "input": {"shape": list(data.shape), "mean": list(data.mean), "std": list(data.std)},
        "classes": list(data.classes),
        "stages": [],
        "versions": records.versions(),
        "commit": records.commit(),
        "data": data.fingerprint,
    }


def build(card: dict[str, Any]) -> nn.Module:
    """The plain network of a card at full width, freshly initialised from torch's global random numbers."""
    network = card["network"]
    shape, classes = tuple(card["input"]["shape"]), len(card["classes"])
    return models.build(network["name"], input_shape=shape, classes=classes, **network["arguments"])


def save(folder: Path, model: nn.Module, card: dict[str, Any]) -> None:
    """Write `model` and its card; a reader sees the card only once the weights are there."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path = folder / "model.safetensors"
    (folder / "model.json").unlink(missing_ok=True)
    files.write_bytes(path, safetensors.torch.save(weights))
    described = {**card, "channels": structure(model), "versions": records.versions(), "commit": records.commit()}
    files.write_json(folder / "model.json", {**described, "weights_sha256": files.sha256(path)})


def load(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The module in evaluation mode on the CPU, and its card. `InputError` names the file and the key that is wrong."""
    card = read_card(folder)
    path = folder / "model.safetensors"
    state = _read_weights(path, card["weights_sha256"])
    with torch.random.fork_rng(devices=[]):
        model = build(card)
        if card["expansion"]:
            overparameterize.overparameterize(model, card["expansion"]["method"], **card["expansion"]["arguments"])
        restructure(model, card["channels"])
    _check_keys(path, model.state_dict(), state)
    model.load_state_dict(state)
    return model.eval(), card


def read_card(folder: Path) -> dict[str, Any]:
    """model.json, checked for its keys and its format."""
    path = folder / "model.json"
    card = files.read_json(path)
    if not isinstance(card, dict) or card.keys() != KEYS:
        there = set(card) if isinstance(card, dict) else set()
        missing, extra = sorted(KEYS - there), sorted(there - KEYS)
        raise InputError(f"{path} is not a model card: missing keys {missing}, unknown keys {extra}")
    if card["format"] != FORMAT:
        raise InputError(f"{path}: format {card['format']!r} is not {FORMAT}: rebuild it with `dvc repro`")
    return card


def continued(card: dict[str, Any], **stage: Any) -> dict[str, Any]:
    """A copy of the card with one more stage in its lineage."""
    card = copy.deepcopy(card)
    card["stages"].append(stage)
    return card


def layer_table(model: nn.Module, card: dict[str, Any]) -> list[dict[str, Any]]:
    """Channels of every filtering layer beside those of the network at full width, for record.json."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        full = structure(build(card))["filtering"]
    table = []
    for name, (inputs, outputs, _) in structure(model)["filtering"].items():
        plain = name.removesuffix(".layer")
        widths = {"inputs": inputs, "outputs": outputs, "full_inputs": full[plain][0], "full_outputs": full[plain][1]}
        table.append({"name": plain, "type": "Conv2d" if _is_convolution(model, name) else "Linear", **widths})
    return table


def _is_convolution(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Conv2d)


def _read_weights(path: Path, expected_sha256: str) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise InputError(f"{path} does not exist: run the stage that writes it first (`dvc repro`)")
    try:
        state = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}): delete its folder and run `dvc repro`") from None
    if files.sha256(path) != expected_sha256:
        raise InputError(f"{path} is not the file that model.json describes: delete their folder and run `dvc repro`")
    return state


def _check_keys(path: Path, wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    for key in sorted(wanted.keys() | found.keys()):
        if key not in found:
            raise InputError(f"{path} lacks the tensor {key}, which the network of model.json has")
        if key not in wanted:
            raise InputError(f"{path} has a tensor {key}, which the network of model.json lacks")
        if wanted[key].shape != found[key].shape:
            shapes = f"{tuple(found[key].shape)}, but the network of model.json needs {tuple(wanted[key].shape)}"
            raise InputError(f"{path}: the tensor {key} has the shape {shapes}")
