"""A model on disk: a folder with `model.safetensors` (the state dict) and `model.json` (the card: how to build the module).

The card names the network and its arguments, how it is over-parameterised, the channels of every layer, the input's shape and
normalisation, the task and its class names, the parameters of every stage so far, versions, commit and data fingerprint.
`load(folder)` gives back the same module, compressed or expanded or neither. No pickle anywhere.
"""

import copy
import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from torch import nn

from pipeline import files, models, overparameterize, records
from pipeline.config import Crop, Section
from pipeline.data.batches import Prepared
from pipeline.data.raw import TaskName
from pipeline.errors import InputError
from pipeline.expansion import plain_class
from pipeline.structure import restructure, structure

FORMAT = 1
MOST = 2**16  # of anything that a network is built of: more would only keep the machine busy


class Built(Section):
    """What is built by name."""

    arguments: dict[str, Any]


class Network(Built):
    """Of `pipeline/models/`."""

    name: str


class Expansion(Built):
    """Of `pipeline/overparameterize/`."""

    method: str


class Input(Section):
    """One image: C, H, W, the normalisation of each channel, and the crop that makes this size of a larger one, if any."""

    shape: list[Annotated[int, Field(ge=1)]] = Field(min_length=3, max_length=3)
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]
    crop: Crop | None = None  # older cards have none


class Card(Section):
    """model.json."""

    format: Literal[1]
    network: Network
    expansion: Expansion | None
    channels: dict[str, dict[str, Any]]  # as `structure` gives them
    input: Input
    task: TaskName = "classify"  # older cards have none
    classes: list[str] = Field(min_length=1)
    stages: list[dict[str, Any]]
    versions: dict[str, str]
    commit: str | None
    data: str
    weights_sha256: str


def new_card(network: dict[str, Any], data: Prepared) -> dict[str, Any]:
    """The card of a network that no stage has worked on. `network`: {"name": ..., "arguments": {...}}."""
    crop = data.crop.model_dump() if data.crop else None
    return {
        "format": FORMAT,
        "network": network,
        "expansion": None,
        "channels": None,
        "input": {"shape": list(data.shape), "mean": list(data.mean), "std": list(data.std), "crop": crop},
        "task": data.task,
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
    weights = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    described = {**card, "channels": structure(model), "versions": records.versions(), "commit": records.commit()}
    described |= {"weights_sha256": hashlib.sha256(weights).hexdigest()}
    files.write_together({folder / "model.safetensors": weights, folder / "model.json": files.as_json(described, summed=True)})


def load(folder: Path, data: Prepared | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The module in evaluation mode on the CPU, and its card. `InputError` names the file and the key that is wrong, or says
    that the model does not belong to `data`."""
    card = read_card(folder)
    if data and data.fingerprint != card["data"]:
        raise InputError(f"{folder / 'model.json'} was made from other data than {data.folder} holds: run `dvc repro`")
    if (number := _largest([card["network"]["arguments"], card["expansion"], card["channels"]])) > MOST:
        raise _damaged(folder / "model.json", f"{number} is more than any network is built of")
    path = folder / "model.safetensors"
    state = _read_weights(path, card["weights_sha256"])
    try:
        with torch.device("meta"):  # no memory and no random numbers for weights that the file replaces
            model = blank({**card, "channels": None})
        restructure(model, card["channels"])
    except Exception as error:  # what a wrong card leads to inside torch has no common class
        raise _damaged(folder / "model.json", f"no network can be built from it: {error!r}") from None
    _check_keys(path, model.state_dict(), state)
    assert state.keys() >= {name for name, _ in model.named_buffers()}, "a buffer outside the state dict would have no value"
    model.to_empty(device="cpu").load_state_dict(state)
    return model.eval(), card


def blank(card: dict[str, Any]) -> nn.Module:
    """The module of a card, expanded and of its widths, freshly initialised from torch's global random numbers."""
    model = build(card)
    if card["expansion"]:
        overparameterize.overparameterize(model, card["expansion"]["method"], **card["expansion"]["arguments"])
    if card["channels"]:
        restructure(model, card["channels"])
    return model


def read_card(folder: Path) -> dict[str, Any]:
    """model.json, checked for its keys and the types of their values."""
    path = folder / "model.json"
    card = files.read_json(path)
    try:
        Card.model_validate(card)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, mistake['loc']))} {mistake['msg']}".strip() for mistake in error.errors()]
        raise _damaged(path, "; ".join(wrong)) from None
    card.setdefault("task", "classify")
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
    for name, (inputs, outputs, groups) in structure(model)["filtering"].items():
        plain = name.removesuffix(".layer")
        widths = {"inputs": inputs, "outputs": outputs, "full_inputs": full[plain][0], "full_outputs": full[plain][1]}
        kind = plain_class(model.get_submodule(name)).__name__
        table.append({"name": plain, "type": kind, **widths, "groups": groups})
    return table


def _largest(value: Any) -> float:
    """The largest number in a value of JSON."""
    if isinstance(value, dict | list):
        return max((_largest(item) for item in (value.values() if isinstance(value, dict) else value)), default=0)
    return value if isinstance(value, int | float) else 0


def _read_weights(path: Path, expected_sha256: str) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise InputError(f"{path} does not exist: run the stage that writes it first (`dvc repro`)")
    try:
        state = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from None
    if files.sha256(path) != expected_sha256:
        raise InputError(f"{path} is not the file that model.json describes: delete their folder and run `dvc repro`; {files.BACK}")
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


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is damaged ({' '.join(why.split())}): delete its folder and run `dvc repro`; {files.BACK}")
